"""Training speed over slower links, and what the scaling model says: by hand, as root.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.network --hosts=2 --rates=100mbit,1gbit,unlimited FLAGS

Takes the trainer's flags but --global_batch_size: each worker gets --batch_size, so that work a worker stays the same.
Each host is a network namespace with one worker, pinned to a core of its own as far as there are cores. Prints a table
to stderr and, as the last line on stdout, the same numbers as JSON.

What the model is given: a worker's step, measured on all hosts at once without a word between them (so that what they
take from each other as neighbours on one machine counts as compute); the half round trip of a small message over TCP;
and software a message. That last one is fitted to the run without a limit, whose error is therefore 0 and says nothing,
unless --overhead_us gives it, for example as another number of hosts had it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from din_dist.benchmark.scaling_model import Cluster, Measured, predict
from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.config import require
from din_dist.errors import InputError
from tests.support import host_lab
from tests.support.host_lab import Host

JOB_SECONDS = 1800  # no job takes longer

settings.define_flags()
flags.DEFINE_integer("hosts", 2, "Hosts, each with one worker.")
flags.DEFINE_list("rates", ["100mbit", "1gbit", "unlimited"], "What the links carry, in turn, as tc(8) has it.")
flags.DEFINE_float("delay_ms", 0.0, "Added to each packet, one way. Needs the kernel's netem.")
flags.DEFINE_integer("batch_size", 1024, "Examples per update on each worker.")
flags.DEFINE_integer("rounds", 3, "How often to go through the rates; medians are reported.")
flags.DEFINE_integer("benchmark_steps", 200, "Updates to measure in each run.")
flags.DEFINE_integer("benchmark_warmup_steps", 20, "Updates before that, not measured.")
flags.DEFINE_float("overhead_us", -1.0, "Microseconds of software a message. -1: fitted to the run without a limit.")

# A round trip of a few bytes, 500 times: the other side's address, then half of the median in seconds on stdout.
PORT = 5001
ANSWER = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("ready", flush=True)
    peer = server.accept()[0]
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while word := peer.recv(64):
        peer.sendall(word)
"""
ASK = """
import socket, statistics, sys, time
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
seconds = []
for _ in range(500):
    started = time.perf_counter()
    peer.sendall(bytes(64))
    peer.recv(64)
    seconds.append(time.perf_counter() - started)
print(statistics.median(seconds) / 2)
"""


def main() -> None:
    settings.config_from_flags()  # checks them
    values = flags.FLAGS
    lows = {"hosts": 2, "batch_size": 1, "rounds": 1, "benchmark_steps": 1, "benchmark_warmup_steps": 1}
    for name, low in lows.items():
        require(getattr(values, name) >= low, f"must be at least {low}", name, getattr(values, name), f"Give {low}.")
    require(bool(values.rates), "must name at least one rate", "rates", values.rates, "For example 100mbit,unlimited.")
    for rate in values.rates:
        try:
            _bits_per_second(rate)
        except ValueError as error:
            raise InputError(f"--rates: {error}") from None
    try:
        with tempfile.TemporaryDirectory() as folder, host_lab.hosts(values.hosts) as hosts:
            if values.delay_ms and not host_lab.has_netem():
                raise InputError("--delay_ms: this kernel cannot delay packets (CONFIG_NET_SCH_NETEM). Leave it out.")
            flagfile = Path(folder, "trainer.flags")
            flagfile.write_text(settings.to_flagfile())
            found = _measure(hosts, flagfile)
    except host_lab.LabError as error:
        raise InputError(str(error)) from None
    entry.say(_table(found))
    print(json.dumps(found), flush=True)


def _measure(hosts: list[Host], flagfile: Path) -> dict[str, Any]:
    values = flags.FLAGS
    prepare = [sys.executable, "-m", "din_dist.cli.prepare_data", f"--flagfile={flagfile}"]
    subprocess.run(prepare, stdout=sys.stderr, check=True)
    _limit(hosts, "unlimited")
    latency_seconds = _latency_seconds(hosts)
    alone: list[dict[str, Any]] = []
    together: dict[str, list[dict[str, Any]]] = {rate: [] for rate in values.rates}
    for number in range(1, values.rounds + 1):
        alone.append(_each_alone(hosts, flagfile))
        _say(number, "without a word between them", alone[-1], len(hosts))
        for rate in values.rates:
            _limit(hosts, rate)
            together[rate].append(_all_together(hosts, flagfile))
            _say(number, rate, together[rate][-1])
    base = _median(alone)
    runs = {rate: _median(reports) for rate, reports in together.items()}
    found: dict[str, Any] = {
        "hosts": len(hosts),
        "batch_size": values.batch_size,
        "delay_ms": values.delay_ms,
        "latency_us": latency_seconds * 1e6,
        "alone": base,
        "runs": {rate: {"report": report, "rounds": _rates(together[rate])} for rate, report in runs.items()},
    }
    _add_predictions(found, base, latency_seconds)
    return found


def _add_predictions(found: dict[str, Any], base: dict[str, Any], latency_seconds: float) -> None:
    """What the model says for each rate, beside what was measured."""
    values, runs, num_hosts = flags.FLAGS, found["runs"], found["hosts"]
    try:
        measured = Measured.from_report(base, "the benchmark's JSON")
    except InputError as error:
        entry.say(f"no prediction: {error}")
        return
    found["overhead_us"], fitted = values.overhead_us, values.overhead_us < 0
    if fitted:
        if "unlimited" not in runs:
            entry.say("no prediction: --overhead_us is to be fitted, which takes `unlimited` among --rates")
            return
        bare = predict(measured, Cluster(math.inf, latency_seconds), num_hosts).step_seconds
        num_messages = measured.num_statistics_messages + measured.num_gradient_messages
        rest = runs["unlimited"]["report"]["step_seconds"] - bare
        found["overhead_us"] = max(0.0, rest / num_messages) * 1e6
    for rate, run in runs.items():
        cluster = Cluster(_bits_per_second(rate), latency_seconds, found["overhead_us"] / 1e6)
        prediction = predict(measured, cluster, num_hosts)
        run["prediction"] = prediction.to_json()
        run["error"] = prediction.examples_per_second / run["report"]["examples_per_second"] - 1
        run["fitted"] = fitted and rate == "unlimited"


def _each_alone(hosts: Sequence[Host], flagfile: Path) -> dict[str, Any]:
    """One worker a host, each a job of its own, all at once: the report of the slowest, for whom others would wait."""
    cores = sorted(os.sched_getaffinity(0))
    jobs = []
    for number, host in enumerate(hosts):
        pin = ["taskset", "-c", str(cores[number % len(cores)])]
        command = host.command([*pin, *_benchmark(flagfile, num_workers=1)])
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    reports = []
    for job in jobs:
        out, complaint = job.communicate(timeout=JOB_SECONDS)
        reports.append(_last_json(job.returncode, out, complaint))
    return max(reports, key=lambda report: report["step_seconds"])


def _all_together(hosts: Sequence[Host], flagfile: Path) -> dict[str, Any]:
    """One job of all hosts."""
    # Each host believes the machine's cores to be its own: the rank says which one to take.
    cores = sorted(os.sched_getaffinity(0))
    pick = f"echo {' '.join(map(str, cores))} | cut -d ' ' -f $((HOROVOD_RANK % {len(cores)} + 1))"
    wrapper = ["sh", "-c", f'exec taskset -c "$({pick})" "$0" "$@"']
    command = host_lab.horovodrun(hosts, [*wrapper, *_benchmark(flagfile, num_workers=len(hosts))])
    done = subprocess.run(hosts[0].command(command), capture_output=True, text=True, timeout=JOB_SECONDS, check=False)
    return _last_json(done.returncode, done.stdout, done.stderr)


def _benchmark(flagfile: Path, num_workers: int) -> list[str]:
    values = flags.FLAGS
    return [
        *(sys.executable, "-m", "din_dist.cli.benchmark", f"--flagfile={flagfile}"),
        f"--global_batch_size={values.batch_size * num_workers}",
        f"--benchmark_steps={values.benchmark_steps}",
        f"--benchmark_warmup_steps={values.benchmark_warmup_steps}",
    ]


def _last_json(code: int, out: str, complaint: str) -> dict[str, Any]:
    lines = [line.removeprefix("[0]<stdout>:") for line in out.splitlines()]
    found = [line for line in lines if line.startswith("{")]
    if code or not found:
        raise RuntimeError(
            f"The benchmark must end with its JSON. Exit code {code}, its last words:\n{complaint[-3000:]}"
        )
    return json.loads(found[-1])


def _limit(hosts: Sequence[Host], rate: str) -> None:
    for host in hosts:
        host.limit(rate, flags.FLAGS.delay_ms)


def _latency_seconds(hosts: Sequence[Host]) -> float:
    """Half the round trip of a small message between two processes on two hosts."""
    first, second = hosts[:2]
    there = [second.address, str(PORT)]
    with subprocess.Popen(second.command([sys.executable, "-c", ANSWER, *there]), stdout=subprocess.PIPE) as answer:
        assert answer.stdout
        answer.stdout.readline()
        asked = subprocess.run(first.command([sys.executable, "-c", ASK, *there]), capture_output=True, check=True)
    return float(asked.stdout)


def _bits_per_second(rate: str) -> float:
    return math.inf if rate == "unlimited" else host_lab.bits_per_second(rate)


def _median(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of the middle round."""
    return sorted(reports, key=lambda report: report["step_seconds"])[len(reports) // 2]


def _rates(reports: list[dict[str, Any]]) -> list[float]:
    return [report["examples_per_second"] for report in reports]


def _say(number: int, what: str, report: dict[str, Any], times: int = 1) -> None:
    rate = report["examples_per_second"] * times
    entry.say(f"round {number}, {what}: {rate:,.0f} examples/s, {report['step_seconds'] * 1e3:.2f} ms a step")


def _table(found: dict[str, Any]) -> str:
    alone = found["alone"]["examples_per_second"] * found["hosts"]
    base = found["runs"].get("unlimited", {}).get("report", {}).get("examples_per_second", math.nan)
    lines = [
        f"{found['hosts']} hosts, batch {found['batch_size']:,} each, {found['latency_us']:.0f} us latency; without a "
        f"word between them {alone:,.0f} examples/s; medians of {flags.FLAGS.rounds} rounds, software a message "
        f"{found.get('overhead_us', math.nan):.0f} us",
        f"{'rate':>12}  {'examples/s':>10}  {'to unlimited':>12}  {'predicted':>10}  {'error':>7}  dominant term",
    ]
    for rate, run in found["runs"].items():
        measured = run["report"]["examples_per_second"]
        line = f"{rate:>12}  {measured:>10,.0f}  {measured / base:>12.2f}"
        if prediction := run.get("prediction"):
            error = "fitted" if run["fitted"] else f"{run['error']:+.1%}"
            dominant = prediction["dominant_term"].replace("_", " ")
            line += f"  {prediction['examples_per_second']:>10,.0f}  {error:>7}  {dominant}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)

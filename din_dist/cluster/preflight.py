"""Finds what would keep a job of several hosts from starting, before it starts.

A probe (`probe.py`) starts on all hosts at once, through the same ssh as the workers. Each probe reports the facts of
its host, which are compared with those of the caller's machine. Then each probe tries to connect to the other hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from din_dist.cluster.addresses import card_towards, own_address
from din_dist.cluster.hosts import HostSlots, is_local
from din_dist.cluster.probe import CONNECT_SECONDS, Facts, Question, find_facts, listen
from din_dist.config import Config, DataConfig, list_text
from din_dist.errors import InputError
from din_dist.text import printable_line

MAX_SKEW_SECONDS = 2.0
FACTS_SECONDS = 30.0  # ssh and Python start within it, even from a slow disk
_REACH_SECONDS = CONNECT_SECONDS + 7.0
_SSH = ("ssh", "-oBatchMode=yes", "-oConnectTimeout=5", "-oStrictHostKeyChecking=accept-new", "-oLogLevel=ERROR")
_NO_FOLDER, _NO_PYTHON = 81, 82  # exit codes that neither ssh nor Python uses
_INHERITED = ("PATH", "PYTHONPATH", "DIN_DIST_DEVICE")  # Horovod hands these to workers on other hosts
_PYTHON = str(Path(sys.prefix, "bin", "python"))
_SSH_CHECK = "ssh"
_HERE = "this machine"  # its name where it is none of the hosts

_Answer = TypeVar("_Answer")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem with a host. A job still runs with one that is not `fatal`, but less well."""

    host: str
    check: str
    found: str
    remedy: str
    fatal: bool = True


@dataclasses.dataclass(frozen=True)
class Answer:
    """The facts of a host, and how many seconds its clock is ahead, plus or minus the margin."""

    facts: Facts
    port: int = 0
    skew_seconds: float = 0.0
    margin_seconds: float = 0.0


def check_hosts(
    hosts: Sequence[HostSlots], config: Config, ssh_port: int | None = None, *, elastic: bool = False, card: str = ""
) -> list[Finding]:
    """Checks all hosts at once, within seconds; returns the problems in the order of the hosts.

    The check assumes that the job starts like this command: from here, in this folder, with this Python and
    environment. It uses ssh, even where Kubernetes has another way into its pods.

    Args:
        hosts: the hosts of the job.
        config: the job's settings.
        ssh_port: the port of the hosts' ssh servers; None: the port that ssh chooses.
        elastic: the job is elastic: any host may write checkpoints, and the job can begin without silent hosts.
        card: the network card by which workers reach each other; empty: on each host the one towards this machine.

    Raises:
        InputError: a host is named twice, or a setting is wrong on this machine already.
    """
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--hosts: each host may be named once. Received: {name!r} twice. Add up its slots.")
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(hosts))))
        probes = list(pool.map(lambda host: stack.enter_context(_Probe(host, ssh_port)), hosts))
        question = stack.enter_context(_question(config, _own_address(hosts, card), card))  # takes a second, meanwhile
        here = find_facts(question)
        answers = _ask_all(pool, probes, findings, lambda probe: probe.meet(question, config.telemetry.metrics_port))
        peers = {name: (found.facts.address, found.port) for name, found in answers.items() if found.facts.address}
        if answers and not any(probe.is_local for probe in probes):  # workers must reach Horovod's driver as well
            listener = stack.enter_context(listen(question.launcher))
            peers[_HERE] = (question.launcher, listener.getsockname()[1])
        met = [probe for probe in probes if probe.host.name in answers]
        unreached = _ask_all(pool, met, findings, lambda probe: probe.reach(peers))
    findings += compare(hosts, here, answers, config, elastic=elastic)
    findings += compare_links(peers, unreached)
    if elastic and answers:
        remedy = "An elastic job begins without it and takes it in once it answers."
        findings = [
            dataclasses.replace(finding, remedy=f"{finding.remedy} {remedy}", fatal=False)
            if finding.check == _SSH_CHECK
            else finding
            for finding in findings
        ]
    order = [*names, _HERE]
    return sorted(findings, key=lambda finding: order.index(finding.host))


def render(hosts: Sequence[HostSlots], findings: Sequence[Finding]) -> str:
    """Returns a line for each host that is fine, and a table of the problems of the others.

    Control characters are escaped, because the texts come from other hosts.
    """
    wrong = {finding.host for finding in findings}
    lines = [f"{host.name}: fine" for host in hosts if host.name not in wrong]
    if findings:
        rows = [("host", "check", "found", "what to do")]
        for finding in findings:
            check = finding.check if finding.fatal else f"{finding.check} (warning)"
            rows.append((finding.host, check, printable_line(finding.found), printable_line(finding.remedy)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def compare(
    hosts: Sequence[HostSlots], here: Facts, answers: Mapping[str, Answer], config: Config, *, elastic: bool = False
) -> list[Finding]:
    """Returns the problems that the facts of the hosts show.

    Args:
        hosts: the hosts of the job.
        here: the facts of this machine.
        answers: name -> what the host's probe found.
        config: the job's settings.
        elastic: the job is elastic.
    """
    any_gpu = any(answer.facts.num_gpus for answer in answers.values())
    fingerprints = [here.fingerprint, *(answer.facts.fingerprint for answer in answers.values())]
    fingerprint = next((found for found in fingerprints if found), None)
    first_names: dict[str, str] = {}  # machine -> the first name that the list has for it
    findings: list[Finding] = []
    for host in hosts:
        if answer := answers.get(host.name):
            facts = answer.facts
            findings += _environment(host, facts, here)
            findings += _address(host, facts)
            findings += _data(host, facts, fingerprint, config.data)
            findings += _processors(host, facts, any_gpu)
            findings += _metrics_ports(host, facts, first_names.setdefault(facts.machine, host.name), config)
            findings += _clock(host, answer)
            findings += _output_dir(host, facts, config, elastic, is_first=host is hosts[0])
    return findings


def compare_links(peers: Mapping[str, tuple[str, int]], unreached: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Returns the problems between hosts.

    Args:
        peers: name -> address and port of a listener on that host.
        unreached: name -> the peers to which that host cannot connect, with the reasons.
    """
    findings = []
    for name, (address, _) in peers.items():
        missed = [f"{other} ({reasons[name]})" for other, reasons in unreached.items() if name in reasons]
        if missed:
            remedy = f"Let all hosts connect to {address} on every TCP port: check firewalls and security groups."
            remedy += " If they reach each other by another network card, name it: --network_interface."
            findings.append(Finding(name, "network", f"not reached at {address} by {_shorten(missed)}", remedy))
    return findings


def _own_address(hosts: Sequence[HostSlots], card: str) -> str:
    """Returns the address at which the hosts would reach Horovod's driver here.

    Raises:
        InputError: the named card has no address.
    """
    elsewhere = [host.name for host in hosts if not is_local(host.name)]
    if not elsewhere:
        return "127.0.0.1"
    return own_address(card or card_towards(elsewhere))


def _environment(host: HostSlots, facts: Facts, here: Facts) -> Iterator[Finding]:
    versions = [
        f"{package} {facts.versions.get(package, 'missing')}, here {here.versions.get(package, 'missing')}"
        for package in {**here.versions, **facts.versions}
        if facts.versions.get(package) != here.versions.get(package)
    ]
    if versions:
        yield Finding(host.name, "versions", "; ".join(versions), "Install the same there: launch/setup.sh.")
    sources = [
        path for path in sorted({**here.sources, **facts.sources}) if facts.sources.get(path) != here.sources.get(path)
    ]
    if sources:
        found = f"{_shorten(sources)} differ; commit {facts.commit}, here {here.commit}"
        yield Finding(host.name, "sources", found, f"Copy {Path.cwd()} from here to the same folder there.")


def _address(host: HostSlots, facts: Facts) -> Iterator[Finding]:
    if facts.address is None:
        remedy = "See `ip -brief address` and `ip route` there. Without --network_interface, the card is the one that "
        remedy += "leads to the launcher."
        yield Finding(host.name, "network card", "no card of that name with an IPv4 address, or no route here", remedy)


def _data(host: HostSlots, facts: Facts, fingerprint: str | None, data: DataConfig) -> Iterator[Finding]:
    command = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.quote(_PYTHON)} -m din_dist.cli.prepare_data"
    if facts.fingerprint is None:
        remedy = f"Run there: {command} {_data_flags(data)}"
        yield Finding(host.name, "data", f"not prepared: {facts.data_problem}", remedy)
    elif facts.fingerprint != fingerprint:
        remedy = f"Copy the same files there, then run there: {command} {_data_flags(data)} --overwrite_prepared"
        yield Finding(host.name, "data", "prepared from other events than elsewhere", remedy)


def _data_flags(data: DataConfig) -> str:
    from din_dist.data.prepared import data_dir

    # The full path: workers get the launcher's HOME, but a user who logs in there does not.
    data = dataclasses.replace(data, data_dir=str(data_dir(data)))
    given = []
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        if "help" in field.metadata and value != field.default:
            text = list_text(value) if isinstance(value, tuple) else str(value)
            given.append(shlex.quote(f"--{field.name}={text}"))
    return " ".join(given)


def _processors(host: HostSlots, facts: Facts, any_gpu: bool) -> Iterator[Finding]:
    if any_gpu and facts.num_gpus < host.slots:
        found = f"{facts.num_gpus} GPU(s) for {host.slots} slot(s)"
        remedy = "Give it as many slots as it has GPUs, or see why `nvidia-smi -L` there lists no more."
        yield Finding(host.name, "GPUs", found, remedy)
    elif not any_gpu and facts.num_cores < host.slots:
        found = f"{facts.num_cores} core(s) for {host.slots} slot(s)"
        remedy = f"Workers that share a core are slow: give it {facts.num_cores} slot(s)."
        yield Finding(host.name, "cores", found, remedy, fatal=False)


def _metrics_ports(host: HostSlots, facts: Facts, first_name: str, config: Config) -> Iterator[Finding]:
    port = config.telemetry.metrics_port
    remedy = "Free them, or give another --metrics_port (0: any free ones) or --metrics_host."
    if facts.taken_ports:
        found = _shorten([f"{taken} ({reason})" for taken, reason in facts.taken_ports.items()])
        yield Finding(host.name, "metrics ports", f"cannot be had on {config.telemetry.metrics_host}: {found}", remedy)
    elif port > 0 and first_name != host.name:
        found = f"the same machine as {first_name}: its workers too would take {port} and up"
        yield Finding(host.name, "metrics ports", found, "Give --metrics_port=0, or the machine one name.")


def _clock(host: HostSlots, answer: Answer) -> Iterator[Finding]:
    skew = answer.skew_seconds
    if abs(skew) - answer.margin_seconds > MAX_SKEW_SECONDS:
        found = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} here"
        remedy = "Alerts and logs use the clock: set it by NTP (timedatectl set-ntp true)."
        yield Finding(host.name, "clock", found, remedy, fatal=False)


def _output_dir(host: HostSlots, facts: Facts, config: Config, elastic: bool, *, is_first: bool) -> Iterator[Finding]:
    """Checks the folder of checkpoints, which the chief uses on the first host; an elastic job may move the chief."""
    folder = Path(config.job.output_dir).absolute()
    if facts.output_problem:
        found, remedy = f"{folder}: {facts.output_problem}", "Give rights there, or name another --output_dir."
        yield Finding(host.name, "output_dir", found, remedy, fatal=elastic or is_first)
    elif not facts.output_shared:
        remedy = "Name an --output_dir on storage that all hosts share. Otherwise only the first host has the results."
        yield Finding(host.name, "output_dir", f"{folder} is not the same folder as here", remedy, fatal=elastic)


def _shorten(parts: Sequence[str]) -> str:
    """Lists the first three parts and counts the others."""
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return ", ".join(parts[:3]) + more


@contextlib.contextmanager
def _question(config: Config, launcher: str, card: str) -> Iterator[Question]:
    """Yields the question for all hosts. Meanwhile a token file lies in the output folder, to recognize it there.

    Raises:
        InputError: the file cannot be written, or the settings name no data set.
    """
    from din_dist.data.prepared import prepared_folder

    data_folder = prepared_folder(config.data)
    folder = Path(config.job.output_dir).absolute()
    token = folder / f".check_cluster.{secrets.token_hex(8)}"
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise InputError(
            f"--output_dir: must be a folder that can be written. Received: {config.job.output_dir}, {error.strerror}. "
            "Name another one."
        ) from error
    try:
        yield Question(str(data_folder), str(folder), token.name, launcher, card, config.telemetry.metrics_host, ())
    finally:
        token.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):  # somebody else has put a file there
                path.rmdir()


class _NoAnswer(Exception):
    """A probe gave no answer; the finding says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.found)
        self.finding = finding


def _ask_all(
    pool: ThreadPoolExecutor, probes: Sequence[_Probe], findings: list[Finding], ask: Callable[[_Probe], _Answer]
) -> dict[str, _Answer]:
    """Asks all probes at once; returns the answers and adds the reasons for missing ones to `findings`."""

    def attempt(probe: _Probe) -> _Answer | Finding:
        try:
            return ask(probe)
        except _NoAnswer as error:
            return error.finding

    told = {}
    for probe, answer in zip(probes, pool.map(attempt, probes), strict=True):
        if isinstance(answer, Finding):
            findings.append(answer)
        else:
            told[probe.host.name] = answer
    return told


class _Probe:
    """A probe on one host and the pipes to it, for the time of a `with` block."""

    def __init__(self, host: HostSlots, ssh_port: int | None) -> None:
        self.host = host
        # The shell reads the variables from its input, which the probe then takes over. So no value from the user's
        # environment stands in a command line.
        variables = [f"{name}={shlex.quote(os.environ[name])}" for name in _INHERITED if name in os.environ]
        settings = " ".join(["export DIN_DIST_PROBE=1", *(each for each in variables if "\n" not in each)])
        folder, python = shlex.quote(str(Path.cwd())), shlex.quote(_PYTHON)
        script = (
            f"cd {folder} || exit {_NO_FOLDER}; [ -x {python} ] || exit {_NO_PYTHON}; "
            f'IFS= read -r settings && eval "$settings" && exec {python} -m din_dist.cluster.probe'
        )
        self.is_local = is_local(host.name)
        self._port = ["-p", str(ssh_port)] if ssh_port else []
        command = ["sh", "-c", script]
        if not self.is_local:
            command = [*_SSH, *self._port, "--", host.name, f"exec {shlex.join(command)}"]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (`__exit__` closes it)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
                errors="replace",
            )
            assert self._process.stdin
            with contextlib.suppress(BrokenPipeError):  # `_explain` finds out why it ended
                print(settings, file=self._process.stdin, flush=True)
        except FileNotFoundError as error:
            raise InputError(
                f"Other hosts are reached by ssh. Received: {host.name}, and no ssh here. Install openssh-client."
            ) from error

    def meet(self, question: Question, metrics_port: int) -> Answer:
        """Asks for the host's facts and its clock.

        Raises:
            _NoAnswer: the probe gave no answer.
        """
        ports = tuple(range(metrics_port, metrics_port + self.host.slots)) if metrics_port > 0 else ()
        question = dataclasses.replace(question, metrics_ports=ports)
        told = self._ask("facts", FACTS_SECONDS, **dataclasses.asdict(question))
        sent, started = time.time(), time.perf_counter()
        there = self._ask("time", _REACH_SECONDS)["time"]
        half_trip = (time.perf_counter() - started) / 2
        try:
            port = told.pop("port")
            return Answer(Facts(**told), port, skew_seconds=there - sent - half_trip, margin_seconds=half_trip)
        except (KeyError, TypeError) as error:  # the probe is of another version
            remedy = f"Copy {Path.cwd()} from here to the same folder there."
            raise _NoAnswer(Finding(self.host.name, "sources", "another version of din_dist", remedy)) from error

    def reach(self, peers: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """Returns the peers to which the host cannot connect, with the reasons.

        Raises:
            _NoAnswer: the probe gave no answer.
        """
        others = {name: place for name, place in peers.items() if name != self.host.name}
        return self._ask("reach", _REACH_SECONDS, peers=others)

    def _ask(self, what: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        watchdog = threading.Timer(seconds, self._process.kill)
        watchdog.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps({"ask": what, **arguments}), file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                if line.startswith('{"answer":'):  # a login script may have printed a line before
                    return json.loads(line)["answer"]
            raise _NoAnswer(self._explain(self._process.wait(), seconds))
        finally:
            watchdog.cancel()

    def _explain(self, code: int, seconds: float) -> Finding:
        """Returns why the probe ended without an answer, and what to do."""
        self._errors.seek(0)
        said = (self._errors.read().strip().splitlines() or [f"exit code {code}"])[-1].strip()[-200:]
        host, folder = self.host.name, Path.cwd()
        if code == _NO_FOLDER:
            return Finding(host, "folder", f"no {folder}", f"Copy {folder} from here to the same folder there.")
        if code == _NO_PYTHON:
            return Finding(host, "Python", f"no {_PYTHON}", "Set it up there as here: launch/setup.sh.")
        if code < 0:
            said = f"no answer within {seconds:g} s"
        if self.is_local or (code >= 0 and code != 255):  # 255 is ssh's own
            return Finding(host, "probe", said, "Correct that; it may be another version of din_dist there.")
        words = shlex.join(["ssh", "-o", "BatchMode=yes", *self._port, host, "true"])
        remedy = f"Make this work from here: {words}. See that its sshd runs and has your key (ssh-copy-id {host})."
        return Finding(host, _SSH_CHECK, said, remedy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # a probe behind ssh ends when its stdin does
        with contextlib.suppress(BrokenPipeError), self._errors, self._process:
            pass

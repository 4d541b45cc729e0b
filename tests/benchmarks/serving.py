"""Load on `cli.serve` over loopback, by wrk (Debian: apt-get install wrk).

`PYTHONPATH=. .venv/bin/python -m tests.benchmarks.serving --export_dir=DIR --data_path=LOG.parquet`

Requests are of the log's items: histories of 9 on average (`--history`), one candidate or many. One server takes all
loads in turn, a second one the same without batches, a third one more than it can do. An export that finds items gets
requests for the best ten alone. One that finds and ranks gets them for each of --retrieved.

Each line on stdout is a load's result as JSON; counts are wrk's, by HTTP status, and so are latencies, over all of
them. What wrk breaks off at its end is in none. The overload's line has the server's memory before and after, and its
own counts.

wrk runs on the same machine and takes its share of the cores. Where others keep it busy, trust ratios, and the server's
CPU time for an answer.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from absl import app, flags
from prometheus_client.parser import text_string_to_metric_families

from din_dist.serving.manifest import read_manifest

EXPORT_DIR = flags.DEFINE_string("export_dir", None, "The export to serve.", required=True)
DATA_PATH = flags.DEFINE_string("data_path", None, "A Parquet file with a column of item ids.", required=True)
ITEM_COLUMN = flags.DEFINE_string("item_column", "item_id", "That column.")
HISTORY = flags.DEFINE_integer("history", 9, "Items in a history on average; lengths are drawn geometrically.")
CANDIDATES = flags.DEFINE_integer("candidates", 100, "Candidates of a request to rank.")
RETRIEVED = flags.DEFINE_list("retrieved", ["50", "200", "1000"], "Items that are found, of requests that rank them.")
CONNECTIONS = flags.DEFINE_list("connections", ["1", "8", "64"], "Clients at a time, in turn.")
OVERLOAD = flags.DEFINE_integer("overload_connections", 400, "Clients at a time of the overload.")
SECONDS = flags.DEFINE_integer("seconds", 8, "How long each load lasts.")
OVERLOAD_SECONDS = flags.DEFINE_integer("overload_seconds", 30, "How long the overload lasts.")

NUM_BODIES = 500  # different ones, sent in turn

SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local bodies, place, threads = {}, 0, {}
for line in io.lines(BODIES) do bodies[#bodies + 1] = line end
function setup(thread) threads[#threads + 1] = thread end
function init() s200, s429, s503, other = 0, 0, 0, 0 end
function request()
  place = place % #bodies + 1
  return wrk.format(nil, nil, nil, bodies[place])
end
function response(status)
  if status == 200 then s200 = s200 + 1 elseif status == 429 then s429 = s429 + 1
  elseif status == 503 then s503 = s503 + 1 else other = other + 1 end
end
function done(summary, latency)
  local sums = {s200 = 0, s429 = 0, s503 = 0, other = 0}
  for _, thread in ipairs(threads) do for name in pairs(sums) do sums[name] = sums[name] + thread:get(name) end end
  local errors = summary.errors
  io.write(string.format(
    '\\n{"seconds": %f, "p50_ms": %f, "p99_ms": %f, "max_ms": %f, "200": %d, "429": %d, "503": %d, "other": %d, ' ..
    '"socket_errors": %d, "timeouts": %d}\\n', summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, latency.max / 1e3, sums.s200, sums.s429, sums.s503, sums.other,
    errors.connect + errors.read + errors.write, errors.timeout))
end
"""


def main(_: list[str]) -> None:
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt-get install wrk")
    manifest = read_manifest(Path(EXPORT_DIR.value))
    with tempfile.TemporaryDirectory() as folder:
        if manifest.recommends:
            measure_recommending(Path(folder), ranks=manifest.retriever is not None)
            return
        single, ranking = (write_script(Path(folder), count) for count in (1, CANDIDATES.value))
        with serving() as (url, process):
            for connections in map(int, CONNECTIONS.value):
                report(f"score, {connections} clients", load(url, process, single, connections, SECONDS.value))
            for connections in map(int, CONNECTIONS.value):
                report(f"rank, {connections} clients", load(url, process, ranking, connections, SECONDS.value))
        with serving("--max_batch_examples=1") as (url, process):
            connections = max(map(int, CONNECTIONS.value))
            report(f"score, {connections} clients, no batches", load(url, process, single, connections, SECONDS.value))
        with serving("--max_queue_requests=64") as (url, process):
            load(url, process, single, OVERLOAD.value, SECONDS.value)  # memory grows until buffers have their sizes
            before, counted = process.memory_info().rss, requests_by_code(url)
            result = load(url, process, single, OVERLOAD.value, OVERLOAD_SECONDS.value)
            now = requests_by_code(url)
            result["server_counts"] = {code: now[code] - counted.get(code, 0) for code in now}
            result["rss_mib_before"], result["rss_mib_after"] = (
                round(size / 2**20, 1) for size in (before, process.memory_info().rss)
            )
            report(f"overload, {OVERLOAD.value} clients", result)


def measure_recommending(folder: Path, *, ranks: bool) -> None:
    draw = drawer()
    histories = [draw() for _ in range(NUM_BODIES)]
    with serving() as (url, process):
        for number in map(int, RETRIEVED.value if ranks else [0]):
            more, name = ({"num_retrieved": number}, f"recommend of {number}") if number else ({}, "recommend")
            bodies = [{"instances": [{"history_item_ids": history, "k": 10, **more}]} for history in histories]
            script = write_bodies(folder, f"recommend-{number}", bodies)
            for connections in map(int, CONNECTIONS.value):
                result = load(url, process, script, connections, SECONDS.value, method="recommend")
                report(f"{name}, {connections} clients", result)


def write_script(folder: Path, num_candidates: int) -> Path:
    """A script for wrk that sends `NUM_BODIES` requests over and over."""
    draw, bodies = drawer(), []
    for _ in range(NUM_BODIES):
        row: dict[str, Any] = {"history_item_ids": draw(), "candidate_item_id": draw(1)[0]}
        if num_candidates > 1:
            row = {"history_item_ids": row["history_item_ids"], "candidate_item_ids": draw(num_candidates), "k": 10}
        bodies.append({"signature_name": "rank" if num_candidates > 1 else "score", "instances": [row]})
    return write_bodies(folder, str(num_candidates), bodies)


def drawer() -> Callable[..., list]:
    """Returns a function that draws so many items of the log, or those of a history."""
    random = np.random.default_rng(0)
    items = pq.read_table(DATA_PATH.value, columns=[ITEM_COLUMN.value])[ITEM_COLUMN.value].to_pylist()

    def draw(count: int | None = None) -> list:
        count = random.geometric(1 / (HISTORY.value + 1)) - 1 if count is None else count
        return [items[place] for place in random.integers(len(items), size=count)]

    return draw


def write_bodies(folder: Path, name: str, bodies: Iterable[dict[str, Any]]) -> Path:
    """Writes bodies of requests and a script for wrk that sends them; returns the script."""
    text, script = folder / f"{name}.txt", folder / f"{name}.lua"
    text.write_text("\n".join(map(json.dumps, bodies)))
    script.write_text(SCRIPT.replace("BODIES", json.dumps(str(text))))
    return script


@contextlib.contextmanager
def serving(*settings: str) -> Iterator[tuple[str, psutil.Process]]:
    words = [sys.executable, "-m", "din_dist.cli.serve", f"--export_dir={EXPORT_DIR.value}", "--port=0", *settings]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            sys.exit(f"the server did not start: {' '.join(words)}")
        try:
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def load(
    url: str, process: psutil.Process, script: Path, connections: int, seconds: int, method: str = "predict"
) -> dict[str, Any]:
    used = sum(process.cpu_times()[:2])
    words = ["wrk", f"--connections={connections}", "--threads=1", f"--duration={seconds}s", "--timeout=30s"]
    done = subprocess.run(
        [*words, f"--script={script}", f"{url}:{method}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"server_cpu_ms_per_answer": round(1000 * (sum(process.cpu_times()[:2]) - used) / result["200"], 3)}


def requests_by_code(url: str) -> dict[str, float]:
    found: dict[str, float] = {}
    with urllib.request.urlopen(f"{url[: url.index('/v1/')]}/metrics", timeout=30) as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for sample in family.samples:
                if sample.name == "din_dist_serving_requests_total":
                    found[sample.labels["code"]] = found.get(sample.labels["code"], 0) + sample.value
    return found


def report(name: str, result: dict[str, Any]) -> None:
    rate = result["200"] / result["seconds"]
    print(json.dumps({"load": name, "answers_per_second": round(rate, 1), **result}), flush=True)


if __name__ == "__main__":
    app.run(main)

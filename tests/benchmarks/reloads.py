"""Serves newer versions in turn under load, and tells what failed and what memory each cost.

`PYTHONPATH=. .venv/bin/python -m tests.benchmarks.reloads --export_dir=DIR --other_export_dir=DIR2`

Copies of two exports with different answers become versions 1, 2, 3, ... of one folder, each when the one before is
served and a load of `--seconds` on it has ended. wrk (Debian: apt-get install wrk) sends one request over and over, and
counts the answers of the one model, those of the other, and all else: an answer of both models at once would be
neither. A logit is a model's up to 1e-4, because its last digits depend on what else is scored in the same call. One
line of JSON on stdout for each version: answers, the longest of them in milliseconds, memory in MiB.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from absl import app, flags

EXPORT_DIR = flags.DEFINE_string("export_dir", None, "An export.", required=True)
OTHER_EXPORT_DIR = flags.DEFINE_string("other_export_dir", None, "Another with the same items.", required=True)
ITEM = flags.DEFINE_string("item", "1082185", "An item's id, as JSON.")
RELOADS = flags.DEFINE_integer("reloads", 20, "Versions after the first.")
CONNECTIONS = flags.DEFINE_integer("connections", 8, "Clients at a time.")
SECONDS = flags.DEFINE_integer("seconds", 10, "Of load, for each version: it begins before the version comes.")

SCRIPT = """
wrk.method, wrk.headers["Content-Type"], wrk.body = "POST", "application/json", [[BODY]]
local threads = {}
function setup(thread) threads[#threads + 1] = thread end
function init() one, two, other = 0, 0, 0 end
function response(status, headers, body)
  local logit = status == 200 and tonumber(body:match('"logits": ([-+%d.e]+)')) or 1e9
  if math.abs(logit - ONE) < 1e-4 then one = one + 1
  elseif math.abs(logit - TWO) < 1e-4 then two = two + 1
  else other = other + 1 end
end
function done(summary, latency)
  local sums = {one = 0, two = 0, other = 0}
  for _, thread in ipairs(threads) do for name in pairs(sums) do sums[name] = sums[name] + thread:get(name) end end
  local errors = summary.errors
  io.write(string.format('\\n{"one": %d, "two": %d, "other": %d, "failed": %d, "p99_ms": %f, "max_ms": %f}\\n',
    sums.one, sums.two, sums.other, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


def main(_: list[str]) -> None:
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt-get install wrk")
    body = json.dumps({"instances": [{"history_item_ids": [json.loads(ITEM.value)], "candidate_item_id": None}]})
    body = body.replace("null", ITEM.value)
    with tempfile.TemporaryDirectory() as folder:
        versions = Path(folder) / "versions"
        one, two = (logit_of(Path(export), body) for export in (EXPORT_DIR.value, OTHER_EXPORT_DIR.value))
        if abs(one - two) < 1e-3:
            sys.exit("both exports give the same answer")
        script = Path(folder) / "script.lua"
        script.write_text(SCRIPT.replace("BODY", body).replace("ONE", str(one)).replace("TWO", str(two)))
        publish(Path(EXPORT_DIR.value), versions / "1")
        with Server(versions) as server:
            server.load(script)  # memory grows until buffers have their sizes
            report(1, server.load(script), server)
            for number in range(2, RELOADS.value + 2):
                wrk = server.begin_load(script)
                publish(Path((EXPORT_DIR.value, OTHER_EXPORT_DIR.value)[(number + 1) % 2]), versions / str(number))
                started = time.monotonic()
                while server.version() != str(number):
                    time.sleep(0.1)
                seconds = round(time.monotonic() - started, 1)
                found = json.loads(wrk.communicate()[0].splitlines()[-1])
                report(number, found | {"seconds_until_served": seconds}, server)


class Server:
    """`serve` of a folder of versions."""

    def __init__(self, versions: Path) -> None:
        words = [sys.executable, "-m", "din_dist.cli.serve", f"--export_dir={versions}", "--port=0"]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            sys.exit(f"the server did not start: {' '.join(words)}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def version(self) -> str:
        """Returns the version that is served."""
        with urllib.request.urlopen(self.url, timeout=60) as response:
            return json.load(response)["model_version_status"][0]["version"]

    def memory(self) -> float:
        """Returns the process's memory in MiB."""
        return round(psutil.Process(self._process.pid).memory_info().rss / 2**20, 1)

    def begin_load(self, script: Path) -> subprocess.Popen[str]:
        """Starts wrk for `--seconds`."""
        words = ["wrk", f"--connections={CONNECTIONS.value}", "--threads=1", f"--duration={SECONDS.value}s"]
        words += ["--timeout=30s", f"--script={script}", f"{self.url}:predict"]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    def load(self, script: Path) -> dict[str, Any]:
        """Returns what wrk counted."""
        return json.loads(self.begin_load(script).communicate()[0].splitlines()[-1])


def logit_of(export: Path, body: str) -> float:
    """Returns the logit that the server answers with one export alone."""
    with Server(export) as server, urllib.request.urlopen(f"{server.url}:predict", body.encode(), timeout=60) as answer:
        return json.load(answer)["predictions"][0]["logits"]


def publish(export: Path, folder: Path) -> None:
    """Copies an export aside, then renames it."""
    aside = folder.with_name(f"copy of {folder.name}")
    shutil.copytree(export, aside)
    aside.rename(folder)


def report(version: int, found: dict[str, Any], server: Server) -> None:
    print(json.dumps({"version": version, **found, "memory_mib": server.memory()}), flush=True)


if __name__ == "__main__":
    app.run(main)

"""A real Prometheus with our configuration watches a real job of two workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.commands import prepare_log
from tests.support.launcher_jobs import environment, launcher, start_elastic, wait_for, worker_of
from tests.support.patience import PATIENCE
from tests.support.programs import free_port, program, running
from tests.support.repository import ROOT

INTERVAL = 1  # seconds between two scrapes
WINDOW = 6  # seconds over which rates are compared
FLAGS = ("--metrics_port=0", "--epochs=10000", "--optimizer=adagrad", "--learning_rate=0.02")


class Prometheus:
    """The HTTP API of a server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        fields = {"query": expression, **({"time": at} if at else {})}
        return self._get("query", fields)["result"]

    def value(self, expression: str, at: float | None = None) -> float:
        (found,) = self.query(expression, at)
        return float(found["value"][1])

    def samples(self, selector: str, at: float) -> list[list[tuple[float, float]]]:
        """Returns time and value of what was scraped, by series."""
        return [[(when, float(value)) for when, value in series["values"]] for series in self.query(selector, at)]

    def alerts(self, state: str = "firing") -> set[str]:
        found = self._get("alerts", {})["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == state}

    def _get(self, what: str, fields: dict[str, Any]) -> Any:
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(fields)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]


@contextmanager
def prometheus(folder: Path, runs: Path) -> Iterator[Prometheus]:
    """Our configuration, but for the place of the jobs and the pace."""
    config = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {
        f"{name}": f"{INTERVAL}s" for name in ("scrape_interval", "scrape_timeout", "evaluation_interval")
    }
    config["rule_files"] = [str(ROOT / "docker" / "prometheus" / name) for name in config["rule_files"]]
    for scrape in config["scrape_configs"]:
        for discovery in scrape["file_sd_configs"]:
            discovery["files"] = [path.replace("/runs/", f"{runs}/") for path in discovery["files"]]
            discovery["refresh_interval"] = f"{INTERVAL}s"
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    url = f"http://127.0.0.1:{port}"
    with running(command, folder / "log", f"{url}/-/ready"):
        yield Prometheus(url)


def test_the_rates_are_those_that_the_job_tells(tmp_path: Path) -> None:
    prepare_log(tmp_path)
    with prometheus(tmp_path / "prometheus", tmp_path / "run") as server:
        flags = ("--metrics_port=0", "--epochs=1000", "--max_steps=8000")
        with subprocess.Popen(
            launcher(tmp_path, *flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as job:
            assert job.stderr
            steps = 0
            up: list[dict[str, Any]] = []
            begin = middle = 0.0
            for line in job.stderr:
                steps += line.startswith("step ")
                # It finds the ranks some seconds after they have begun.
                if steps and len(up) < 2:
                    up = server.query('up{job="din_dist"} == 1')
                    begin = time.time() + INTERVAL
                if len(up) == 2 and not middle and time.time() > begin + WINDOW:
                    middle = time.time()
                    alerts = server.alerts()
            assert middle, "the job was over too soon"
            assert job.stdout
            summary = json.loads(job.stdout.read().splitlines()[-1])
        assert job.returncode == 0
        assert {sample["metric"]["rank"] for sample in up} == {"0", "1"}
        assert {sample["metric"]["run"] for sample in up} == {str(tmp_path / "run")}
        assert not alerts
        # What the job says of itself: when it was where.
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        told = [(line["time"], line["examples"]) for line in lines if line["kind"] == "train"]
        samples = server.samples("din_dist_examples_total[5m]", at=middle)
        assert len(samples) == 2
        # A rank is at most an update ahead of the other; which of them has the odd example of an epoch is not told.
        slack = 2 * 64 + len(summary["epoch_records"])
        for of_rank in samples:
            assert len(of_rank) > 2
            for at, value in of_rank:
                # One record may have come ahead of its count, and one count of its record.
                least = [0, 0, *(examples for when, examples in told if when < at)][-2]
                most = [examples for when, examples in told if when > at + INTERVAL][1]
                assert least - slack <= 2 * value <= most + slack
        one_minute = server.value("run:din_dist_examples:rate1m", at=middle)
        trained = max(examples for when, examples in told if when <= middle)
        assert 0 < one_minute * 60 < 4 * trained  # with three samples or more, `rate` extends their range to the double
        last = server.value("sum(last_over_time(din_dist_examples_total[5m]))")
        assert 0 < last <= summary["metrics"]["din_dist_examples_total"] * 2 + 64
        parts = server.query("run_part:din_dist_step_part_seconds:ratio_rate5m", at=middle)
        assert abs(sum(float(part["value"][1]) for part in parts) - 1) < 1e-6
        # It has ended well, so nobody misses its ranks.
        until = time.monotonic() + PATIENCE
        while server.query('up{job="din_dist"}'):
            assert time.monotonic() < until
            time.sleep(INTERVAL)
        assert not server.alerts()


def test_the_loss_of_an_elastic_worker_is_seen(tmp_path: Path) -> None:
    prepare_log(tmp_path)
    with (
        prometheus(tmp_path / "prometheus", tmp_path / "run") as server,
        start_elastic(tmp_path, *FLAGS) as job,
    ):
        wait_for(job, "step 1,000 of ")
        drain = threading.Thread(target=job.communicate)
        drain.start()
        try:
            assert eventually(lambda: server.value("sum(up)") == 2)
            assert server.value("run:din_dist_world_size:max") == 2
            assert "DinDistFewerWorkers" not in server.alerts("pending")
            os.kill(worker_of(1, tmp_path), signal.SIGKILL)
            assert eventually(lambda: "DinDistFewerWorkers" in server.alerts("pending"))
            assert eventually(lambda: server.value("sum(din_dist_elastic_resets_total)") >= 1)
            # Its host is taken in again, and the new worker is found by the targets that the job wrote anew.
            assert eventually(lambda: server.value("sum(up)") == 2 and server.value("run:din_dist_world_size:max") == 2)
            # The loss of so small a log may rise by itself.
            assert eventually(lambda: server.alerts("pending") <= {"DinDistLossRising"}), server.alerts("pending")
        finally:
            job.send_signal(signal.SIGTERM)
            drain.join()
    assert job.returncode == 75


def eventually(holds: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether `holds` within so long; values that are not there yet do not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(ValueError):
            if holds():
                return True
        time.sleep(INTERVAL / 4)
    return False

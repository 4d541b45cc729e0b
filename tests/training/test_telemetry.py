"""What a job says of itself, read as its readers read it: over HTTP, from files, from a terminal."""

from __future__ import annotations

import json
import os
import pty
import socket
import termios
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from din_dist import assembly
from din_dist.config import Config
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.training.telemetry import Exporter
from tests.small_log import small_config


def train(config: Config, exporter: Exporter | None = None) -> assembly.Job:
    job = assembly.make_job(config, Runtime(), prepare(config.data), exporter=exporter)
    job.trainer.train()
    return job


def scrape(address: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: sample.value for sample in samples if not sample.labels}


def test_a_scrape_counts_what_was_trained(tmp_path: Path) -> None:
    config = small_config(tmp_path, metrics_port=0, epochs=2)
    job = train(config, Exporter(config.job, Runtime()))
    try:
        (target,) = json.loads((tmp_path / "run" / "targets.json").read_text())
        assert target["labels"]["rank"] == "0"
        (address,) = target["targets"]
        found = scrape(address)
        records = job.trainer.state.epoch_records
        assert found["din_dist_examples_total"] == sum(record["examples"] for record in records)
        assert found["din_dist_step_seconds_count"] == job.trainer.state.step
        assert 0 < found["din_dist_step_seconds_sum"] < 60
        assert 0 < found["din_dist_input_wait_seconds_total"] < 60
        assert 0.1 < found["din_dist_loss"] < 1.0
        assert found["din_dist_epoch"] == 2
        assert found["din_dist_world_size"] == 1
    finally:
        job.telemetry.close()


def test_two_jobs_in_one_process_do_not_clash(tmp_path: Path) -> None:
    exporters = [Exporter(small_config(tmp_path, metrics_port=0).job, Runtime()) for _ in range(2)]
    exporters[0].examples.inc(3)
    assert [scrape(exporter.address)["din_dist_examples_total"] for exporter in exporters] == [3, 0]
    for exporter in exporters:
        exporter.close()


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--metrics_port: .* needs a free port on 127.0.0.1. Received: {port}, "):
            Exporter(small_config(tmp_path, metrics_port=port).job, Runtime())


def test_files_for_people_and_scripts(tmp_path: Path) -> None:
    job = train(small_config(tmp_path, log_every_steps=5))
    job.telemetry.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(5, job.trainer.state.step + 1, 5))
    assert all(line["examples_per_second"] > 0 for line in lines if line["kind"] == "train")
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()


def test_a_terminal_gets_a_bar_and_others_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train(small_config(tmp_path, log_every_steps=5, output_dir=str(tmp_path / "plain"))).telemetry.close()
    assert "step 5: loss 0." in capfd.readouterr().err
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    monkeypatch.setenv("DIN_DIST_PROGRESS_TTY", os.ttyname(terminal))
    train(small_config(tmp_path, log_every_steps=5, output_dir=str(tmp_path / "bar"))).telemetry.close()
    shown = os.read(controller, 100_000).decode()
    assert "%|" in shown
    assert "step 5" not in capfd.readouterr().err

"""What a job says of itself, read as its readers read it: from files, from a terminal, in TensorBoard."""

from __future__ import annotations

import json
import os
import pty
import termios
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from din_dist import assembly
from din_dist.config import Config
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.errors import Interrupted
from din_dist.telemetry.projector import write_projector
from din_dist.text import duration
from tests.support.signals import StopWhen
from tests.support.small_log import small_config


def train(config: Config) -> assembly.Assembly:
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    with job.telemetry.until_the_end(job.trainer):
        job.trainer.train()
    return job


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["kind"]].append(record)
    return found


def test_metrics_jsonl_tells_the_life_of_a_job(tmp_path: Path) -> None:
    job = train(small_config(tmp_path, log_every_steps=5, split="leave_two_out"))
    state, found = job.trainer.state, records(tmp_path / "run")
    assert [line["step"] for line in found["train"]] == list(range(5, state.step + 1, 5))
    for line in found["train"]:
        assert line["examples_per_second"] > 0
        parts = [line[f"{part}_seconds"] for part in ("input_wait", "compute", "exchange", "update")]
        assert sum(parts) == pytest.approx(line["step_seconds"])
    assert [(line["world_size"], line["restarts"]) for line in found["start"]] == [(1, 0)]
    assert len(found["validation"]) == len(found["checkpoint"]) == 2
    assert all(line["seconds"] > 0 and line["bytes"] > 0 for line in found["checkpoint"])
    (end,) = found["end"]
    assert (end["outcome"], end["step"]) == ("done", state.step)
    assert end["seconds_by_phase"]["training"] > 0


def test_a_full_disk_costs_records_but_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few updates in the middle cannot be recorded, as TensorBoard's writer then says it."""
    monkeypatch.setattr("din_dist.telemetry.tensorboard.RETRY_SECONDS", 0.0)
    write = EventFileWriter.add_event

    def full(writer: EventFileWriter, event: Any) -> None:
        if 5 <= event.step < 8:
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")
        write(writer, event)

    monkeypatch.setattr(EventFileWriter, "add_event", full)
    job = train(small_config(tmp_path, log_every_steps=1))
    assert job.trainer.state.step > 8
    assert [line["step"] for line in records(tmp_path / "run")["train"]] == list(range(1, job.trainer.state.step + 1))
    said = capsys.readouterr().err
    assert said.count("records of the job are lost from now on: No space left on device") == 1
    assert said.count("records of the job are kept again") == 1
    every = {"tensors": 0}  # otherwise TensorBoard draws ten of them
    points = EventAccumulator(str(tmp_path / "run" / "tensorboard"), every).Reload().Tensors("train/loss")
    assert {5, 6, 7}.isdisjoint({point.step for point in points})
    assert {4, 8} <= {point.step for point in points}


def test_restarts_are_counted_and_outcomes_told(tmp_path: Path) -> None:
    config = small_config(tmp_path, metrics_port=0)

    def start(stop_at: int) -> assembly.Assembly:
        asked = iter(range(1, 1000))
        job = assembly.Assembly(
            config, Runtime(), prepare(config.data), signals=StopWhen(lambda: next(asked) == stop_at)
        )
        with job.telemetry.until_the_end(job.trainer):
            job.trainer.train()
        return job

    for _ in range(2):
        with pytest.raises(Interrupted):
            start(stop_at=3)
    job = start(stop_at=0)
    found = records(tmp_path / "run")
    assert [line["restarts"] for line in found["start"]] == [0, 1, 2]
    assert [line["step"] for line in found["start"]] == [0, 3, 6]
    assert [line["outcome"] for line in found["end"]] == ["stopped", "stopped", "done"]
    values = job.telemetry.prometheus_metrics.values()
    assert values["din_dist_restarts_total"] == 2
    assert values["din_dist_phase{phase=done}"] == 1
    assert values["din_dist_steps_total"] == job.trainer.state.step - 6
    assert json.loads((tmp_path / "run" / "targets.json").read_text()) == []  # whoever watches need not miss it


def test_a_failure_leaves_its_targets_and_names_its_step(tmp_path: Path) -> None:
    config = small_config(tmp_path, metrics_port=0)
    calls = iter(range(1, 1000))

    def run_out_of_memory() -> bool:
        if next(calls) == 4:
            raise MemoryError("no more")
        return False

    job = assembly.Assembly(config, Runtime(), prepare(config.data), signals=StopWhen(run_out_of_memory))
    with pytest.raises(MemoryError) as failure, job.telemetry.until_the_end(job.trainer):
        job.trainer.train()
    assert failure.value.__notes__ == ["step 4"]
    assert records(tmp_path / "run")["end"][0]["outcome"] == "failed"
    assert len(json.loads((tmp_path / "run" / "targets.json").read_text())) == 1
    assert job.telemetry.prometheus_metrics.values()["din_dist_phase{phase=failed}"] == 1


def test_a_refused_step_is_counted_and_shown(tmp_path: Path) -> None:
    config = small_config(tmp_path, optimizer="sgd", learning_rate=1e30)
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    with pytest.raises(FloatingPointError), job.telemetry.until_the_end(job.trainer):
        job.trainer.train()
    values = job.telemetry.prometheus_metrics.values()
    assert values["din_dist_nonfinite_steps_total"] == 1
    assert not np.isfinite([values["din_dist_loss"], values["din_dist_gradient_norm"]]).all()


def test_tensorboard_has_scalars_flags_and_histograms(tmp_path: Path) -> None:
    config = small_config(tmp_path, log_every_steps=5, histograms_every_steps=10)
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    job.telemetry.show_flags("--epochs=2\n--model=din\n")
    job.trainer.train()
    job.telemetry.close()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    board.Reload()
    tags = board.Tags()["tensors"]
    assert {"train/loss", "train/examples_per_second", "train/gradient_norm", "epoch/loss", "checkpoint/bytes"} <= set(
        tags
    )
    losses = [line["loss"] for line in records(tmp_path / "run")["train"]]
    shown = [float(np.array(event.tensor_proto.float_val)[0]) for event in board.Tensors("train/loss")]
    assert shown == pytest.approx(losses)
    assert b"--model=din" in board.Tensors("flags")[0].tensor_proto.string_val[0]
    for name in ("attention_weights", "embedding_norms/item", "embedding_norms/category_id"):
        assert [event.step for event in board.Tensors(name)] == list(range(10, job.trainer.state.step + 1, 10))
    buckets = np.frombuffer(board.Tensors("attention_weights")[0].tensor_proto.tensor_content, np.float64).reshape(
        -1, 3
    )
    assert 0 <= buckets[0, 0] <= buckets[-1, 1] <= 1  # a softmax


@pytest.mark.parametrize("by_file", [False, True])
def test_a_profile_is_taken_on_request(tmp_path: Path, by_file: bool) -> None:
    config = small_config(tmp_path, log_every_steps=5, epochs=3, profile_at_step=0 if by_file else 4)
    job = assembly.Assembly(config, Runtime(), prepare(config.data))
    request = tmp_path / "run" / "profile"
    if by_file:
        request.touch()
    job.trainer.train()
    job.telemetry.close()
    profiles = list((tmp_path / "run" / "tensorboard").rglob("*.xplane.pb"))
    assert len(profiles) == 1
    assert profiles[0].stat().st_size > 1000
    assert not request.exists()


def test_the_projector_finds_vectors_and_labels(tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tensorboard.plugins.projector import projector_plugin
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    config = small_config(tmp_path)
    job, store = train(config), prepare(config.data)
    write_projector(tmp_path / "board", job.model.lookup, store, num_items=7)
    told = text_format.Parse((tmp_path / "board" / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = told.embeddings
    vectors = projector_plugin._read_tensor_binary_file(
        str(tmp_path / "board" / embedding.tensor_path), list(embedding.tensor_shape)
    )
    header, *rows = [
        line.split("\t") for line in (tmp_path / "board" / embedding.metadata_path).read_text().splitlines()
    ]
    assert header == ["item", "events", "category_id"]
    assert vectors.shape == (7, 10)
    counts = [int(row[1]) for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == np.bincount(store.item_ids).max()
    own_ids = store.vocabulary("items").to_pylist()
    for row, vector in zip(rows, vectors, strict=True):
        assert row[2] == f"c{int(row[0][1:]) % 5}"  # the log's own rule
        dense_id = own_ids.index(row[0]) + 1
        np.testing.assert_array_equal(vector[:6], job.model.lookup.tables[0].numpy()[dense_id])


def test_a_terminal_gets_a_bar_and_others_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train(small_config(tmp_path, log_every_steps=5, output_dir=str(tmp_path / "plain")))
    assert "step 5 of 30: loss 0." in (told := capfd.readouterr().err)
    assert " examples/s, 0 s left\n" in told
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    monkeypatch.setenv("DIN_DIST_PROGRESS_TTY", os.ttyname(terminal))
    train(small_config(tmp_path, log_every_steps=5, output_dir=str(tmp_path / "bar")))
    shown = os.read(controller, 100_000).decode()
    assert "% |" in shown
    assert "/30, " in shown
    assert " left, loss 0." in shown
    assert "step 5 of" not in capfd.readouterr().err


def test_log_collectors_get_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = train(small_config(tmp_path, log_every_steps=5, log_format="json"))
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    progress = [line for line in lines if "examples_per_second" in line]
    assert [line["step"] for line in progress] == list(range(5, job.trainer.state.step + 1, 5))
    assert all(line["level"] == "info" and line["rank"] == 0 and line["time"] > 1e9 for line in lines)
    assert progress[0]["message"].startswith("step 5 of 30: loss 0.")
    assert [line["epoch"] for line in lines if "example_checksum" in line] == [1, 2]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (7810, "2 h 10 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text

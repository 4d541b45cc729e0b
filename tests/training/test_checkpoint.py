"""Checkpoints: whole or not there, and only for the job they belong to."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from din_dist.config import Config, DataConfig, UnknownItem
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.training.checkpoint import CheckpointStore, SavedCheckpoint, latest_checkpoint
from din_dist.training_state import TrainingState
from tests.support import special_files
from tests.support.programs import missing


def make(
    folder: Path, *, learning_rate: float = 0.1, keep: int = 2, data: str = "d1"
) -> tuple[Config, CheckpointStore]:
    config = Config().replace(output_dir=str(folder), keep_checkpoints=keep, learning_rate=learning_rate)
    return config, CheckpointStore(config, data, Runtime())


def variables(value: float) -> dict[str, tf.Variable]:
    return {
        "model/table": tf.Variable(tf.fill([3, 2], float(value))),
        "model/count": tf.Variable(int(value), dtype=tf.int64),
    }


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    _, store = make(tmp_path)
    state = TrainingState(
        epoch=1, examples_seen=64, step=9, example_checksum=2**64 - 1, best_validation=0.7, best_step=9
    )
    store.save(variables(4.0), state)
    loaded = variables(0.0)
    assert store.restore(loaded) == state
    np.testing.assert_array_equal(loaded["model/table"], np.full([3, 2], 4.0))
    assert int(loaded["model/count"]) == 4


def test_an_untouched_folder_has_none(tmp_path: Path) -> None:
    config, store = make(tmp_path / "new")
    assert store.restore(variables(1.0)) is None
    assert latest_checkpoint(config) is None


def test_only_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    _, store = make(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(variables(step), TrainingState(step=step, best_step=2))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step-{step:012d}" for step in (2, 4, 5)
    ]
    best = variables(0.0)
    store.restore(best, step=2)
    assert float(best["model/table"][0, 0]) == 2.0


@pytest.mark.parametrize(("best_step", "chosen"), [(0, 3), (1, 1), (2, 3)], ids=["none", "kept", "lost"])
def test_the_best_is_chosen_or_else_the_newest(tmp_path: Path, best_step: int, chosen: int) -> None:
    """Step 0 is kept of a job that began warm, and is never the best."""
    _, store = make(tmp_path, keep=9)
    for step in (0, 1, 3):
        store.save(variables(step), TrainingState(step=step, best_step=min(step, best_step)))
    found = SavedCheckpoint.chosen(tmp_path / "checkpoints")
    assert found is not None
    assert found.state.step == chosen
    np.testing.assert_array_equal(found.read("model/table"), np.full([3, 2], chosen))


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    """What a SIGKILL in the middle of saving leaves."""
    _, store = make(tmp_path)
    store.save(variables(1.0), TrainingState(step=1))
    abandoned = tmp_path / "checkpoints" / "writing-2"
    abandoned.mkdir()
    (abandoned / "model.table.npy").write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    (tmp_path / "checkpoints" / "writing-3").mkdir()  # another process may be at it
    assert store.restore(variables(0.0)).step == 1
    store.save(variables(3.0), TrainingState(step=3))
    assert not abandoned.exists()
    assert (tmp_path / "checkpoints" / "writing-3").exists()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    make(tmp_path)[1].save(variables(1.0), TrainingState(step=1))
    _, other = make(tmp_path, learning_rate=0.2, keep=5)  # how many to keep may change
    with pytest.raises(
        InputError, match=r"resumed with the settings it was made with. Received: --learning_rate: 0.1,"
    ):
        other.restore(variables(0.0))


def test_settings_that_came_later_had_their_defaults(tmp_path: Path) -> None:
    """A checkpoint of a version that did not know them is resumed as it was trained, and as nothing else."""
    config, store = make(tmp_path)
    store.save(variables(1.0), TrainingState(step=1))
    path = tmp_path / "checkpoints" / "step-000000000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("unknown_item", "unknown_item_rate"):
        del manifest["config"]["data"][name]
    path.write_text(json.dumps(manifest))
    assert store.restore(variables(0.0)) == TrainingState(step=1)
    other = dataclasses.replace(config, data=DataConfig(unknown_item=UnknownItem.FEATURES, unknown_item_rate=0.2))
    with pytest.raises(
        InputError,
        match=r"Received: --unknown_item: untrained, now features; --unknown_item_rate: 0.1, now 0.2. Give the same",
    ):
        CheckpointStore(other, "d1", Runtime()).restore(variables(0.0))


def test_other_data_is_refused(tmp_path: Path) -> None:
    make(tmp_path)[1].save(variables(1.0), TrainingState(step=1))
    with pytest.raises(InputError, match="data that was prepared anew"):
        make(tmp_path, data="d2")[1].restore(variables(0.0))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    config, store = make(tmp_path)
    store.save(variables(1.0), TrainingState(step=1))
    store.save(variables(2.0), TrainingState(step=2))
    folder = latest_checkpoint(config)
    assert folder
    path = folder / ("manifest.json" if damage == "manifest" else "model.table.npy")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage != "changed" else content[:-1] + b"\x7f")
    found = variables(0.0)
    assert store.restore(found).step == 1
    assert float(found["model/table"][0, 0]) == 1.0
    (problem,) = store.damaged
    assert re.search(r"step-0+2.*must be (as it was saved|a checkpoint)\. Received: ", problem)
    with pytest.raises(InputError, match=r"step-0+2.*Received: "):
        store.restore(found, step=2)
    shutil.rmtree(folder.parent / "step-000000000001")
    with pytest.raises(InputError, match=r"step-0+2.*Received: .*None of 1 can be read: name another --output_dir\."):
        store.restore(variables(0.0))


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def with_part(manifest: dict, value: object, *names: str) -> str:
    """Returns the text of `manifest` with another value at the end of the path `names`."""
    manifest = json.loads(json.dumps(manifest))
    part = manifest
    for name in names[:-1]:
        part = part[name]
    part[names[-1]] = value
    return json.dumps(manifest)


@pytest.mark.parametrize(
    "write",
    [
        lambda manifest: "",
        lambda manifest: "null",
        lambda manifest: "[]",
        lambda manifest: "{}",
        lambda manifest: nested(100_000),
        lambda manifest: "9" * 5000,
        lambda manifest: '{"state": ' + nested(100_000) + "}",
        lambda manifest: with_part(manifest, None, "state"),
        lambda manifest: with_part(manifest, [], "state"),
        lambda manifest: with_part(manifest, "two", "state", "step"),
        lambda manifest: with_part(manifest, -1, "state", "step"),
        lambda manifest: with_part(manifest, True, "state", "epoch"),
        lambda manifest: with_part(manifest, [3], "state", "epoch_records"),
        lambda manifest: with_part(manifest, 3, "state", "another"),
        lambda manifest: with_part(manifest, "high", "state", "best_validation"),
        lambda manifest: with_part(manifest, 10**400, "state", "epoch_loss"),
        lambda manifest: with_part(manifest, 10**30, "state", "epoch"),
        lambda manifest: with_part(manifest, 10**30, "state", "examples_seen"),
        lambda manifest: with_part(manifest, 2**70, "state", "example_checksum"),
        lambda manifest: with_part(manifest, [], "config"),
        lambda manifest: with_part(manifest, [], "config", "data"),
        lambda manifest: with_part(manifest, 5, "data_fingerprint"),
        lambda manifest: with_part(manifest, [], "variables"),
        lambda manifest: with_part(manifest, {}, "variables"),
        lambda manifest: with_part(manifest, None, "variables", "model/table"),
        lambda manifest: with_part(manifest, 7, "variables", "model/table", "digest"),
        lambda manifest: with_part(
            manifest, "../step-000000000001/model.table.npy", "variables", "model/table", "file"
        ),
        lambda manifest: with_part(manifest, "/dev/zero", "variables", "model/table", "file"),
        lambda manifest: with_part(manifest, "..", "variables", "model/table", "file"),
        lambda manifest: with_part(manifest, "manifest.json", "variables", "model/table", "file"),
        lambda manifest: with_part(manifest, "a\0.npy", "variables", "model/table", "file"),
    ],
    ids=map(str, itertools.count()),
)
def test_a_manifest_that_cannot_be(tmp_path: Path, write: Callable[[dict], str]) -> None:
    config, store = make(tmp_path)
    store.save(variables(1.0), TrainingState(step=1))
    store.save(variables(2.0), TrainingState(step=2))
    folder = latest_checkpoint(config)
    path = folder / "manifest.json"
    path.write_text(write(json.loads(path.read_text())))
    found = variables(0.0)
    assert store.restore(found).step == 1
    assert float(found["model/table"][0, 0]) == 1.0
    (problem,) = store.damaged
    assert re.search(r"step-0+2.*must be (as it was saved|a checkpoint)\. Received: .", problem)
    assert len(problem) < 1000


@pytest.mark.parametrize("name", ["manifest.json", "model.table.npy"])
@pytest.mark.parametrize("kind", special_files.KINDS)
def test_a_checkpoint_with_what_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    config, store = make(tmp_path)
    store.save(variables(1.0), TrainingState(step=1))
    store.save(variables(2.0), TrainingState(step=2))
    path = latest_checkpoint(config) / name
    special_files.put(kind, path)
    assert store.restore(variables(0.0)).step == 1
    assert len(store.damaged) == 1


@pytest.mark.parametrize(
    ("head", "received"),
    [
        ("3000000000000,", "an array of float32[3000000000000] for float32[3, 2]"),
        ("3, 2, 'unended", "the head of its array cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_an_array_of_another_size(tmp_path: Path, head: str, received: str) -> None:
    """One whose head asks for more memory than there is, and a manifest that vouches for it."""
    config, store = make(tmp_path)
    store.save(variables(1.0), TrainingState(step=1))
    store.save(variables(2.0), TrainingState(step=2))
    folder = latest_checkpoint(config)
    content = (folder / "model.table.npy").read_bytes()
    shape = f"({head}), }}".encode()
    content = content.replace(b"(3, 2), }".ljust(len(shape)), shape) if head else content[:100]
    (folder / "model.table.npy").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["variables"]["model/table"]["digest"] = hashlib.blake2b(content).hexdigest()[:32]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert store.restore(variables(0.0)).step == 1
    assert received in store.damaged[0]


def test_what_is_no_checkpoint_among_them(tmp_path: Path) -> None:
    config, store = make(tmp_path, keep=1)
    (tmp_path / "checkpoints" / "step-old").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000000000009").write_text("")
    store.save(variables(1.0), TrainingState(step=1))
    store.save(variables(2.0), TrainingState(step=2))
    assert latest_checkpoint(config).name == "step-000000000002"
    assert store.restore(variables(0.0)).step == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000000002",
        "step-000000000009",
        "step-old",
    ]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        missing("mounting a small tmpfs needs root")
    try:
        _, store = make(tmp_path)
        small = {"table": tf.Variable(tf.ones([100, 100]))}
        store.save(small, TrainingState(step=1))
        big = {"table": tf.Variable(tf.ones([1000, 100]))}
        with pytest.raises(
            InputError, match=r"a checkpoint must fit. Received: No space left .* step 2 .*step-0+1\. Free"
        ):
            store.save(big, TrainingState(step=2))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000000001"]
        assert store.restore(small).step == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    config, store = make(tmp_path)
    store.save(variables(1.0), TrainingState(step=1))
    manifest = json.loads((latest_checkpoint(config) / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["state"]["best_validation"] is None  # no NaN or Infinity, which JSON does not know
    assert manifest["config"]["optimizer"]["learning_rate"] == 0.1


@pytest.mark.parametrize("free_bytes", [1 << 40, 0])
def test_what_is_written_later_is_as_it_was_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int
) -> None:
    """Whatever an update changes meanwhile; without memory for a copy, training waits."""
    monkeypatch.setattr("din_dist.training.checkpoint.free_memory_bytes", lambda: free_bytes)
    _, store = make(tmp_path)
    trained, state, steps = variables(4.0), TrainingState(step=4), []
    store.save_later(trained, state, 1, lambda saved, seconds, num_bytes: steps.append(saved.step), pytest.fail)
    trained["model/table"].assign(tf.fill([3, 2], 5.0))
    state.step = 5
    assert store.finish(60)
    assert steps == [4]
    loaded = variables(0.0)
    assert store.restore(loaded) == TrainingState(step=4)
    np.testing.assert_array_equal(loaded["model/table"], np.full([3, 2], 4.0))

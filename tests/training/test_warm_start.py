"""A job that begins with what an older one has learned: rows by own ids, everything else to the bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist.assembly import Assembly
from din_dist.config import Activation, Config, ModelKind, NewRows, OptimizerConfig, OptimizerKind, Split, UnknownItem
from din_dist.data.event_store import ITEMS
from din_dist.data.prepared import prepare
from din_dist.distributed.row_transports import RowGradients
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.execution import Execution
from din_dist.features.spec import Kind, Owner
from din_dist.training import warm_start as module
from din_dist.training.checkpoint import latest_checkpoint
from din_dist.training.optimizers import make_optimizer
from din_dist.training.warm_start import Parent, ParentJob, keep_rows, taken_over
from tests.support.featured_log import featured_config, write_featured_log
from tests.support.small_log import small_config, write_log

SETTINGS: dict[str, Any] = {"activation": Activation.DICE, "optimizer": OptimizerKind.LAZY_ADAM, "epochs": 2}


class Two(NamedTuple):
    """An older job that has trained, and the settings of a new one on a longer log in another order."""

    parent: Assembly
    config: Config


def shuffled(path: Path, seed: int = 0) -> pa.Table:
    """Returns the rows of a log in another order, in which own ids are numbered otherwise."""
    rows = pq.read_table(path)
    return rows.take(pa.array(np.random.default_rng(seed).permutation(len(rows))))


def trained(config: Config) -> Assembly:
    store = prepare(config.data)
    job = Assembly(config, Runtime(), store)
    keep_rows(config, job.model, store)
    job.trainer.train()
    return job


def begun(config: Config) -> tuple[Assembly, str]:
    """Returns a job before its first update, and the line about its parent."""
    job = Assembly(config, Runtime(), prepare(config.data))
    assert job.warm_start
    return job, job.warm_start.begin()[1]


def values_of(job: Assembly) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in job.saved_variables.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """Jobs with a feature of every owner and kind. The old log lacks items and a user, and has another order."""
    old, new = (tmp_path_factory.mktemp(name) for name in ("old", "new"))
    write_featured_log(new / "log.parquet", num_users=50, num_items=40)
    rows = shuffled(new / "log.parquet")
    pq.write_table(rows, new / "log.parquet")
    rows = rows.filter((pc.field("item_id") < 130) & (pc.field("user_id") != "u7"))
    pq.write_table(rows.take(pa.array(np.random.default_rng(1).permutation(len(rows)))), old / "log.parquet")
    shutil.copy(new / "offers.parquet", old / "offers.parquet")
    parent = trained(featured_config(old, **SETTINGS))
    return Two(parent, featured_config(new, warm_start_from=parent.config.job.output_dir, **SETTINGS))


def own_ids(job: Assembly) -> dict[str, list]:
    """Returns, for each variable with rows of own ids, the id of each row from 1 on, as the data says."""
    store, lookup = job.store, job.model.lookup
    items = store.vocabulary(ITEMS).to_pylist()
    found = {lookup.tables[0].path: items}
    if lookup.has_biases:
        found[lookup.item_bias.path] = items
    for name, table in zip(store.item_features, lookup.tables[1:], strict=True):
        found[table.path] = store.vocabulary(name).to_pylist()
    for columns in (lookup.columns, job.model.example_columns, job.model.side_columns):
        for encoding, table in columns.embedded if columns else ():
            if len(ids := store.feature_vocabulary(encoding.spec.name)):
                found[table.path] = ids.to_pylist()
    return found


def assert_taken_over(parent: Assembly, job: Assembly) -> int:
    """Asserts that each old row is there to the bit, in tables and slots, and all else too; returns how many moved."""
    old, new, moved = values_of(parent), values_of(job), 0
    before, now = own_ids(parent), own_ids(job)
    assert old.keys() == new.keys()
    for name, values in new.items():
        table = re.sub("/(first_moment|second_moment|accumulator)$", "", name)
        if table not in now:
            if not table.endswith("/price"):  # whose rows are bins
                assert_array_equal(values, old[name], err_msg=name)
            continue
        row_of = {own: row for row, own in enumerate(before[table], start=1)}
        assert_array_equal(values[0], old[name][0], err_msg=name)
        for row, own in enumerate(now[table], start=1):
            if own in row_of:
                assert_array_equal(values[row], old[name][row_of[own]], err_msg=f"{name} {own}")
                moved += row != row_of[own]
    return moved


def test_every_old_row_is_there_to_the_bit(two: Two) -> None:
    job, line = begun(two.config)
    assert assert_taken_over(two.parent, job) > 100
    old = values_of(two.parent)
    assert any("moving_mean" in name and np.any(values != 0) for name, values in old.items())
    assert all(
        np.any(values != 0) for name, values in old.items() if "moment" in name and "attention.scorer" not in name
    )
    known, items = set(own_ids(two.parent)["lookup/item"]), own_ids(job)["lookup/item"]
    new = sum(own not in known for own in items)
    assert new >= 8
    assert f": item {len(items) - new} rows kept, {new} new, {len(known) - len(items) + new} dropped; brand " in line
    assert "; hour 24 rows kept; " in line and "; slots come along; " in line
    assert "; price has other bounds, and each bin begins as the one that it overlaps most; " in line
    assert "; income is standardized anew (mean " in line


def test_rows_by_their_place_would_be_wrong(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above sees rows that are shifted."""
    by_place = lambda old, now: np.minimum(np.arange(now.num_rows), old.num_rows - 1)  # noqa: E731
    monkeypatch.setattr(module, "rows_before", by_place)
    job, _ = begun(two.config)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_taken_over(two.parent, job)


def test_rows_without_ids_stay_or_follow_their_bounds(two: Two) -> None:
    job, _ = begun(two.config)
    old, new = values_of(two.parent), values_of(job)
    for kind in ("", "/first_moment", "/second_moment"):
        for name in ("columns/hour", "columns/weekday", "columns/who", "columns/badges"):
            path = next(path for path in new if path.endswith(f"{name.partition('/')[2]}{kind}"))
            assert_array_equal(new[path], old[path], err_msg=path)
    bounds = [each.store.features["price"].encoding.bounds for each in (two.parent, job)]
    edges = [np.array([-1e9, *each, 1e9]) for each in bounds]
    path = next(path for path in new if path.endswith("/price"))
    for place, (low, high) in enumerate(zip(edges[1][:-1], edges[1][1:], strict=True)):
        shared = [min(high, end) - max(low, start) for start, end in zip(edges[0][:-1], edges[0][1:], strict=True)]
        assert_array_equal(new[path][1 + place], old[path][1 + int(np.argmax(shared))])


@pytest.mark.parametrize("new_rows", NewRows)
def test_new_rows_begin_as_said(two: Two, new_rows: NewRows) -> None:
    """As the row of unknown ids, or as in a new job. A vector that the user gave stays the start of its row."""
    job, _ = begun(two.config.replace(new_rows=new_rows))
    fresh = values_of(Assembly(two.config, Runtime(), job.store))
    old, new = values_of(two.parent), values_of(job)
    before, now = own_ids(two.parent), own_ids(job)
    counted = 0
    for name, ids in now.items():
        given = name.endswith(("/text", "/style"))
        for row, own in enumerate(ids, start=1):
            if own not in before[name]:
                at_random = given or new_rows is NewRows.RANDOM
                assert_array_equal(new[name][row], fresh[name][row] if at_random else old[name][0], err_msg=name)
                if f"{name}/first_moment" in new:
                    assert_array_equal(new[f"{name}/first_moment"][row], 0 * new[name][row])
                counted += 1
    assert counted > 20
    text, last = next(name for name in new if name.endswith("/text")), len(job.store.vocabulary(ITEMS))
    assert np.any(new[text][last] != 0)


def test_a_second_moment_begins_as_that_of_the_median_row(two: Two) -> None:
    job, _ = begun(two.config)
    old, new = (values_of(each)["lookup/item/second_moment"] for each in (two.parent, job))
    updated = [row for row in old.tolist() if any(row)]
    assert 10 < len(updated) <= len(old)
    median = [sorted(column)[len(updated) // 2] for column in zip(*updated, strict=True)]
    if len(updated) % 2 == 0:
        below = [sorted(column)[len(updated) // 2 - 1] for column in zip(*updated, strict=True)]
        median = [(one + other) / 2 for one, other in zip(median, below, strict=True)]
    known = set(own_ids(two.parent)["lookup/item"])
    for row, own in enumerate(own_ids(job)["lookup/item"], start=1):
        if own not in known:
            assert_allclose(new[row], median, rtol=1e-6)


@pytest.mark.parametrize("native", [False, True])
def test_the_first_update_of_a_new_row_is_at_most_a_learning_rate(native: bool) -> None:
    """After 5,000 updates by parents, rows that were updated 12 times with gradients of 0.5, and a new row.

    v = 0.25 (1 - 0.999^12) = 0.0029836 for old rows. The new row moves by 0.1 x 0.5 / sqrt(0.999 x 0.0029836 + 0.001 x
    0.25) = 0.8796 learning rates; from 0 it would be 0.05 / sqrt(0.00025) = 3.1623. Bias correction at update 5,001 is
    sqrt(1 - 0.999^5001) = 0.99664.
    """
    table = tf.Variable(tf.zeros([5, 2]))
    execution = Execution(native, False)
    optimizer = make_optimizer(OptimizerConfig(), [table], ["table"], ["table"], execution)
    old_moment = np.zeros((4, 2), np.float32)
    old_moment[1:] = 0.25 * (1 - 0.999**12)  # row 0 was never updated
    first = optimizer.slot_of_new_rows("second_moment", old_moment)
    assert first is not None
    assert_allclose(first, 0.0029836, rtol=1e-4)
    assert optimizer.slot_of_new_rows("first_moment", old_moment) is None
    assert optimizer.slot_of_new_rows("second_moment", np.zeros((4, 2), np.float32)) is None
    rows = np.array([0, 1, 2, 3, -1])
    slot = optimizer.state["table/second_moment"]
    slot.assign(taken_over(slot.numpy(), old_moment, rows, first))
    gradient = RowGradients(tf.constant([4]), tf.constant([[0.5, -0.5]]))
    rate = 0.01
    optimizer.apply([gradient], optimizer.values_of([gradient]), tf.constant(rate), tf.constant(5001, tf.int64))
    assert_allclose(table[4].numpy() / rate, [-0.8766, 0.8766], rtol=1e-3)
    slot.assign(tf.zeros_like(slot))
    table.assign(tf.zeros_like(table))
    optimizer.state["table/first_moment"].assign(tf.zeros_like(slot))
    optimizer.apply([gradient], optimizer.values_of([gradient]), tf.constant(rate), tf.constant(5001, tf.int64))
    assert_allclose(table[4].numpy() / rate, [-3.1516, 3.1516], rtol=1e-3)


def test_bias_correction_counts_the_updates_of_all_jobs(two: Two, tmp_path: Path) -> None:
    """One update of an old row, in float64: the moments of the parent, and its updates in the correction."""
    config = two.config.replace(output_dir=str(tmp_path), max_steps=1, native=False)
    before, _ = begun(config)
    job = Assembly(config, Runtime(), before.store)
    job.trainer.train()
    first, last = values_of(before), values_of(job)
    assert job.trainer.state.step == 1
    updates = two.parent.trainer.state.step + 1
    assert job.trainer.state.slot_updates == updates > 10
    name = "lookup/item"
    moments = [last[f"{name}/{kind}_moment"].astype(np.float64) for kind in ("first", "second")]
    changed = np.any(first[f"{name}/first_moment"] != last[f"{name}/first_moment"], axis=1)
    assert changed.sum() > 5
    rate = 1e-3 * np.sqrt(1 - 0.999**updates) / (1 - 0.9**updates)
    expected = first[name] - rate * moments[0] / (np.sqrt(moments[1]) + 1e-7)
    assert_allclose(last[name][changed], expected[changed], rtol=2e-5, atol=1e-7)
    assert_array_equal(last[name][~changed], first[name][~changed])


def test_a_new_job_keeps_its_parent_and_does_without_it(two: Two, tmp_path: Path) -> None:
    """A copy of the parent is removed after the start: the job goes on, and ends as one that was never stopped."""
    folder = shutil.copytree(two.parent.config.job.output_dir, tmp_path / "parent")
    config = two.config.replace(warm_start_from=str(folder), output_dir=str(tmp_path / "run"), epochs=1)
    store = prepare(config.data)
    whole = Assembly(config.replace(output_dir=str(tmp_path / "whole")), Runtime(), store)
    whole.trainer.train()
    Assembly(config.replace(max_steps=1), Runtime(), store).trainer.train()
    first = tmp_path / "run" / "checkpoints" / "step-000000000000" / "manifest.json"
    newest = latest_checkpoint(two.parent.config)
    assert newest
    parent = {
        "path": str(folder),
        "kind": "job",
        "digest": digest_of_file(newest / "manifest.json"),
        "step": two.parent.trainer.state.step,
        "slot_updates": two.parent.trainer.state.step,
    }
    manifest = json.loads(first.read_text())
    assert (manifest["state"]["step"], manifest["state"]["parent"]) == (0, parent)
    assert manifest["config"]["job"]["warm_start_from"] == str(folder)
    shutil.rmtree(folder)
    resumed = Assembly(config, Runtime(), store)
    resumed.trainer.train()
    assert resumed.trainer.state == whole.trainer.state
    assert resumed.trainer.state.parent == parent
    for name, values in values_of(resumed).items():
        assert_array_equal(values, values_of(whole)[name], err_msg=name)
    with pytest.raises(InputError, match="--warm_start_from: .*, now . Give the same settings"):
        Assembly(config.replace(warm_start_from=""), Runtime(), store).trainer.train()
    lost = config.replace(output_dir=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"--warm_start_from: must be .*parent, no such folder\. Name the folder of a"):
        Assembly(lost, Runtime(), store).trainer.train()


def digest_of_file(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()[:32]


RULE = "a warm start goes on with the parent's. Received:"


@pytest.mark.parametrize(
    ("setting", "before", "received"),
    [
        ("model.model", "mean_pooling", "din"),
        ("model.embedding_dim", [5], "6"),
        ("model.hidden_units", [8, 3], "8,4"),
        ("model.attention_hidden_units", [9], "8,4"),
        ("model.attention", "dot", "mlp"),
        ("model.activation", "prelu", "dice"),
        ("model.batch_norm", "frozen", "synced"),
        ("data.label_columns", ["click", "buy"], "none"),
        ("data.histories", ["click:8", "buy:5"], "none"),
        ("data.long_history", "brand:100", "none"),
        ("data.timezone", "Europe/Vienna", "America/New_York"),
        ("optimizer.optimizer", "sgd", "lazy_adam"),
        ("optimizer.adagrad_row_wise", True, "False"),
    ],
)
def test_another_model_or_optimizer_is_refused_in_one_line(two: Two, setting: str, before: Any, received: str) -> None:
    room, _, name = setting.partition(".")

    def open_parent(folder: Path) -> ParentJob:
        parent = ParentJob(folder)
        parent.settings = {**parent.settings, room: {**parent.settings[room], name: before}}
        return parent

    wanted = {"histories": "click,buy", "long_history": "brand"}.get(name)
    wanted = wanted or (",".join(map(str, before)) if isinstance(before, list) else str(before))
    end = "or train without --warm_start_from."
    end = f"start from its export, whose slots begin anew, {end}" if room == "optimizer" else end
    expected = f"--{name}: {RULE} {received}, and {two.config.job.warm_start_from} has {wanted}. Give the same, {end}"
    assert refusal(two, open_parent) == expected


def refusal(two: Two, open_parent: Callable[[Path], Parent]) -> str:
    job = Assembly(two.config, Runtime(), prepare(two.config.data), open_parent=open_parent)
    assert job.warm_start
    before = values_of(job)
    with pytest.raises(InputError) as error:
        job.warm_start.begin()
    assert all(np.array_equal(values, before[name]) for name, values in values_of(job).items())
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "received"),
    [
        ({"width": 7}, "age with width = 3, and {parent} has age with width = 7."),
        ({"owner": Owner.CONTEXT}, "age with owner = user, and {parent} has age with owner = context."),
        ({"kind": Kind.CATEGORIES}, "age with kind = category, and {parent} has age with kind = categories."),
        ({"rows": 9}, "age with rows = 0, and {parent} has age with rows = 9."),
        ({"name": "years"}, "age,who,"),
    ],
)
def test_another_feature_is_refused_in_one_line(two: Two, change: dict[str, Any], received: str) -> None:
    def open_parent(folder: Path) -> ParentJob:
        parent = ParentJob(folder)
        first, *rest = parent.rows.encodings
        first = dataclasses.replace(first, spec=dataclasses.replace(first.spec, **change))
        parent.rows = parent.rows._replace(encodings=(first, *rest))
        return parent

    parent = two.config.job.warm_start_from
    assert refusal(two, open_parent).startswith(f"--features: {RULE} {received.format(parent=parent)}")


def test_other_item_features_are_refused(two: Two) -> None:
    def open_parent(folder: Path) -> ParentJob:
        parent = ParentJob(folder)
        parent.rows = parent.rows._replace(item_features=("maker", "shop"))
        return parent

    found = refusal(two, open_parent)
    assert found.startswith(f"--item_features: {RULE} none, and {two.config.job.warm_start_from} has maker,shop. ")


def test_settings_of_training_alone_may_differ(two: Two) -> None:
    free = {"learning_rate": 0.5, "dropout": 0.3, "global_batch_size": 32, "seed": 5, "max_history_length": 5}
    job, _ = begun(two.config.replace(**free, embedding_l2=0.1, epochs=7, clip_norm=3.0))
    assert assert_taken_over(two.parent, job) > 100


def test_ids_of_another_type_are_refused(two: Two) -> None:
    def open_parent(folder: Path) -> ParentJob:
        parent = ParentJob(folder)
        items, *rest = parent.rows.tables
        assert items.ids is not None
        items = dataclasses.replace(items, ids=items.ids.cast(pa.string()))
        parent.rows = parent.rows._replace(tables=(items, *rest))
        return parent

    assert refusal(two, open_parent) == (
        "--warm_start_from: rows are found by the log's own ids, of one type. Received: strings and integers as ids of "
        f"item, here and in {two.config.job.warm_start_from}. Write them in the log as before, or train without "
        "--warm_start_from."
    )


@pytest.mark.parametrize("damage", ["missing", "other data", "changed"])
def test_a_parent_that_cannot_be_read_is_refused(two: Two, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(two.parent.config.job.output_dir, tmp_path / "parent")
    path, expected = folder / "rows" / "rows.json", f"{folder / 'rows'}"
    if damage == "missing":
        path.unlink()
        expected += "/rows.json: must tell of the rows of tables. Received: no such file, as from earlier versions."
    elif damage == "changed":
        path.write_text(path.read_text()[:-9])
        expected += ": must be as it was saved. Received: "
    else:
        path.write_text(path.read_text().replace('"data_fingerprint": "', '"data_fingerprint": "0'))
        expected += ": must tell of the rows of the job's tables. Received: those of other data."
    with pytest.raises(InputError) as error:
        ParentJob(folder)
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith(
        "Start that job again by its own command, which writes it, or warm start from an export."
    )


def test_a_damaged_checkpoint_is_refused(two: Two, tmp_path: Path) -> None:
    folder = shutil.copytree(two.parent.config.job.output_dir, tmp_path / "parent")
    (checkpoint,) = (folder / "checkpoints").glob(f"*{two.parent.trainer.state.step}")
    path = checkpoint / "lookup.item.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    rest = "must be as it was saved. Received: its content changed. Name another job, or an export."
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}: {rest}')}$"):
        ParentJob(folder).read("lookup/item")
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"must be a checkpoint\. Received: .*\. Name another job, or an export\.$"):
        ParentJob(folder)


def test_the_best_checkpoint_is_taken(tmp_path: Path) -> None:
    """As exports take it, so that a job and its export have the same weights."""
    config = small_config(tmp_path, split=Split.LEAVE_TWO_OUT, epochs=4, learning_rate=0.5)
    job = trained(config)
    assert 0 < job.trainer.state.best_step < job.trainer.state.step
    parent = ParentJob(Path(config.job.output_dir))
    assert parent.step == parent.slot_updates == job.trainer.state.best_step


MORE = {
    "sgd": {"optimizer": OptimizerKind.SGD},
    "adagrad": {"optimizer": OptimizerKind.ADAGRAD, "unknown_item": UnknownItem.FEATURES},
    "adagrad_row_wise": {"optimizer": OptimizerKind.ADAGRAD, "adagrad_row_wise": True, "native": False},
    "youtube_dnn": {"model": ModelKind.YOUTUBE_DNN, "num_sampled": 20, "example_age": True},
    "comirec_sa": {"model": ModelKind.COMIREC_SA, "num_sampled": 20},
    "sr_gnn": {"model": ModelKind.SR_GNN, "num_sampled": 20, "session_gap": "3"},
}


@pytest.mark.parametrize("case", MORE)
def test_other_optimizers_and_models_go_on(tmp_path: Path, case: str) -> None:
    folders = [tmp_path / name for name in ("old", "new")]
    for folder, num_items in zip(folders, (20, 30), strict=True):
        folder.mkdir()
        write_log(folder / "log.parquet", num_items=num_items, num_users=80)
    rows = shuffled(folders[1] / "log.parquet")
    pq.write_table(rows, folders[1] / "log.parquet")
    parent = trained(small_config(folders[0], epochs=2, **MORE[case]))
    config = small_config(folders[1], epochs=1, warm_start_from=str(folders[0] / "run"), **MORE[case])
    job, line = begun(config)
    assert assert_taken_over(parent, job) > 10
    assert ("the optimizer has no slots" if case == "sgd" else "slots come along") in line
    if "adagrad" in case:
        accumulators = values_of(job)["lookup/item/accumulator"]
        known = {*own_ids(parent)["lookup/item"]}
        new = [row for row, own in enumerate(own_ids(job)["lookup/item"], start=1) if own not in known]
        assert len(new) > 5 and np.all(accumulators[new] == np.float32(0.1))
        assert np.any(accumulators != np.float32(0.1))
    job.trainer.train()
    assert job.trainer.state.epoch == 1
    assert np.isfinite(job.trainer.state.epoch_records[0]["loss"])


def test_an_item_that_training_has_hidden_is_new(tmp_path: Path) -> None:
    """With --unknown_item=features the parent knew it by row 0, so its row has learned nothing."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write_log(tmp_path / name / "log.parquet", num_users=12, num_items=40)
    settings = {"unknown_item": UnknownItem.FEATURES, "epochs": 1}
    parent = trained(small_config(tmp_path / "old", **settings))
    config = small_config(tmp_path / "new", warm_start_from=str(tmp_path / "old" / "run"), **settings)
    job, _ = begun(config)
    assert parent.trained_items
    seen = parent.trained_items.occur[1:]
    assert 0 < np.count_nonzero(~seen) < len(seen)
    old, new = values_of(parent)["lookup/item"], values_of(job)["lookup/item"]
    assert_array_equal(new[1:][seen], old[1:][seen])
    assert_array_equal(new[1:][~seen], np.broadcast_to(old[0], new[1:][~seen].shape))

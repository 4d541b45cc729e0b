"""The loop: what it reaches, when it stops, what it picks."""

from __future__ import annotations

import dataclasses
import errno
import functools
import gc
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from din_dist import assembly, kernels
from din_dist.assembly import MODELS
from din_dist.benchmark.forms import with_idle_rows
from din_dist.cli.saved_job import trained_model
from din_dist.config import Activation, ComputeDtype, Config, ModelKind, OptimizerKind, Split, UnknownItem
from din_dist.data.prepared import prepare
from din_dist.data.splits import item_counts, split_examples
from din_dist.data.trained_items import trained_items
from din_dist.distributed.collectives import Collectives
from din_dist.distributed.gradients import GradientExchange
from din_dist.distributed.runtime import Runtime
from din_dist.distributed.shared_memory import BUFFER_BYTES, SharedMemory
from din_dist.errors import InputError, Interrupted
from din_dist.execution import Mode
from din_dist.files import make_folder
from din_dist.layers.pairs import Pairs
from din_dist.models.ranking_model import LookedUp, RankingModel
from din_dist.schema import feature_label
from din_dist.telemetry.projector import write_projector
from din_dist.training import checkpoint
from din_dist.training.checkpoint import CheckpointStore, latest_checkpoint
from din_dist.training.optimizers import OPTIMIZERS, Optimizer
from tests.support.model_kinds import RANKING
from tests.support.processor import need_bfloat16
from tests.support.signals import StopWhen
from tests.support.small_log import small_config, write_log
from tests.support.task_log import TASKS, write_task_log


def make(config: Config, **kwargs) -> assembly.Assembly:
    return assembly.Assembly(config, Runtime(), prepare(config.data), **kwargs)


def restore(job: assembly.Assembly, step: int | None = None) -> None:
    """Loads a checkpoint of the job's output folder, the newest or that of `step`, into its variables."""
    checkpoints = CheckpointStore(job.config, job.store.facts.fingerprint, job.runtime)
    assert checkpoints.restore(job.saved_variables, step)


def lines(config: Config, kind: str) -> list[dict]:
    found = map(json.loads, (Path(config.job.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


@pytest.mark.parametrize("model", RANKING)
def test_it_learns_what_users_like(tmp_path: Path, model: ModelKind) -> None:
    """Users of the made-up log like one category: an untrained model ranks at chance, a trained one well above it."""
    write_log(tmp_path / "log.parquet", num_users=300)
    config = small_config(tmp_path, model=model, learning_rate=0.01, epochs=4, activation=Activation.DICE)
    job = make(config)
    before = job.evaluator.evaluate("test", job.model)["gauc"]
    job.trainer.train()
    after = job.trainer.test()
    assert before < 0.6 < 0.7 < after["gauc"]
    losses = [record["loss"] for record in job.trainer.state.epoch_records]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.thorough(unless=lambda case: case["xla"])
@pytest.mark.parametrize("xla", [False, True])
def test_an_epoch_costs_one_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xla: bool) -> None:
    """No batch size or history length makes TensorFlow trace the step again, nor does the next epoch."""
    job = make(small_config(tmp_path, epochs=3, xla=xla, activation=Activation.DICE, dropout=0.1))
    traces: list[str] = []
    call = RankingModel.call

    def note_trace(model: RankingModel, batch: Any, training: bool = False) -> tf.Tensor:
        traces.append("training" if training else "evaluation")
        return call(model, batch, training=training)

    monkeypatch.setattr(RankingModel, "call", note_trace)
    job.trainer.train()
    job.trainer.test()
    assert traces == ["training", "evaluation"]


def test_only_what_is_known_last_waits_for_the_last_pass(tmp_path: Path) -> None:
    job = make(small_config(tmp_path, activation=Activation.DICE))
    weights = job.model.trainable_weights
    (batch,) = itertools.islice(job.make_batches(1, 2), 1)

    @tf.function(autograph=False)
    def gradients() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(job.model(batch, training=True))
        return [tf.convert_to_tensor(each) for each in tape.gradient(loss, [weight.value for weight in weights])]

    graph = gradients.get_concrete_function().graph
    (last_pass,) = (each for each in graph.get_operations() if each.type == "DinDistFirstGradient")
    waiting = {last_pass.name}
    for each in graph.get_operations():  # in the order in which they were added
        if any(before.op.name in waiting for before in each.inputs):
            waiting.add(each.name)
    late = {weight.path for weight, found in zip(weights, graph.outputs, strict=True) if found.op.name in waiting}
    # An item's bias is looked up with its vector, and is known early.
    assert late == {weight.path for weight in job.model.late_weights} - {"lookup/item_bias"}
    assert len(late) == 4


def test_every_form_trains_the_same_model(tmp_path: Path) -> None:
    """A whole epoch, its last, smaller batch included: by TensorFlow's operations, XLA, and kernels of our own."""
    weights = []
    for xla, native in ((False, False), (True, False), (True, True), (False, True)):
        form = {"xla": xla, "native": native, "output_dir": f"{tmp_path}/{xla}-{native}"}
        job = make(small_config(tmp_path, epochs=1, activation=Activation.DICE, **form))
        assert job.model.attention.runs_by_kernels(job.model.training_mode) == native
        job.trainer.train()
        weights.append({weight.path: weight.numpy() for weight in job.model.weights})
    for path, weight in weights[0].items():
        if path.endswith("scorer/output/bias"):
            continue  # softmax cancels it: its gradient is rounding error, which Adam scales up to whole steps
        for other in weights[1:]:
            np.testing.assert_allclose(other[path], weight, rtol=1e-3, atol=1e-4, err_msg=path)


def test_kernels_that_are_not_compiled_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PATH", tmp_path / "kernels.so")
    with pytest.raises(InputError) as caught:
        make(small_config(tmp_path))
    assert str(caught.value) == (
        f"--native: takes {tmp_path}/kernels.so. Received: 'no such file'. Run launch/setup.sh, which "
        "compiles it, or install a wheel for this platform. Or add --nonative for TensorFlow's own operations."
    )
    make(small_config(tmp_path, native=False))


def test_kernels_are_for_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly.tf.config, "get_visible_devices", lambda kind: [kind])
    assert not make(small_config(tmp_path)).execution.kernels
    rule = "--compute_dtype: bfloat16 is for our kernels, which run on CPUs. Received: "
    for native, received in ((True, "'a GPU'"), (False, "'--nonative'")):
        with pytest.raises(InputError) as caught:
            make(small_config(tmp_path, native=native, compute_dtype=ComputeDtype.BFLOAT16))
        assert str(caught.value) == f"{rule}{received}. Use --compute_dtype=float32."


def test_a_processor_without_bfloat16_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    make(small_config(tmp_path))
    with pytest.raises(InputError) as caught:
        make(small_config(tmp_path, compute_dtype=ComputeDtype.BFLOAT16))
    assert str(caught.value) == (
        "--compute_dtype: bfloat16 takes AVX512_BF16 (AMD Zen 4, Intel Sapphire Rapids or newer) and kernels built by "
        "g++ 10 or newer. Received: 'a processor or kernels without'. Use --compute_dtype=float32."
    )


def test_float32_where_bfloat16_would_be_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(kernels, "gains_by_bfloat16", lambda: False)
    job = make(small_config(tmp_path, compute_dtype=ComputeDtype.BFLOAT16))
    assert not job.execution.bfloat16
    assert job.trainer
    line = "computing in float32: this processor, without AMX tiles, would be slower in bfloat16"
    assert line in "".join(capsys.readouterr())


@pytest.mark.parametrize("model", RANKING)
def test_bfloat16_changes_weights_by_little(model: ModelKind, tmp_path: Path) -> None:
    """All that multiply, in the attention and in the head."""
    need_bfloat16()
    weights = []
    for dtype in ComputeDtype:
        sgd = {"optimizer": OptimizerKind.SGD, "learning_rate": 0.1}  # Adam makes whole steps of differences near 0
        settings = {"model": model, "compute_dtype": dtype, "output_dir": f"{tmp_path}/{dtype}", **sgd}
        job = make(small_config(tmp_path, epochs=1, activation=Activation.DICE, **settings))
        assert job.execution.bfloat16 == (dtype is ComputeDtype.BFLOAT16)
        before = {weight.path: weight.numpy() for weight in job.model.trainable_weights}
        job.trainer.train()
        weights.append({w.path: w.numpy() - before[w.path] for w in job.model.trainable_weights})
    changes = {path: change for path, change in weights[0].items() if path.endswith("kernel")}
    assert len(changes) >= (7 if model is ModelKind.DIN else 4)
    for path, change in changes.items():
        difference = np.linalg.norm(weights[1][path] - change) / np.linalg.norm(change)
        assert 0 < difference < 0.05, path


@pytest.mark.parametrize("unknown_item", UnknownItem)
def test_items_spread_over_a_larger_table_train_the_same(tmp_path: Path, unknown_item: UnknownItem) -> None:
    """With two idle rows before each: the losses are those of the small table with the same weights."""
    configs = [small_config(tmp_path, output_dir=f"{tmp_path}/{n}", unknown_item=unknown_item) for n in (1, 3)]
    small, large = (
        with_idle_rows(assembly.Assembly, n)(config, Runtime(), prepare(config.data))
        for config, n in zip(configs, (1, 3), strict=True)
    )
    for one, other in zip(small.model.weights, large.model.weights, strict=True):
        if one.shape != other.shape:
            values = other.numpy()
            values[::3] = one.numpy()
            other.assign(values)
        else:
            other.assign(one)
    idle = large.model.lookup.tables[0].numpy()
    for job in (small, large):
        job.trainer.train()
    losses = [[record["loss"] for record in job.trainer.state.epoch_records] for job in (small, large)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    after = large.model.lookup.tables[0].numpy()
    moved = np.flatnonzero((after != idle).any(axis=1))
    assert len(moved) > 20
    assert (moved % 3 == 0).all()


@pytest.fixture
def with_new_items(tmp_path: Path) -> Callable[..., Config]:
    """A log of which many items come once: some of those are tested and nothing else."""
    write_log(tmp_path / "log.parquet", num_users=60, num_items=1000)
    settings = {"learning_rate": 0.01, "epochs": 1, "embedding_dim": (6, 4)}
    return lambda **others: small_config(tmp_path, output_dir=f"{tmp_path}/{len(others)}", **settings, **others)


def train_and_see_what_moved(config: Config) -> tuple[assembly.Job, np.ndarray]:
    """The job, and bool `[num_items + 1]`: the items whose vector or bias is not as it was."""
    job = make(config)
    tables = [job.model.lookup.tables[0], job.model.lookup.item_bias]
    before = [table.numpy() for table in tables]
    job.trainer.train()
    moved = [(table.numpy() != old).any(axis=1) for table, old in zip(tables, before, strict=True)]
    return job, moved[0] | moved[1]


def test_new_items_are_told_by_their_features_when_asked(with_new_items: Callable[..., Config]) -> None:
    """The reserved row learns from what is hidden, a new item's nothing; opened again, the model says the same."""
    config = with_new_items(unknown_item=UnknownItem.FEATURES, unknown_item_rate=0.3)
    job, moved = train_and_see_what_moved(config)
    rows = job.model.lookup.row_of_item.numpy()
    is_new = rows == 0
    assert is_new[1:].sum() > 20
    assert moved[0]
    assert not (moved & is_new)[1:].any()
    store = prepare(config.data)
    expected = job.evaluator.scores("test", job.model)
    model, step = trained_model(config, store)
    assert step == job.trainer.state.step
    np.testing.assert_allclose(job.evaluator.scores("test", model), expected, rtol=1e-5, atol=1e-6)
    model.lookup.row_of_item = tf.range(len(rows))  # another model
    assert np.abs(job.evaluator.scores("test", model) - expected).max() > 1e-3


def test_by_default_new_items_have_rows_that_learn_as_negatives(with_new_items: Callable[..., Config]) -> None:
    config = with_new_items(negatives_per_positive=4)
    job, moved = train_and_see_what_moved(config)
    features = dataclasses.replace(config.data, unknown_item=UnknownItem.FEATURES)
    trained = trained_items(store := prepare(config.data), features, split_examples(store, config.data))
    assert trained
    assert job.model.lookup.row_of_item is None
    assert not moved[0]
    assert (moved & ~trained.occur).sum() > 20


def test_events_of_a_row_where_ids_are_hidden(with_new_items: Callable[..., Config]) -> None:
    """For the mini-batch aware penalty: 0.3 of all are those of the reserved row, and 0.7 of an item's are its own."""
    config = with_new_items(unknown_item=UnknownItem.FEATURES, unknown_item_rate=0.3)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, mini_batch_aware_l2=0.1))
    job = make(config)
    rows = job.model.lookup.row_of_item.numpy()
    counts, events = job.row_counts, item_counts(job.store, job.splits) * (rows > 0)
    assert 0 < events.sum() < item_counts(job.store, job.splits).sum()  # two events are in no example of training
    assert counts["lookup/item"][0] == pytest.approx(0.3 * events.sum())
    np.testing.assert_allclose(counts["lookup/item"][1:], 0.7 * events[1:])
    assert counts["lookup/category_id"].sum() == events.sum()


def test_a_bad_loss_stops_before_the_update(tmp_path: Path) -> None:
    config = small_config(tmp_path, optimizer=OptimizerKind.SGD)
    job = make(config)
    job.model.lookup.item_bias.assign(tf.fill(job.model.lookup.item_bias.shape, math.nan))
    before = job.model.head.dense_layers[0].kernel.numpy()
    with pytest.raises(FloatingPointError, match="Step 1: loss and gradient must be finite. Received: loss nan"):
        job.trainer.train()
    np.testing.assert_array_equal(job.model.head.dense_layers[0].kernel.numpy(), before)
    assert latest_checkpoint(config) is None


def poison(job: assembly.Job, item: int) -> None:
    """From now on the logit of this candidate is not a number."""
    bias = job.model.lookup.item_bias.value
    bias.scatter_update(tf.IndexedSlices(tf.fill([1, 1], math.nan), [item]))


def test_examples_with_a_bad_loss_are_named(tmp_path: Path) -> None:
    job = make(small_config(tmp_path))
    poison(job, item=3)
    batch = next(job.make_batches(0, 1))
    expected = batch.example_ids.numpy()[batch.candidate_item_ids.numpy() == 3].tolist()
    assert 0 < len(expected) <= 10
    named = (
        rf"the loss of {len(expected)} example\(s\) by itself: on rank 0 of examples {', '.join(map(str, expected))}\."
    )
    with pytest.raises(FloatingPointError, match=named):
        job.trainer.train()


def test_bad_updates_are_skipped_and_leave_no_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, epochs=1, activation=Activation.DICE, skip_nonfinite_steps=2)
    job = make(config)
    steps = job.trainer.num_steps
    item = 3
    with_it = [
        step + 1 for step, batch in enumerate(job.make_batches(0, steps)) if item in batch.distinct_item_ids.numpy()
    ]
    assert len(with_it) > 2
    # Its vector, by which the batch statistics go bad as well.
    table = job.model.lookup.tables[0].value
    table.scatter_update(tf.IndexedSlices(tf.fill([1, table.shape[1]], math.nan), [item]))
    with pytest.raises(FloatingPointError, match=f"Step {with_it[2]}: "):
        job.trainer.train()
    state = job.trainer.state
    assert (state.skipped_steps, state.step) == (2, with_it[2] - 1)
    assert state.examples_seen == 64 * state.step  # the skipped ones count: the epoch goes on behind them
    assert job.telemetry.prometheus_metrics.values()["din_dist_nonfinite_steps_total"] == 3
    assert "Skipped, 2 of at most 2." in capfd.readouterr().err
    for name, variable in job.saved_variables.items():
        values = np.delete(variable.numpy(), item, axis=0) if name == "lookup/item" else variable.numpy()
        assert np.isfinite(values).all(), name  # the averages of batch statistics included


def test_the_best_weights_by_validation_are_tested(tmp_path: Path) -> None:
    config = small_config(tmp_path, split=Split.LEAVE_TWO_OUT, epochs=6, learning_rate=0.05)
    job = make(config)
    job.trainer.train()
    gaucs = [line["gauc"] for line in lines(config, "validation")]
    state = job.trainer.state
    assert state.best_validation == max(gaucs)
    best_epoch = gaucs.index(max(gaucs)) + 1
    assert state.best_step == best_epoch * state.step // 6
    tested = job.trainer.test()
    again = make(small_config(tmp_path, split=Split.LEAVE_TWO_OUT, epochs=6, learning_rate=0.05))
    restore(again, state.best_step)
    assert again.evaluator.evaluate("test", again.model)["log_loss"] == pytest.approx(tested["log_loss"], abs=1e-6)


def test_leave_one_out_never_selects(tmp_path: Path) -> None:
    """There is no validation example, and so no best: the last weights are tested."""
    config = small_config(tmp_path, epochs=2)
    job = make(config)
    job.trainer.train()
    job.trainer.test()
    assert job.trainer.state.best_step == 0
    assert not lines(config, "validation")


def test_early_stopping_counts_validations(tmp_path: Path) -> None:
    config = small_config(tmp_path, split=Split.LEAVE_TWO_OUT, epochs=50, learning_rate=0.05, early_stopping_patience=2)
    job = make(config)
    job.trainer.train()
    gaucs = [line["gauc"] for line in lines(config, "validation")]
    assert len(gaucs) < 50
    assert gaucs.index(max(gaucs)) == len(gaucs) - 3  # the best one, then two that are no better
    make(config).trainer.train()  # resumed, it knows that it had stopped
    assert len(lines(config, "validation")) == len(gaucs)


FORMS: dict[str, dict[str, Any]] = {
    "resampled negatives": {"dropout": 0.3, "resample_negatives": True},
    "popular negatives": {"negatives": "popularity:0.75", "resample_negatives": True},
    "negatives of the batch": {"negatives": "batch"},
    "tasks": {
        **{"label_columns": TASKS, "task_head": "mmoe:2", "task_weights": (1.0, 2.0)},
        **{"split": Split.TEMPORAL, "validation_from": 12, "test_from": 16},
    },
    "behaviours of another log": {"split": Split.TEMPORAL, "validation_from": 12, "test_from": 16},
    "several interests": {"model": ModelKind.COMIREC_SA, "num_interests": 2, "num_sampled": 10},
    "cuts at random": {
        "model": ModelKind.YOUTUBE_DNN,
        "num_sampled": 10,
        "split": Split.USERS,
        "history_cut": "random",
    },
    "graphs of sessions": {"model": ModelKind.SR_GNN, "num_sampled": 10},
}


@pytest.mark.parametrize("form", FORMS)
def test_it_stops_when_asked_and_goes_on_to_the_same_end(form: str, tmp_path: Path) -> None:
    settings = {"epochs": 3, "learning_rate": 0.01, **FORMS[form]}
    if form == "tasks":
        write_task_log(tmp_path / "log.parquet")
    if form == "behaviours of another log":
        write_log(tmp_path / "log.parquet", labels=True)
        write_log(tmp_path / "behaviours.parquet", seed=1)
        settings["behaviours_path"] = str(tmp_path / "behaviours.parquet")
    straight = make(small_config(tmp_path, output_dir=str(tmp_path / "straight"), **settings))
    straight.trainer.train()
    config = small_config(tmp_path, output_dir=str(tmp_path / "stopped"), **settings)
    asked = iter([False] * 9 + [True])
    job = make(config, signals=StopWhen(lambda: next(asked)))
    with pytest.raises(Interrupted, match="on request, after the checkpoint of step 10"):
        job.trainer.train()
    resumed = make(config)
    resumed.trainer.train()
    pairs = zip(resumed.trainer.state.epoch_records, straight.trainer.state.epoch_records, strict=True)
    for found, expected in pairs:
        assert found == {**expected, "loss": pytest.approx(expected["loss"])}
    for name, variable in straight.saved_variables.items():
        np.testing.assert_allclose(resumed.saved_variables[name], variable, atol=1e-6, err_msg=name)


def test_checkpoints_and_validations_come_when_due(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        split=Split.LEAVE_TWO_OUT,
        checkpoint_every_steps=3,
        evaluate_every_steps=5,
        max_steps=11,
        keep_checkpoints=99,
    )
    make(config).trainer.train()
    assert [line["step"] for line in lines(config, "validation")] == [5, 10]
    steps = {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {3, 5, 6, 9, 11} <= steps <= {3, 5, 6, 9, 10, 11}


def test_floors_by_hand(tmp_path: Path) -> None:
    """Popularity and repeats of a log of three users, worked out by hand."""
    events = {"a": ["x", "y", "x", "x"], "b": ["y", "x", "x"], "c": ["z", "x", "z"], "d": ["w"]}
    rows = [
        {"user_id": user, "item_id": item, "category_id": "c1" if item in "xy" else "c2", "timestamp": time}
        for user, items in events.items()
        for time, item in enumerate(items)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    job = make(small_config(tmp_path))
    floors = job.evaluator.floors("test")
    # Held out: x, x and z. Left: x 4 times, y twice, z and w once. Negatives of a and b are z or w (never touched, less
    # popular than x); c's z, seen once, meets y (more popular) or w (as popular).
    assert floors["user_repeat"]["gauc"] == 1.0  # every held-out item is a repeat, negatives never are
    assert 2 / 3 <= floors["popularity"]["gauc"] <= 5 / 6
    assert floors["user_repeat"]["num_users"] == 3


def test_what_is_not_known_repeats_nothing(tmp_path: Path) -> None:
    """Two items without a category have none in common. By hand: of the four shown only c has what u had before."""
    category_of = {"a": None, "b": "red", "c": "red", "d": None, "e": None, "f": "blue"}
    rows = [("u", "a", 1, 1), ("u", "b", 2, 1), *(("u", item, 4, int(item == "c")) for item in "cdef")]
    names = ("user_id", "item_id", "timestamp", "label")
    log = [dict(zip(names, row, strict=True)) | {"category_id": category_of[row[1]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(log), tmp_path / "log.parquet")
    job = make(small_config(tmp_path, split=Split.TEMPORAL, validation_from=3, test_from=4))
    scorer = job.evaluator.floor_scorers()["category_id_repeat"]
    assert np.floor(job.evaluator.scores("test", scorer)).tolist() == [1, 0, 0, 0]
    assert job.evaluator.floors("test")["category_id_repeat"]["gauc"] == 1.0


NAMES = ["item", "items", "user", "users", "events", "popularity", "item_bias", "feature:item", "a/b", "..", "größe"]
NAMES += ["brand name", "a:b", "{x}", '"q"', "a,b", "%41", "-x", "my/kernel", "kernel", "x" * 200, "item_ids", "0"]


def test_item_features_may_be_called_what_they_like(tmp_path: Path) -> None:
    """None takes the place of something of ours, or of another; from the log to the weights of a job gone on with."""
    random = np.random.default_rng(0)
    of_item = {name: random.integers(2 + place, size=30) for place, name in enumerate(NAMES)}
    write_log(tmp_path / "plain.parquet")
    table = pq.read_table(tmp_path / "plain.parquet").drop_columns(["category_id"])
    items = [int(item[1:]) for item in table["item_id"].to_pylist()]
    for name in NAMES:
        table = table.append_column(name, pa.array(of_item[name][items]))
    pq.write_table(table, tmp_path / "log.parquet")
    config = small_config(tmp_path, item_features=tuple(NAMES), embedding_dim=(4,), l2=0.01, epochs=1)
    job = make(config)
    tables = {spec.name: spec.num_rows - 1 for spec in assembly.table_specs(config.model, job.store.facts)}
    assert len(tables) == 1 + len(NAMES) and tables["item"] == 30
    for name in NAMES:
        assert tables[feature_label(name)] == len(set(of_item[name][items])), name
    assert len({weight.path for weight in job.model.weights}) == len(job.model.weights)
    floors = job.evaluator.floor_scorers()
    assert {"popularity", "user_repeat"} < floors.keys() and len(floors) == 2 + len(NAMES)
    job.trainer.train()
    again = make(config.replace(epochs=2))
    restore(again)
    for weight, other in zip(job.model.weights, again.model.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), other.numpy(), err_msg=weight.path)
    write_projector(tmp_path, job.model.lookup, job.store, 3)
    header, first, *_ = (tmp_path / "items.tsv").read_text().splitlines()
    columns = dict(zip(header.split("\t"), first.split("\t"), strict=True))
    item = int(columns["item"][1:])
    assert int(columns["events"]) == items.count(item)
    assert columns["feature:events"] == str(of_item["events"][item])


def test_a_name_of_two_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--item_features: a column's name must be one line. Received: 'a.nb'"):
        small_config(tmp_path, item_features=("a\nb",))


def test_where_no_user_has_both_labels_auc_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One labelled test event a user gives no pair to rank; the file stays JSON, which has no NaN."""
    settings = {"split": Split.LEAVE_TWO_OUT, "epochs": 3, "early_stopping_patience": 3}
    config = small_config(tmp_path, labels=True, **settings)
    job = make(config)
    job.trainer.train()
    validations = lines(config, "validation")
    assert "NaN" not in (Path(config.job.output_dir) / "metrics.jsonl").read_text()
    assert [line["gauc"] for line in validations] == [None] * 3
    state = job.trainer.state
    assert state.best_validation == max(line["auc"] for line in validations)
    assert state.validations_without_gain < 3
    assert job.trainer.validation_metric == "auc"
    assert "validation: GAUC is not defined" in capsys.readouterr().err


def fill_disk(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """For so many checkpoints."""
    calls = itertools.count(1)

    def fail_at_first(folder: Path) -> None:
        if next(calls) <= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        make_folder(folder)

    monkeypatch.setattr(checkpoint, "make_folder", fail_at_first)
    monkeypatch.setattr(checkpoint, "TRY_AGAIN_SECONDS", 0.0)


def test_a_disk_that_is_full_for_a_moment_does_not_cost_the_best_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(small_config(tmp_path, split="leave_two_out", epochs=1))
    fill_disk(monkeypatch, writes=5)
    job.trainer.train()
    assert job.trainer.state.best_step == job.trainer.state.step
    assert job.telemetry.prometheus_metrics.values()["din_dist_checkpoint_failures_total"] == 5
    assert job.telemetry.prometheus_metrics.values()["din_dist_checkpoint_seconds_count"] == 1
    job.telemetry.close()


def test_training_goes_on_where_a_checkpoint_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = make(small_config(tmp_path, split="leave_two_out", epochs=3, learning_rate=0.3))
    fill_disk(monkeypatch, writes=6)
    job.trainer.train()
    state = job.trainer.state
    assert job.telemetry.prometheus_metrics.values()["din_dist_checkpoint_failures_total"] == 6
    assert job.telemetry.prometheus_metrics.values()["din_dist_checkpoint_seconds_count"] == 2
    assert "warning: --output_dir: a checkpoint must fit. Received: No space left" in (told := capfd.readouterr().err)
    assert "Training goes on without it." in told
    state.best_step = state.step // 3  # the one that was not saved
    assert job.trainer.test()["num_examples"] > 0
    assert f"the best weights, of step {state.best_step}, could not be saved" in capfd.readouterr().err
    job.telemetry.close()


def test_data_that_changes_under_a_job_stops_it_before_the_next_checkpoint(tmp_path: Path) -> None:
    config = small_config(tmp_path, epochs=2, split=Split.LEAVE_TWO_OUT)
    job = make(config)
    (array,) = prepare(config.data).folder.glob("packed/item_ids.npy")
    validate = job.evaluator.evaluate

    def change_and_validate(*arguments: Any) -> dict[str, float]:
        array.write_bytes(array.read_bytes())
        return validate(*arguments)

    job.evaluator.evaluate = change_and_validate  # type: ignore[method-assign]
    with pytest.raises(InputError, match="item_ids.npy: prepared data must stay as it is while a job uses it"):
        job.trainer.train()
    assert latest_checkpoint(config) is None


def test_workers_with_other_data_or_settings_are_refused(tmp_path: Path) -> None:
    """The second rank of two, whose gathered rows are those of another job."""

    class Second(Runtime):
        rank, world_size = 1, 2

        def gather(self, values: np.ndarray) -> np.ndarray:
            other = values.copy()
            other[:, -1] += 1
            return np.concatenate([other, values])

    config = small_config(tmp_path)
    job = assembly.Assembly(config, Second(), prepare(config.data))
    with pytest.raises(InputError, match="same settings and the same prepared data. Received: others on rank 1"):
        job.trainer.train()


def test_the_last_checkpoint_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make(small_config(tmp_path, epochs=1))

    def fail(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint, "make_folder", fail)
    with pytest.raises(InputError, match="Received: Read-only file system while saving step"):
        job.trainer.train()
    job.telemetry.close()


def test_tables_in_shared_memory_are_trained_the_same(tmp_path: Path) -> None:
    """Here by one rank. No update ends before all of its rows are changed, whatever order the graph leaves open."""
    graphs = []

    def shared_tables() -> int:
        gc.collect()  # those of jobs before
        return Path("/proc/self/maps").read_text().count("memfd:din_dist-tables")

    class Watched(GradientExchange):
        def finish(self) -> None:
            super().finish()
            graphs.append(tf.compat.v1.get_default_graph())

    class Sharing(assembly.Assembly):
        @functools.cached_property
        def exchange(self) -> GradientExchange:
            file = os.memfd_create("messages")
            os.ftruncate(file, 2 * (64 + BUFFER_BYTES))
            return Watched(SharedMemory(self.runtime, file), self.config.optimizer.wire_dtype, self.execution)

    ended = []
    for kind in (assembly.Assembly, Sharing):
        settings = {"mini_batch_aware_l2": 0.1, "clip_norm": 0.5, "optimizer": OptimizerKind.LAZY_ADAM}
        config = small_config(tmp_path, output_dir=str(tmp_path / kind.__name__), max_steps=20, **settings)
        shared_before = shared_tables()
        job = kind(config, Runtime(), prepare(config.data))
        job.trainer.train()
        ended.append([weight.numpy() for weight in job.model.weights])
        assert (shared_tables() > shared_before) == (kind is Sharing)
    for shared, own in zip(*ended, strict=True):
        np.testing.assert_allclose(shared, own, rtol=1e-5, atol=1e-7)
    [finish] = [each for each in graphs[0].get_operations() if each.type == "DinDistNeighboursFinish"]
    assert "If" in [before.type.removeprefix("Stateless") for before in finish.control_inputs]
    # Dense gradients leave after a look at the clock that waits for them: else their way would take no time.
    clock, *_ = (each for each in graphs[0].get_operations() if each.type == "Timestamp")
    sums, *_ = (each for each in graphs[0].get_operations() if each.type == "DinDistNeighboursSum")
    assert clock in sums.control_inputs
    assert len(clock.control_inputs) > 15


@pytest.mark.parametrize("model", RANKING)
def test_messages_in_shared_memory_keep_their_order(tmp_path: Path, model: ModelKind) -> None:
    """In the graph that runs, after TensorFlow's optimizer: each of two messages at once would overwrite the other."""

    class Sharing(assembly.Assembly):
        @functools.cached_property
        def collectives(self) -> Collectives:
            file = os.memfd_create("messages")
            os.ftruncate(file, 2 * (64 + BUFFER_BYTES))
            return SharedMemory(self.runtime, file)

    config = small_config(tmp_path, model=model, activation=Activation.DICE, max_steps=2)
    job = Sharing(config, Runtime(), prepare(config.data))
    context.context().enable_graph_collection()
    try:
        job.trainer.train()
        graphs = [of.post_optimization_graph for of in context.context().export_run_metadata().function_graphs]
    finally:
        context.context().disable_graph_collection()
    [graph] = [graph for graph in graphs if any(node.op == "DinDistNeighboursFinish" for node in graph.node)]
    inputs = {node.name: [name.lstrip("^").partition(":")[0] for name in node.input] for node in graph.node}

    @functools.cache
    def waits_for(name: str) -> frozenset[str]:
        return frozenset(inputs[name]).union(*(waits_for(before) for before in inputs[name]))

    messages = [node.name for node in graph.node if node.op.startswith("DinDistNeighbours")]
    assert len(messages) > 8
    messages.sort(key=lambda name: len(waits_for(name).intersection(messages)))
    for place, name in enumerate(messages):
        assert waits_for(name).issuperset(messages[:place]), name


class LastItem(RankingModel):
    """A toy model: the interest is the candidate's last behaviour."""

    def interest(self, items: LookedUp, pairs: Pairs, mode: Mode, history: int = 0) -> tf.Tensor:
        positions = tf.range(tf.size(pairs.candidate_of))
        last = tf.math.unsorted_segment_max(positions, pairs.candidate_of, tf.shape(items.candidate)[0])
        found = tf.gather(items.behaviours, tf.gather(tf.concat([pairs.behaviour_of, [0]], 0), tf.maximum(last, 0)))
        return tf.where((last >= 0)[:, None], found, 0.0)

    def head_inputs(self, interests: Sequence[tf.Tensor], candidate: tf.Tensor, mode: Mode) -> tf.Tensor:
        return tf.concat([*interests, candidate], axis=1)


class Momentum(Optimizer):
    """A toy optimizer."""

    initial_state: ClassVar[dict[str, float]] = {"velocity": 0.0}

    @staticmethod
    def update(gradient: tf.Tensor, rate: tf.Tensor, value: tf.Tensor, *slots: tf.Tensor) -> list[tf.Tensor]:
        velocity = 0.9 * slots[0] + gradient
        return [value - rate * velocity, velocity]


@pytest.mark.parametrize("native", [True, False])
def test_toys_without_a_kernel_train_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """With penalties, which kernels would read from whole tables; the same weights as by TensorFlow alone."""
    monkeypatch.setitem(MODELS, ModelKind.DIN, LastItem)
    monkeypatch.setitem(OPTIMIZERS, OptimizerKind.SGD, Momentum)
    settings = {"optimizer": OptimizerKind.SGD, "learning_rate": 0.1, "embedding_l2": 0.01, "epochs": 4}
    job = make(small_config(tmp_path, native=native, **settings))
    assert isinstance(job.model, LastItem)
    assert isinstance(job.optimizer, Momentum)
    job.trainer.train()
    losses = [record["loss"] for record in job.trainer.state.epoch_records]
    assert losses[-1] < losses[0]

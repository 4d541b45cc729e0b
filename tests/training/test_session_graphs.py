"""The graphs that batches bring along: they are those of their histories, and training and evaluation take them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

from din_dist.assembly import Assembly
from din_dist.config import Config, HistoryCut, ModelKind, OptimizerKind, Softmax, Split, UnknownItem
from din_dist.data.pipeline import batch_signature, num_steps_per_epoch
from din_dist.data.prepared import open_prepared, prepare
from din_dist.distributed.runtime import Runtime
from din_dist.models import sr_gnn
from din_dist.schema import Batch
from tests.support.brute_graphs import assert_same_graph, graph_of
from tests.support.small_log import small_config
from tests.support.visit_log import write_visits

FORMS: dict[str, dict[str, Any]] = {
    "kernels": {},
    "TensorFlow": {"native": False},
    "XLA": {"native": False, "xla": True},
    "cut at random": {"history_cut": HistoryCut.RANDOM},
    "users": {"split": Split.USERS, "history_cut": HistoryCut.FIXED},
    "sessions": {"session_gap": "5", "split": Split.LEAVE_TWO_OUT, "softmax": Softmax.FULL},
    "hidden items": {"unknown_item": UnknownItem.FEATURES, "unknown_item_rate": 0.4},
    "groups": {"group_negatives": True, "negatives_per_positive": 3},
}
NUM_UPDATES = 20


def setting(folder: Path, **settings: Any) -> Config:
    """Returns the settings of a small job whose histories have items again and again."""
    if not (folder / "log.parquet").exists():
        write_visits(folder / "log.parquet", labels=False, num_items=12)
    sizes = {"model": ModelKind.SR_GNN, "num_sampled": 6, "optimizer": OptimizerKind.ADAGRAD, "learning_rate": 0.05}
    return small_config(folder, **sizes | settings)


def job_of(config: Config) -> Assembly:
    prepare(config.data)
    return Assembly(config, Runtime(), open_prepared(config.data))


def histories_of(batch: Batch) -> list[list[int]]:
    """Returns the items of each history, by their places among the distinct ones."""
    place_of = {item: place for place, item in enumerate(batch.distinct_item_ids.numpy().tolist())}
    items = iter([place_of[item] for item in batch.history_item_ids.numpy().tolist()])
    return [[*itertools.islice(items, length)] for length in batch.history_lengths.numpy().tolist()]


def checked(batches: Iterator[Batch]) -> set[int]:
    """Asserts that batches have the graphs of their histories, many with an item twice; returns all lengths."""
    lengths, repeats = set(), 0
    for batch in batches:
        histories = histories_of(batch)
        assert_same_graph(batch.graph, graph_of(histories))
        lengths |= {*map(len, histories)}
        repeats += sum(len({*history}) < len(history) for history in histories)
    assert repeats > 5
    return lengths


@pytest.mark.parametrize("form", FORMS)
def test_batches_have_the_graphs_of_their_histories(tmp_path: Path, form: str) -> None:
    job = job_of(setting(tmp_path, **FORMS[form]))
    assert {1, 2} <= checked(job.batches(0, NUM_UPDATES))
    assert len(checked(iter(job.evaluator.batches("test")))) > 1
    assert job.evaluator.batches("test").element_spec == batch_signature(extras=job.model.extras)


def results(job: Assembly, given: Callable[[Batch], Batch], extras: tuple[str, ...]) -> list[np.ndarray]:
    """Returns losses and weights of 20 updates, and then the logits of a test, of batches as `given` makes them."""
    batches = enumerate(map(given, job.batches(0, NUM_UPDATES)), start=1)
    losses = [float(job.step(batch, 0.05, step, 64).loss) for step, batch in batches]
    score = tf.function(job.model, input_signature=[batch_signature(extras=extras)], autograph=False)
    logits = job.evaluator.scores("test", lambda batch: score(given(batch)))
    return [np.array(losses), *(weight.numpy() for weight in job.model.weights), logits]


@pytest.mark.parametrize("form", FORMS)
def test_training_and_evaluation_are_those_of_graphs_that_the_model_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """To the bit. With graphs in the batches the model finds none itself."""
    config = setting(tmp_path, **FORMS[form])
    found, given = job_of(config), job_of(config)
    expected = results(found, lambda batch: batch._replace(graph=()), ())

    def refuse(*_: tf.Tensor) -> None:
        raise AssertionError("the graph is there")

    monkeypatch.setattr(sr_gnn, "session_graph", refuse)
    for own, other in zip(results(given, lambda batch: batch, given.model.extras), expected, strict=True):
        assert_array_equal(own, other)
    assert expected[0][-5:].mean() < expected[0][:5].mean()
    with pytest.raises(AssertionError, match="the graph is there"):
        given.model(next(given.batches(0, 1))._replace(graph=()))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_worker_has_the_graphs_of_its_own_part(tmp_path: Path, world_size: int) -> None:
    """Together they train on each example of an update once. The last update may leave a worker nothing."""
    config = setting(tmp_path, global_batch_size=50)
    job = job_of(config)
    num_steps = num_steps_per_epoch(job.splits["train"].num_examples, 50)
    trained, tested = [], []
    for rank in range(world_size):
        job.runtime.rank, job.runtime.world_size = rank, world_size
        for batches, seen in ((job.batches(0, num_steps), trained), (job.evaluator.batches("test"), tested)):
            for batch in batches:
                assert_same_graph(batch.graph, graph_of(histories_of(batch)))
                seen += batch.example_ids.numpy().tolist()
    assert sorted(trained) == [*range(job.splits["train"].num_examples)]
    assert tested == [*range(job.splits["test"].num_examples)]


@pytest.mark.parametrize("kind", [kind for kind in ModelKind if kind is not ModelKind.SR_GNN])
def test_batches_of_other_models_have_none(tmp_path: Path, kind: ModelKind) -> None:
    job = job_of(setting(tmp_path, model=kind))
    for batch in (next(job.batches(0, 1)), next(iter(job.evaluator.batches("test")))):
        assert batch.graph == ()
        assert "graph" not in batch.extras
    assert job.model.extras == ()

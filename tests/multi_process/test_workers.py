"""Many workers equal one: real `horovodrun` jobs of 2 to 4 workers against one process, 60 steps of each optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from din_dist.cli.saved_job import trained_model
from din_dist.data.hashing import hash64
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import split_examples
from din_dist.distributed.placement import FEWEST_TO_SUM_AT_OWNERS
from din_dist.distributed.runtime import Runtime
from din_dist.evaluation.evaluator import Evaluator
from din_dist.serving.bundle import Bundle
from din_dist.serving.export.writer import TrainedModel, export
from tests.support.jobs import STEPS, assert_same_training, assert_same_weights, losses, records, train, weights
from tests.support.train_cases import CASES, config_of, data_config, prepare_data
from tests.support.trained_job import histories_of_tests


class Job(NamedTuple):
    """The cases that a job trains, and its numbers of workers: with the first of two it stops after 23 updates."""

    cases: tuple[str, ...]
    world_sizes: tuple[int, ...]


JOBS = {
    "one": Job(tuple(CASES), (1,)),
    "two": Job(tuple(CASES), (2,)),
    "three": Job(("sgd", "tasks", "comirec_sa", "youtube_dnn"), (3,)),
    "three_more": Job(("lazy_adam", "features"), (3,)),
    # These share no memory.
    "by_messages": Job(("lazy_adam", "comirec_sa"), (2,)),
    "at_owners": Job(("adagrad",), (FEWEST_TO_SUM_AT_OWNERS,)),
    "at_owners_more": Job(("lazy_adam", "bfloat16"), (FEWEST_TO_SUM_AT_OWNERS,)),
    "two_then_three": Job(("lazy_adam",), (2, 3)),
    # Each worker has a part of the rows.
    "sharded": Job(("lazy_adam", "adagrad", "comirec_sa"), (2,)),
    "sharded_more": Job(("sgd", "features", "tasks", "youtube_dnn"), (2,)),
    "sharded_three_then_two": Job(("lazy_adam",), (3, 2)),
}
AS_ONE = [(run, case) for run in ("two", "three", "three_more") for case in JOBS[run].cases]
SHARDED = [(run, case) for run in ("sharded", "sharded_more") for case in JOBS[run].cases]
BY_MESSAGES = [(run, case) for run in ("by_messages", "at_owners", "at_owners_more") for case in JOBS[run].cases]
EACH_WAY_ONCE = pytest.mark.thorough(
    unless=lambda case: case["run"] in ("one", "two", "three", "by_messages", "at_owners", "sharded")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    prepare_data(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Callable[..., None]:
    """Trains the named jobs, unless another test has asked for them: each test waits for its own."""

    @functools.cache
    def train_job(run: str) -> None:
        job = JOBS[run]
        *first, last = job.world_sizes
        for world_size in first:
            train(folder, run, world_size, max_steps=23, cases=job.cases)
        train(folder, run, last, cases=job.cases)

    def train_jobs(*runs: str) -> None:
        for run in runs:
            train_job(run)

    return train_jobs


@EACH_WAY_ONCE
@pytest.mark.parametrize(("run", "case"), [*AS_ONE, *BY_MESSAGES])
def test_many_workers_equal_one(folder: Path, trained: Callable[..., None], run: str, case: str) -> None:
    trained("one", run)
    loose = 50 if case == "bfloat16" else 1  # 8 bits of mantissa on the wire
    assert_same_training(folder, run, "one", case, loose)
    assert losses(folder, "one", case)[-10:].mean() < losses(folder, "one", case)[:10].mean()  # it learns something


@EACH_WAY_ONCE
@pytest.mark.parametrize(("run", "case"), SHARDED)
def test_sharded_tables_equal_whole_ones(folder: Path, trained: Callable[..., None], run: str, case: str) -> None:
    """Bit for bit those of as many workers with whole tables, and within rounding those of one."""
    trained("one", run)
    assert_same_training(folder, run, "one", case)
    (one,), (many,) = (records(folder, name, case, "test") for name in ("one", run))
    assert many["auc"] == pytest.approx(one["auc"], abs=1e-3)
    if case in JOBS["by_messages"].cases:
        trained("by_messages")
        whole = weights(folder, "by_messages", case)
        assert (losses(folder, run, case) == losses(folder, "by_messages", case)).all()
        assert all(np.array_equal(weight, whole[name]) for name, weight in weights(folder, run, case).items())


@pytest.mark.thorough
def test_a_job_of_shards_may_change_its_size(folder: Path, trained: Callable[..., None]) -> None:
    """Two workers read what three have written, and one process what two have."""
    trained("one", "sharded_three_then_two")
    other = weights(folder, "sharded_three_then_two", "lazy_adam")
    assert_same_weights(other, weights(folder, "one", "lazy_adam"), tolerance=1e-3)


@pytest.mark.thorough  # as elastic jobs do in test_elastic.py
def test_a_job_that_changes_its_size_ends_the_same(folder: Path, trained: Callable[..., None]) -> None:
    trained("one", "two_then_three")
    other = weights(folder, "two_then_three", "lazy_adam")
    assert_same_weights(other, weights(folder, "one", "lazy_adam"), tolerance=1e-3)


@EACH_WAY_ONCE
@pytest.mark.parametrize("run", ["one", "two", "three_more", "two_then_three"])
def test_every_example_is_trained_on_exactly_once_an_epoch(
    folder: Path, trained: Callable[..., None], run: str
) -> None:
    """The trained examples' checksum, which the job keeps, is that of each number from 0 once."""
    trained(run)
    store = prepare(data_config(folder))
    num_examples = split_examples(store, data_config(folder))["train"].num_examples
    checksum = f"{int(tf.reduce_sum(hash64(tf.range(num_examples, dtype=tf.int64)))):016x}"
    epochs = records(folder, run, "lazy_adam", "epoch")
    assert len(epochs) == STEPS * 64 // num_examples
    for number, record in enumerate(epochs, start=1):
        assert (record["epoch"], record["examples"]) == (number, num_examples)
        assert record["example_checksum"] == checksum


@EACH_WAY_ONCE
@pytest.mark.parametrize(("run", "case"), AS_ONE)
def test_evaluation_is_that_of_one_worker(folder: Path, trained: Callable[..., None], run: str, case: str) -> None:
    trained("one", run)
    (one,), (many,) = (records(folder, name, case, "test") for name in ("one", run))
    tolerance = 0.02 if case == "bfloat16" else 1e-3
    assert many["num_examples"] == one["num_examples"]
    names = {"gauc", "auc", "log_loss", "pairwise_gauc", "gauc_click", "auc_buy", "log_loss_buy"} & one.keys()
    assert len(names) == (6 if case == "tasks" else 4)
    for name in names:
        assert many[name] == pytest.approx(one[name], abs=tolerance)


def test_an_export_of_two_workers_scores_as_one_of_one(folder: Path, trained: Callable[..., None]) -> None:
    """By ids read from the log; the export itself compares with its own trainer only."""
    trained("one", "two")
    scores = {run: exported_scores(folder, run, "adagrad") for run in ("one", "two")}
    np.testing.assert_allclose(scores["two"], scores["one"], rtol=0, atol=1e-4)
    assert scores["one"].std() > 0.01


def exported_scores(folder: Path, run: str, case: str) -> np.ndarray:
    config = config_of(folder, run, case, STEPS)
    store = open_prepared(config.data)
    model, step = trained_model(config, store)
    evaluator = Evaluator(config, store, split_examples(store, config.data), Runtime())
    export(TrainedModel(model, store, config, step, "", None), evaluator, "test", folder / f"export-{run}")
    histories, candidates = histories_of_tests(Path(config.data.data_path), config.data.max_history_length)
    flat = [item for history in histories for item in history]
    return Bundle.open(folder / f"export-{run}").score(flat, [len(history) for history in histories], candidates)


def test_workers_hold_the_same_weights_and_learn(folder: Path, trained: Callable[..., None]) -> None:
    """Against a test that could not fail: two optimizers must not end alike."""
    trained("one")
    assert np.abs(losses(folder, "one", "sgd") - losses(folder, "one", "adagrad")).max() > 0.01

"""Undoing updates, to the bit; and where workers agree to go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from din_dist import assembly
from din_dist.config import OptimizerKind
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.errors import Interrupted
from din_dist.training.undo import agree
from din_dist.training_state import TrainingState
from tests.support.signals import StopWhen
from tests.support.small_log import small_config


class Elastic(Runtime):
    """A worker of an elastic job whose others are all gone."""

    elastic = True


@pytest.mark.parametrize("optimizer", list(OptimizerKind))
def test_an_update_is_undone_to_the_bit(tmp_path: Path, optimizer: OptimizerKind) -> None:
    config = small_config(
        tmp_path, optimizer=optimizer, learning_rate=0.1, epochs=2, adagrad_row_wise=True, activation="dice"
    )
    seen: list[tuple[dict[str, np.ndarray], TrainingState]] = []  # before each update

    def stop_at_fourth() -> bool:
        seen.append((values_of(job), job.trainer.state.copy()))
        return len(seen) == 4

    job = assembly.Assembly(config, Elastic(), prepare(config.data), signals=StopWhen(stop_at_fourth))
    with pytest.raises(Interrupted):
        job.trainer.train()
    job.telemetry.close()
    before, state = seen[3]
    # As if another update had been broken off: the averages have moved.
    for variable in job.undo_log.others:
        variable.assign(variable + 1)
    assert job.undo_log.newest() == (4, True)
    assert job.undo_log.go_back(3, finished=True) == state
    for name, value in values_of(job).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    with pytest.raises(RuntimeError, match="Update 2 is not kept"):
        job.undo_log.go_back(2, finished=True)


def values_of(job: assembly.Assembly) -> dict[str, np.ndarray]:
    """Returns a copy of all that a checkpoint would keep."""
    return {name: variable.numpy() for name, variable in job.saved_variables.items()}


def test_what_was_due_is_done_again_where_not_all_had_done_it(tmp_path: Path) -> None:
    config = small_config(tmp_path, split="leave_two_out", epochs=1, global_batch_size=2000)
    job = assembly.Assembly(config, Elastic(), prepare(config.data))
    job.trainer.train()  # one update, which ends the epoch
    history = job.undo_log
    assert history.newest() == (1, True)
    after = history.go_back(1, finished=True)
    assert (after.epoch, after.examples_seen, after.best_step, len(after.epoch_records)) == (1, 0, 1, 1)
    before = history.go_back(1, finished=False)
    assert (before.epoch, before.best_step, before.epoch_records) == (0, 0, [])
    assert before.examples_seen == after.epoch_records[0]["examples"]
    assert history.newest() == (1, False)
    job.trainer.train()  # all that are left are at this place, and nothing is left to do
    assert job.trainer.state == after
    job.telemetry.close()


def test_a_job_that_was_tested_takes_up_its_checkpoint(tmp_path: Path) -> None:
    """The test is done with the best weights, so memory holds no others any more."""
    config = small_config(tmp_path, split="leave_two_out", epochs=2)
    job = assembly.Assembly(config, Elastic(), prepare(config.data))
    job.trainer.train()
    last = values_of(job)
    job.trainer.test()
    assert job.undo_log.newest() is None
    job.trainer.train()
    for name, value in values_of(job).items():
        np.testing.assert_array_equal(value, last[name], err_msg=name)
    job.telemetry.close()


@given(st.integers(1, 100), st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_all_can_go_on_from_where_they_agree(step: int, ranks: list[tuple[bool, bool]]) -> None:
    """No rank is more than one update ahead of another, nor has it what was due done there."""
    ahead_somewhere = any(ahead for ahead, _ in ranks)
    positions = [(step + ahead, done or (ahead_somewhere and not ahead)) for ahead, done in ranks]
    agreed, finished = agree(positions)
    assert agreed == min(reached for reached, _ in positions)
    for reached, done in positions:
        assert reached >= agreed
        if finished and reached == agreed:
            assert done

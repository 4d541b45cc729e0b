import pytest

from din_dist.config import OptimizerConfig, Schedule
from din_dist.training.schedules import learning_rate


def rates(schedule, steps, num_steps, rate=1.0, **config):
    config = OptimizerConfig(learning_rate=rate, learning_rate_schedule=schedule, **config)
    return [learning_rate(config, step, num_steps) for step in steps]


def test_constant():
    assert rates(Schedule.CONSTANT, [1, 10, 10**6], 10, rate=0.3) == [0.3, 0.3, 0.3]


def test_step_decays_after_the_authors_336000_steps():
    assert rates(Schedule.STEP, [1, 336_000, 336_001, 672_001], 10**6) == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_step_decays_by_its_own_factor_and_period():
    decay = {"learning_rate_decay": 0.5, "learning_rate_decay_steps": 2}
    assert rates(Schedule.STEP, range(1, 7), 6, **decay) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_warmup_linear():
    """Two steps up, four down: the next one would be 0."""
    found = rates(Schedule.WARMUP_LINEAR, range(1, 8), 6, warmup_steps=2)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_warmup_cosine():
    """Half a cosine over four steps: 1, (1 + 1/sqrt 2) / 2, 1/2, (1 - 1/sqrt 2) / 2, and 0 from then on."""
    found = rates(Schedule.WARMUP_COSINE, [1, 2, 3, 4, 5, 6, 7, 99], 6, rate=2.0, warmup_steps=2)
    assert found == pytest.approx([1.0, 2.0, 2.0, 2 * 0.853553, 1.0, 2 * 0.146447, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("schedule", [Schedule.WARMUP_LINEAR, Schedule.WARMUP_COSINE])
def test_every_step_moves(schedule):
    """Without warm-up, with nothing but warm-up, and with more warm-up than steps."""
    for warmup_steps, num_steps in ((0, 5), (5, 5), (8, 5), (0, 1)):
        found = rates(schedule, range(1, num_steps + 1), num_steps, warmup_steps=warmup_steps)
        assert all(0 < rate <= 1 for rate in found)
    assert rates(schedule, [1], 1) == [1.0]

"""How many updates a job has, and the learning rate of each."""

from __future__ import annotations

import math

from din_dist.config import Config, OptimizerConfig, Schedule
from din_dist.data.pipeline import num_steps_per_epoch


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Returns the rate of update `step`, counted from 1, of `num_steps` in all.

    The warm-up reaches the full rate at its last step; the decay after it reaches 0 one step past the end, so that
    every step moves.
    """
    match config.learning_rate_schedule:
        case Schedule.CONSTANT:
            return config.learning_rate
        case Schedule.STEP:
            return config.learning_rate * config.learning_rate_decay ** ((step - 1) // config.learning_rate_decay_steps)
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    if config.learning_rate_schedule is Schedule.WARMUP_LINEAR:
        return config.learning_rate * max(1.0 - done, 0.0)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def num_updates(config: Config, examples_per_epoch: int) -> int:
    """Returns the number of updates of the whole job."""
    steps = config.job.epochs * num_steps_per_epoch(examples_per_epoch, config.job.global_batch_size)
    return min(steps, config.job.max_steps) if config.job.max_steps else steps

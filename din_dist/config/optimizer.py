"""Settings of the optimizer and of its learning rate."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import ClassVar

from din_dist.config.settings import Settings, require, setting, text_setting

_SCHEDULE = "schedule"


class OptimizerKind(enum.StrEnum):
    SGD = "sgd"
    ADAGRAD = "adagrad"
    LAZY_ADAM = "lazy_adam"


class Schedule(enum.StrEnum):
    CONSTANT = "constant"
    STEP = "step"
    WARMUP_LINEAR = "warmup_linear"
    WARMUP_COSINE = "warmup_cosine"


class WireDtype(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _check_factors(name: str, value: tuple[float, ...]) -> None:
    given = ",".join(map(str, value))
    hold = all(isinstance(factor, float) and math.isfinite(factor) and factor >= 0 for factor in value)
    require(
        hold and (not value or sum(value) > 0),
        "must be numbers of at least 0, not all 0",
        name,
        given,
        "For example 1,0.5.",
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The optimizer, its learning rate over time, and the penalties on weights."""

    THEME: ClassVar[str] = "optimizer"

    optimizer: OptimizerKind = setting(
        OptimizerKind.LAZY_ADAM, "sgd, adagrad or lazy_adam. Each changes only the embedding rows of the batch."
    )
    adagrad_row_wise: bool = setting(
        False, "Let adagrad keep one accumulator per row of an embedding table instead of one per value."
    )
    learning_rate: float = setting(1e-3, "Learning rate, after warm-up and before decay.", above=0, theme=_SCHEDULE)
    learning_rate_schedule: Schedule = setting(
        Schedule.CONSTANT,
        "constant. step: multiplied by --learning_rate_decay every --learning_rate_decay_steps. warmup_linear and "
        "warmup_cosine: rises over --warmup_steps, then falls to 0 at the end of --epochs.",
        theme=_SCHEDULE,
    )
    learning_rate_decay: float = setting(0.1, "Factor of the step schedule.", above=0, at_most=1, theme=_SCHEDULE)
    learning_rate_decay_steps: int = setting(
        336_000,
        "Updates between two decays of the step schedule. The default is the authors'.",
        at_least=1,
        theme=_SCHEDULE,
    )
    warmup_steps: int = setting(
        0, "Updates of linear warm-up, for the warmup_* schedules.", at_least=0, theme=_SCHEDULE
    )
    clip_norm: float = setting(
        0.0, "Largest global norm of the gradient; 0 for no clipping. The authors use 5.", at_least=0
    )
    l2: float = setting(0.0, "L2 penalty on the dense kernels: adds l2 * w to their gradient.", at_least=0)
    embedding_l2: float = setting(
        0.0,
        "L2 penalty on the embedding rows of the batch: adds embedding_l2 * row to their gradient.",
        at_least=0,
    )
    mini_batch_aware_l2: float = setting(
        0.0,
        "The paper's regularization (section 5.1): adds mini_batch_aware_l2 / (events with this id) * row to the "
        "gradient of the embedding rows of the batch.",
        at_least=0,
    )
    task_weights: tuple[float, ...] = text_setting(
        (),
        "Factor of each label's loss, in the order of --label_columns. Default: 1 for each.",
        check=_check_factors,
        later=True,
    )
    wire_dtype: WireDtype = setting(
        WireDtype.FLOAT32,
        "Type in which row gradients travel between workers: float32, bfloat16 or float16.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        warming = self.learning_rate_schedule in (Schedule.WARMUP_LINEAR, Schedule.WARMUP_COSINE)
        require(
            warming or not self.warmup_steps,
            "belongs to the warmup_* schedules",
            "warmup_steps",
            self.warmup_steps,
            "Add --learning_rate_schedule=warmup_cosine, or drop it.",
        )

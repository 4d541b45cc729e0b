"""Settings of a job: how long it trains, how it computes, how it survives failures, when it evaluates."""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar

from din_dist.config.settings import UINT32_MAX, Settings, path_setting, require, setting, text_setting


class ComputeDtype(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class TablePlacement(enum.StrEnum):
    AUTO = "auto"
    WHOLE = "whole"
    SHARDED = "sharded"


class NewRows(enum.StrEnum):
    UNKNOWN = "unknown"
    RANDOM = "random"


_WARM_START = "warm start"


def _check_output_dir(name: str, value: str) -> None:
    require(bool(value), "must name a folder", name, value, "For example runs/first.")


def _check_sharded_from_rows(name: str, value: int) -> None:
    require(value >= 1, "must be at least 1", name, value, "For example 100000.")


@dataclasses.dataclass(frozen=True)
class JobConfig(Settings):
    """The length and the order of training, and where its results go."""

    THEME: ClassVar[str] = "training"

    global_batch_size: int = setting(1024, "Examples per update over all workers.", at_least=1)
    epochs: int = setting(2, "Passes over the training examples.", at_least=1, may_change=True)
    max_steps: int = setting(
        0,
        "Stop after this many updates in all; 0 for no limit. The learning-rate schedule stays the same.",
        at_least=0,
        may_change=True,
    )
    seed: int = setting(1234, "Seed of weights, order, negatives and dropout.", at_least=0, at_most=UINT32_MAX)
    output_dir: str = path_setting(
        "runs/latest",
        "Folder of checkpoints, metrics and summary.json. A job whose folder has a checkpoint is resumed.",
        check=_check_output_dir,
        may_change=True,
    )
    warm_start_from: str = path_setting(
        "",
        "Begin a new job with what an older one has learned, on other data: the --output_dir of a job, or an export. "
        "Rows of embeddings are found by the log's own ids; slots of the optimizer come along from a job. The model, "
        "the features and the optimizer must be the same. Default: none, weights begin at random.",
        theme=_WARM_START,
        later=True,
    )
    new_rows: NewRows = text_setting(
        NewRows.UNKNOWN,
        "How rows of ids begin that the older job does not have. unknown: as its row for unknown ids, by which it "
        "scored them. random: as in a new job.",
        theme=_WARM_START,
        later=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rule, remedy = "belongs to --warm_start_from", "Add it, or drop --new_rows."
        fits = bool(self.warm_start_from) or self.new_rows is NewRows.UNKNOWN
        require(fits, rule, "new_rows", str(self.new_rows), remedy)


@dataclasses.dataclass(frozen=True)
class ExecutionConfig(Settings):
    """How updates are computed: none of it changes the model beyond rounding."""

    THEME: ClassVar[str] = "execution"

    xla: bool = setting(
        True,
        "Compile the element-wise parts of training with XLA. Updates are faster; the start takes some seconds longer.",
        may_change=True,
    )
    native: bool = setting(
        True,
        "On CPUs, train attention, Dice and batch normalization in our own C++ kernels, which launch/setup.sh "
        "compiles. Otherwise, and on GPUs, TensorFlow and XLA do it.",
        may_change=True,
    )
    compute_dtype: ComputeDtype = setting(
        ComputeDtype.FLOAT32,
        "Type to which our kernels round the factors of matrix products in training. bfloat16 needs a processor that "
        "multiplies it (AMX, AVX512_BF16). Sums, weights and everything else stay float32. On Intel's processors "
        "without AMX all is computed in float32, which is faster there.",
        may_change=True,
    )
    table_placement: TablePlacement = text_setting(
        TablePlacement.AUTO,
        "Where embedding tables and their slots lie. whole: on every worker, or once a machine if workers share "
        "memory. sharded: each worker holds a part of the rows, and asks the others for the rest. auto: whole, unless "
        "only sharded fits into memory.",
        may_change=True,
        later=True,
    )
    sharded_from_rows: int = text_setting(
        100_000,
        "Rows of the smallest table that is sharded. Smaller ones stay whole on every worker.",
        check=_check_sharded_from_rows,
        may_change=True,
        later=True,
    )


@dataclasses.dataclass(frozen=True)
class RecoveryConfig(Settings):
    """How a job survives failures: checkpoints, lost workers, updates that are not finite."""

    THEME: ClassVar[str] = "checkpoints and recovery"

    checkpoint_every_steps: int = setting(
        0, "Updates between checkpoints; 0: only at the end of each epoch.", at_least=0, may_change=True
    )
    rejoin_timeout_seconds: float = setting(
        300.0,
        "How long the rest of an elastic job waits for --min_workers, in seconds. It then saves a checkpoint and ends "
        "with exit code 75.",
        above=0,
        may_change=True,
        theme="elastic",
    )
    skip_nonfinite_steps: int = setting(
        0,
        "Most updates to skip because loss or gradient is not finite; one more stops the job. 0: the first one stops "
        "it.",
        at_least=0,
        may_change=True,
    )
    keep_checkpoints: int = setting(
        2, "Newest checkpoints to keep. The best by validation is kept as well.", at_least=1, may_change=True
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Settings):
    """When the model is evaluated during training, and what follows from it."""

    THEME: ClassVar[str] = "evaluation"

    evaluate_every_steps: int = setting(
        0, "Updates between validations; 0: only at the end of each epoch.", at_least=0, may_change=True
    )
    evaluation_batch_size: int = setting(
        4096, "Examples per evaluation batch on each worker.", at_least=1, may_change=True
    )
    early_stopping_patience: int = setting(
        0,
        "Stop after this many validations in a row without a better GAUC; 0: never. Needs a validation split.",
        at_least=0,
        may_change=True,
    )
    validation_task: str = text_setting(
        "",
        "The one of --label_columns by which the best weights are chosen, training stops early and items are ranked. "
        "Metrics without a label's name are its own. Default: the first.",
        later=True,
    )

"""Every setting of a job, checked when it is built.

One dataclass a room; each field carries its help text, from which `cli/flags.py` makes the flag of the same name,
so that a setting is written down once. Errors are `InputError`s: the rule, what came, what to do.
"""

from __future__ import annotations

import csv
import dataclasses
import enum
import hashlib
import io
import json
import math
from collections.abc import Iterable
from typing import Any

from din_dist.errors import InputError
from din_dist.files import local_path, without_password


class Split(enum.StrEnum):
    LEAVE_ONE_OUT = "leave_one_out"
    LEAVE_TWO_OUT = "leave_two_out"
    TEMPORAL = "temporal"


class UnknownItem(enum.StrEnum):
    UNTRAINED = "untrained"
    FEATURES = "features"


class ModelKind(enum.StrEnum):
    DIN = "din"
    MEAN_POOLING = "mean_pooling"


class Activation(enum.StrEnum):
    SIGMOID = "sigmoid"
    DICE = "dice"
    PRELU = "prelu"
    RELU = "relu"


class AttentionNormalization(enum.StrEnum):
    SOFTMAX = "softmax"
    NONE = "none"


class BatchNorm(enum.StrEnum):
    SYNCED = "synced"
    FROZEN = "frozen"


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


class ComputeDtype(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class LogFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


UNKNOWN_ITEM_RATE = 0.1
_INT32_MAX, _UINT32_MAX, _INT64_MAX = 2**31 - 1, 2**32 - 1, 2**63 - 1


def setting(default: Any, help_text: str, at_most: int = _INT32_MAX) -> Any:
    """A dataclass field with the help text of its flag; `at_most` holds for whole numbers, and for their opposites."""
    return dataclasses.field(default=default, metadata={"help": help_text, "at_most": at_most})


def path_setting(default: str, help_text: str) -> Any:
    """As `setting`, of a path: what users may write for one is the same everywhere, see `files.local_path`."""
    return dataclasses.field(default=default, metadata={"help": help_text, "path": True})


def resolve_paths(config: Any) -> None:
    """Gives the `path_setting`s of a dataclass that is being built the form in which the system takes them.

    Raises:
        InputError: one is no path of this machine.
    """
    for field in dataclasses.fields(config):
        if field.metadata.get("path"):
            object.__setattr__(config, field.name, local_path(getattr(config, field.name), field.name))


def require(holds: bool, rule: str, name: str, value: object, remedy: str) -> None:
    """Raises `InputError` in the one form that all settings share."""
    if not holds:
        raise InputError(f"--{name}: {rule}. Received: {value!r}. {remedy}")


def require_numbers_that_fit(config: Any) -> None:
    """Checks that the numbers of a dataclass that is being built can be computed with.

    Raises:
        InputError: one is too large, or is not finite.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                require(math.isfinite(number), "must be finite", field.name, number, f"For example {field.default}.")
            elif isinstance(number, int):
                most = field.metadata.get("at_most", _INT32_MAX)
                remedy = f"Give a number up to {most}."
                require(abs(number) <= most, f"must be at most {most}", field.name, number, remedy)


def list_text(values: Iterable[object]) -> str:
    """Returns values as a flag that takes a list understands them, commas and quotes among them."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def _require_at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= low, f"must be at least {low}", name, value, f"Give a number from {low} up.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    dataset: str = setting(
        "complete_journey",
        "Data set: complete_journey (real purchases, installed with the package), amazon_reviews/CATEGORY "
        "(McAuley's 5-core files), event_log (your own files, see --data_path) or synthetic (any size, for tests).",
    )
    data_path: str = path_setting(
        "",
        "Your events for --dataset=event_log: one Parquet, CSV or JSON-lines file, a folder of them, or a quoted glob. "
        "For amazon_reviews: a folder with files downloaded by hand.",
    )
    data_dir: str = path_setting(
        "", "Where prepared data lives. Default: a folder `din_dist` in the user's cache folder."
    )
    user_column: str = setting("user_id", "Column of the user's id (string or integer).")
    item_column: str = setting("item_id", "Column of the item's id (string or integer).")
    timestamp_column: str = setting("timestamp", "Column of the time of the event (integer, any unit, or a date type).")
    label_column: str = setting(
        "label", "Column of the click label, 0 or 1. The default column may be absent: then every event is a positive."
    )
    label_column_required: bool = dataclasses.field(default=False, metadata={})  # it was asked for by name
    item_features: tuple[str, ...] = setting(
        ("category_id",),
        "Columns that describe the item (category, brand, ...), comma-separated; each is embedded and joined to the "
        "item's own embedding. Empty for none. The default column may be absent.",
    )
    item_features_required: bool = dataclasses.field(default=False, metadata={})
    presorted: bool = setting(
        False, "The log is already in time order for each user: keep the file's order, and fail where it is not."
    )
    synthetic_num_users: int = setting(10_000, "Users of --dataset=synthetic.")
    synthetic_num_items: int = setting(10_000, "Items of --dataset=synthetic.")
    synthetic_num_categories: int = setting(100, "Item categories of --dataset=synthetic.")
    synthetic_events_per_user: int = setting(30, "Mean number of events a user of --dataset=synthetic.")
    synthetic_seed: int = setting(0, "Seed of --dataset=synthetic.", at_most=_INT64_MAX)
    split: Split = setting(
        Split.LEAVE_ONE_OUT,
        "leave_one_out: each user's last event is the test example, the rest train (the authors' protocol). "
        "leave_two_out: the last tests, the last but one validates. temporal: cut by time.",
    )
    validation_from: int = setting(
        0,
        "For --split=temporal: events from this timestamp on validate. 0: the time before which 80% of events lie.",
        at_most=_INT64_MAX,
    )
    test_from: int = setting(
        0,
        "For --split=temporal: events from this timestamp on test. 0: the time before which 90% of events lie.",
        at_most=_INT64_MAX,
    )
    max_history_length: int = setting(100, "Longest behaviour history, in events; the newest are kept.")
    negatives_per_positive: int = setting(
        1, "Without labels: random items that the user never touched, per positive, for training."
    )
    resample_negatives: bool = setting(False, "Draw other training negatives in each epoch.")
    group_negatives: bool = setting(
        False,
        "Without labels: an event and its negatives come one after the other in the order of an epoch, not each by "
        "itself. They share a history, so an update has fewer distinct items, and fewer table rows to send and change. "
        "Each row is then in fewer updates: a penalty on the rows in use (--embedding_l2) may be larger.",
    )
    evaluation_negatives_per_positive: int = setting(
        1, "Without labels: negatives per positive for validation and test (the authors use 1); never redrawn."
    )
    unknown_item: UnknownItem = setting(
        UnknownItem.UNTRAINED,
        "How items score that training never saw. untrained: by vectors that have learned nothing. features: by what "
        "their item features say, which is learned by hiding item ids at random (--unknown_item_rate).",
    )
    unknown_item_rate: float = setting(
        UNKNOWN_ITEM_RATE, "For --unknown_item=features: share of the item ids hidden in training, between 0 and 1."
    )

    def __post_init__(self) -> None:
        resolve_paths(self)
        require_numbers_that_fit(self)
        kind, _, category = self.dataset.partition("/")
        known = ("complete_journey", "amazon_reviews", "event_log", "synthetic")
        require(kind in known, "unknown data set", "dataset", self.dataset, f"Choose one of {', '.join(known)}.")
        require(
            kind == "amazon_reviews" or not category,
            "only amazon_reviews has configurations",
            "dataset",
            self.dataset,
            f"Write --dataset={kind}.",
        )
        require(
            kind != "event_log" or bool(self.data_path),
            "--dataset=event_log needs your files",
            "data_path",
            self.data_path,
            "Give a file, a folder or a glob.",
        )
        require(
            kind in ("event_log", "amazon_reviews") or not self.data_path,
            f"--dataset={kind} reads no files of yours",
            "data_path",
            self.data_path,
            "Add --dataset=event_log.",
        )
        require(
            len(set(self.item_features)) == len(self.item_features),
            "each feature may be named once",
            "item_features",
            ",".join(self.item_features),
            "Remove the repetition.",
        )
        columns = (self.user_column, self.item_column, self.timestamp_column, self.label_column, *self.item_features)
        for name in columns:
            require(columns.count(name) == 1, "a column can have one role", "item_features", name, "Use it once.")
            rule, remedy = "a column's name must be one line", "Rename the column."
            require(len(name.splitlines()) <= 1, rule, "item_features", name, remedy)
        _require_at_least(self, 1, "max_history_length", "negatives_per_positive", "evaluation_negatives_per_positive")
        _require_at_least(self, 2, "synthetic_num_items", "synthetic_events_per_user")
        _require_at_least(self, 1, "synthetic_num_users", "synthetic_num_categories")
        _require_at_least(self, 0, "synthetic_seed")
        require(
            0 < self.unknown_item_rate < 1,
            "must be between 0 and 1",
            "unknown_item_rate",
            self.unknown_item_rate,
            f"For example {UNKNOWN_ITEM_RATE}.",
        )
        require(
            self.unknown_item is UnknownItem.FEATURES or self.unknown_item_rate == UNKNOWN_ITEM_RATE,
            "belongs to --unknown_item=features",
            "unknown_item_rate",
            self.unknown_item_rate,
            "Add --unknown_item=features, or drop it.",
        )
        if self.split is not Split.TEMPORAL:
            for name in ("validation_from", "test_from"):
                value = getattr(self, name)
                require(not value, "belongs to --split=temporal", name, value, "Drop it, or use --split=temporal.")
        elif self.validation_from and self.test_from:
            require(
                self.validation_from < self.test_from,
                "must be earlier than --test_from",
                "validation_from",
                self.validation_from,
                f"Give a timestamp before {self.test_from}.",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    model: ModelKind = setting(ModelKind.DIN, "din, or mean_pooling (the authors' base model: no attention).")
    embedding_dim: tuple[int, ...] = setting(
        (64,), "Width of the embeddings: one number for all, or the item's followed by each item feature's."
    )
    attention_hidden_units: tuple[int, ...] = setting((80, 40), "Hidden layers of the local activation unit.")
    hidden_units: tuple[int, ...] = setting((80, 40), "Hidden layers of the head.")
    activation: Activation = setting(Activation.SIGMOID, "Activation of the hidden layers of head and attention.")
    attention_normalization: AttentionNormalization = setting(
        AttentionNormalization.SOFTMAX, "softmax over the history (the authors' code) or none (the paper)."
    )
    batch_norm: BatchNorm = setting(
        BatchNorm.SYNCED,
        "synced: statistics of the whole global batch; frozen: never updated, as the authors' code ran.",
    )
    dropout: float = setting(0.0, "Share of the head's hidden units left out in training, from 0 to below 1.")

    def __post_init__(self) -> None:
        require_numbers_that_fit(self)
        for name in ("embedding_dim", "attention_hidden_units", "hidden_units"):
            value = getattr(self, name)
            require(
                len(value) > 0 and all(isinstance(width, int) and width > 0 for width in value),
                "must be one or more positive numbers",
                name,
                ",".join(map(str, value)),
                "For example 80,40.",
            )
        require(0 <= self.dropout < 1, "must be in [0, 1)", "dropout", self.dropout, "For example 0.2.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    optimizer: OptimizerKind = setting(
        OptimizerKind.LAZY_ADAM, "sgd, adagrad or lazy_adam. All of them touch only the embedding rows of the batch."
    )
    adagrad_row_wise: bool = setting(
        False, "adagrad keeps one accumulator a row of an embedding table, not one a value."
    )
    learning_rate: float = setting(1e-3, "Learning rate (after warm-up, before decay).")
    learning_rate_schedule: Schedule = setting(
        Schedule.CONSTANT,
        "constant; step: times --learning_rate_decay every --learning_rate_decay_steps; warmup_linear and "
        "warmup_cosine: up over --warmup_steps, then down to 0 at the end of --epochs.",
    )
    learning_rate_decay: float = setting(0.1, "Factor of the step schedule.")
    learning_rate_decay_steps: int = setting(336_000, "Steps between two decays of the step schedule (the authors').")
    warmup_steps: int = setting(0, "Steps of linear warm-up of the warmup_* schedules.")
    clip_norm: float = setting(0.0, "Largest global norm of the gradient; 0 for no clipping. The authors: 5.")
    l2: float = setting(0.0, "L2 on the dense kernels: adds l2 * w to their gradient.")
    embedding_l2: float = setting(
        0.0, "L2 on the embedding rows of the batch: adds embedding_l2 * row to the gradient."
    )
    mini_batch_aware_l2: float = setting(
        0.0,
        "The paper's regularisation (section 5.1): adds mini_batch_aware_l2 / (events with this id) * row to the "
        "gradient of the rows of the batch.",
    )
    wire_dtype: WireDtype = setting(
        WireDtype.FLOAT32, "How row gradients travel between workers: float32, bfloat16 or float16."
    )

    def __post_init__(self) -> None:
        require_numbers_that_fit(self)
        require(self.learning_rate > 0, "must be positive", "learning_rate", self.learning_rate, "For example 0.001.")
        _require_at_least(self, 0, "clip_norm", "l2", "embedding_l2", "mini_batch_aware_l2", "warmup_steps")
        _require_at_least(self, 1, "learning_rate_decay_steps")
        require(
            0 < self.learning_rate_decay <= 1,
            "must be in (0, 1]",
            "learning_rate_decay",
            self.learning_rate_decay,
            "For example 0.1.",
        )
        warming = self.learning_rate_schedule in (Schedule.WARMUP_LINEAR, Schedule.WARMUP_COSINE)
        require(
            warming or not self.warmup_steps,
            "belongs to the warmup_* schedules",
            "warmup_steps",
            self.warmup_steps,
            "Add --learning_rate_schedule=warmup_cosine, or drop it.",
        )


@dataclasses.dataclass(frozen=True)
class JobConfig:
    global_batch_size: int = setting(1024, "Examples per update over all workers.")
    epochs: int = setting(2, "Passes over the training examples.")
    max_steps: int = setting(
        0, "Stop after this many updates in all; 0 for no limit. Does not change the learning-rate schedule."
    )
    seed: int = setting(1234, "Seed of weights, order, negatives and dropout.", at_most=_UINT32_MAX)
    output_dir: str = path_setting(
        "runs/latest", "Where checkpoints, metrics and summary.json go. A folder with a checkpoint is resumed."
    )
    xla: bool = setting(
        True, "Compile the element-wise parts of training with XLA: faster steps, some seconds at the start."
    )
    native: bool = setting(
        True,
        "On CPUs, train attention, Dice and batch normalisation in kernels of our own, which launch/setup.sh has "
        "compiled; else, and on GPUs, by TensorFlow and XLA.",
    )
    compute_dtype: ComputeDtype = setting(
        ComputeDtype.FLOAT32,
        "What training in our kernels rounds the factors of matrix products to: float32, as they are, or bfloat16, on "
        "processors that multiply it (AVX512_BF16). Sums, weights and all else stay float32.",
    )
    checkpoint_every_steps: int = setting(0, "Updates between checkpoints; 0: at the end of each epoch only.")
    rejoin_timeout_seconds: float = setting(
        300.0,
        "How long the rest of an elastic job waits for --min_workers before it saves a checkpoint and ends with exit "
        "code 75.",
    )
    skip_nonfinite_steps: int = setting(
        0, "Updates to leave out at most because loss or gradient is not finite; one more stops the job. Default: none."
    )
    keep_checkpoints: int = setting(2, "Newest checkpoints to keep; the best by validation is kept as well.")
    evaluate_every_steps: int = setting(0, "Updates between validations; 0: at the end of each epoch only.")
    evaluation_batch_size: int = setting(4096, "Examples per evaluation batch on each worker.")
    early_stopping_patience: int = setting(
        0, "Stop after this many validations in a row without a better GAUC; 0 for never. Needs a validation split."
    )
    log_every_steps: int = setting(100, "Updates between two log lines and TensorBoard points.")
    log_format: LogFormat = setting(
        LogFormat.TEXT, "Lines on stderr: text for people, or json, an object a line, for log collectors."
    )
    histograms_every_steps: int = setting(
        1000, "Updates between TensorBoard histograms of attention weights and embedding norms; 0 for none."
    )
    profile_at_step: int = setting(
        0,
        "Profile 20 updates from this one on, for TensorBoard; 0 for none. A running job does so when a file named "
        "`profile` appears in --output_dir.",
    )
    projector_items: int = setting(
        1000, "Most frequent items whose embeddings go to TensorBoard's projector when a job is done; 0 for none."
    )
    metrics_host: str = setting("127.0.0.1", "Address that the Prometheus exporters listen on.")
    metrics_port: int = setting(
        0,
        "Prometheus port of the first worker of a machine, the next ones take the next ports. 0: a free port each, "
        "written to targets.json in --output_dir. -1: no exporter.",
    )
    metrics_tls_certificate: str = path_setting(
        "", "PEM certificate by which the exporters serve HTTPS. Default: HTTP."
    )
    metrics_tls_key: str = path_setting("", "PEM file with the key of --metrics_tls_certificate.")
    metrics_password_file: str = path_setting(
        "", "File with lines user:password, one of which a scrape must give (basic authentication). Default: none."
    )
    pushgateway: str = setting(
        "",
        "URL of a Prometheus Pushgateway that gets the last values when a job ends; a password belongs into "
        "--pushgateway_password_file. Default: none.",
    )
    pushgateway_password_file: str = path_setting(
        "",
        "File with one line user:password, for a Pushgateway that asks for it (basic authentication). Default: none.",
    )
    baseline_examples_per_second: float = setting(
        0.0, "What one worker alone does (see cli/benchmark.py): lets Prometheus tell the scaling efficiency."
    )

    def __post_init__(self) -> None:
        resolve_paths(self)
        require_numbers_that_fit(self)
        _require_at_least(
            self, 1, "global_batch_size", "epochs", "keep_checkpoints", "evaluation_batch_size", "log_every_steps"
        )
        _require_at_least(
            self,
            0,
            "max_steps",
            "seed",
            "skip_nonfinite_steps",
            "checkpoint_every_steps",
            "evaluate_every_steps",
            "early_stopping_patience",
            "histograms_every_steps",
            "profile_at_step",
            "projector_items",
            "baseline_examples_per_second",
        )
        require(
            self.rejoin_timeout_seconds > 0,
            "must be positive",
            "rejoin_timeout_seconds",
            self.rejoin_timeout_seconds,
            "For example 300.",
        )
        require(
            -1 <= self.metrics_port <= 65535,
            "must be a port, 0 or -1",
            "metrics_port",
            self.metrics_port,
            "For example 9400.",
        )
        require(
            bool(self.metrics_tls_certificate) == bool(self.metrics_tls_key),
            "needs --metrics_tls_key, and the other way round",
            "metrics_tls_certificate",
            self.metrics_tls_certificate,
            "Give both, or neither.",
        )
        require(
            not self.pushgateway or self.pushgateway.startswith(("http://", "https://")),
            "must be a URL",
            "pushgateway",
            without_password(self.pushgateway),
            "For example http://pushgateway:9091.",
        )
        require(  # flags are kept in checkpoints, reports and exports, and all users of a machine see them
            without_password(self.pushgateway) == self.pushgateway,
            "must be without user and password",
            "pushgateway",
            without_password(self.pushgateway),
            "Give them in --pushgateway_password_file.",
        )
        require(
            bool(self.pushgateway) or not self.pushgateway_password_file,
            "belongs to --pushgateway",
            "pushgateway_password_file",
            self.pushgateway_password_file,
            "Add --pushgateway, or drop it.",
        )
        require(bool(self.output_dir), "must name a folder", "output_dir", self.output_dir, "For example runs/first.")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a training job."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    job: JobConfig = JobConfig()

    def __post_init__(self) -> None:
        require(
            self.data.split is not Split.LEAVE_ONE_OUT or not self.job.early_stopping_patience,
            "needs a validation split, which leave_one_out has not",
            "early_stopping_patience",
            self.job.early_stopping_patience,
            "Use --split=leave_two_out or temporal, or drop it.",
        )

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


# What may differ between a checkpoint and the job that resumes it: how long, how often, where; never what is learned.
FREE_TO_CHANGE = {
    "data": {
        "data_path",
        "data_dir",
        "evaluation_negatives_per_positive",
        "label_column_required",  # these two say how a flag was given; what was found, the data's fingerprint tells
        "item_features_required",
    },
    "model": set(),
    "optimizer": {"wire_dtype"},
    "job": {field.name for field in dataclasses.fields(JobConfig)} - {"global_batch_size", "seed"},
}


def differences(saved: dict, current: dict) -> list[str]:
    """Settings by which two `Config.to_json()` would train different models, as `--name: saved, now current`.

    What `saved` does not name yet had its default: settings are added so that their default is what was done before.
    """
    before, now = _learned_by(Config().to_json()) | _learned_by(saved), _learned_by(current)
    return [f"--{name}: {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value]


def digest_of(config: Config, data_fingerprint: str) -> int:
    """A number of 63 bits: equal for jobs that train the same model on the same data."""
    text = json.dumps([_learned_by(config.to_json()), data_fingerprint], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _learned_by(settings: dict) -> dict[str, Any]:
    """Of a `Config.to_json()`, what decides the model that is trained."""
    return {
        name: _plain(value)
        for room, free in FREE_TO_CHANGE.items()
        for name, value in settings.get(room, {}).items()
        if name not in free
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

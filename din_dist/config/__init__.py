"""Every setting of a job, checked when it is built: one class per theme, all of them together in `Config`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from din_dist.config.data import (
    ALL_BEHAVIOURS,
    FORGETTING,
    LABELLED,
    LONG,
    SKIPPED,
    UNKNOWN_ITEM_RATE,
    DataConfig,
    HistoryCut,
    HistoryEnds,
    Negatives,
    Split,
    UnknownItem,
)
from din_dist.config.job import (
    ComputeDtype,
    EvaluationConfig,
    ExecutionConfig,
    JobConfig,
    NewRows,
    RecoveryConfig,
    TablePlacement,
)
from din_dist.config.model import (
    Activation,
    AttentionKind,
    AttentionNormalization,
    BatchNorm,
    EvaluateWith,
    InterestWeights,
    ModelConfig,
    ModelKind,
    PositionVectors,
    Readout,
    Sampler,
    SessionQuery,
    SessionReadout,
    Softmax,
    TaskHead,
)
from din_dist.config.optimizer import OptimizerConfig, OptimizerKind, Schedule, WireDtype
from din_dist.config.settings import Settings, is_saved, list_text, require
from din_dist.config.telemetry import LogFormat, TelemetryConfig, TrackerKind

__all__ = [
    "ALL_BEHAVIOURS",
    "FORGETTING",
    "LABELLED",
    "LONG",
    "SKIPPED",
    "UNKNOWN_ITEM_RATE",
    "Activation",
    "AttentionKind",
    "AttentionNormalization",
    "BatchNorm",
    "ComputeDtype",
    "Config",
    "DataConfig",
    "EvaluateWith",
    "EvaluationConfig",
    "ExecutionConfig",
    "HistoryCut",
    "HistoryEnds",
    "InterestWeights",
    "JobConfig",
    "LogFormat",
    "ModelConfig",
    "ModelKind",
    "Negatives",
    "NewRows",
    "OptimizerConfig",
    "OptimizerKind",
    "PositionVectors",
    "Readout",
    "RecoveryConfig",
    "Sampler",
    "Schedule",
    "SessionQuery",
    "SessionReadout",
    "Settings",
    "Softmax",
    "Split",
    "TablePlacement",
    "TaskHead",
    "TelemetryConfig",
    "TrackerKind",
    "UnknownItem",
    "WireDtype",
    "decisive",
    "differences",
    "digest_of",
    "list_text",
    "require",
]

_OWN_ROOMS = ("data", "model", "optimizer")  # of a manifest, which keeps all other settings under "job"


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a training job. Manifests and flagfiles keep the order of the fields."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    job: JobConfig = JobConfig()
    execution: ExecutionConfig = ExecutionConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    def __post_init__(self) -> None:
        require(
            self.data.split is not Split.LEAVE_ONE_OUT or not self.evaluation.early_stopping_patience,
            "needs a validation split, which leave_one_out has not",
            "early_stopping_patience",
            self.evaluation.early_stopping_patience,
            "Use --split=leave_two_out, temporal or users, or drop it.",
        )
        self._check_tasks()
        self._check_model()

    def _check_model(self) -> None:
        kind, data = self.model.model, self.data
        drawn = data.negatives_per_positive
        if not kind.retrieves:
            rule, remedy = "a model that ranks needs negatives", "Give at least 1."
            require(drawn > 0, rule, "negatives_per_positive", drawn, remedy)
            cut, remedy = data.history_cut, "Drop it, or use a --model that finds items."
            rule = f"is for models that find items, and {kind} ranks"
            require(cut is HistoryCut.EVENT, rule, "history_cut", str(cut), remedy)
            return
        positions, longest = self.model.num_positions, data.max_history_length
        rule, remedy = f"must be at least --max_history_length={longest}", f"Give {longest}."
        require(positions >= longest or not kind.has_positions, rule, "num_positions", positions, remedy)
        refused = {
            "label_columns": (list_text(data.label_columns), ""),
            "histories": (list_text(data.histories), ""),
            "long_history": (data.long_history, ""),
            "negatives": (data.negatives, Negatives.UNIFORM),
        }
        for name, (value, default) in refused.items():
            remedy = "Drop it." if name != "negatives" else "Drop it, or give --sampler instead."
            require(value == default, f"is for models that rank, and {kind} finds", name, value, remedy)
        # Their negatives are those of the softmax, so an event is one example.
        object.__setattr__(self, "data", dataclasses.replace(data, negatives_per_positive=0))

    def _check_tasks(self) -> None:
        tasks, factors = self.data.label_columns, self.optimizer.task_weights
        head, validated = self.model.task_head, self.evaluation.validation_task
        rule = "is for several labels"
        require(bool(tasks) or head == TaskHead.SHARED, rule, "task_head", head, "Give --label_columns, or drop it.")
        rule, remedy = "must be one of --label_columns", f"Choose among {', '.join(tasks) or 'them'}, or drop it."
        require(not validated or validated in tasks, rule, "validation_task", validated, remedy)
        fits = len(factors) in (0, len(tasks))
        rule, given = "must have one number for each of --label_columns", list_text(factors)
        require(
            fits, rule, "task_weights", given, f"Give {len(tasks)}." if tasks else "Give --label_columns, or drop it."
        )

    @property
    def main_task(self) -> int:
        """The label that models are chosen and items are ranked by: its place among `data.label_columns`; 0 without."""
        validated = self.evaluation.validation_task
        return self.data.label_columns.index(validated) if validated else 0

    def parts(self) -> Iterator[tuple[str, Settings]]:
        """Yields the name and the settings of each theme."""
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)

    def replace(self, **values: Any) -> Config:
        """Returns these settings with some changed, each given by the name of its flag.

        Raises:
            InputError: the new values break a rule.
            TypeError: there is no such setting.
        """
        parts = {}
        for name, part in self.parts():
            own = {field.name for field in dataclasses.fields(part)} & values.keys()
            parts[name] = dataclasses.replace(part, **{setting: values.pop(setting) for setting in own})
        if values:
            raise TypeError(f"No such settings: {', '.join(values)}.")
        return Config(**parts)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Returns the settings as a checkpoint's manifest keeps them."""
        rooms: dict[str, dict[str, Any]] = {}
        for name, part in self.parts():
            values = dataclasses.asdict(part)
            saved = {
                field.name: values[field.name]
                for field in dataclasses.fields(part)
                if is_saved(field, values[field.name])
            }
            rooms.setdefault(_room(name), {}).update(saved)
        return rooms


def differences(saved: dict, current: dict) -> list[str]:
    """Lists, as `--name: saved, now current`, the settings by which two `Config.to_json()` learn different models.

    A setting that `saved` does not have yet had its default, because settings are added so that their default is what
    was done before.
    """
    before, now = decisive(saved), decisive(current)
    return [f"--{name}: {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value]


def decisive(saved: dict) -> dict[str, Any]:
    """Returns, by name, the settings of a `Config.to_json()` that decide what is learned, absent ones as defaults."""
    return _defaults() | _decisive(saved)


def digest_of(config: Config, data_fingerprint: str) -> int:
    """Returns a number of 63 bits that is equal for jobs that train the same model on the same data."""
    text = json.dumps([_decisive(config.to_json()), data_fingerprint], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _defaults() -> dict[str, Any]:
    """Returns the default of each setting that decides what is learned."""
    fields = [field for _, part in Config().parts() for field in dataclasses.fields(part)]
    return {field.name: _plain(field.default) for field in fields if not field.metadata.get("may_change")}


def _decisive(rooms: dict) -> dict[str, Any]:
    """Returns those settings of a `Config.to_json()` that decide what is learned."""
    return {
        field.name: _plain(rooms[room][field.name])
        for name, part in Config().parts()
        for field in dataclasses.fields(part)
        if not field.metadata.get("may_change") and field.name in rooms.get(room := _room(name), {})
    }


def _room(part: str) -> str:
    return part if part in _OWN_ROOMS else "job"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

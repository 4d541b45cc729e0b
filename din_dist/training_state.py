"""Where a job stands: everything that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from din_dist.text import is_count, is_integer, shown


@dataclasses.dataclass
class TrainingState:
    """The position in training, which does not depend on the number of workers, and what was found so far.

    `examples_seen` counts within `epoch` (from 0); `step` counts updates in all. `example_checksum` is the sum, modulo
    2**64, of a hash of each example seen this epoch: equal sums mean that each was seen exactly once.
    """

    epoch: int = 0
    examples_seen: int = 0
    step: int = 0
    epoch_loss: float = 0.0  # sum over the examples seen
    example_checksum: int = 0
    best_validation: float = -math.inf  # GAUC, or AUC where no user has both labels
    best_step: int = 0
    validations_without_gain: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite
    epoch_records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    parent: dict[str, Any] | None = None  # what a warm start began from; see `Origin` in training/warm_start.py

    def advance(self, examples: int, loss: float, checksum: int = 0) -> None:
        """Counts one update on `examples` with mean loss `loss`; `checksum`: the sum of the examples' hashes."""
        self.example_checksum = (self.example_checksum + checksum) % 2**64
        self.step += 1
        self.examples_seen += examples
        self.epoch_loss += loss * examples

    @property
    def slot_updates(self) -> int:
        """How often the optimizer's slots were updated, in this job and in those before it."""
        return self.step + (self.parent["slot_updates"] if self.parent else 0)

    @property
    def examples(self) -> int:
        """The number of examples seen in all epochs."""
        return self.examples_seen + sum(record["examples"] for record in self.epoch_records)

    def end_epoch(self) -> dict[str, Any]:
        """Records the complete epoch and starts the next one."""
        self.epoch += 1
        record = {
            "epoch": self.epoch,
            "examples": self.examples_seen,
            "example_checksum": f"{self.example_checksum:016x}",  # too long for a number in JSON
            "loss": self.epoch_loss / self.examples_seen,
        }
        self.epoch_records.append(record)
        self.examples_seen, self.epoch_loss, self.example_checksum = 0, 0.0, 0
        return record

    def note_validation(self, value: float) -> bool:
        """Records a validation. Returns True if it is the best so far."""
        if value > self.best_validation:
            self.best_validation, self.best_step, self.validations_without_gain = value, self.step, 0
            return True
        self.validations_without_gain += 1
        return False

    def copy(self) -> TrainingState:
        return dataclasses.replace(self, epoch_records=list(self.epoch_records))

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        fields["best_validation"] = self.best_validation if math.isfinite(self.best_validation) else None
        if self.parent is None:
            del fields["parent"]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainingState:
        """Returns the state that `to_json` wrote.

        Raises:
            ValueError: `fields` are no such state.
        """
        if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"a training state with {shown(unknown[0])}")
        best = fields.get("best_validation")
        fields = {**fields, "best_validation": -math.inf if best is None else best}
        if wrong := [name for name, value in fields.items() if not _is_possible(name, value)]:
            raise ValueError(f"a training state whose {wrong[0]} is {shown(fields[wrong[0]])}")
        return cls(**fields)


def _is_possible(name: str, value: Any) -> bool:
    if name == "epoch_records":
        records = value if isinstance(value, list) else [None]
        return all(isinstance(record, dict) and is_count(record.get("examples")) for record in records)
    if name == "parent":
        texts, counts = ("path", "kind", "digest"), ("step", "slot_updates")
        return isinstance(value, dict) and (
            all(isinstance(value.get(text), str) for text in texts)
            and all(is_count(value.get(name)) for name in counts)
        )
    if name in ("epoch_loss", "best_validation"):
        return isinstance(value, float) or is_integer(value)
    if name == "example_checksum":
        return isinstance(value, int) and 0 <= value < 2**64
    return is_count(value)

"""The labels that an export predicts, each with the names of its outputs and its calibrator.

Letters of shapes: C candidates, T labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from din_dist.serving.calibrator import Calibrator


@dataclasses.dataclass(frozen=True)
class PredictedLabel:
    """One label.

    Attributes:
        task: its name; empty for the only one.
        calibrator: turns its logits into probabilities.
    """

    task: str = ""
    calibrator: Calibrator = Calibrator()

    @property
    def logits(self) -> str:
        """The name of the output of logits."""
        return f"logits_{self.task}" if self.task else "logits"

    @property
    def probability(self) -> str:
        """The name of the output, and of the column, of probabilities."""
        return f"probability_{self.task}" if self.task else "click_probability"

    @property
    def logit(self) -> str:
        """The name of the column of logits, in tables."""
        return f"logit_{self.task}" if self.task else "logit"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """All labels of an export.

    Attributes:
        labels: in the order of the model's logits.
        main: the place of the one that items are ranked by.
    """

    labels: tuple[PredictedLabel, ...] = (PredictedLabel(),)
    main: int = 0

    @classmethod
    def of(
        cls, tasks: Sequence[str], main: int = 0, calibrators: Mapping[str, Calibrator] | None = None
    ) -> Predictions:
        """Returns the predictions of several tasks, or of one click without any.

        Args:
            tasks: their names.
            main: the place of the one that items are ranked by.
            calibrators: task, or empty for one click -> its calibrator. None: probabilities are sigmoids.
        """
        given = calibrators or {}
        return cls(tuple(PredictedLabel(task, given.get(task, Calibrator())) for task in tasks or [""]), main)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the labels, if there are several."""
        return tuple(label.task for label in self.labels if label.task)

    def columns(self, logits: Any) -> Iterator[tuple[PredictedLabel, Any]]:
        """Yields each label with its logits `[C]`, of an array or tensor `[C]` or `[C, T]`."""
        for place, label in enumerate(self.labels):
            yield label, logits[:, place] if self.tasks else logits

    def ranking(self, logits: Any) -> Any:
        """Returns the logits `[C]` by which items are ranked, of an array or tensor `[C]` or `[C, T]`."""
        return logits[:, self.main] if self.tasks else logits

    def stacked(self, outputs: Mapping[str, Any], stack: Any) -> Any:
        """Returns the logits `[C]` or `[C, T]` of an export's outputs.

        Args:
            outputs: by name.
            stack: NumPy's or TensorFlow's function of that name.
        """
        columns = [outputs[label.logits] for label in self.labels]
        return stack(columns, axis=1) if self.tasks else columns[0]

"""The model that the server serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from din_dist.serving.http.parse import Instance, Vocabulary
from din_dist.serving.http.scoring import Scorer, score_together
from din_dist.serving.predictions import Predictions


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A model and its description for clients.

    Each request keeps the one that it began with, so a version's memory is free after the last of its requests.
    """

    scorer: Scorer
    vocabulary: Vocabulary
    version: int
    description: Mapping[str, Any]
    predictions: Predictions = Predictions()

    def score(self, instances: Sequence[Instance]) -> list[Any]:
        """Returns the logits of each instance; see `score_together`."""
        return score_together(self.scorer, self.vocabulary, instances)

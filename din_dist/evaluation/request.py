"""What an evaluation is to tell. Nothing here needs TensorFlow, so that wrong flags are answered at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from din_dist.config import Config, require
from din_dist.errors import InputError

if TYPE_CHECKING:
    from din_dist.data.event_store import EventStore
    from din_dist.data.splits import Examples

ALL, NONE, AUTO = "all", "none", "auto"
AUTO_CANDIDATES = 30_000_000  # that --max_events=auto scores in all


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """What is to be told. Names are those of the flags.

    Attributes:
        rank_against: how many items that the user never touched; 0: all items; None: no retrieval metrics.
        ks: ascending; those of the default that are longer than all candidates are left out.
        max_events: None: as many as have `AUTO_CANDIDATES` candidates in all.
    """

    evaluation_split: str
    rank_against: int | None
    exclude_history: bool
    ks: tuple[int, ...]
    max_events: int | None
    bootstrap_samples: int
    by_default: bool = False  # `ks`

    def __post_init__(self) -> None:
        require(bool(self.ks), "must name a length", "ks", "", "For example 1,5,10,20.")
        least, value = "must be at least 0", self.bootstrap_samples
        require(value >= 0, least, "bootstrap_samples", value, "For example 1000.")

    def fitted(self, config: Config, store: EventStore, splits: Mapping[str, Examples]) -> EvaluationRequest:
        """Returns what can be told of the data.

        Raises:
            InputError: what was asked for by name cannot be.
        """
        split, num_items = self.evaluation_split, store.facts.num_items
        if not splits[split].num_examples:
            there = [name for name, examples in splits.items() if examples.num_examples]
            raise InputError(
                f"--evaluation_split: must have examples. Received: {split}, which has none with --split="
                f"{config.data.split}. Choose among {', '.join(there)}."
            )
        if self.rank_against is None:
            return self
        rule = f"must be fewer than the {num_items} items"
        remedy = f"Give {ALL}, or a smaller number."
        require(self.rank_against < num_items, rule, "rank_against", self.rank_against, remedy)
        most = 1 + self.rank_against if self.rank_against else num_items
        rule = f"must be at most the number of candidates, {most}"
        require(self.by_default or self.ks[-1] <= most, rule, "ks", self.ks[-1], "Give shorter lists.")
        return dataclasses.replace(self, ks=tuple(k for k in self.ks if k <= most))

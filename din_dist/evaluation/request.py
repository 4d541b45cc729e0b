"""The request for an evaluation. This module does not need TensorFlow, so that wrong flags are refused at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from din_dist.config import Config, require
from din_dist.errors import InputError
from din_dist.features.spec import Owner

if TYPE_CHECKING:
    from din_dist.data.event_store import EventStore
    from din_dist.data.splits import Examples

ALL, NONE, AUTO = "all", "none", "auto"
EVENTS, USERS = "events", "users"  # what is asked
TARGETS, HITS = "targets", "hits"  # what the ideal of NDCG has
AUTO_CANDIDATES = 30_000_000  # scored in all with --max_events=auto


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """The metrics to compute. The names are those of the flags.

    Attributes:
        rank_against: the number of items to rank against that the user never touched. 0: all items. None: no retrieval
            metrics.
        ks: list lengths, ascending. Default lengths above the number of candidates are left out.
        max_events: the most queries to rank. None: as many as have `AUTO_CANDIDATES` candidates in all.
        by_default: `ks` is the flag's default.
        slice_by: features by whose values the examples are cut.
        queries: `EVENTS`: each chosen item is asked for, given the history before it. `USERS`: each user is asked once
            for all items chosen in the split, given the history before it.
        ndcg_ideal: what the ideal of NDCG has: all `TARGETS`, or only the `HITS`.
        diversity_weight: of ComiRec's re-ranking; see `evaluation/reranking.py`. 0: none.
    """

    evaluation_split: str
    rank_against: int | None
    exclude_history: bool
    ks: tuple[int, ...]
    max_events: int | None
    bootstrap_samples: int
    by_default: bool = False
    slice_by: tuple[str, ...] = ()
    queries: str = EVENTS
    ndcg_ideal: str = TARGETS
    diversity_weight: float = 0.0

    def __post_init__(self) -> None:
        rule, remedy = "is for --queries=users, in which there are several", "Add it, or drop this one."
        fits = self.queries == USERS or self.ndcg_ideal == TARGETS
        require(fits, rule, "ndcg_ideal", self.ndcg_ideal, remedy)
        rule, remedy = "are those of retrieval metrics", f"Drop it, or give --rank_against={ALL}."
        require(self.queries == EVENTS or self.rank_against is not None, rule, "queries", self.queries, remedy)
        rule, weight = "must be finite and at least 0", self.diversity_weight
        require(math.isfinite(weight) and weight >= 0, rule, "diversity_weight", weight, "For example 0.1.")
        rule, remedy = f"is for --rank_against={ALL}", "Drop one of them."
        require(not weight or self.rank_against == 0, rule, "diversity_weight", weight, remedy)
        require(bool(self.ks), "must name a length", "ks", "", "For example 1,5,10,20.")
        least, value = "must be at least 0", self.bootstrap_samples
        require(value >= 0, least, "bootstrap_samples", value, "For example 1000.")

    def fitted(self, config: Config, store: EventStore, splits: Mapping[str, Examples]) -> EvaluationRequest:
        """Returns the request without default list lengths that the data cannot fill.

        Raises:
            InputError: the split is empty, a feature is not there, or a setting does not fit the number of items.
        """
        from din_dist.data.splits import SPLITS  # here, because wrong flags are refused before

        of_history = [name for name, each in store.features.items() if each.encoding.spec.owner is Owner.HISTORY]
        known = [name for name in (*store.item_features, *store.features) if name not in of_history]
        for name in self.slice_by:
            remedy = f"Choose among {', '.join(known)}." if known else "The model has none."
            require(name in known, "must be features of the model", "slice_by", name, remedy)
        split, num_items = self.evaluation_split, store.facts.num_candidates
        if not splits[split].num_examples:
            filled = [name for name in SPLITS if splits[name].num_examples]
            raise InputError(
                f"--evaluation_split: must have examples. Received: {split}, which has none with --split="
                f"{config.data.split}. Choose among {', '.join(filled)}."
            )
        if self.rank_against is None:
            return self
        if self.diversity_weight:
            self._check_diversity(config, store)
        rule = f"must be fewer than the {num_items} items"
        remedy = f"Give {ALL}, or a smaller number."
        require(self.rank_against < num_items, rule, "rank_against", self.rank_against, remedy)
        most = 1 + self.rank_against if self.rank_against else num_items
        rule = f"must be at most the number of candidates, {most}"
        require(self.by_default or self.ks[-1] <= most, rule, "ks", self.ks[-1], "Give shorter lists.")
        return dataclasses.replace(self, ks=tuple(k for k in self.ks if k <= most))

    def _check_diversity(self, config: Config, store: EventStore) -> None:
        kind, weight = config.model.model, self.diversity_weight
        rule, remedy = f"is for models that find items, and {kind} ranks", "Drop it."
        require(kind.retrieves, rule, "diversity_weight", weight, remedy)
        rule, remedy = "needs a category of items, their first feature", "Train with --item_features, or drop it."
        require(bool(store.item_features), rule, "diversity_weight", weight, remedy)

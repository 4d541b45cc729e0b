"""A model and its floors on the examples of a split: overall, and by history length, popularity and category."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from din_dist.config import DataConfig
from din_dist.data.event_store import EventStore, vocabulary_of
from din_dist.data.pipeline import BATCH_SIGNATURE
from din_dist.data.splits import Examples
from din_dist.evaluation.evaluator import Evaluator, Scorer
from din_dist.metrics.bins import equal_mass_bins
from din_dist.metrics.calibration import Calibration, calibration
from din_dist.metrics.ranking import auc, gauc, log_loss
from din_dist.metrics.slices import Slice, largest_parts, range_names, slices
from din_dist.models.ranking_model import RankingModel

MODEL = "model"  # its name among the rankings, where the others are floors
_HISTORY_BINS, _POPULARITY_BINS, _LARGEST_CATEGORIES = 8, 10, 12


@dataclasses.dataclass(frozen=True)
class Scored:
    """`[M]` each, in the order of the examples. `rankings`: the model's logits and the scores of the floors."""

    rankings: Mapping[str, np.ndarray]
    labels: np.ndarray
    users: np.ndarray
    candidates: np.ndarray
    history_lengths: np.ndarray
    draws_per_row: int

    def by_row(self, values: np.ndarray) -> np.ndarray:
        """`values` of candidates `[M]`, those of drawn negatives replaced by that of the event they were drawn for.

        Within a slice there must be positives and negatives to compare: without labels an event and its negatives go
        into the slice of the item that was really chosen.
        """
        return np.repeat(values[:: self.draws_per_row], self.draws_per_row)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One row of the comparison between the model and its floors."""

    name: str
    gauc: float
    auc: float


@dataclasses.dataclass(frozen=True)
class Table:
    """Slices under a heading."""

    title: str
    unit: str
    slices: list[Slice]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`num_in_split`: before examples were left out to save time."""

    split: str
    num_in_split: int
    num_examples: int
    num_positives: int
    num_users: int
    num_users_skipped: int
    rankings: list[Ranking]  # the model's first
    log_loss: float
    calibration: Calibration
    corrected: tuple[float, Calibration] | None  # both of these, where training draws other numbers of negatives
    tables: list[Table]

    @property
    def base_rate(self) -> float:
        return self.num_positives / self.num_examples

    @property
    def base_log_loss(self) -> float:
        """Of the base rate given to every example: what a model must stay below. In nats."""
        rate = self.base_rate
        return -sum(part * math.log(part) for part in (rate, 1 - rate) if part > 0)


def score(evaluator: Evaluator, split: str, examples: Examples, model: RankingModel) -> Scored:
    """Scores `split` of `evaluator`, whose examples are `examples`."""
    logits_of = tf.function(
        lambda batch: model(batch, training=False), input_signature=[BATCH_SIGNATURE], autograph=False
    )
    scorers: dict[str, Scorer] = {MODEL: logits_of, **evaluator.floor_scorers()}
    return Scored(
        rankings={name: evaluator.scores(split, scorer) for name, scorer in scorers.items()},
        labels=evaluator.labels(split),
        users=examples.user_of_example(),
        candidates=evaluator.scores(split, lambda batch: batch.candidate_item_ids).astype(np.int64),
        history_lengths=evaluator.scores(split, lambda batch: batch.history_lengths).astype(np.int64),
        draws_per_row=examples.draws_per_row,
    )


def evaluate(
    scored: Scored, store: EventStore, config: DataConfig, popularity: np.ndarray, split: str, num_in_split: int
) -> Evaluation:
    """`popularity`: positive training events of each item, `[num_items + 1]`."""
    by_user = gauc(scored.rankings[MODEL], scored.labels, scored.users)
    rankings = [
        Ranking(name, gauc(scores, scored.labels, scored.users).gauc, auc(scores, scored.labels))
        for name, scores in scored.rankings.items()
    ]
    tables = [
        _by_range(scored, scored.history_lengths, _HISTORY_BINS, "history length", "Events"),
        _by_range(
            scored, scored.by_row(popularity[scored.candidates]), _POPULARITY_BINS, "item popularity", "Training events"
        ),
        *(_by_feature(scored, store, name) for name in store.item_features),
    ]
    return Evaluation(
        split=split,
        num_in_split=num_in_split,
        num_examples=len(scored.labels),
        num_positives=int(scored.labels.sum()),
        num_users=by_user.num_users,
        num_users_skipped=by_user.num_users_skipped,
        rankings=rankings,
        log_loss=log_loss(scored.rankings[MODEL], scored.labels),
        calibration=calibration(probabilities(scored.rankings[MODEL]), scored.labels),
        corrected=_corrected(scored, config) if not store.facts.has_labels else None,
        tables=tables,
    )


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Click probabilities."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _corrected(scored: Scored, config: DataConfig) -> tuple[float, Calibration] | None:
    """Log loss and calibration as if training had as many negatives per positive as evaluation.

    With n of them in training and m here, the odds of a click are n / m times those that the model was trained for.
    """
    ratio = config.negatives_per_positive / config.evaluation_negatives_per_positive
    if ratio == 1:
        return None
    logits = scored.rankings[MODEL].astype(np.float64) + math.log(ratio)
    return log_loss(logits, scored.labels), calibration(probabilities(logits), scored.labels)


def _by_range(scored: Scored, values: np.ndarray, num_bins: int, title: str, unit: str) -> Table:
    part_of = equal_mass_bins(values, num_bins)
    names = range_names(values, part_of)
    return Table(title, unit, slices(scored.rankings, scored.labels, scored.users, part_of, names))


def _by_feature(scored: Scored, store: EventStore, feature: str) -> Table:
    values = scored.by_row(store.item_features[feature][scored.candidates])
    kept, part_of = largest_parts(values, _LARGEST_CATEGORIES)
    names = [*store.own_ids(vocabulary_of(feature), kept), "all others"]
    return Table(feature, "", slices(scored.rankings, scored.labels, scored.users, part_of, names))

"""Evaluates a model and its floors on a split: overall, and by history length, item popularity and item feature."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from din_dist.config import DataConfig
from din_dist.data.event_store import EventStore, vocabulary_of
from din_dist.data.splits import Examples
from din_dist.evaluation.evaluator import Evaluator, logits_of
from din_dist.evaluation.slicing import parts_of
from din_dist.features.spec import Owner
from din_dist.layers.packed import split_histories
from din_dist.metrics.bins import equal_mass_bins
from din_dist.metrics.calibration import Calibration, calibration
from din_dist.metrics.ranking import auc, gauc, log_loss
from din_dist.metrics.slices import Slice, largest_parts, metrics_of, range_names, slices
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.report.gain import Difference, difference
from din_dist.schema import Batch

_SAMPLES, _SLICE_SAMPLES = 1000, 300  # of the bootstrap, for the gain on all examples and on a slice

MODEL = "model"  # the model's name among the rankings; the others are floors
_HISTORY_BINS, _POPULARITY_BINS, _LARGEST_CATEGORIES = 8, 10, 12


@dataclasses.dataclass(frozen=True)
class ScoredExamples:
    """The examples of a split with their scores; arrays are `[M]`, in the order of the examples.

    Attributes:
        rankings: name -> the model's logits or the scores of a floor.
        labels: in {0, 1}.
        users: of the examples.
        candidates: dense ids of their items.
        history_lengths: of the examples; of several histories that of the first.
        draws_per_row: a positive and its drawn negatives; 1 if the log has labels.
        examples: the examples, for the values of declared features.
        by_task: task -> its logits and its labels, if there are several.
    """

    rankings: Mapping[str, np.ndarray]
    labels: np.ndarray
    users: np.ndarray
    candidates: np.ndarray
    history_lengths: np.ndarray
    draws_per_row: int
    examples: Examples | None = None
    by_task: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

    def by_row(self, values: np.ndarray) -> np.ndarray:
        """Returns `values` `[M]`, with that of each drawn negative replaced by that of its positive.

        A slice needs positives and negatives to compare. Without labels, an event and its drawn negatives therefore
        belong to the slice of the item that was really chosen.
        """
        return np.repeat(values[:: self.draws_per_row], self.draws_per_row)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One row of the comparison between the model and its floors."""

    name: str
    gauc: float
    auc: float


@dataclasses.dataclass(frozen=True)
class LabelMetrics:
    """How well one of several labels is predicted.

    Attributes:
        task: the label's name.
        rate: the share of positive examples.
        gauc, auc, log_loss: on the split; the last in nats.
        error: the expected calibration error.
    """

    task: str
    rate: float
    gauc: float
    auc: float
    log_loss: float
    error: float


@dataclasses.dataclass(frozen=True)
class SliceTable:
    """The slices of the examples by one property.

    Attributes:
        title: the property.
        unit: of its values.
        slices: the metrics of each.
        gains: of each slice, that of the model over the best floor there; NaN where nothing can be ranked.
    """

    title: str
    unit: str
    slices: list[Slice]
    gains: list[Difference]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results on a split.

    `num_in_split` also counts examples that were left out to save time. `gain` is that over the best floor.
    """

    split: str
    num_in_split: int
    num_examples: int
    num_positives: int
    num_users: int
    num_users_skipped: int
    rankings: list[Ranking]  # the model's first
    gain: Difference
    log_loss: float
    calibration: Calibration
    corrected: tuple[float, Calibration] | None  # log loss and calibration, corrected for the number of negatives
    tables: list[SliceTable]
    labels: list[LabelMetrics] = dataclasses.field(default_factory=list)  # of each, if there are several

    @property
    def base_rate(self) -> float:
        return self.num_positives / self.num_examples

    @property
    def base_log_loss(self) -> float:
        """The log loss of predicting the base rate for every example, in nats. A model must stay below it."""
        rate = self.base_rate
        return -sum(part * math.log(part) for part in (rate, 1 - rate) if part > 0)


def score(evaluator: Evaluator, split: str, examples: Examples, model: BehaviourModel) -> ScoredExamples:
    """Scores a split with the model and the floors.

    Args:
        evaluator: scores the split.
        split: its name.
        examples: of the split.
        model: to evaluate.
    """

    def lengths_of(batch: Batch) -> tf.Tensor:
        return split_histories(model.num_histories, batch.history_lengths)[0][0]

    logits = evaluator.scores(split, logits_of(model))
    rankings = {MODEL: logits}
    rankings |= {name: evaluator.scores(split, scorer) for name, scorer in evaluator.floor_scorers().items()}
    return ScoredExamples(
        rankings=rankings | {MODEL: evaluator.of_main_task(logits)},
        by_task={
            task: (logits[:, place], evaluator.labels(split, place)) for place, task in enumerate(evaluator.tasks)
        },
        labels=evaluator.labels(split),
        users=examples.user_of_example(),
        examples=examples,
        candidates=evaluator.scores(split, lambda batch: batch.candidate_item_ids).astype(np.int64),
        history_lengths=evaluator.scores(split, lengths_of).astype(np.int64),
        draws_per_row=examples.draws_per_row,
    )


def evaluate(
    scored: ScoredExamples,
    store: EventStore,
    config: DataConfig,
    popularity: np.ndarray,
    split: str,
    num_in_split: int,
    seed: int = 0,
) -> Evaluation:
    """Computes the results of a scored split.

    Args:
        scored: the examples.
        store: gives the item features.
        config: settings of the data.
        popularity: `[num_items + 1]`, the positive training events of each item.
        split: its name.
        num_in_split: the number of examples before some were left out.
        seed: of the bootstrap.
    """
    by_user = gauc(scored.rankings[MODEL], scored.labels, scored.users)
    everywhere, on_all = np.arange(len(scored.labels)), metrics_of(scored.rankings, scored.labels, scored.users)
    rankings = [
        Ranking(name, gauc(scores, scored.labels, scored.users).gauc, auc(scores, scored.labels))
        for name, scores in scored.rankings.items()
    ]
    tables = [
        _by_range(scored, scored.history_lengths, _HISTORY_BINS, "history length", "Events", seed),
        _by_range(
            scored,
            scored.by_row(popularity[scored.candidates]),
            _POPULARITY_BINS,
            "item popularity",
            "Training events",
            seed,
        ),
        *(_by_feature(scored, store, name, seed) for name in store.item_features),
        *(
            _by_declared(scored, store, name, seed)
            for name, feature in store.features.items()
            if feature.encoding.spec.owner is not Owner.HISTORY
        ),
    ]
    return Evaluation(
        split=split,
        num_in_split=num_in_split,
        num_examples=len(scored.labels),
        num_positives=int(scored.labels.sum()),
        num_users=by_user.num_users,
        num_users_skipped=by_user.num_users_skipped,
        rankings=rankings,
        gain=_gain(scored, everywhere, *on_all, seed=seed, samples=_SAMPLES),
        log_loss=log_loss(scored.rankings[MODEL], scored.labels),
        calibration=calibration(probabilities(scored.rankings[MODEL]), scored.labels),
        corrected=_corrected(scored, config) if not store.facts.has_labels else None,
        tables=tables,
        labels=[_of_label(task, *own, scored.users) for task, own in scored.by_task.items()],
    )


def _of_label(task: str, logits: np.ndarray, labels: np.ndarray, users: np.ndarray) -> LabelMetrics:
    error = calibration(probabilities(logits), labels).error
    own_gauc, own_auc = gauc(logits, labels, users).gauc, auc(logits, labels)
    return LabelMetrics(task, float(labels.mean()), own_gauc, own_auc, log_loss(logits, labels), error)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the click probabilities of logits."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _corrected(scored: ScoredExamples, config: DataConfig) -> tuple[float, Calibration] | None:
    """Returns the log loss and the calibration, corrected for another number of negatives than in training.

    With n negatives per positive in training and m here, the odds of a click are n / m times those in training. If n
    equals m, the result is None. So it is for models that find items, whose logits are no odds of clicks.
    """
    ratio = config.negatives_per_positive / config.evaluation_negatives_per_positive
    if ratio in (0, 1):
        return None
    logits = scored.rankings[MODEL].astype(np.float64) + math.log(ratio)
    return log_loss(logits, scored.labels), calibration(probabilities(logits), scored.labels)


def _gain(
    scored: ScoredExamples, here: np.ndarray, metric: str, values: Mapping[str, float], *, seed: int, samples: int
) -> Difference:
    """Returns the gain over the best floor on the examples `here`, on which the rankings have those values."""
    floors = {name: value for name, value in values.items() if name != MODEL and not math.isnan(value)}
    if not floors or math.isnan(values[MODEL]):
        return Difference(metric, math.nan, math.nan, math.nan)
    best = max(floors, key=lambda name: floors[name])
    ours, others = scored.rankings[MODEL][here], scored.rankings[best][here]
    return difference(ours, others, scored.labels[here], scored.users[here], seed, samples)


def _table(
    scored: ScoredExamples, title: str, unit: str, part_of: np.ndarray, names: Sequence[str], seed: int
) -> SliceTable:
    """Returns the slices of the examples whose part is `part_of` `[M]`, an index in `names`."""
    found = slices(scored.rankings, scored.labels, scored.users, part_of, names)
    parts = [here for part in range(len(names)) if len(here := np.flatnonzero(part_of == part))]
    gains = [
        _gain(scored, here, part.metric, part.values, seed=seed, samples=_SLICE_SAMPLES)
        for part, here in zip(found, parts, strict=True)
    ]
    return SliceTable(title, unit, found, gains)


def _by_range(
    scored: ScoredExamples, values: np.ndarray, num_bins: int, title: str, unit: str, seed: int
) -> SliceTable:
    part_of = equal_mass_bins(values, num_bins)
    return _table(scored, title, unit, part_of, range_names(values, part_of), seed)


def _by_feature(scored: ScoredExamples, store: EventStore, feature: str, seed: int) -> SliceTable:
    values = scored.by_row(store.item_features[feature][scored.candidates])
    kept, part_of = largest_parts(values, _LARGEST_CATEGORIES)
    names = [*store.own_ids(vocabulary_of(feature), kept), "all others"]
    return _table(scored, feature, "", part_of, names, seed)


def _by_declared(scored: ScoredExamples, store: EventStore, feature: str, seed: int) -> SliceTable:
    if scored.examples is None:
        raise ValueError(f"examples: must be given to slice by {feature}. Received: None.")
    parts = parts_of(store, scored.examples, feature)
    return _table(scored, feature, parts.unit, parts.part_of, parts.names, seed)

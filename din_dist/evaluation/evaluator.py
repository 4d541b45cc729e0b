"""Validation and test over all ranks, each example once; and floors, simple rankings that a model must beat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

from din_dist import progress, schema
from din_dist.config import Config
from din_dist.data.event_store import EventStore
from din_dist.data.pipeline import Shard, batch_signature, evaluation_batches, share
from din_dist.data.splits import Examples, item_counts
from din_dist.distributed.runtime import Runtime
from din_dist.layers.packed import segment_ids, segment_sum, split_histories
from din_dist.metrics.ranking import auc, gauc, log_loss, pairwise_gauc
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.schema import METRICS_OF_TASKS, Batch, metric_of

# Packed batch -> a number for each example, `[B]`, or for each example and label, `[B, T]`.
BatchScorer = Callable[[Batch], tf.Tensor]


def logits_of(model: BehaviourModel) -> BatchScorer:
    """Returns a function from packed batches to the model's logits, traced once."""
    return tf.function(
        lambda batch: model(batch, training=False),
        input_signature=[batch_signature(model.batch_encodings, model.extras, model.num_tasks)],
        autograph=False,
    )


class Evaluator:
    """Scores whole splits. Each rank scores its own range of the examples and gets the metrics of all of them.

    Args:
        config: all settings.
        store: the data.
        splits: the examples of each split.
        runtime: the ranks.
        in_step: all ranks score as many batches, because they read rows of each other's tables.
    """

    def __init__(
        self,
        config: Config,
        store: EventStore,
        splits: Mapping[str, Examples],
        runtime: Runtime,
        in_step: bool = False,
    ) -> None:
        self._config, self._store, self._splits, self._runtime = config, store, splits, runtime
        self._in_step = in_step

    def has_examples(self, split: str) -> bool:
        return self._splits[split].num_examples > 0

    def examples(self, split: str) -> Examples:
        """Returns the examples of a split."""
        return self._splits[split]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the labels that are predicted, if there are several."""
        return self._store.facts.tasks

    def evaluate(self, split: str, logits_of: BatchScorer) -> dict[str, float]:
        """Returns `gauc`, `auc`, `log_loss` and counts; if the log has no labels, also `pairwise_gauc`.

        With several tasks these are of the main one, and `METRIC_TASK` is that of each.
        """
        return self.metrics_of(split, self.scores(split, logits_of))

    def metrics_of(self, split: str, logits: np.ndarray) -> dict[str, float]:
        """Returns the same metrics as `evaluate`, from a split's `logits`, `[num_examples]` or `[num_examples, T]`."""
        if not self.tasks:
            return self._metrics(split, logits, self.labels(split))
        by_task = [
            self._metrics(split, logits[:, place], self.labels(split, place)) for place in range(len(self.tasks))
        ]
        metrics = dict(by_task[self._config.main_task])
        for task, own in zip(self.tasks, by_task, strict=True):
            metrics |= {metric_of(name, task): own[name] for name in METRICS_OF_TASKS}
        return metrics

    def _metrics(self, split: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns the metrics of one label, of logits and labels `[num_examples]`."""
        ranking = self._ranking_metrics(split, logits, labels)
        return {**ranking, "log_loss": log_loss(logits, labels), "num_examples": len(logits)}

    def of_main_task(self, logits: np.ndarray) -> np.ndarray:
        """Returns the logits by which items are ranked, `[num_examples]`, of those for each task."""
        return logits[:, self._config.main_task] if self.tasks else logits

    def floors(self, split: str) -> dict[str, dict[str, float]]:
        """Returns the metrics of each of the `floor_scorers`."""
        scorers, labels = self.floor_scorers(), self.labels(split)
        return {
            name: self._ranking_metrics(split, self.scores(split, scorer), labels) for name, scorer in scorers.items()
        }

    def floor_scorers(self) -> dict[str, BatchScorer]:
        """Returns the simple rankings that a model must beat, by name.

        - `popularity`: how often the item was chosen in training.
        - `user_repeat`: how often the user's history has the item; ties by popularity.
        - `FEATURE_repeat`: the same for each item feature. An unknown feature value never repeats.
        """
        popularity = item_counts(self._store, self._splits).astype(np.float32)
        popularity_of = tf.constant(popularity / (popularity.max() + 1.0))
        scorers: dict[str, BatchScorer] = {"popularity": functools.partial(_popularity, popularity_of=popularity_of)}
        identity = tf.range(self._store.facts.num_items + 1)
        features = {schema.feature_label(name): tf.constant(ids) for name, ids in self._store.item_features.items()}
        for name, feature_of in {"user": identity, **features}.items():
            scorers[f"{name}_repeat"] = functools.partial(
                _repeats,
                feature_of=feature_of,
                popularity_of=popularity_of,
                num_histories=self._store.facts.num_histories,
            )
        return scorers

    def _ranking_metrics(self, split: str, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        by_user = gauc(scores, labels, self._splits[split].user_of_example())
        metrics = {
            "gauc": by_user.gauc,
            "auc": auc(scores, labels),
            "num_users": by_user.num_users,
            "num_users_skipped": by_user.num_users_skipped,
        }
        if not self._store.facts.has_labels:
            metrics["pairwise_gauc"] = pairwise_gauc(scores.reshape(-1, self._splits[split].draws_per_row))
        return metrics

    def labels(self, split: str, task: int | None = None) -> np.ndarray:
        """Returns the labels of a split in its order: uint8 `[num_examples]`. None: those of the main task."""
        examples = self._splits[split]
        if self._store.labels is not None:
            with progress.at(f"reading data in {self._store.folder}"):
                return self._store.labels_of(examples.events(), self._config.main_task if task is None else task)
        return (np.arange(examples.num_examples) % examples.draws_per_row == 0).astype(np.uint8)

    def batches(self, split: str) -> tf.data.Dataset:
        """Returns this rank's packed batches of a split."""
        return self._batches(split, Shard(self._runtime.rank, self._runtime.world_size))

    def _batches(self, split: str, shard: Shard) -> tf.data.Dataset:
        return evaluation_batches(
            self._store,
            self._splits[split],
            self._config.data,
            seed=self._config.job.seed,
            batch_size=self._config.evaluation.evaluation_batch_size,
            shard=shard,
            graphs=self._config.model.model.reads_graphs,
        )

    def scores(self, split: str, score: BatchScorer) -> np.ndarray:
        """Returns the scores of a split in its order, `[num_examples]` or by task, equal on all ranks."""
        batches = self.batches(split)
        mine = [score(batch).numpy() for batch in progress.each(batches, f"reading data in {self._store.folder}")]
        if self._in_step:
            self._score_for_others(split, score, len(mine))
        # Flat, because a rank without examples does not know the number of columns.
        found = self._runtime.gather(np.concatenate([*map(np.ravel, mine), np.zeros(0, np.float32)]))
        num_examples = self._splits[split].num_examples
        return found.reshape(num_examples, -1) if len(found) > num_examples else found

    def _score_for_others(self, split: str, score: BatchScorer, num_scored: int) -> None:
        """Scores some batch as often as the rank with the most batches has more than this one, which has scored all."""
        size, num_ranks = self._config.evaluation.evaluation_batch_size, self._runtime.world_size
        runs = (share(self._splits[split].num_examples, rank, num_ranks) for rank in range(num_ranks))
        num_left = max(-(-(end - first) // size) for first, end in runs) - num_scored
        for batch in self._batches(split, Shard()).take(1).repeat(num_left):
            score(batch)


def _popularity(batch: Batch, popularity_of: tf.Tensor) -> tf.Tensor:
    return tf.gather(popularity_of, batch.candidate_item_ids)


def _repeats(batch: Batch, feature_of: tf.Tensor, popularity_of: tf.Tensor, num_histories: int) -> tf.Tensor:
    """Returns how many positions of the first history have the candidate's feature, plus the popularity, `[B]`."""
    lengths, history = split_histories(num_histories, batch.history_lengths, batch.history_item_ids)[0]
    candidate_of = segment_ids(lengths)
    candidate = tf.gather(feature_of, batch.candidate_item_ids)
    wanted = tf.gather(candidate, candidate_of)
    same = tf.equal(wanted, tf.gather(feature_of, history)) & (wanted != schema.UNKNOWN_ID)
    times = segment_sum(tf.cast(same, tf.float32), candidate_of, tf.size(candidate))
    return times + _popularity(batch, popularity_of)

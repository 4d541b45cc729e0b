"""The models that find items among all, for Keras: YouTube DNN, ComiRec, MIND and SR-GNN.

Letters of shapes: B examples, K items that are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from din_dist.api.arguments import check
from din_dist.api.model import SEED, Features, ItemFeatures, KerasBehaviourModel
from din_dist.config import ModelKind, Sampler, Softmax
from din_dist.data.sampled_items import SampledItems, weights_of
from din_dist.features.spec import Owner
from din_dist.schema import Batch

_OF_SOFTMAX = ("softmax", "num_sampled", "sampler", "normalize_vectors", "temperature")
_OF_INTERESTS = ("num_interests", "num_positions", "readout", "evaluate_with")


class KerasRetrievalModel(KerasBehaviourModel):
    """A model that learns to find each example's candidate among other items, by the cross-entropy of a softmax.

    `fit` takes inputs without labels: `candidate_item_ids` are the targets. Other items are drawn for each update, by a
    hash of the seed and the optimizer's number of updates, or are all items (`softmax="full"`). A call returns the
    logits of the candidates, and `recommend` finds the best items of all.

    Args:
        num_items: as of `KerasBehaviourModel`, like those that are not named here.
        item_counts: integers `[num_items + 1]`, how often training has each item, for `sampler`. None: items are drawn
            uniformly.
    """

    def __init__(
        self,
        num_items: int,
        item_features: ItemFeatures | None = None,
        embedding_dim: int | Sequence[int] = 64,
        features: Features | None = None,
        item_counts: Any = None,
        seed: int = SEED,
        **settings: Any,
    ) -> None:
        super().__init__(num_items, item_features, embedding_dim, features, seed, **settings)
        check(num_items > 1, "num_items", "must be above 1, to choose among", num_items, "Use more data.")
        self._sampled = self._drawn_items(item_counts)

    def _check_features(self) -> None:
        read = (Owner.ITEM, Owner.USER, Owner.CONTEXT) if self.KIND is ModelKind.YOUTUBE_DNN else (Owner.ITEM,)
        left = [name for name, stored in self._features.items() if stored.encoding.spec.owner not in read]
        check(not left, "features", f"{self.KIND} reads those of {', '.join(read)} only", left, "Leave them out.")

    def _drawn_items(self, item_counts: Any) -> SampledItems:
        """Returns what draws the items of a softmax: by the frequencies that are given, not by the weights' seed."""
        full, weights = self.config.softmax is Softmax.FULL, np.zeros(self.num_items + 1, np.int64)
        counts = np.zeros(self.num_items + 1, np.int64) if item_counts is None else np.asarray(item_counts)
        self._item_counts = None if item_counts is None else counts
        rule = f"must be {self.num_items + 1} numbers, of ids 0 to {self.num_items}"
        check(counts.shape == weights.shape, "item_counts", rule, list(counts.shape), "Make them so.")
        uniform = full or item_counts is None
        weights[1:] = weights_of(counts[1:], Sampler.UNIFORM if uniform else self.config.sampler)
        return SampledItems(weights, None if full else self.config.num_sampled, self._seed)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> tf.Tensor:
        """Returns the mean loss of the examples; see `RetrievalModel.losses`.

        Args:
            x: inputs with targets, as of a call.
            y: nothing.
            y_pred: is left aside.
            sample_weight: float32 `[B]`, by how much each example counts. None: all count alike.
            training: is left aside.

        Raises:
            InputError: there are labels, or no targets.
        """
        check(y is None, self.name, "takes no labels, as candidates are the targets", "labels", "Leave them out.")
        losses = self.core.losses(self._with_drawn_items(self.inputs_of_examples.batch(x)))
        return tf.reduce_mean(losses if sample_weight is None else losses * tf.cast(sample_weight, tf.float32))

    def _with_drawn_items(self, batch: Batch) -> Batch:
        updates = tf.constant(0, tf.int64) if self.optimizer is None else self.optimizer.iterations.value
        sampled = self._sampled.of_update(tf.cast(updates, tf.int64))
        targets = batch.candidate_item_ids
        distinct, index = tf.unique(tf.concat([targets, batch.history_item_ids, sampled], axis=0))
        return batch._replace(
            distinct_item_ids=distinct,
            item_index=index,
            logit_offsets=self._sampled.offsets(targets),
            sampled_item_ids=sampled,
            sampled_offsets=self._sampled.offsets(sampled),
        )

    def recommend(self, inputs: Any, count: int = 10) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the items with the largest logits, best first, int32 `[B, K]`, and their logits, float32 `[B, K]`.

        Args:
            inputs: as of a call. Candidates are left aside.
            count: K. If there are fewer items, all of them.

        Raises:
            InputError: an input is wrong, or `count` is below 1.
        """
        check(count > 0, "count", "must be at least 1", count, "For example 10.")
        batch = self.inputs_of_examples.batch(inputs, candidates=False)
        users = self.core.users_of(batch.history_item_ids, batch.history_lengths, batch.features)
        vectors = self.core.items(tf.range(1, self.num_items + 1, dtype=tf.int32))
        best = tf.math.top_k(self.core.best(tf.einsum("bkh,mh->bmk", users, vectors)), min(count, self.num_items))
        return best.indices + 1, best.values

    def get_config(self) -> dict[str, Any]:
        counts = self._item_counts
        return {**super().get_config(), "item_counts": None if counts is None else counts.tolist()}


@keras.saving.register_keras_serializable("din_dist", name="YouTubeDNN")
class KerasYouTubeDNN(KerasRetrievalModel):
    """YouTube's retrieval model; see `KerasRetrievalModel` and `models.youtube_dnn.YouTubeDNN`.

    The settings are tower_units, softmax, num_sampled, sampler, normalize_vectors and temperature.
    """

    KIND = ModelKind.YOUTUBE_DNN
    SETTINGS = (*_OF_SOFTMAX, "tower_units")


@keras.saving.register_keras_serializable("din_dist", name="ComiRecSA")
class KerasComiRecSA(KerasRetrievalModel):
    """Several interests by self-attention; see `KerasRetrievalModel` and `models.comirec.ComiRecSA`.

    The settings are those of `KerasYouTubeDNN` without tower_units, and num_interests, num_positions, readout,
    evaluate_with, positions and interest_weights. The newest `num_positions` behaviours are read.
    """

    KIND = ModelKind.COMIREC_SA
    SETTINGS = (*_OF_SOFTMAX, *_OF_INTERESTS, "positions", "interest_weights")


@keras.saving.register_keras_serializable("din_dist", name="ComiRecDR")
class KerasComiRecDR(KerasRetrievalModel):
    """Several interests by dynamic routing; see `KerasRetrievalModel` and `models.comirec.ComiRecDR`.

    The settings are those of `KerasComiRecSA` without positions and interest_weights.
    """

    KIND = ModelKind.COMIREC_DR
    SETTINGS = (*_OF_SOFTMAX, *_OF_INTERESTS)


@keras.saving.register_keras_serializable("din_dist", name="MIND")
class KerasMIND(KerasRetrievalModel):
    """Dynamic routing with one map; see `KerasRetrievalModel` and `models.comirec.MIND`.

    The settings are those of `KerasComiRecDR`.
    """

    KIND = ModelKind.MIND
    SETTINGS = (*_OF_SOFTMAX, *_OF_INTERESTS)


@keras.saving.register_keras_serializable("din_dist", name="SRGNN")
class KerasSRGNN(KerasRetrievalModel):
    """A graph network over sessions; see `KerasRetrievalModel` and `models.sr_gnn.SRGNN`.

    The settings are softmax, num_sampled, sampler, normalize_vectors, temperature, session_readout and session_query.
    """

    KIND = ModelKind.SR_GNN
    SETTINGS = (*_OF_SOFTMAX, "session_readout", "session_query")

"""What DIN and its baselines share: everything but how the history becomes an interest."""

from __future__ import annotations

import abc
import functools
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import BatchNorm, ModelConfig
from din_dist.layers.hidden import HiddenLayers
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.native.dense import Stage, run_stages
from din_dist.layers.native.vectors import vectors_and_candidates
from din_dist.layers.packed import padded, rows_at, segment_ids
from din_dist.layers.standardize import BatchNormalization, SumOverRanks
from din_dist.layers.xla import round_up
from din_dist.schema import Batch


class RankingModel(keras.Model):
    """Scores candidates against packed behaviour histories; returns logits.

    Each layer is created once, here, and serves the candidate, the negatives and any number of candidates at once
    (where the authors' code called `tf.layers` again under `reuse=True`).

    Args:
        lookup: turns item ids into vectors; the model does not know where the tables live.
        config: sizes, activations and normalisation.
        sum_over_ranks: for batch statistics of the global batch; the identity when alone.
        compiled: runs training through XLA, but for lookups and matrix products (see `layers/xla.py`).
        native: runs what it can of training in kernels of our own (`kernels/`), on CPUs.
        in_bfloat16: those round the factors of matrix products.
    """

    def __init__(
        self,
        lookup: LocalLookup,
        config: ModelConfig,
        sum_over_ranks: SumOverRanks = tf.identity,
        compiled: bool = False,
        native: bool = False,
        in_bfloat16: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.lookup, self.compiled, self.native, self.in_bfloat16 = lookup, compiled, native, in_bfloat16
        frozen = config.batch_norm is BatchNorm.FROZEN
        self.has_batch_statistics = not frozen
        self.interest_norm = BatchNormalization(frozen, sum_over_ranks, compiled, name="interest_norm")
        self.interest_projection = keras.layers.Dense(lookup.width, name="interest_projection")
        self.head_norm = BatchNormalization(frozen, sum_over_ranks, compiled, name="head_norm")
        self.head = HiddenLayers(
            config.hidden_units,
            config.activation,
            frozen=frozen,
            sum_over_ranks=sum_over_ranks,
            dropout=config.dropout,
            compiled=compiled,
            name="head",
        )

    def build_variables(self) -> None:
        """Makes every variable, by scoring one candidate without a history."""
        nothing = tf.zeros([0], tf.int32)
        one = tf.zeros([1], tf.int32)
        self(Batch(candidate_item_ids=one, history_item_ids=nothing, history_lengths=one))

    @property
    def statistics_widths(self) -> list[int]:
        """Columns of each layer with batch statistics, which the ranks exchange in training."""
        means = [weight for weight in self.non_trainable_weights if weight.path.endswith("moving_mean")]
        return [weight.shape[0] for weight in means] if self.has_batch_statistics else []

    @property
    def late_weights(self) -> list[keras.Variable]:
        """Weights whose gradients are found in the last pass of all, after the last batch statistics."""
        return self.lookup.trainable_weights

    def num_computed_positions(self, num_positions: tf.Tensor) -> tf.Tensor:
        """How many there are in training with padding.

        XLA compiles for each pair of lengths: few pairs, on average 6 % more positions.
        """
        return round_up(num_positions, steps=8) if self.compiled and self.needs_few_lengths else num_positions

    @property
    def needs_few_lengths(self) -> bool:
        """Whether `interest` is compiled anew for each number of pairs, where `compiled`."""
        return True

    @abc.abstractmethod
    def interest(
        self,
        candidate: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        training: bool,
        num_pairs: tf.Tensor | None,
    ) -> tf.Tensor:
        """Pools each candidate's history to `[C, H]`, zeros where it is empty. See `LocalActivationUnit.call`."""

    @abc.abstractmethod
    def head_inputs(self, interest: tf.Tensor, candidate: tf.Tensor, native: bool = False) -> tf.Tensor:
        """`[C, H]` and `[C, H]` to what the head sees of them; `native`: in a kernel of our own, if it has one."""

    def call(self, batch: Batch, training: bool = False) -> tf.Tensor:
        """Logits `[B]` of a packed batch (see `schema`); its distinct items are found here if they are not given."""
        # Where XLA compiles for each length, there are to be few.
        few_lengths = training and self.compiled and self.needs_few_lengths
        distinct, places = items_of(batch)
        native = self.native and training
        candidate_of = segment_ids(batch.history_lengths, native=native)
        num_candidates = tf.size(batch.candidate_item_ids)
        candidate_places, key_of = places[:num_candidates], places[num_candidates:]
        if native:
            parts, biases = self.lookup.parts(distinct)
            vectors, candidate = vectors_and_candidates(parts, candidate_places)
        else:
            vectors, biases = self.lookup(distinct)  # [U, H], [U]
        num_pairs = None
        if few_lengths:  # of U 12 % more; of positions see `num_computed_positions`
            vectors = padded(vectors, round_up(tf.size(distinct), steps=4))
            num_pairs = tf.size(key_of)
            key_of = padded(key_of, self.num_computed_positions(num_pairs))
            candidate_of = padded(candidate_of, tf.size(key_of), -1)
        if not native:
            candidate = rows_at(vectors, candidate_places, compiled=few_lengths)
        return self.logits(
            candidate,
            tf.gather(biases, candidate_places),
            vectors,
            candidate_of,
            key_of,
            num_pairs=num_pairs,
            dropout_seeds=batch.dropout_seeds,
            training=training,
        )

    def attention_weights(self, batch: Batch) -> tf.Tensor | None:
        """How much each history position of a packed batch counts, `[N]`; None where all count the same."""
        return None

    def score_candidates(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        candidate_item_ids: tf.Tensor,
        candidate_counts: tf.Tensor,
    ) -> tf.Tensor:
        """Logits `[C]` of many candidates for each history, whose items are looked up and projected once.

        Args:
            history_item_ids: int32 `[N]`, B histories end to end; `history_lengths` int32 `[B]`.
            candidate_item_ids: int32 `[C]`, the candidates of B histories end to end; `candidate_counts` int32 `[B]`.
        """
        history_of = segment_ids(candidate_counts)  # [C]
        starts = tf.gather(tf.cumsum(history_lengths, exclusive=True), history_of)
        lengths = tf.gather(history_lengths, history_of)  # [C]
        position_of = tf.ragged.range(starts, starts + lengths).values  # [P]
        distinct, places = distinct_items(candidate_item_ids, history_item_ids)
        vectors, biases = self.lookup(distinct)
        num_candidates = tf.size(candidate_item_ids)
        candidate_places, position_places = places[:num_candidates], places[num_candidates:]
        return self.logits(
            tf.gather(vectors, candidate_places),
            tf.gather(biases, candidate_places),
            vectors,
            segment_ids(lengths),
            tf.gather(position_places, position_of),
        )

    def logits(
        self,
        candidate: tf.Tensor,
        biases: tf.Tensor,
        keys: tf.Tensor,
        candidate_of: tf.Tensor,
        key_of: tf.Tensor,
        *,
        num_pairs: tf.Tensor | None = None,
        dropout_seeds: tf.Tensor | None = None,
        training: bool = False,
    ) -> tf.Tensor:
        """Logits `[C]` of items that were looked up before.

        Args:
            candidate: `[C, H]`; `biases` `[C]`.
            keys: `[K, H]`, the items of the histories: what the attention computes of a key alone, it does once.
            candidate_of, key_of: int32 `[P]`, pair candidates with the keys of their histories; `candidate_of` ascends.
            num_pairs: how many of the P pairs are real; the rest is padding, of candidate -1. None: all.
        """
        interest = self.interest(candidate, keys, candidate_of, key_of, training, num_pairs)
        if self.native and training:
            run = functools.partial(run_stages, in_bfloat16=self.in_bfloat16)
            interest = run([Stage(self.interest_norm, self.interest_projection)], interest)
            stages = [Stage(self.head_norm, self.head.dense_layers[0]), *self.head.stages]
            scores = tf.squeeze(run(stages, self.head_inputs(interest, candidate, native=True), dropout_seeds), axis=1)
        else:
            interest = self.interest_projection(self.interest_norm(interest, training=training))
            features = self.head_norm(self.head_inputs(interest, candidate), training=training)
            scores = self.head(features, dropout_seeds, training=training)
        return scores + biases


def items_of(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    """`distinct_items` of a packed batch, which may bring them along."""
    if batch.distinct_item_ids is not None:
        return batch.distinct_item_ids, batch.item_index
    return distinct_items(batch.candidate_item_ids, batch.history_item_ids)


def distinct_items(candidate_item_ids: tf.Tensor, history_item_ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Each item once, `[U]`, and where in it the candidates and then the history positions stand, `[C + N]`."""
    return tf.unique(tf.concat([candidate_item_ids, history_item_ids], axis=0))

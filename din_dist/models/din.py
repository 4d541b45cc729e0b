"""The Deep Interest Network (Zhou et al. 2018, arXiv:1706.06978)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import AttentionKind, BatchNorm, ModelConfig
from din_dist.execution import Mode
from din_dist.layers.attention_unit import AttentionUnit
from din_dist.layers.dot_product_attention import DotProductAttention
from din_dist.layers.feature_columns import FeatureColumns
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.native.vectors import beside_product
from din_dist.layers.pairs import Pairs
from din_dist.models.behaviour_model import items_of
from din_dist.models.ranking_model import LookedUp, RankingModel, suffixes_of
from din_dist.schema import Batch, NamedHistory


class DIN(RankingModel):
    """Weighs each past behaviour by its relevance to the candidate.

    interest = Dense(BN(attention(q, history))); logit = head(BN([interest, q, interest * q, context])) + bias[item].
    `--nointerest_projection` leaves that Dense out.
    Of several histories each has an interest, and the head sees them and their products with the candidate.
    The context is the columns of user, context and candidate features, if there are any.
    Source: the authors' din/model.py.

    Args:
        lookup: turns item ids into vectors.
        config: sizes, activations and normalization.
        training_mode: of a pass in training.
        example_columns: of the context.
        num_tasks: the labels to predict.
        histories: several histories; None: there is one.
        side_columns: of the side information of behaviours.
        attention: another form of the local activation unit, for comparison. None: the one of `config`.
    """

    def __init__(
        self,
        lookup: LocalLookup,
        config: ModelConfig,
        training_mode: Mode | None = None,
        example_columns: FeatureColumns | None = None,
        num_tasks: int = 1,
        histories: Sequence[NamedHistory] | None = None,
        side_columns: FeatureColumns | None = None,
        attention: type[LocalActivationUnit] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(lookup, config, training_mode, example_columns, num_tasks, histories, side_columns, **kwargs)
        suffixes = suffixes_of(self.histories)
        if config.attention is AttentionKind.DOT and attention is None:
            make_unit: Callable[..., AttentionUnit] = functools.partial(DotProductAttention, self.side_width)
        else:
            make_unit = functools.partial(
                attention or LocalActivationUnit,
                config.attention_hidden_units,
                config.activation,
                config.attention_normalization,
                frozen=config.batch_norm is BatchNorm.FROZEN,
                side_width=self.side_width,
            )
        self.attentions = [
            make_unit(name=f"attention{suffix}") for suffix in (suffixes[:1] if config.share_attention else suffixes)
        ]

    @property
    def attention(self) -> AttentionUnit:
        """The unit of the only history, or the first."""
        return self.attentions[0]

    def _attention_of(self, history: int) -> AttentionUnit:
        return self.attentions[min(history, len(self.attentions) - 1)]

    def pools_compiled(self, mode: Mode) -> bool:
        return self.attention.is_compiled(mode)

    @property
    def late_weights(self) -> list[keras.Variable]:
        return [*super().late_weights, *(weight for unit in self.attentions for weight in unit.last_known)]

    def interest(self, items: LookedUp, pairs: Pairs, mode: Mode, history: int = 0) -> tf.Tensor:
        unit = self._attention_of(history)
        return unit(items.candidate, items.behaviours, pairs, mode=mode, sides=items.sides)

    def head_inputs(self, interests: Sequence[tf.Tensor], candidate: tf.Tensor, mode: Mode) -> tf.Tensor:
        interest, *others = interests
        more = [part for other in others for part in (other, other * candidate)]
        if mode.kernels:
            first = beside_product(interest, candidate)
            return tf.concat([first, *more], axis=1) if more else first
        return tf.concat([interest, candidate, interest * candidate, *more], axis=1)

    def attention_weights(self, batch: Batch) -> tf.Tensor:
        item_ids, index = items_of(batch)
        num_candidates = tf.size(batch.candidate_item_ids)
        vectors, _ = self.lookup(item_ids)
        candidate = tf.gather(vectors, index[:num_candidates])
        side_of = batch.side_index if self.side_columns else None
        all_pairs = self.pairs(batch.history_lengths, index[num_candidates:], side_of=side_of)
        sides = self.sides(batch.sides)
        found = [
            self._attention_of(history).weights_of_pairs(candidate, vectors, pairs, sides)
            for history, pairs in enumerate(all_pairs)
        ]
        return tf.concat(found, axis=0)

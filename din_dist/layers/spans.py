"""Which positions of each history a candidate reads, where many candidates share the histories of a user.

Letters of shapes, in addition to those of `schema`: C candidates, S histories of a user, K behaviours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from din_dist.layers.packed import matched_positions, segment_ids, split_histories
from din_dist.layers.pairs import Pairs
from din_dist.schema import NamedHistory


class Span(NamedTuple):
    """The positions of one history that each of C candidates reads."""

    index: tf.Tensor  # int32 [N], the behaviour at each position
    starts: tf.Tensor  # int32 [C]
    ends: tf.Tensor  # int32 [C]

    def part(self, low: tf.Tensor, high: tf.Tensor) -> Span:
        """Returns the positions that the candidates `low` to `high` - 1 read; there may be none."""
        starts, ends = self.starts[low:high], self.ends[low:high]
        begin = tf.reduce_min(tf.concat([starts, tf.shape(self.index)], axis=0))
        end = tf.reduce_max(tf.concat([ends, begin[None]], axis=0))
        return Span(self.index[begin:end], starts - begin, ends - begin)

    def pairs(self) -> Pairs:
        """Returns each candidate with its behaviours."""
        behaviour_of = tf.gather(self.index, tf.ragged.range(self.starts, self.ends).values)
        return Pairs(segment_ids(self.ends - self.starts), behaviour_of)


def spans_of(
    histories: Sequence[NamedHistory],
    lengths: tf.Tensor,
    behaviour_of: tf.Tensor,
    of_behaviours: Mapping[str, tf.Tensor],
    user_of: tf.Tensor,
    of_candidates: Mapping[str, tf.Tensor],
) -> list[Span]:
    """Returns the span of each history. Of one with a feature, a candidate reads the newest positions that share it.

    Args:
        histories: S histories.
        lengths: int32 `[S * B]`, history after history.
        behaviour_of: int32 `[N]`, the behaviour at each position.
        of_behaviours: name -> int32 `[K]`, the ids of item features, those of `histories` among them.
        user_of: int32 `[C]`, the user of each candidate.
        of_candidates: name -> int32 `[C]`, the ids of item features.
    """
    spans = []
    for history, (own_lengths, index) in zip(
        histories, split_histories(len(histories), lengths, behaviour_of), strict=True
    ):
        if history.feature:
            of_positions = segment_ids(own_lengths), tf.gather(of_behaviours[history.feature], index)
            own_candidates = user_of, of_candidates[history.feature]
            order, starts, ends = matched_positions(of_positions, own_candidates, history.longest)
            index = tf.gather(index, order)
        else:
            starts = tf.gather(tf.cumsum(own_lengths, exclusive=True), user_of)
            ends = starts + tf.gather(own_lengths, user_of)
        spans.append(Span(index, starts, ends))
    return spans

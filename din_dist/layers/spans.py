"""Which positions of each history a candidate reads, where many candidates share the histories of a user.

Letters of shapes, in addition to those of `schema`: C candidates, S histories of a user, K behaviours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from din_dist.layers.packed import matched_positions, segment_ids, split_histories
from din_dist.layers.pairs import Pairs
from din_dist.schema import NamedHistory


class Positions(NamedTuple):
    """The behaviours at N positions of histories."""

    behaviour_of: tf.Tensor  # int32 [N]
    side_of: tf.Tensor | None = None  # int32 [N], their side information; None: there is none

    def take(self, take: Callable[[tf.Tensor], tf.Tensor]) -> Positions:
        """Returns some of the positions."""
        return Positions(take(self.behaviour_of), None if self.side_of is None else take(self.side_of))


class Span(NamedTuple):
    """The positions of one history that each of C candidates reads."""

    positions: Positions  # N of them
    starts: tf.Tensor  # int32 [C]
    ends: tf.Tensor  # int32 [C]

    def part(self, low: tf.Tensor, high: tf.Tensor) -> Span:
        """Returns the positions that the candidates `low` to `high` - 1 read; there may be none."""
        starts, ends = self.starts[low:high], self.ends[low:high]
        begin = tf.reduce_min(tf.concat([starts, tf.shape(self.positions.behaviour_of)], axis=0))
        end = tf.reduce_max(tf.concat([ends, begin[None]], axis=0))
        return Span(self.positions.take(lambda values: values[begin:end]), starts - begin, ends - begin)

    def pairs(self) -> Pairs:
        """Returns each candidate with its behaviours."""
        read = tf.ragged.range(self.starts, self.ends).values
        behaviour_of, side_of = self.positions.take(lambda values: tf.gather(values, read))
        return Pairs(segment_ids(self.ends - self.starts), behaviour_of, side_of=side_of)


def spans_of(
    histories: Sequence[NamedHistory],
    lengths: tf.Tensor,
    positions: Positions,
    of_behaviours: Mapping[str, tf.Tensor],
    user_of: tf.Tensor,
    of_candidates: Mapping[str, tf.Tensor],
) -> list[Span]:
    """Returns the span of each history. Of one with a feature, a candidate reads the newest positions that share it.

    Args:
        histories: S histories.
        lengths: int32 `[S * B]`, history after history.
        positions: N of them.
        of_behaviours: name -> int32 `[K]`, the ids of item features, those of `histories` among them.
        user_of: int32 `[C]`, the user of each candidate.
        of_candidates: name -> int32 `[C]`, the ids of item features.
    """
    spans = []
    values = [value for value in positions if value is not None]
    for history, (own_lengths, *found) in zip(
        histories, split_histories(len(histories), lengths, *values), strict=True
    ):
        own = Positions(*found)
        if history.feature:
            of_positions = segment_ids(own_lengths), tf.gather(of_behaviours[history.feature], own.behaviour_of)
            own_candidates = user_of, of_candidates[history.feature]
            order, starts, ends = matched_positions(of_positions, own_candidates, history.longest)
            own = own.take(functools.partial(tf.gather, indices=order))
        else:
            starts = tf.gather(tf.cumsum(own_lengths, exclusive=True), user_of)
            ends = starts + tf.gather(own_lengths, user_of)
        spans.append(Span(own, starts, ends))
    return spans

"""Which behaviours each candidate is paired with."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


class Pairs(NamedTuple):
    """Each of C candidates with each behaviour of its history: P pairs, by ascending candidate.

    Distinct behaviours stand once in `[K, H]`, however many pairs share them.
    """

    candidate_of: tf.Tensor  # int32 [P]; -1 in padding, which stands at the end
    behaviour_of: tf.Tensor  # int32 [P]
    num_real: tf.Tensor | None = None  # int32, how many of the P pairs are no padding; None: all
    side_of: tf.Tensor | None = None  # int32 [P], the side information of each behaviour; None: there is none

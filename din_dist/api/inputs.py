"""Makes the packed batch of the models from what users of Keras have: packed, ragged or padded histories.

Letters of shapes: B examples, N history positions in all, T positions of a padded history, D numbers of a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from din_dist.api.arguments import check
from din_dist.features.encoding import Encoding, Lists
from din_dist.features.gathering import missing_values
from din_dist.features.spec import Form, Pooling
from din_dist.layers.packed import segment_ids
from din_dist.schema import UNKNOWN_ID, Batch

CANDIDATES, HISTORY = "candidate_item_ids", "history_item_ids"
LENGTHS, MASK, FEATURES, OFFSETS = "history_lengths", "history_mask", "features", "logit_offsets"
_NAMES = (CANDIDATES, HISTORY, LENGTHS, MASK, FEATURES, OFFSETS)
_FORMS = (
    f"{HISTORY} may be packed [N] with {LENGTHS} [B], a tf.RaggedTensor [B, None], or padded [B, T] with {MASK} [B, T]."
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The things that a model reads, and how they are made a packed batch.

    Attributes:
        num_items: the items with vectors of their own, 1 to `num_items`. Other ids count as unknown.
        encodings: of the features of examples.
        longest: the most behaviours that the model reads, the newest. None: all.
    """

    num_items: int
    encodings: Sequence[Encoding] = ()
    longest: int | None = None

    def batch(self, inputs: Any, *, candidates: bool = True) -> Batch:
        """Returns the packed batch of some inputs.

        Args:
            inputs: a `Batch`, which is returned as it is, or tensors by name. `candidate_item_ids`: integers `[B]`.
                `history_item_ids`: integers, oldest first, packed `[N]`, ragged `[B, None]` or padded `[B, T]`, on
                whichever side. `history_lengths`: integers `[B]`, of packed histories. `history_mask`: bool `[B, T]`,
                true at behaviours; without it, id 0 is padding. `features`: name -> values of B examples; a feature
                that is not there is missing for all of them.
            candidates: there must be candidates. Otherwise there may be none.

        Raises:
            InputError: an input is missing, is not known, or has a wrong shape or type.
        """
        if isinstance(inputs, Batch):
            return inputs
        is_mapping = isinstance(inputs, Mapping)
        received = sorted(inputs) if is_mapping else type(inputs).__name__
        check(is_mapping, "inputs", f"must be a dict of {', '.join(_NAMES[:2])}", received, _FORMS)
        unknown = [name for name in inputs if name not in _NAMES]
        check(not unknown, "inputs", f"must be among {', '.join(_NAMES)}", unknown, "Rename or drop it.")
        wanted = (CANDIDATES, HISTORY) if candidates else (HISTORY,)
        lacking = [name for name in wanted if name not in inputs]
        check(not lacking, "inputs", f"must have {' and '.join(wanted)}", received, _FORMS)
        items, lengths = self._histories(inputs)
        num_examples = tf.size(lengths)
        targets = tf.zeros([0], tf.int32)
        if CANDIDATES in inputs:
            targets = self._items(_column(CANDIDATES, inputs[CANDIDATES]))
            _require_equal(tf.size(targets), num_examples, f"{CANDIDATES}: must be as many as histories")
        batch = Batch(targets, items, lengths, features=self._features(inputs.get(FEATURES) or {}, num_examples))
        return batch._replace(logit_offsets=inputs[OFFSETS]) if OFFSETS in inputs else batch

    def _histories(self, inputs: Mapping[str, Any]) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the items of all histories, int32 `[N]`, and their lengths, int32 `[B]`."""
        given = inputs[HISTORY]
        ragged = isinstance(given, tf.RaggedTensor)
        ids = given if ragged else _integers(HISTORY, given)
        for name, rank in ((LENGTHS, 1), (MASK, 2)):
            fits = name not in inputs or (not ragged and ids.shape.rank == rank)
            received = f"{HISTORY} {list(ids.shape)}"
            check(fits, name, f"belongs to {HISTORY} of {rank} axes, and not to ragged ones", received, "Drop it.")
        if ragged:
            check(ids.shape.rank == 2, HISTORY, "must have 2 axes if it is ragged", list(ids.shape), _FORMS)
            flat, lengths = _integers(HISTORY, ids.values), tf.cast(ids.row_lengths(), tf.int32)
        elif ids.shape.rank == 1:
            check(LENGTHS in inputs, "inputs", f"must have {LENGTHS}, as {HISTORY} has 1 axis", sorted(inputs), _FORMS)
            flat, lengths = ids, tf.cast(_column(LENGTHS, inputs[LENGTHS]), tf.int32)
            _require_equal(tf.reduce_sum(lengths), tf.size(flat), f"{LENGTHS}: must add up to the size of {HISTORY}")
        else:
            check(ids.shape.rank == 2, HISTORY, "must have 1 or 2 axes", list(ids.shape), _FORMS)
            mask = _mask_of(inputs, ids)
            flat, lengths = tf.boolean_mask(ids, mask), tf.reduce_sum(tf.cast(mask, tf.int32), axis=1)
        return self._newest(self._items(flat), lengths)

    def _items(self, ids: tf.Tensor) -> tf.Tensor:
        return known(ids, self.num_items)

    def _newest(self, items: tf.Tensor, lengths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if self.longest is None:
            return items, lengths
        ends = tf.gather(tf.cumsum(lengths), segment_ids(lengths))
        is_new = ends - tf.range(tf.size(items)) <= self.longest
        return tf.boolean_mask(items, is_new), tf.minimum(lengths, self.longest)

    def _features(self, given: Mapping[str, Any], num_examples: tf.Tensor) -> Any:
        names = [encoding.spec.name for encoding in self.encodings]
        unknown = [name for name in given if name not in names]
        rule = f"must be among the model's: {', '.join(names) or 'none'}"
        check(not unknown, FEATURES, rule, unknown, "Drop it, or name it where the model is made.")
        if not names:
            return ()
        lacking = [encoding for encoding in self.encodings if encoding.spec.name not in given]
        values = missing_values(lacking, num_examples)
        for encoding in self.encodings:
            if (name := encoding.spec.name) in given:
                values[name] = _OF_FORM[encoding.form](encoding, given[name])
                counted = values[name].lengths if isinstance(values[name], Lists) else values[name]
                rule = f"{FEATURES} {name}: must have a value for each history"
                _require_equal(tf.shape(counted)[0], num_examples, rule)
        return values


def known(ids: tf.Tensor, most: int) -> tf.Tensor:
    """Returns ids as int32, with 0 for those that are not in 1 to `most`."""
    wide = tf.cast(ids, tf.int64)
    return tf.cast(tf.where((wide >= 0) & (wide <= most), wide, UNKNOWN_ID), tf.int32)


def _integers(name: str, values: Any) -> tf.Tensor:
    try:
        found = tf.convert_to_tensor(values)
    except (TypeError, ValueError) as error:
        check(False, name, "must be an array of integers", type(values).__name__, "Make it one.")
        raise AssertionError from error
    check(found.dtype.is_integer, name, "must be integers", found.dtype.name, "For example: .astype('int32').")
    return found


def _column(name: str, values: Any) -> tf.Tensor:
    """Returns one integer for each example, `[B]`."""
    found = _integers(name, values)
    if found.shape.rank == 2 and found.shape[1] == 1:  # as Keras makes of a column of a table
        found = tf.squeeze(found, axis=1)
    check(found.shape.rank == 1, name, "must have 1 axis, of examples", list(found.shape), "Reshape it to [B].")
    return found


def _mask_of(inputs: Mapping[str, Any], ids: tf.Tensor) -> tf.Tensor:
    if MASK not in inputs:
        return tf.not_equal(ids, UNKNOWN_ID)
    mask = tf.cast(tf.convert_to_tensor(inputs[MASK]), tf.bool)
    fits = mask.shape.rank == 2 and ids.shape.is_compatible_with(mask.shape)
    rule = f"must have the shape of {HISTORY}, {list(ids.shape)}"
    check(fits, MASK, rule, list(mask.shape), "Make it true at behaviours, false at padding.")
    return mask


def _require_equal(number: tf.Tensor, wanted: tf.Tensor, rule: str) -> None:
    """Checks two counts: at once where they are known, otherwise when the graph runs."""
    found, expected = tf.get_static_value(number), tf.get_static_value(wanted)
    if found is None or expected is None:
        tf.debugging.assert_equal(number, wanted, f"{rule}.")
    else:
        name, _, words = rule.partition(": ")
        check(found == expected, name, f"{words} ({expected})", int(found), "Correct the shape.")


def _ids_of(encoding: Encoding, values: Any) -> tf.Tensor:
    return known(_column(encoding.spec.name, values), encoding.num_rows - 1)


def _lists_of(encoding: Encoding, values: Any) -> Lists:
    if isinstance(values, Lists):
        return values
    name, remedy = encoding.spec.name, "See tf.ragged.constant."
    weighted = encoding.spec.pool is Pooling.WEIGHTED
    check(not weighted, name, "must be din_dist.api.Lists, with weights", type(values).__name__, "Make it one.")
    check(isinstance(values, tf.RaggedTensor), name, "must be a tf.RaggedTensor", type(values).__name__, remedy)
    rows = known(_integers(name, values.values), encoding.num_rows - 1)
    return Lists(rows, tf.cast(values.row_lengths(), tf.int32), tf.zeros([0]))


def _numbers_of(encoding: Encoding, values: Any) -> tf.Tensor:
    found = tf.cast(tf.convert_to_tensor(values), tf.float32)
    if found.shape.rank == 2 and found.shape[1] == 1:
        found = tf.squeeze(found, axis=1)
    rank, remedy = found.shape.rank, "Reshape it to [B]."
    check(rank == 1, encoding.spec.name, "must have 1 axis, of examples", list(found.shape), remedy)
    return found


def _vectors_of(encoding: Encoding, values: Any) -> tf.Tensor:
    found = tf.cast(tf.convert_to_tensor(values), tf.float16)
    fits = found.shape.rank == 2 and found.shape[1] == encoding.dimension
    rule = f"must have {encoding.dimension} numbers for each example"
    check(fits, encoding.spec.name, rule, list(found.shape), "Reshape it.")
    return found


_OF_FORM = {Form.IDS: _ids_of, Form.LISTS: _lists_of, Form.NUMBERS: _numbers_of, Form.VECTORS: _vectors_of}

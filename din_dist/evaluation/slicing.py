"""Cuts the examples of a split into parts by the values of a feature.

Letters of shapes: R rows of a split, M examples; n rows of a feature's owner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from din_dist.data.event_store import EventStore, vocabulary_of
from din_dist.data.raw_columns import RawColumn
from din_dist.data.raw_features import open_raw
from din_dist.data.splits import Examples
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import Form, Kind, Owner
from din_dist.metrics.bins import equal_mass_bins
from din_dist.metrics.slices import largest_parts, range_names
from din_dist.tables.values import NumberValues

MISSING, OTHERS = "(missing)", "all others"
_LARGEST_CATEGORIES, _BINS = 12, 8
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Parts(NamedTuple):
    """Parts of the examples.

    Attributes:
        names: of the parts.
        part_of: int `[M]`, the index in `names` of each example's part.
        unit: of the names, for headings; empty where they need none.
    """

    names: list[str]
    part_of: np.ndarray
    unit: str = ""


def parts_of(store: EventStore, examples: Examples, name: str) -> Parts:
    """Returns the parts of a split by a feature. Draws are in the part of their positive.

    - ids: the commonest values, then all others
    - numbers: bins of about equally many examples
    - lists: their lengths, in such bins
    - vectors: given, or missing

    Args:
        store: the data.
        examples: of the split.
        name: of an item feature or of a declared one.
    """
    events = examples.events()
    items = store.item_ids[events]
    if name in store.item_features:
        parts = _of_ids(store.item_features[name][items], lambda ids: store.own_ids(vocabulary_of(name), ids))
        return _repeated(parts, examples)
    feature = store.features[name]
    owner = feature.encoding.spec.owner
    users = np.repeat(examples.users.astype(np.int64), examples.rows_per_user())
    if feature.offers is not None:
        rows = feature.offers.rows(events, items)
    else:
        rows = users if owner is Owner.USER else items if owner is Owner.ITEM else events
    return _repeated(_of_feature(store, feature, rows), examples)


def _repeated(parts: Parts, examples: Examples) -> Parts:
    return parts._replace(part_of=np.repeat(parts.part_of, examples.draws_per_row))


def _of_feature(store: EventStore, feature: StoredFeature, rows: np.ndarray) -> Parts:
    """Returns the parts `[R]` by a declared feature; `rows` `[R]` are those of its owner."""
    spec = feature.encoding.spec
    if spec.kind is Kind.NUMBER:
        column = RawColumn.of(spec)
        assert column is not None
        values = open_raw(store.folder, column, store.files).values
        assert isinstance(values, NumberValues)
        return _of_numbers(values.numbers[rows].astype(np.float64))
    if feature.offsets is not None:
        lengths = feature.offsets[rows + 1] - feature.offsets[rows]
        part_of = equal_mass_bins(lengths, _BINS)
        return Parts(range_names(lengths, part_of), part_of, "Values")
    if feature.encoding.form is Form.VECTORS or spec.trained:
        vectors = feature.values if feature.encoding.form is Form.VECTORS else feature.start
        assert vectors is not None
        given = ~np.isnan(vectors[rows if feature.encoding.form is Form.VECTORS else feature.values[rows], 0])
        return Parts([MISSING, "given"], given.astype(np.int64))
    return _of_ids(feature.values[rows], lambda ids: _names_of_ids(store, feature, ids))


def _of_ids(ids: np.ndarray, names_of: Callable[[np.ndarray], list[str]]) -> Parts:
    """Returns the parts by ids `[R]`; `names_of` gives the names of some of them."""
    kept, part_of = largest_parts(ids, _LARGEST_CATEGORIES)
    return Parts([*names_of(kept), OTHERS], part_of)


def _names_of_ids(store: EventStore, feature: StoredFeature, ids: np.ndarray) -> list[str]:
    """Returns how a reader knows the rows of a table, of which row 0 is also for rare values."""
    spec = feature.encoding.spec
    unknown = MISSING if spec.min_count == 1 else "(missing or rare)"
    if spec.kind is Kind.HOUR_OF_DAY:
        return [f"{number - 1:02d}:00" if number else unknown for number in ids]
    if spec.kind is Kind.DAY_OF_WEEK:
        return [_DAYS[number - 1] if number else unknown for number in ids]
    if spec.rows:
        return [f"row {number}" if number else unknown for number in ids]
    own = store.feature_vocabulary(spec.name)
    return [str(own[int(number) - 1].as_py()) if number else unknown for number in ids]


def _of_numbers(numbers: np.ndarray) -> Parts:
    """Returns the parts by numbers, float64 `[R]`; those that are missing are the first part."""
    given = ~np.isnan(numbers)
    part_of = np.zeros(len(numbers), np.int64)
    part_of[given] = 1 + equal_mass_bins(numbers[given], _BINS)
    names = [MISSING]
    for part in range(1, int(part_of.max(initial=0)) + 1):
        here = numbers[part_of == part]
        low, high = float(here.min()), float(here.max())
        names.append(f"{low:g}" if low == high else f"{low:g} to {high:g}")
    return Parts(names, part_of)

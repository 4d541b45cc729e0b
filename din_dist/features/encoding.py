"""A feature after preparation: numbers that the training part fixed, and arrays. The model sees no more.

Letters of shapes: n rows of a feature's owner, which are users, events, items with item 0, or offers with row 0; M
values of all lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from din_dist.features.offers import Offers
from din_dist.features.spec import FeatureSpec, Form, Scale


@dataclasses.dataclass(frozen=True)
class FeatureCounts:
    """The numbers that preparation reports about a feature. Rows are those of its owner in the whole log.

    Attributes:
        distinct: different values, missing ones not counted.
        missing: rows without a value; of lists, rows with an empty one.
        rare: different values with fewer training events than `min_count`, which share the unknown row.
        colliding: with hashing, the share of the training events whose row belongs to several values.
        extra: values or rows of a table of items or users that no event has.
    """

    distinct: int = 0
    missing: int = 0
    rare: int = 0
    colliding: float = 0.0
    extra: int = 0


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A feature as the training part fixed it.

    Attributes:
        spec: the declaration.
        num_rows: of the embedding table, with row 0 for unknown and missing values; 0 without a table.
        dimension: D of vectors.
        mean: of numbers, after `log` where that is the scale.
        deviation: likewise, the standard deviation; never 0.
        bounds: of quantiles, ascending: a number x has bin 1 + (how many bounds are at most x).
        integers: ids are integers; otherwise strings.
        unit: of the timestamps, for features that are made from them; otherwise empty.
        timezone: likewise, the IANA name of the time zone.
        counts: for the report.
    """

    spec: FeatureSpec
    num_rows: int = 0
    dimension: int = 0
    mean: float = 0.0
    deviation: float = 1.0
    bounds: tuple[float, ...] = ()
    integers: bool = False
    unit: str = ""
    timezone: str = ""
    counts: FeatureCounts = dataclasses.field(default_factory=FeatureCounts)

    @property
    def form(self) -> Form:
        """The form in which the model receives the feature."""
        return self.spec.form

    def width(self, default: int) -> int:
        """Returns the number of columns that the feature adds to what the model sees.

        Args:
            default: the width of embeddings that declare none.
        """
        if self.spec.width:
            return self.spec.width
        if self.form is not Form.NUMBERS:
            return default
        return self.num_number_columns

    @property
    def num_number_columns(self) -> int:
        """The columns of a number before its projection: what stands for it, and an indicator of missing ones."""
        return 1 + (2 * self.spec.encode.frequencies if self.spec.encode.scale is Scale.PERIODIC else 1)

    def to_json(self) -> dict[str, Any]:
        """Returns the encoding as JSON takes it."""
        return {**dataclasses.asdict(self), "spec": self.spec.to_json(), "bounds": list(self.bounds)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the encoding that `to_json` has written.

        Raises:
            ValueError, TypeError, KeyError: `fields` are no encoding.
        """
        return cls(
            **{
                **fields,
                "spec": FeatureSpec.from_json(fields["spec"]),
                "bounds": tuple(fields["bounds"]),
                "counts": FeatureCounts(**fields["counts"]),
            }
        )


@dataclasses.dataclass(frozen=True, eq=False)
class StoredFeature:
    """A feature of a prepared data set, mapped from its files.

    Attributes:
        encoding: how it was encoded.
        values: by form, IDS: int32 `[n]`, rows of the table; LISTS: int32 `[M]`, likewise; NUMBERS: float32 `[n]`,
            encoded, NaN where missing; VECTORS: float16 `[n, D]`, NaN where missing.
        offsets: of LISTS, int64 `[n + 1]`, where each row's list begins; otherwise None.
        weights: of weighted LISTS, float32 `[M]`; otherwise None.
        start: of vectors that are trained, float16 `[num_rows, D]`, the first values of each row of the table, NaN
            where there are none; otherwise None.
        vocabulary: of ids with rows of their own, int32 `[num_rows - 1]`: entry i is the place, in the vocabulary of
            the raw column, of the id that has row i + 1; otherwise None.
        offers: of a candidate's feature that is looked up, the row of each item under an event's circumstances;
            otherwise None.
    """

    encoding: Encoding
    values: np.ndarray
    offsets: np.ndarray | None = None
    weights: np.ndarray | None = None
    start: np.ndarray | None = None
    vocabulary: np.ndarray | None = None
    offers: Offers | None = None


class Lists(NamedTuple):
    """Lists of some rows, concatenated, as a batch or a lookup has them: each field a tensor or its TensorSpec."""

    values: Any  # int32 [M], rows of the table
    lengths: Any  # int32 [n], sum M
    weights: Any  # float32 [M]; empty without weights

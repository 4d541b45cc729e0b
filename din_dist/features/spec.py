"""`FeatureSpec`: a feature as a user declares it. Preparation, training, exports and serving all follow it.

A feature has one of four owners and one kind. `declarations.py` reads declarations from a file and checks them.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self


class Owner(enum.StrEnum):
    """Who has the value of a feature."""

    USER = "user"
    CONTEXT = "context"  # the event: hour, device, page
    CANDIDATE = "candidate"  # the event's own value of the item that was shown: a price, a position
    ITEM = "item"  # every item, as candidate and in histories
    HISTORY = "history"  # a behaviour: its action, its quantity, how long ago it was


class FeatureConflict(enum.StrEnum):
    """Says which row counts if rows give an item or a user different values of a feature."""

    ERROR = "error"  # none: the rows are wrong
    FIRST = "first"  # the value of the first row that has one
    LAST = "last"  # that of the last


OF_EXAMPLES = (Owner.USER, Owner.CONTEXT, Owner.CANDIDATE)  # whose features have a value for each example


class Kind(enum.StrEnum):
    """The kind of a feature's values."""

    CATEGORY = "category"  # one id, string or integer
    NUMBER = "number"
    CATEGORIES = "categories"  # a list of ids, which is pooled
    VECTOR = "vector"  # a list of numbers, of one length
    HOUR_OF_DAY = "hour_of_day"  # of the event's time
    DAY_OF_WEEK = "day_of_week"
    TIME_SINCE = "time_since"  # from a behaviour to the request


class Form(enum.StrEnum):
    """The form in which the model receives a feature. There are few forms, so a new kind needs no new layer."""

    IDS = "ids"  # a row of an embedding table
    LISTS = "lists"  # several rows of a table, with a weight each or none
    NUMBERS = "numbers"  # a standardized number; NaN where it is missing
    VECTORS = "vectors"  # D numbers; NaN where it is missing


class Pooling(enum.StrEnum):
    """How the vectors of a list become one."""

    MEAN = "mean"
    SUM = "sum"
    WEIGHTED = "weighted"  # the sum of weight times vector


class Scale(enum.StrEnum):
    """How a number is encoded."""

    STANDARD = "standard"  # (x - mean) / standard deviation
    LOG = "log"  # sign(x) log(1 + |x|), then standard
    NONE = "none"
    QUANTILES = "quantiles"  # the number of the bin, a row of a table
    PERIODIC = "periodic"  # standard, then sin and cos of K frequencies that are learned


TIME_KINDS = (Kind.HOUR_OF_DAY, Kind.DAY_OF_WEEK, Kind.TIME_SINCE)
NUM_TIME_IDS = {Kind.HOUR_OF_DAY: 24, Kind.DAY_OF_WEEK: 7, Kind.TIME_SINCE: 64}


@dataclasses.dataclass(frozen=True)
class Encode:
    """The encoding of a number.

    Attributes:
        scale: its name.
        bins: of quantiles, at least 2.
        frequencies: of periodic, at least 1.
        sigma: of periodic, the standard deviation of the first frequencies.
    """

    scale: Scale = Scale.STANDARD
    bins: int = 0
    frequencies: int = 0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the encoding that a user wrote, such as `quantiles:16` or `periodic:8,0.1`.

        Raises:
            ValueError: there is no such encoding.
        """
        name, _, numbers = text.partition(":")
        scale = Scale(name)
        match scale:
            case Scale.QUANTILES:
                found = cls(scale, bins=int(numbers))
                valid = 2 <= found.bins <= 65536
            case Scale.PERIODIC:
                count, _, sigma = numbers.partition(",")
                found = cls(scale, frequencies=int(count), sigma=float(sigma))
                valid = 1 <= found.frequencies <= 1024 and 0 < found.sigma < 1e6
            case _:
                found, valid = cls(scale), not numbers
        if not valid:
            raise ValueError(text)
        return found

    def __str__(self) -> str:
        match self.scale:
            case Scale.QUANTILES:
                return f"{self.scale}:{self.bins}"
            case Scale.PERIODIC:
                return f"{self.scale}:{self.frequencies},{self.sigma:g}"
            case _:
                return str(self.scale)


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """One declared feature.

    Attributes:
        name: in labels, inputs and errors; unique in a job.
        owner: who has the value.
        kind: of the values.
        column: the column of the log, or of the table of items or users. Empty for times and for `path`.
        width: of the embedding or of the projection. 0: `--embedding_dim` for tables and vectors; a number is not
            projected.
        encode: of a number.
        min_count: values with fewer training events share the unknown row.
        rows: with hashing, the number of rows; 0: each value has a row of its own.
        pool: of a list.
        weights: the column of a list's weights.
        separator: separates the values of a list that is written as text; empty: lists are lists or JSON arrays.
        path: an .npy file with the vectors, `[F, D]`; `ids` is a text file with the id of each row, one a line.
        ids: see `path`.
        trained: a vector is the start of a trained table and not frozen.
        by: of a candidate's feature that is looked up in a table of offers: the columns of the event which, with the
            item, name the row. Empty: the log has the value of the item that was shown.
    """

    name: str
    owner: Owner
    kind: Kind
    column: str = ""
    width: int = 0
    encode: Encode = dataclasses.field(default_factory=Encode)
    min_count: int = 1
    rows: int = 0
    pool: Pooling = Pooling.MEAN
    weights: str = ""
    separator: str = ""
    path: str = ""
    ids: str = ""
    trained: bool = False
    by: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        """The form in which the model receives the feature."""
        match self.kind:
            case Kind.NUMBER:
                return Form.IDS if self.encode.scale is Scale.QUANTILES else Form.NUMBERS
            case Kind.CATEGORIES:
                return Form.LISTS
            case Kind.VECTOR:
                return Form.IDS if self.trained else Form.VECTORS
            case _:
                return Form.IDS

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read for it."""
        return tuple(name for name in (self.column, self.weights) if name)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that are not the default, as JSON takes them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in fields.items() if value != _DEFAULTS.get(name)}
        return {name: str(value) if isinstance(value, Encode) else value for name, value in given.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the feature that `to_json` has written.

        Raises:
            ValueError, TypeError, KeyError: `fields` are no feature.
        """
        fields = dict(fields)
        fields |= {"owner": Owner(fields["owner"]), "kind": Kind(fields["kind"])}
        if "encode" in fields:
            fields["encode"] = Encode.parse(fields["encode"])
        if "pool" in fields:
            fields["pool"] = Pooling(fields["pool"])
        if "by" in fields:
            fields["by"] = tuple(map(str, fields["by"]))
        return cls(**fields)


_DEFAULTS = {
    field.name: field.default_factory() if callable(field.default_factory) else field.default
    for field in dataclasses.fields(FeatureSpec)
}


def shorthand(names: Sequence[str]) -> tuple[FeatureSpec, ...]:
    """Returns what `--item_features` declares: the columns `names`, each a category of items."""
    return tuple(FeatureSpec(name, Owner.ITEM, Kind.CATEGORY, name) for name in names)


def to_text(specs: Sequence[FeatureSpec]) -> str:
    """Returns features as one line of JSON; empty for none. Settings keep declarations in this form."""
    return json.dumps([spec.to_json() for spec in specs], separators=(",", ":")) if specs else ""


def from_text(text: str) -> tuple[FeatureSpec, ...]:
    """Returns the features that `to_text` has written."""
    return tuple(map(FeatureSpec.from_json, json.loads(text))) if text else ()

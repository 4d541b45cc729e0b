"""Names what is read of the user's files for declared features.

Encodings, widths and splits change nothing here. So a key names a column and not a feature.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from din_dist.errors import InputError
from din_dist.features.spec import TIME_KINDS, FeatureConflict, FeatureSpec, Kind, Owner
from din_dist.tables.sources import find_files
from din_dist.tables.storage import File
from din_dist.tables.values import ColumnValues

RAW_DIR = "raw_features"
TABLES = {Owner.ITEM: "items", Owner.USER: "users", Owner.CANDIDATE: "offers"}  # whose rows they have


@dataclasses.dataclass(frozen=True)
class RawColumn:
    """A column that declared features need.

    Attributes:
        owner: the owner of the values; context also stands for candidates, whose values are the event's as well.
        kind: of the values, other than times.
        column: its name; empty for `path`.
        weights: the column of the weights of lists; empty for none.
        separator: as of `FeatureSpec`, likewise `path` and `ids`.
        path: see `separator`.
        ids: see `separator`.
        by: the columns of the event by which, with the item, a row of a table of offers is found; then the owner is the
            candidate. Empty: no such table has it.
    """

    owner: Owner
    kind: Kind
    column: str
    weights: str = ""
    separator: str = ""
    path: str = ""
    ids: str = ""
    by: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: FeatureSpec) -> Self | None:
        """Returns the column of a feature; None: it is made from the time."""
        if spec.kind in TIME_KINDS:
            return None
        owner = Owner.CONTEXT if spec.owner is Owner.CANDIDATE and not spec.by else spec.owner
        return cls(owner, spec.kind, spec.column, spec.weights, spec.separator, spec.path, spec.ids, spec.by)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of a file that are read for it."""
        return tuple(name for name in (self.column, self.weights) if name)

    @property
    def key(self) -> str:
        """The name of its files."""
        return hashlib.blake2b(json.dumps(self.to_json()).encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that are not empty."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass(frozen=True)
class RawColumns:
    """Everything that is read for declared features.

    Attributes:
        columns: each column once.
        items_path: the files of a table of items; empty for none.
        users_path: likewise of users.
        offers_path: likewise of offers.
        candidates: the names of candidates' features that the log has, which need labels.
        conflict: what counts if rows of the log give an item or a user different values of a feature.
    """

    columns: tuple[RawColumn, ...] = ()
    items_path: str = ""
    users_path: str = ""
    offers_path: str = ""
    candidates: tuple[str, ...] = ()
    conflict: FeatureConflict = FeatureConflict.ERROR

    @classmethod
    def of(
        cls,
        specs: Iterable[FeatureSpec],
        items_path: str = "",
        users_path: str = "",
        offers_path: str = "",
        conflict: FeatureConflict = FeatureConflict.ERROR,
    ) -> Self:
        """Returns the columns of declared features."""
        specs = tuple(specs)
        columns = dict.fromkeys(column for spec in specs if (column := RawColumn.of(spec)))
        candidates = tuple(spec.name for spec in specs if spec.owner is Owner.CANDIDATE and not spec.by)
        columns_in_order = tuple(sorted(columns, key=lambda column: column.key))
        return cls(columns_in_order, items_path, users_path, offers_path, candidates, conflict)

    @property
    def by(self) -> tuple[str, ...]:
        """The columns of the log by which offers are looked up."""
        return next((column.by for column in self.columns if column.by), ())

    @property
    def tables(self) -> dict[str, str]:
        """The files of each table, by `items`, `users` and `offers`; empty for none."""
        return {"items": self.items_path, "users": self.users_path, "offers": self.offers_path}

    def find_tables(self) -> dict[str, list[File]]:
        """Returns the files besides the log's, by `items`, `users`, `offers` and `vectors`.

        Raises:
            InputError: a file is missing, or cannot be read.
        """
        vectors = [Path(path) for column in self.columns for path in (column.path, column.ids) if path]
        found: dict[str, list[File]] = {"vectors": [*dict.fromkeys(vectors)]}
        for name, source in self.tables.items():
            found[name] = find_files(source, f"--{name}_path", f"table of {name}").files if source else []
        for file in vectors:
            if not file.is_file():
                raise InputError(f"{file}: no such file. Correct path and ids in the file of --features.")
        return {name: files for name, files in found.items() if files}

    def name_parts(self) -> list[Any]:
        """Returns what a prepared folder's name depends on; nothing without columns and with the default."""
        of_conflict = [] if self.conflict is FeatureConflict.ERROR else [f"{self.conflict} value"]
        if not self.columns:
            return of_conflict
        of_offers = [self.offers_path] if self.offers_path else []
        columns = [column.to_json() for column in self.columns]
        return [columns, self.items_path, self.users_path, *of_offers, *of_conflict]

    def settings(self) -> dict[str, Any]:
        """Returns what the fingerprint depends on besides the content of the files, likewise."""
        of_conflict = {} if self.conflict is FeatureConflict.ERROR else {"conflict": str(self.conflict)}
        if not self.columns:
            return of_conflict
        columns = [dataclasses.replace(column, path="", ids="").to_json() for column in self.columns]
        of_offers = [True] if self.offers_path else []
        tables = [bool(self.items_path), bool(self.users_path), *of_offers]
        return {"features": columns, "tables": tables, **of_conflict}


@dataclasses.dataclass(frozen=True, eq=False)
class RawFeature:
    """The values of a column.

    Attributes:
        column: what they are of.
        values: one row a user, an event, an item with item 0, or an offer with row 0 for those that are missing.
        told: bool `[E]`, the events that tell their owner's value; None: all, or those of an event or of a table.
        extra: rows of a table, or values of it, that no event has.
    """

    column: RawColumn
    values: ColumnValues
    told: np.ndarray | None = None
    extra: int = 0


@dataclasses.dataclass(frozen=True)
class TableCounts:
    """How a table of items, users or offers fits the events.

    Attributes:
        rows: all rows of the table.
        without_events: rows whose id no event has; of offers, whose item or circumstances no event has.
        ids_without_a_row: ids of the log without a row; of offers, events whose item has none.
        repeated: rows of offers that an earlier one precedes, which stays.
    """

    rows: int
    without_events: int
    ids_without_a_row: int
    repeated: int = 0


def raw_vocabulary_path(folder: Path, column: RawColumn) -> Path:
    """Returns the file of the own ids of a column's vocabulary, below the folder of a prepared version."""
    return folder / RAW_DIR / f"{column.key}.parquet"

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
from din_dist.features.spec import TIME_KINDS, FeatureSpec, Kind, Owner
from din_dist.tables.sources import find_files
from din_dist.tables.values import Values

RAW_DIR = "raw_features"


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
    """

    owner: Owner
    kind: Kind
    column: str
    weights: str = ""
    separator: str = ""
    path: str = ""
    ids: str = ""

    @classmethod
    def of(cls, spec: FeatureSpec) -> Self | None:
        """Returns the column of a feature; None: it is made from the time."""
        if spec.kind in TIME_KINDS:
            return None
        owner = Owner.CONTEXT if spec.owner is Owner.CANDIDATE else spec.owner
        return cls(owner, spec.kind, spec.column, spec.weights, spec.separator, spec.path, spec.ids)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of a file that are read for it."""
        return tuple(name for name in (self.column, self.weights) if name)

    @property
    def key(self) -> str:
        """The name of its files."""
        return hashlib.blake2b(json.dumps(self.to_json()).encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, str]:
        """Returns the fields that are not empty."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass(frozen=True)
class FeatureColumns:
    """Everything that is read for declared features.

    Attributes:
        columns: each column once.
        items_path: the files of a table of items; empty for none.
        users_path: likewise of users.
        candidates: the names of candidates' features, which need labels.
    """

    columns: tuple[RawColumn, ...] = ()
    items_path: str = ""
    users_path: str = ""
    candidates: tuple[str, ...] = ()

    @classmethod
    def of(cls, specs: Iterable[FeatureSpec], items_path: str = "", users_path: str = "") -> Self:
        """Returns the columns of declared features."""
        specs = tuple(specs)
        columns = dict.fromkeys(column for spec in specs if (column := RawColumn.of(spec)))
        candidates = tuple(spec.name for spec in specs if spec.owner is Owner.CANDIDATE)
        return cls(tuple(sorted(columns, key=lambda column: column.key)), items_path, users_path, candidates)

    def find_tables(self) -> dict[str, list[Path]]:
        """Returns the files besides the log's, by `items`, `users` and `vectors`.

        Raises:
            InputError: a file is missing, or cannot be read.
        """
        vectors = [Path(path) for column in self.columns for path in (column.path, column.ids) if path]
        found = {"vectors": list(dict.fromkeys(vectors))}
        for name, source in (("items", self.items_path), ("users", self.users_path)):
            found[name] = find_files(source, f"--{name}_path", f"table of {name}").files if source else []
        for file in found["vectors"]:
            if not file.is_file():
                raise InputError(f"{file}: no such file. Correct path and ids in the file of --features.")
        return {name: files for name, files in found.items() if files}

    def name_parts(self) -> list[Any]:
        """Returns what a prepared folder's name depends on; nothing without columns."""
        if not self.columns:
            return []
        return [[column.to_json() for column in self.columns], self.items_path, self.users_path]

    def settings(self) -> dict[str, Any]:
        """Returns what the fingerprint depends on besides the content of the files; nothing without columns."""
        if not self.columns:
            return {}
        columns = [dataclasses.replace(column, path="", ids="").to_json() for column in self.columns]
        return {"features": columns, "tables": [bool(self.items_path), bool(self.users_path)]}


@dataclasses.dataclass(frozen=True, eq=False)
class RawFeature:
    """The values of a column.

    Attributes:
        column: what they are of.
        values: one row a user, an event, or an item with item 0.
        told: bool `[E]`, the events that tell their owner's value; None: all, or those of an event or of a table.
        extra: rows of a table, or values of it, that no event has.
    """

    column: RawColumn
    values: Values
    told: np.ndarray | None = None
    extra: int = 0


@dataclasses.dataclass(frozen=True)
class TableCounts:
    """How a table of items or users fits the events: its rows, those without events, and ids without a row."""

    rows: int
    without_events: int
    ids_without_a_row: int


def raw_vocabulary_path(folder: Path, column: RawColumn) -> Path:
    """Returns the file of the own ids of a column's vocabulary, below the folder of a prepared version."""
    return folder / RAW_DIR / f"{column.key}.parquet"

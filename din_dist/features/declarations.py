"""Reads the file of `--features`: one TOML table a feature, checked before any data are read.

[price]
of = "candidate"
kind = "number"
encode = "quantiles:16"
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from din_dist.errors import InputError
from din_dist.features.spec import TIME_KINDS, Encode, FeatureSpec, Form, Kind, Owner, Pooling
from din_dist.files import is_remote, read_bounded
from din_dist.text import shown

_LARGEST_FILE = 1 << 20  # bytes
_LONGEST_NAME = 100  # characters
_MOST_ROWS = 2**31 - 2
_WIDEST = 4096
_KEYS: Mapping[str, Collection[str]] = {  # key -> the kinds that have it
    "of": tuple(Kind),
    "kind": tuple(Kind),
    "from": TIME_KINDS,
    "column": (Kind.CATEGORY, Kind.NUMBER, Kind.CATEGORIES, Kind.VECTOR),
    "width": tuple(Kind),
    "encode": (Kind.NUMBER,),
    "min_count": (Kind.CATEGORY, Kind.CATEGORIES),
    "rows": (Kind.CATEGORY, Kind.CATEGORIES),
    "pool": (Kind.CATEGORIES,),
    "weights": (Kind.CATEGORIES,),
    "separator": (Kind.CATEGORIES, Kind.VECTOR),
    "path": (Kind.VECTOR,),
    "ids": (Kind.VECTOR,),
    "trained": (Kind.VECTOR,),
    "by": (Kind.CATEGORY, Kind.NUMBER, Kind.CATEGORIES, Kind.VECTOR),
}
_MOST_COLUMNS = 8  # that name the row of an offer, besides the item
_ENCODINGS = "standard, log, none, quantiles:BINS (2 to 65536) or periodic:FREQUENCIES,SIGMA"


def read_declarations(path: Path) -> tuple[FeatureSpec, ...]:
    """Reads the features that a file declares, in its order.

    Paths in it are relative to its folder.

    Raises:
        InputError: the file cannot be read, or a declaration is wrong; the text names the feature.
    """
    try:
        text = read_bounded(path, _LARGEST_FILE).decode()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--features: must be a TOML file of at most 1 MiB. Received: {path}: "
            f"{getattr(error, 'strerror', None) or error}. Give another."
        ) from error
    return parse_declarations(text, path)


def parse_declarations(text: str, path: Path) -> tuple[FeatureSpec, ...]:
    """Returns the features that `text`, the content of `path`, declares.

    Raises:
        InputError: as `read_declarations`.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}: must be TOML, one table [NAME] a feature, each name once. Received: {error}. Correct it."
        ) from error
    specs = tuple(_Declaration(path, name, table).spec() for name, table in tables.items())
    of_offers = [spec for spec in specs if spec.by]
    other = next((spec for spec in of_offers if spec.by != of_offers[0].by), None)
    if other:
        raise InputError(
            f"{path}, [{other.name}]: all features of offers have the same by, because they share a table. Received: "
            f"by = {list(other.by)}, and {list(of_offers[0].by)} of {of_offers[0].name}. Write one list for all."
        )
    return specs


class _Declaration:
    """One table of the file."""

    def __init__(self, path: Path, name: str, table: Any) -> None:
        self._path, self._name, self._table = path, name, table

    def spec(self) -> FeatureSpec:
        self._check_name()
        if not isinstance(self._table, dict):
            raise self._error(
                "a feature is a table", f"{self._name} = {shown(self._table)}", 'Write [NAME], then of = "..." below it'
            )
        owner = self._choice("of", Owner)
        kind = self._choice("kind", Kind)
        self._check_keys(kind)
        spec = FeatureSpec(
            name=self._name,
            owner=owner,
            kind=kind,
            column=self._column(kind),
            width=self._whole("width", 0, 1, _WIDEST),
            encode=self._encode(),
            min_count=self._whole("min_count", 1, 1, _MOST_ROWS),
            rows=self._whole("rows", 0, 1, _MOST_ROWS),
            pool=self._choice("pool", Pooling, Pooling.MEAN),
            weights=self._text("weights"),
            separator=self._text("separator"),
            path=self._file("path"),
            ids=self._file("ids"),
            trained=self._switch("trained"),
            by=self._columns("by"),
        )
        self._check_owner(spec)
        self._check_together(spec)
        return spec

    def _check_name(self) -> None:
        name = self._name
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise self._error(
                f"a feature's name is printable text of 1 to {_LONGEST_NAME} characters",
                shown(name),
                "Rename it, and name its column by column",
            )

    def _check_keys(self, kind: Kind) -> None:
        for key in self._table:
            if key not in _KEYS:
                close = difflib.get_close_matches(key, _KEYS, 1)
                remedy = f"Did you mean {close[0]}" if close else f"Write one of {', '.join(_of_kind(kind))}"
                raise self._error("there is no such key", key, remedy)
            if kind not in _KEYS[key]:
                kinds = " or ".join(map(str, _KEYS[key]))
                raise self._error(
                    f"{key} belongs to kind = {kinds}", f'{key} with kind = "{kind}"', f"Drop {key}, or change the kind"
                )

    def _check_owner(self, spec: FeatureSpec) -> None:
        """Refuses kinds that their owner does not have."""
        is_time, is_age = spec.kind in TIME_KINDS, spec.kind is Kind.TIME_SINCE
        self._require(
            not is_time or is_age or spec.owner is Owner.CONTEXT,
            "the event's time belongs to the context",
            f'of = "{spec.owner}"',
            'Write of = "context"',
        )
        self._require(
            not is_age or spec.owner is Owner.HISTORY,
            f"{Kind.TIME_SINCE} is the time from a behaviour to the request",
            f'of = "{spec.owner}"',
            'Write of = "history"',
        )
        is_id = spec.form is Form.IDS and spec.kind is not Kind.VECTOR
        self._require(
            spec.owner is not Owner.HISTORY or is_id,
            f"a feature of behaviours is a category, a number in quantiles, or {Kind.TIME_SINCE}",
            f'kind = "{spec.kind}"' + (f' with encode = "{spec.encode}"' if spec.kind is Kind.NUMBER else ""),
            "Write one of these",
        )
        self._require(
            not is_time or self._table.get("from") == "timestamp",
            f'{spec.kind} is made from = "timestamp"',
            f"from = {shown(self._table.get('from'))}",
            'Write from = "timestamp"',
        )

    def _check_together(self, spec: FeatureSpec) -> None:
        self._require(
            not (spec.rows and "min_count" in self._table),
            "hashed values are not counted",
            "rows and min_count",
            "Drop one of them",
        )
        self._require(
            (spec.pool is Pooling.WEIGHTED) == bool(spec.weights),
            'pool = "weighted" and weights, the column of the weights, belong together',
            f'pool = "{spec.pool}" and weights = "{spec.weights}"',
            "Give both, or neither",
        )
        self._require(
            bool(spec.path) == bool(spec.ids),
            "path (an .npy file) and ids (the id of each of its rows) belong together",
            f"path = {spec.path!r} and ids = {spec.ids!r}",
            "Give both, or a column",
        )
        self._require(
            not spec.path or "column" not in self._table,
            "vectors come from a column or from path",
            "both",
            "Drop one of them",
        )
        of_id = spec.owner in (Owner.ITEM, Owner.USER)
        self._require(
            of_id or not (spec.path or spec.trained),
            "vectors from a file, and trained ones, belong to items or users",
            f'of = "{spec.owner}"',
            'Write of = "item" or "user"',
        )
        self._require(
            not spec.by or spec.owner is Owner.CANDIDATE,
            "by names the columns of the event by which a candidate's feature is looked up",
            f'by with of = "{spec.owner}"',
            'Write of = "candidate", or drop by',
        )

    def _column(self, kind: Kind) -> str:
        if kind in TIME_KINDS or "path" in self._table:
            return ""
        return self._text("column") or self._name

    def _encode(self) -> Encode:
        text = self._text("encode")
        if not text:
            return Encode()
        try:
            return Encode.parse(text)
        except ValueError as error:
            raise self._error(f"encode must be {_ENCODINGS}", f'encode = "{text}"', "Write one of these") from error

    def _choice(self, key: str, kind: Any, default: Any = None) -> Any:
        value = self._table.get(key, default)
        try:
            return kind(value)
        except ValueError as error:
            received = f"{key} = {shown(value)}" if key in self._table else f"no {key}"
            if key == "kind" and isinstance(value, str) and (close := difflib.get_close_matches(value, list(kind), 1)):
                raise self._error(f"{key} must be {_words(kind)}", received, f"Did you mean {close[0]}") from error
            raise self._error(f"{key} must be {_words(kind)}", received, "Write one of these") from error

    def _whole(self, key: str, default: int, least: int, most: int) -> int:
        value = self._table.get(key, default)
        if key not in self._table:
            return default
        self._require(
            isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
            f"{key} must be a whole number from {least:,} to {most:,}",
            f"{key} = {shown(value)}",
            "Give such a number",
        )
        return value

    def _text(self, key: str) -> str:
        value = self._table.get(key, "")
        self._require(
            isinstance(value, str) and (key not in self._table or bool(value)) and value.isprintable(),
            f"{key} must be printable text",
            f"{key} = {shown(value)}",
            f"Write {key} in quotes, or drop it",
        )
        return value

    def _columns(self, key: str) -> tuple[str, ...]:
        value = self._table.get(key, [])
        names = value if isinstance(value, list) else []
        good = all(isinstance(name, str) and name and name.isprintable() for name in names)
        self._require(
            key not in self._table or (good and 1 <= len(names) <= _MOST_COLUMNS and len(set(names)) == len(names)),
            f"{key} must be a list of 1 to {_MOST_COLUMNS} columns, each once",
            f"{key} = {shown(value)}",
            f'Write {key} = ["store_id"], or drop it',
        )
        return tuple(names)

    def _switch(self, key: str) -> bool:
        value = self._table.get(key, False)
        self._require(isinstance(value, bool), f"{key} must be true or false", f"{key} = {shown(value)}", "Write one")
        return value

    def _file(self, key: str) -> str:
        text = self._text(key)
        self._require(
            not is_remote(text),
            f"{key} must be a file of this machine, because vectors are mapped into memory",
            f"{key} = {shown(text)}",
            "Copy it to one",
        )
        return str(self._path.absolute().parent / text) if text else ""

    def _require(self, holds: bool, rule: str, received: str, remedy: str) -> None:
        if not holds:
            raise self._error(rule, received, remedy)

    def _error(self, rule: str, received: str, remedy: str) -> InputError:
        end = "?" if remedy.startswith("Did") else "."
        return InputError(f"{self._path}, [{shown(self._name)[1:-1]}]: {rule}. Received: {received}. {remedy}{end}")


def _of_kind(kind: Kind) -> list[str]:
    return [key for key, kinds in _KEYS.items() if kind in kinds]


def _words(values: Iterable[str]) -> str:
    *first, last = values
    return f"{', '.join(first)} or {last}"

"""Raw values of declared features, as the user's files have them, stored beside the records of prepared data.

FOLDER/raw_features/
    columns.json             what each file is, and counts
    KEY-NAME.npy             the arrays of `ColumnValues`, one row a user, an event, or an item with item 0
    KEY-told.npy             which events tell their owner's value, where not all do
    KEY.parquet              column "id": the own ids of a vocabulary
    offers-keys.npy, offers-circumstances.npy    the arrays of `Offers`, if there is a table of offers
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.data.checksums import write_checksums
from din_dist.data.event_store import FileState, map_array, reading_prepared
from din_dist.data.raw_columns import RAW_DIR, RawColumn, RawFeature, TableCounts, raw_vocabulary_path
from din_dist.features.offers import Offers
from din_dist.features.spec import Kind
from din_dist.files import read_record, write_text
from din_dist.tables.spools import save_array
from din_dist.tables.values import ColumnValues, IdValues, ListValues, NumberValues, VectorValues
from din_dist.text import parse_json

_COLUMNS_FILE = "columns.json"
_OFFER_KEYS, _CIRCUMSTANCES = "offers-keys.npy", "offers-circumstances.npy"


def write_raw(
    folder: Path, features: Sequence[RawFeature], tables: Mapping[str, TableCounts], offers: Offers | None = None
) -> None:
    """Writes raw values below the folder of a prepared version. Nothing else writes there."""
    into = folder / RAW_DIR
    into.mkdir()
    if offers is not None:
        np.save(into / _OFFER_KEYS, offers.keys)
        np.save(into / _CIRCUMSTANCES, offers.circumstances)
    for feature in features:
        arrays, ids = _arrays(feature.values)
        if feature.told is not None:
            arrays["told"] = feature.told
        for name, array in arrays.items():
            save_array(into / f"{feature.column.key}-{name}.npy", array)
        if ids is not None:
            pq.write_table(pa.table({"id": ids}), raw_vocabulary_path(folder, feature.column))
    write_known(into, {feature.column: (feature.extra, feature.told is not None) for feature in features}, tables)
    write_checksums(into)


def write_known(into: Path, columns: Mapping[RawColumn, tuple[int, bool]], tables: Mapping[str, TableCounts]) -> None:
    """Writes what is known of the files in a folder of raw values.

    Args:
        into: the folder.
        columns: for each column `RawFeature.extra`, and whether some events do not tell their owner's value.
        tables: how the tables of items, users and offers fit the events.
    """
    known = {
        "columns": {
            column.key: {**column.to_json(), "extra": extra, "told": told} for column, (extra, told) in columns.items()
        },
        "tables": {name: dataclasses.asdict(counts) for name, counts in tables.items()},
    }
    write_text(into / _COLUMNS_FILE, json.dumps(known, indent=1) + "\n")


def open_raw(folder: Path, column: RawColumn, files: dict[Path, FileState]) -> RawFeature:
    """Maps the values of a column into memory. The ids of a vocabulary are read only when they are needed.

    Args:
        folder: the folder of the prepared version.
        column: what to open.
        files: the state of each file, which is noted here.

    Raises:
        InputError: a file is missing or damaged.
    """
    path = folder / RAW_DIR / _COLUMNS_FILE
    with reading_prepared(path):
        facts = parse_json(read_record(path))["columns"][column.key]
        extra, has_told = int(facts["extra"]), bool(facts["told"])

    def load(name: str) -> np.ndarray:
        return np.asarray(map_array(folder / RAW_DIR / f"{column.key}-{name}.npy", files))

    told = load("told") if has_told else None
    values: ColumnValues
    match column.kind:
        case Kind.CATEGORY:
            values = IdValues(load("codes"), pa.array([], pa.int64()))
        case Kind.NUMBER:
            values = NumberValues(load("numbers"))
        case Kind.CATEGORIES:
            weights = load("weights") if column.weights else None
            values = ListValues(load("codes"), load("offsets"), pa.array([], pa.int64()), weights)
        case _:
            values = VectorValues(load("vectors"))
    return RawFeature(column, values, told, extra)


def open_offers(folder: Path, num_items: int, files: dict[Path, FileState]) -> Offers:
    """Maps the offers of a table into memory.

    Args:
        folder: the folder of the prepared version.
        num_items: of the log.
        files: the state of each file, which is noted here.

    Raises:
        InputError: a file is missing or damaged.
    """
    keys, circumstances = (
        np.asarray(map_array(folder / RAW_DIR / name, files)) for name in (_OFFER_KEYS, _CIRCUMSTANCES)
    )
    return Offers(keys, circumstances, num_items)


def raw_ids(folder: Path, column: RawColumn) -> pa.ChunkedArray:
    """Reads the own ids of a column's vocabulary from the disk.

    Raises:
        InputError: the file is missing or damaged.
    """
    with reading_prepared(raw_vocabulary_path(folder, column)) as path:
        return pq.read_table(path, columns=["id"]).column("id")


def read_tables(folder: Path) -> dict[str, TableCounts]:
    """Returns how the tables fit the events, by `items`, `users` and `offers`.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / RAW_DIR / _COLUMNS_FILE
    if not path.exists():
        return {}
    with reading_prepared(path):
        return {name: TableCounts(**counts) for name, counts in parse_json(read_record(path))["tables"].items()}


def _arrays(values: ColumnValues) -> tuple[dict[str, np.ndarray], pa.Array | None]:
    match values:
        case IdValues():
            return {"codes": values.codes}, values.ids
        case NumberValues():
            return {"numbers": values.numbers}, None
        case ListValues():
            weights = {} if values.weights is None else {"weights": values.weights}
            return {"codes": values.codes, "offsets": values.offsets, **weights}, values.ids
        case VectorValues():
            return {"vectors": values.vectors}, None
    raise TypeError(type(values))

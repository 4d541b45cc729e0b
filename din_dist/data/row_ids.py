"""Keeps what each row of each embedding table stands for, so that another job can take rows over by the log's own ids.

FOLDER/
    rows.json        each table with its variables, the encodings of declared features, and the data's fingerprint
    INDEX.parquet    column "id": the own ids of a table; column "row": the row of each

Row 0 of every table is for unknown ids and stands in no file. Letters of shapes: V ids of a table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from din_dist.features.encoding import Encoding
from din_dist.files import make_folder, open_regular, published_folder, read_record, write_text
from din_dist.schema import UNKNOWN_ID
from din_dist.tables.record_batches import whole
from din_dist.text import is_count, parse_json, shown

ROWS_FILE = "rows.json"
NEW = -1  # a row that no row was before


@dataclasses.dataclass(frozen=True, eq=False)
class RowIds:
    """The meaning of the rows of a table.

    Attributes:
        name: of the table, for people.
        variables: the names of the variables with these rows: the table, and the biases of items.
        num_rows: with row 0.
        ids: the own ids, strings or integers `[V]`, each once. None: a row stands for the same in all data, because it
            is a hash or a time, or for a bin.
        rows: int32 `[V]`, the row of each id, no row twice; 0 for an id without a row of its own. None: i + 1.
        bounds: of bins, ascending: bin 1 + k is that of numbers from `bounds[k - 1]` on and below `bounds[k]`. None:
            rows are no bins.
        given: new rows have first values of their own, which the user gave.
    """

    name: str
    variables: tuple[str, ...]
    num_rows: int
    ids: pa.Array | None = None
    rows: np.ndarray | None = None
    bounds: tuple[float, ...] | None = None
    given: bool = False

    @property
    def known(self) -> Self:
        """The same without ids that have no row of their own."""
        if self.ids is None or self.rows is None:
            return self
        own = np.flatnonzero(self.rows != UNKNOWN_ID)
        return dataclasses.replace(self, ids=self.ids.take(pa.array(own)), rows=self.rows[own])

    @property
    def row_of_id(self) -> np.ndarray:
        """The row of each id `[V]`."""
        assert self.ids is not None
        return np.arange(1, len(self.ids) + 1) if self.rows is None else self.rows


class KeptRows(NamedTuple):
    """The meaning of the rows of all tables, as `write_rows` keeps it.

    Attributes:
        tables: what the rows of each table stand for; ids without a row of their own are left out.
        item_features: names of the item features.
        encodings: those of declared features.
        fingerprint: of the prepared data.
        variables: name of a variable -> where an export has its values; empty for a job.
    """

    tables: tuple[RowIds, ...]
    item_features: tuple[str, ...]
    encodings: tuple[Encoding, ...]
    fingerprint: str
    variables: Mapping[str, str] = {}


def rows_before(before: RowIds, now: RowIds) -> np.ndarray:
    """Returns which row each row was before, int64 `[now.num_rows]`: `NEW` for a new one; row 0 stays row 0.

    Own ids are looked up, never places, unless the old ids are proven to be the first of the new ones. A bin was the
    one that shares the longest interval of numbers with it.

    Raises:
        ValueError: the ids are strings here and integers there.
    """
    found = np.full(now.num_rows, NEW, np.int64)
    found[UNKNOWN_ID] = UNKNOWN_ID
    if now.ids is not None and before.ids is not None:
        places = _places(now.ids, before.ids)
        known = places >= 0
        rows = now.row_of_id[known]
        found[rows] = before.row_of_id[places[known]]
        found[UNKNOWN_ID] = UNKNOWN_ID  # ids without a row of their own have written there
    elif now.bounds is not None and before.bounds is not None:
        found[1:] = 1 + _bins_before(before.bounds, now.bounds)
    else:
        common = min(before.num_rows, now.num_rows)
        found[:common] = np.arange(common)
    return found


def _places(ids: pa.Array, among: pa.Array) -> np.ndarray:
    """Returns the place of each of `ids` in `among`, int64; -1 where it is not."""
    integers = [pa.types.is_integer(each.type) for each in (ids, among) if len(each)]
    if len({*integers}) > 1:
        raise ValueError("strings and integers")
    kind = pa.int64() if True in integers else pa.large_string()
    if not len(integers):
        return np.full(len(ids), NEW, np.int64)
    ids, among = (each.cast(kind) if len(each) else pa.array([], kind) for each in (ids, among))
    if len(among) <= len(ids) and ids[: len(among)].equals(among):
        return np.where(np.arange(len(ids)) < len(among), np.arange(len(ids)), NEW)
    return pc.fill_null(pc.index_in(ids, value_set=among, skip_nulls=True), NEW).to_numpy().astype(np.int64)


def _bins_before(before: Sequence[float], now: Sequence[float]) -> np.ndarray:
    """Returns the bin, from 0, that shares the longest interval with each bin of now; of equal ones the first."""
    starts, ends = (np.concatenate(ends) for ends in (([-np.inf], before), (before, [np.inf])))
    found = []
    for start, end in zip([-np.inf, *now], [*now, np.inf], strict=True):
        shared = np.minimum(ends, end) - np.maximum(starts, start)
        found.append(int(np.argmax(shared)))
    return np.array(found, np.int64)


def write_rows(folder: Path, kept: KeptRows) -> None:
    """Publishes a folder that says what the rows of tables stand for, in place of one that is there.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(folder.parent)
    tables: list[dict[str, Any]] = []
    with published_folder(folder) as aside:
        for index, table in enumerate(each.known for each in kept.tables):
            fields: dict[str, Any] = {
                "name": table.name,
                "variables": table.variables,
                "num_rows": table.num_rows,
                "bounds": table.bounds,
            }
            if table.ids is not None:
                path = aside / f"{index}.parquet"
                columns = {"id": table.ids, "row": pa.array(table.row_of_id, pa.int32())}
                pq.write_table(pa.table(columns), path, compression="zstd")
                fields |= {"ids": path.name, "digest": _digest(path)}
            tables.append(fields)
        written = {
            "data_fingerprint": kept.fingerprint,
            "tables": tables,
            "item_features": kept.item_features,
            "features": [encoding.to_json() for encoding in kept.encodings],
            "variables": dict(kept.variables),
        }
        write_text(aside / ROWS_FILE, json.dumps(written, indent=1) + "\n")


def read_rows(folder: Path) -> KeptRows:
    """Returns what `write_rows` has written.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not as it was written.
    """
    fields = parse_json(read_record(folder / ROWS_FILE))
    try:
        return KeptRows(
            tuple(_read_table(folder, table) for table in fields["tables"]),
            tuple(map(str, fields["item_features"])),
            tuple(map(Encoding.from_json, fields["features"])),
            str(fields["data_fingerprint"]),
            {str(name): str(place) for name, place in fields["variables"].items()},
        )
    except (TypeError, KeyError, AttributeError, pa.ArrowException) as error:
        raise ValueError(f"{ROWS_FILE} of another form") from error


def _read_table(folder: Path, fields: Mapping[str, Any]) -> RowIds:
    variables, num_rows, bounds = tuple(map(str, fields["variables"])), fields["num_rows"], fields["bounds"]
    if not is_count(num_rows) or not num_rows:
        raise ValueError(f"a table of {shown(num_rows)} rows")
    bounds = None if bounds is None else tuple(map(float, bounds))
    table = RowIds(str(fields["name"]), variables, num_rows, bounds=bounds)
    if "ids" not in fields:
        return table
    path = folder / Path(fields["ids"]).name
    if _digest(path) != fields["digest"]:
        raise ValueError(f"{path.name}, whose content changed")
    found = pq.read_table(path, columns=["id", "row"]).combine_chunks()
    ids, rows = (whole(found.column(name)) for name in ("id", "row"))
    places = rows.to_numpy(zero_copy_only=False)
    if len(places) and not (places.min() > UNKNOWN_ID and places.max() < num_rows):
        raise ValueError(f"rows beyond the {num_rows} of {table.name}")
    return dataclasses.replace(table, ids=ids, rows=places)


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]

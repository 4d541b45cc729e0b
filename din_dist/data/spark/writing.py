"""Writes, on executors, parts of vocabularies, of records and of arrays, and the files that are joined from parts."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist import schema
from din_dist.data.array_writer import ArrayWriter, ArrayWriters
from din_dist.data.blocks import Block
from din_dist.data.checksums import checksum_of
from din_dist.data.event_store import packing
from din_dist.data.log_reader import first_times, session_places
from din_dist.files import published

_ROWS_AT_ONCE = 1 << 20  # a row group of a vocabulary has so many, as Arrow writes a whole table
_BASES = {  # arrays of places: which count stands before the first of a part
    "user_offsets": "item_ids",
    "history_offsets": "history_item_ids",
    "history_ends": "history_item_ids",
    "touched_offsets": "touched_gaps",
}
Batches = Iterable[pa.RecordBatch]


def write_numbered(batches: Batches, folder: Path, part: int) -> Iterator[pa.RecordBatch]:
    """Writes a part of what is numbered, with `place` in the part and the events before it; yields its counts."""
    rows = events = 0
    path = folder / f"part-{part:06}.parquet"
    with contextlib.ExitStack() as stack:
        writer = None
        for batch in filter(len, batches):
            counts = batch.column("n").to_numpy()
            ends = events + np.cumsum(counts)
            table = pa.Table.from_batches([batch])
            table = table.append_column("part", pa.repeat(pa.scalar(part, pa.int32()), len(batch)))
            table = table.append_column("place", pa.array(np.arange(rows, rows + len(batch))))
            table = table.append_column("before", pa.array(ends - counts))
            if writer is None:
                file = stack.enter_context(published(path, durable=False))
                writer = stack.enter_context(pq.ParquetWriter(file, table.schema))
            writer.write_table(table)
            rows, events = rows + len(batch), int(ends[-1])
    yield pa.RecordBatch.from_pydict({"part": [part], "rows": [rows], "events": [events]})


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The facts that the task of a shard of records must know.

    Attributes:
        facts: about the data set; its first and last timestamps are not known yet.
        first_users: int64 `[B + 1]`, the first user of each block, and at last U.
        blocks_per_shard: of records.
        paths: the file of each shard's records.
        more: as of `EventsBuilder._more`.
        raw: column of the rows -> name and dtype of its raw array.
        presorted: the order of the rows must be that of the times.
        work: the folder of the parts.
    """

    facts: schema.DatasetFacts
    first_users: np.ndarray
    blocks_per_shard: int
    paths: tuple[str, ...]
    more: Mapping[str, type]
    raw: Mapping[str, tuple[str, str]]
    presorted: bool
    work: Path

    def part(self, shard: int) -> Path:
        """Returns the folder of the arrays of a shard."""
        return self.work / f"shard-{shard:06}"


def write_shard(batches: Batches, sharding: Sharding, shard: int) -> Iterator[pa.RecordBatch]:
    """Writes the records of a shard and its part of each array.

    Args:
        batches: its rows, users ascending, each user's in order.
        sharding: of all.
        shard: its number.

    Yields:
        the number of records, the first and the last timestamp, and, where rows that must be sorted are not, the
        positions and times of the first such pair.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    from din_dist.data.builders.base import block_features, record_of

    folder = sharding.part(shard)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
    for name in ("packed", "raw"):
        (folder / name).mkdir(parents=True)
    features = block_features(sharding.more)
    writer = tfds.core.writer.ShardWriter(
        features=features,
        serializer=tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info()),
        example_writer=tfds.core.writer.ExampleWriter(file_format=tfds.core.file_adapters.FileFormat.TFRECORD),
    )
    times: list[int] = []
    unsorted: list[tuple[int, int, int, int]] = []
    dtypes = {name: np.dtype(dtype).type for name, dtype in sharding.raw.values()}

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        with packing(folder / "packed", sharding.facts) as pack, ArrayWriters(folder / "raw", dtypes) as raw:
            for index, rows in _tables_of_blocks(batches, sharding, shard):
                block = _block(rows, sharding, index)
                if sharding.presorted:
                    unsorted.extend(_first_unsorted(rows))
                times.extend((int(block.timestamps.min()), int(block.timestamps.max())))
                pack(block)
                for name, (array, dtype) in sharding.raw.items():
                    raw.append(array, _raw(rows[name], dtype))
                yield index, record_of(block, sharding.more)

    num_records = writer.write(records(), epath.Path(sharding.paths[shard]))
    worst = min(unsorted, key=lambda pair: pair[1], default=(-1, -1, 0, 0))
    names = ("before", "after", "time_before", "time_after")
    found = {"shard": shard, "records": num_records, "first": min(times), "last": max(times)}
    found |= dict(zip(names, worst, strict=True))
    yield pa.RecordBatch.from_pydict({name: pa.array([value], pa.int64()) for name, value in found.items()})


def _tables_of_blocks(batches: Batches, sharding: Sharding, shard: int) -> Iterator[tuple[int, pa.Table]]:
    """Yields the number of each block of a shard and its rows."""
    index = shard * sharding.blocks_per_shard
    held: list[pa.RecordBatch] = []
    for batch in filter(len, batches):
        while batch is not None and int(batch.column("user_number")[-1].as_py()) >= sharding.first_users[index + 1]:
            users = batch.column("user_number").to_numpy()
            end = int(np.searchsorted(users, sharding.first_users[index + 1]))
            yield index, pa.Table.from_batches([*held, batch.slice(0, end)])
            index, held, batch = index + 1, [], batch.slice(end)
        held.append(batch)
    yield index, pa.Table.from_batches(held)


def _block(rows: pa.Table, sharding: Sharding, index: int) -> Block:
    facts = sharding.facts
    first, end = (int(user) for user in sharding.first_users[index : index + 2])

    def array(name: str) -> np.ndarray:
        return rows[name].to_numpy()

    users, times = array("user_number") - first, array("time")
    more: dict[str, np.ndarray] = {}
    if facts.has_request_times:
        more["request_times"] = first_times(users, _codes(rows["request"]), times)
    if facts.has_sessions:
        more["session_places"] = session_places(users, _codes(rows["session"]), np.arange(len(users)))
    if facts.has_label_times:
        more["label_times"] = array("label_time")
    if facts.has_weights:
        more["weights"] = array("weight").view(np.float32)
    if facts.tasks:
        more["task_labels"] = array("tasks").astype(np.uint8)
    if schema.BLOCK_ACTIONS in sharding.more:
        more["actions"] = rows["action_code"].fill_null(0).to_numpy().astype(np.uint8)
    return Block(
        first_user=first,
        offsets=np.searchsorted(users, np.arange(end - first + 1)).astype(np.int64),
        item_ids=(array("item_number") + 1).astype(np.int32),
        timestamps=times,
        labels=array("label").astype(np.uint8) if facts.has_labels else np.ones(len(users), np.uint8),
        **more,
    )


def _codes(ids: pa.ChunkedArray) -> np.ndarray:
    return ids.combine_chunks().dictionary_encode().indices.to_numpy()


def _first_unsorted(rows: pa.Table) -> list[tuple[int, int, int, int]]:
    """Returns positions and times of the pair of neighbours of one user that are not in order; at most one."""
    users, times, positions = (rows[name].to_numpy() for name in ("user_number", "time", "position"))
    wrong = np.flatnonzero((np.diff(times) < 0) & (np.diff(users) == 0))
    if not len(wrong):
        return []
    at = int(wrong[np.argmin(positions[wrong + 1])])
    return [(int(positions[at]), int(positions[at + 1]), int(times[at]), int(times[at + 1]))]


def _raw(values: pa.ChunkedArray, dtype: str) -> np.ndarray:
    """Returns raw values: codes, 0 where they are missing; numbers from their bits; or booleans."""
    if dtype == "float32":
        bits = values.fill_null(_NAN_BITS).to_numpy().astype(np.int32)
        return bits.view(np.float32)
    return values.fill_null(0).to_numpy().astype(dtype)


_NAN_BITS = int(np.array(np.nan, np.float32).view(np.int32))

WriteTask = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Joined:
    """A file that one task makes of parts.

    Attributes:
        path: the file.
        parts: their files, in order.
        column: of Parquet parts, the one to read.
        dtype: of an array.
        kind: vocabulary (int64 or large_string in `dtype`), owners (an array of Parquet parts), events (of .npy parts).
        lead: owners: the value of row 0; None for none.
        bases: events: what is added to the values of each part.
        keeps_first: events: the parts do not begin with a 0 that all but the first leave out.
    """

    path: Path
    parts: Sequence[Path]
    kind: str
    column: str = ""
    dtype: str = "int64"
    lead: float | None = None
    bases: Sequence[int] = ()
    keeps_first: bool = True

    def write(self) -> tuple[str, str]:
        """Writes the file. Returns its path and its checksum."""
        if self.kind == "vocabulary":
            _write_vocabulary(self)
        else:
            with ArrayWriter(self.path, np.dtype(self.dtype).type) as writer:
                for values in self._values():
                    writer.append(values)
        return str(self.path), checksum_of(self.path)

    def _values(self) -> Iterator[np.ndarray]:
        if self.kind == "events":
            for place, (part, base) in enumerate(zip(self.parts, self.bases, strict=True)):
                values = np.load(part, mmap_mode="r")[0 if self.keeps_first or not place else 1 :]
                for first in range(0, len(values), _ROWS_AT_ONCE):
                    found = np.asarray(values[first : first + _ROWS_AT_ONCE])
                    yield found + base if base else found
            return
        if self.lead is not None:
            yield np.array([self.lead], self.dtype)
        for column in _columns(self.parts, self.column):
            yield _raw(pa.chunked_array([column]), self.dtype)


def _columns(parts: Sequence[Path], name: str) -> Iterator[pa.Array]:
    for part in parts:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[name]):
                yield batch.column(0)


def _write_vocabulary(job: Joined) -> None:
    """Writes ids as `pq.write_table` writes a whole table, one row group at a time."""
    kind = pa.int64() if job.dtype == "int64" else pa.large_string()
    held: list[pa.Array] = []
    with pq.ParquetWriter(job.path, pa.schema([("id", kind)])) as writer:
        for column in _columns(job.parts, job.column):
            held.append(column.cast(kind))
            if sum(map(len, held)) >= _ROWS_AT_ONCE:
                ids = pa.concat_arrays(held)
                writer.write_table(pa.table({"id": ids.slice(0, _ROWS_AT_ONCE)}))
                held = [ids.slice(_ROWS_AT_ONCE)]
        ids = pa.concat_arrays(held) if held else pa.array([], kind)
        if len(ids) or not job.parts:
            writer.write_table(pa.table({"id": ids}))


def joined_events(into: Path, folders: Sequence[Path]) -> list[Joined]:
    """Returns the arrays that are joined from parts of the same names in `folders`."""
    lengths = {
        path.stem: [len(np.load(folder / path.name, mmap_mode="r")) for folder in folders]
        for path in sorted(folders[0].glob("*.npy"))
    }
    found = []
    for name, own in lengths.items():
        base = lengths[_BASES[name]] if name in _BASES else [0] * len(own)
        before = [0, *np.cumsum(base)[:-1].tolist()]
        parts = [folder / f"{name}.npy" for folder in folders]
        dtype = str(np.load(parts[0], mmap_mode="r").dtype)
        keeps_first = not name.endswith("_offsets")
        found.append(Joined(into / f"{name}.npy", parts, "events", "", dtype, None, before, keeps_first))
    return found

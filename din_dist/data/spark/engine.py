"""Prepares a log on Spark: the same rules, records, vocabularies and arrays as the local way, to the byte.

1. One task a file finds its layout and its digest. One task a piece reads, checks and keeps rows (`rows.py`).
2. Users, items, and the values of categories are grouped, and numbered by the first position at which each appears.
3. Rows get these numbers by joins, and go to the shard of records of their user, sorted by user, time and position.
4. One task a shard writes records and parts of arrays. One task a file joins the parts (`writing.py`).

The driver holds counts, one entry a file, a part or a block of records, and nothing of the rows.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist import schema
from din_dist.data.blocks import EVENTS_PER_BLOCK
from din_dist.data.checksums import checksum_of, write_found
from din_dist.data.column_readers import names_of
from din_dist.data.event_store import ITEMS, PACKED_DIR, USERS, item_feature_path, vocabulary_of, vocabulary_path
from din_dist.data.feature_reader import two_values
from din_dist.data.log_reader import Columns, checked_columns, layout_of, unsorted
from din_dist.data.raw_columns import RAW_DIR, RawColumn, RawColumns, raw_vocabulary_path
from din_dist.data.raw_features import write_known
from din_dist.data.spark.rows import (
    ROWS_PER_PIECE,
    Piece,
    PositionedRows,
    Summary,
    WantedColumns,
    in_conflict,
    read_piece,
    settle_folders,
)
from din_dist.data.spark.session import spark_session
from din_dist.data.spark.writing import Joined, Sharding, joined_events, write_numbered, write_shard
from din_dist.errors import InputError
from din_dist.features.spec import FeatureConflict, Kind, Owner, shorthand
from din_dist.tables.formats import Format, format_of
from din_dist.tables.record_batches import Layout
from din_dist.tables.sources import fingerprint_files
from din_dist.tables.storage import File, readable
from din_dist.text import shown

_COUNTS = "part long, rows long, events long"
_OF_SHARD = (
    "shard long, records long, first long, last long, before long, after long, time_before long, time_after long"
)


@dataclasses.dataclass(frozen=True)
class SparkLog:
    """The log to prepare.

    Attributes:
        files: of the log, sorted.
        columns: to read.
        features: what declared features need.
        more: as of `EventsBuilder._more`.
    """

    files: Sequence[File]
    columns: Columns
    features: RawColumns
    more: Mapping[str, type]


@dataclasses.dataclass(frozen=True)
class Written:
    """The parts that were written.

    Attributes:
        facts: about the data set; the fingerprint, sources and reader are the builder's to fill in.
        shard_lengths: the number of records of each shard.
        sources: as from `fingerprint_files`.
        late_columns: as of `EventLog`.
    """

    facts: schema.DatasetFacts
    shard_lengths: list[int]
    sources: dict[str, dict[str, int | str]]
    late_columns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Look:
    """The facts of a file that a task finds without reading its rows.

    Attributes:
        layout: None if it has no rows.
        facts: as from `fingerprint_files`.
        groups: of Parquet, the number of rows of each row group.
        error: the text of a broken rule; empty for none.
    """

    layout: Layout | None = None
    facts: Mapping[str, dict[str, int | str]] = dataclasses.field(default_factory=dict)
    groups: tuple[int, ...] = ()
    error: str = ""


def refuse_features(features: RawColumns) -> None:
    """Refuses what this engine does not read yet.

    Raises:
        InputError: there is such a feature.
    """
    tables = [f"--{name}_path" for name, source in features.tables.items() if source]
    kinds = [f"{column.kind} {column.column}".strip() for column in features.columns if not _is_read(column)]
    if found := [*tables, *kinds]:
        raise InputError(
            "--engine=spark: reads categories and numbers of users, items, events and candidates from the log alone. "
            f"Received: {found[0]}. Drop it, or use --engine=local."
        )


def _is_read(column: RawColumn) -> bool:
    return column.kind in (Kind.CATEGORY, Kind.NUMBER) and not (column.path or column.by)


def prepare_on_spark(
    log: SparkLog, master: str, folder: Path, paths_of_shards: Callable[[int], tuple[str, ...]], per_shard: int
) -> Written:
    """Writes everything but the builder's own files.

    Args:
        log: what to prepare.
        master: of Spark.
        folder: where records, vocabularies and arrays go; all executors must see it.
        paths_of_shards: returns the paths of the records by the number of shards.
        per_shard: blocks of records in a shard.

    Raises:
        InputError: the log breaks a rule, or Spark fails.
    """
    work = folder / "parts"
    with spark_session(master) as session:
        try:
            for name in ("rows", "numbers"):
                (work / name).mkdir(parents=True)
            return _Preparation(session, log, folder, work).run(paths_of_shards, per_shard)
        finally:
            shutil.rmtree(work, ignore_errors=True)


class _Numbered:
    """Values that are numbered by first appearance.

    Args:
        session: of Spark.
        folder: of the parts.
        counts: part -> its number of rows, and of events.
    """

    def __init__(self, session: Any, folder: Path, counts: Mapping[int, tuple[int, int]]) -> None:
        self._session = session
        parts = sorted(part for part, (rows, _) in counts.items() if rows)
        self.parts = [folder / f"part-{part:06}.parquet" for part in parts]
        before = np.cumsum([(0, 0), *(counts[part] for part in parts)], axis=0)
        self.size, self.events = int(before[-1][0]), int(before[-1][1])
        self._before = {part: (int(rows), int(events)) for part, (rows, events) in zip(parts, before, strict=False)}

    def frame(self, number: str) -> Any:
        """Returns the parts as a table, with the `number` of each row from 0, and `begin`, the events before it."""
        from pyspark.sql import functions as F

        known = [(part, rows, events) for part, (rows, events) in self._before.items()]
        offsets = self._session.createDataFrame(known, "part int, rows_before long, events_before long")
        table = self._session.read.parquet(*[path.as_uri() for path in self.parts])
        table = table.join(F.broadcast(offsets), "part")
        table = table.withColumn(number, F.col("rows_before") + F.col("place"))
        return table.withColumn("begin", F.col("events_before") + F.col("before"))


class _Preparation:
    def __init__(self, session: Any, log: SparkLog, folder: Path, work: Path) -> None:
        self._session, self._log, self._folder, self._work = session, log, folder, work
        self._files = list(log.files)
        self._of_log = [column for column in log.features.columns if not column.path]

    def run(self, paths_of_shards: Callable[[int], tuple[str, ...]], per_shard: int) -> Written:
        looks = self._look()
        wanted, layouts = self._wanted(looks)
        summaries = self._read(wanted, looks, layouts)
        rows = self._session.read.schema(_ddl(wanted.schema)).parquet((self._work / "rows").as_uri())
        vocabularies = self._category_vocabularies(wanted, rows)
        told = {
            index: sum(summary.missing.get(f"f{index}", 0) for summary in summaries) > 0
            for index in range(len(wanted.features))
        }
        users = self._owners(wanted, rows, Owner.USER, vocabularies)
        items = self._owners(wanted, rows, Owner.ITEM, vocabularies)
        first_users = self._first_users(users, per_shard)
        num_shards = -(-(len(first_users) - 1) // per_shard)
        actions = self._actions(wanted, vocabularies)
        facts = self._facts(wanted, users, items, vocabularies, actions)
        raw = _raw_of_events(wanted, self._of_log, told)
        sharding = Sharding(
            facts,
            first_users,
            per_shard,
            paths_of_shards(num_shards),
            self._log.more,
            raw,
            wanted.columns.presorted,
            self._work,
        )
        shards = self._write_shards(rows, users, items, vocabularies, sharding)
        facts = dataclasses.replace(
            facts,
            first_timestamp=min(shard["first"] for shard in shards),
            last_timestamp=max(shard["last"] for shard in shards),
        )
        self._join(wanted, summaries, users, items, vocabularies, told, [sharding.part(n) for n in range(num_shards)])
        sources: dict[str, dict[str, int | str]] = {}
        for look in looks:
            sources |= look.facts
        late = {name for layout in layouts.values() for name in layout.late}
        return Written(facts, [shard["records"] for shard in shards], sources, tuple(sorted(late)))

    # --- Reading. ---

    def _parallel(self, tasks: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
        """Returns what a function returns for each of some tasks, which run on executors."""
        return self._session.sparkContext.parallelize(tasks, len(tasks)).map(function).collect()

    def _look(self) -> list[Look]:
        form, columns, features = self._form, self._log.columns, self._of_log
        token = self._work / "seen_by_executors"
        token.touch()
        looks = self._parallel(
            self._files, lambda file: _look(file, form, columns, features) if token.exists() else None
        )
        if None in looks:
            raise InputError(
                f"{self._folder}: executors of Spark must see the folder of prepared data. Received: one that does "
                "not. Give a --data_dir on a file system that all machines share."
            )
        for look in looks:
            if look.error:
                raise InputError(look.error)
        return looks

    @property
    def _form(self) -> Format:
        return format_of(self._files[0]) or Format.PARQUET

    def _wanted(self, looks: Sequence[Look]) -> tuple[WantedColumns, dict[File, Layout]]:
        layouts = {file: look.layout for file, look in zip(self._files, looks, strict=True) if look.layout}
        columns = checked_columns(layouts, self._log.columns, self._log.features, names_of(self._of_log))
        of_items = [column for column in map(RawColumn.of, shorthand(columns.item_features)) if column]
        features = tuple(dict.fromkeys([*self._of_log, *of_items]))
        return WantedColumns(columns, features, self._form), layouts

    def _read(self, wanted: WantedColumns, looks: Sequence[Look], layouts: Mapping[File, Layout]) -> list[Summary]:
        pieces = []
        for place, (file, look) in enumerate(zip(self._files, looks, strict=True)):
            if file in layouts:
                pieces += _pieces(place, file, layouts[file], look.groups)
        folder = self._work / "rows"

        def read(task: tuple[Piece, dict[str, pa.Array]]) -> Summary:
            piece, seeds = task
            return read_piece(piece, wanted, folder / f"{piece.file:06}-{piece.first_row:012}.parquet", seeds)

        summaries = self._parallel([(piece, {}) for piece in pieces], read) if pieces else []
        seeds: dict[str, pa.Array] = {}
        for piece, summary in zip(pieces, summaries, strict=True):
            if in_conflict(wanted, seeds, summary.examples):
                (summary,) = self._parallel([(piece, seeds)], read)
            if summary.error:
                raise InputError(summary.error)
            seeds = summary.examples | seeds
        settle_folders(wanted, pieces, seeds, self._files)
        if not sum(summary.num_rows for summary in summaries):
            raise InputError(
                f"{self._files[0]}: a log must have events. Received: no rows in {len(self._files)} file(s). "
                "Give others."
            )
        self._types = {
            name: _type_of(wanted, name, column, seeds, summaries, layouts)
            for name, column in wanted.id_columns().items()
        }
        return summaries

    # --- Numbers by first appearance. ---

    def _number(self, table: Any, name: str) -> _Numbered:
        """Numbers the rows of a table by its column `first`."""
        folder = self._work / "numbers" / name
        folder.mkdir()

        def write(batches: Any) -> Any:
            from pyspark import TaskContext

            return write_numbered(batches, folder, TaskContext.get().partitionId())

        in_order = table.repartitionByRange("first").sortWithinPartitions("first")
        counts = in_order.mapInArrow(write, _COUNTS).collect()
        return _Numbered(self._session, folder, {row["part"]: (row["rows"], row["events"]) for row in counts})

    def _category_vocabularies(self, wanted: WantedColumns, rows: Any) -> dict[str, _Numbered]:
        """Returns the values of each category and of the actions, by the name in the rows."""
        from pyspark.sql import functions as F

        names = [f"f{index}" for index, column in enumerate(wanted.features) if column.kind is Kind.CATEGORY]
        found = {}
        for name in [*names, *(["action"] if wanted.columns.action else [])]:
            values = rows.where(F.col(name).isNotNull()).groupBy(F.col(name).alias("value"))
            found[name] = self._number(values.agg(F.min("position").alias("first"), F.lit(1).alias("n")), name)
        return found

    def _owners(
        self, wanted: WantedColumns, rows: Any, owner: Owner, vocabularies: Mapping[str, _Numbered]
    ) -> _Numbered:
        """Returns the users or the items, each with the values of its features."""
        from pyspark.sql import functions as F

        conflict, position = self._log.features.conflict, F.col("position")
        told = {f"f{index}": column for index, column in enumerate(wanted.features) if column.owner is owner}
        key = "user" if owner is Owner.USER else "item"
        chosen = [F.min("position").alias("first"), F.count(F.lit(1)).alias("n")]
        take = F.max_by if conflict is FeatureConflict.LAST else F.min_by
        for name in told:
            value = _comparable(name, told[name])
            chosen.append(take(name, F.when(F.col(name).isNotNull(), position)).alias(name))
            chosen.append((F.min(value) != F.max(value)).alias(f"{name}_differs"))
        table = rows.groupBy(F.col(key).alias("value")).agg(*chosen)
        for name, column in told.items():
            if conflict is FeatureConflict.ERROR:
                self._refuse_two_values(rows, table, key, name, column)
            table = table.drop(f"{name}_differs")
            if name in vocabularies:
                table = _with_codes(table, vocabularies[name], name)
        return self._number(table, key)

    def _refuse_two_values(self, rows: Any, table: Any, key: str, name: str, column: RawColumn) -> None:
        """Refuses the first row whose value differs from the first of its owner."""
        from pyspark.sql import functions as F

        value = _comparable(name, column)
        wrong = table.where(F.col(f"{name}_differs")).select(F.col("value").alias(key))
        own = rows.join(wrong, key).where(F.col(name).isNotNull()).select("position", key, name, value.alias("same"))
        firsts = own.groupBy(key).agg(
            F.min("position").alias("first"), *[F.min_by(c, "position").alias(f"first_{c}") for c in (name, "same")]
        )
        differing = own.join(firsts, key).where(F.col("same") != F.col("first_same")).orderBy("position").head()
        if differing is None:
            return
        owner_id: object = differing[key]
        values = [_shown(differing[each], column, self._types.get(name)) for each in (f"first_{name}", name)]
        if self._types[key] == "int64":
            owner_id = int(differing[key])
        pair = (int(differing["first"]), int(differing["position"]))
        raise two_values(column, owner_id, pair, (values[0], values[1]), PositionedRows(self._files))

    # --- Records and arrays. ---

    def _first_users(self, users: _Numbered, per_shard: int) -> np.ndarray:
        """Returns the first user of each block, and at last U, as `first_users_of_blocks`; notes blocks' shards."""
        from pyspark.sql import functions as F

        block = F.floor(F.col("begin") / EVENTS_PER_BLOCK).alias("block")
        found = users.frame("user_number").groupBy(block).agg(F.min("user_number").alias("first")).collect()
        found = sorted((row["block"], row["first"]) for row in found)
        self._shard_of = [(number, place // per_shard) for place, (number, _) in enumerate(found)]
        return np.array([*(first for _, first in found), users.size], np.int64)

    def _write_shards(
        self, rows: Any, users: _Numbered, items: _Numbered, vocabularies: Mapping[str, _Numbered], sharding: Sharding
    ) -> list[Any]:
        from pyspark.sql import functions as F

        shards = F.broadcast(self._session.createDataFrame(self._shard_of, "block long, shard int"))
        of_users = users.frame("user_number").withColumn("block", F.floor(F.col("begin") / EVENTS_PER_BLOCK))
        of_users = of_users.join(shards, "block").select(F.col("value").alias("user"), "user_number", "shard")
        of_items = items.frame("item_number").select(F.col("value").alias("item"), "item_number")
        table = rows.join(of_users, "user").join(of_items, "item").drop("user", "item")
        for name, (array, _) in sharding.raw.items():
            if array.endswith("-told"):
                table = table.withColumn(name, F.col(name.removeprefix("told_")).isNotNull().cast("tinyint"))
            elif name in vocabularies:
                table = _with_codes(table, vocabularies[name], name)
        if "action" in vocabularies:
            table = _with_codes(table, vocabularies["action"], "action").withColumnRenamed("action", "action_code")
        order = ["user_number", *([] if sharding.presorted else ["time"]), "position"]
        table = table.repartitionById(len(sharding.paths), F.col("shard")).sortWithinPartitions(*order)

        def write(batches: Any) -> Any:
            from pyspark import TaskContext

            return write_shard(batches, sharding, TaskContext.get().partitionId())

        found = sorted((row.asDict() for row in table.mapInArrow(write, _OF_SHARD).collect()), key=lambda r: r["shard"])
        if wrong := [shard for shard in found if shard["after"] >= 0]:
            first = min(wrong, key=lambda shard: shard["after"])
            pair, times = (first["before"], first["after"]), (first["time_before"], first["time_after"])
            raise unsorted(PositionedRows(self._files), pair, times)
        return found

    def _join(
        self,
        wanted: WantedColumns,
        summaries: Sequence[Summary],
        users: _Numbered,
        items: _Numbered,
        vocabularies: Mapping[str, _Numbered],
        told: Mapping[int, bool],
        parts: Sequence[Path],
    ) -> None:
        """Joins all parts into the files of prepared data, and writes their checksums."""
        folder, raw = self._folder, self._folder / RAW_DIR
        jobs = [
            Joined(vocabulary_path(folder, name), own.parts, "vocabulary", "value", self._types[key])
            for name, own, key in ((USERS, users, "user"), (ITEMS, items, "item"))
        ]
        for index, column in enumerate(wanted.features):
            name = f"f{index}"
            owners = {Owner.USER: users, Owner.ITEM: items}.get(column.owner)
            is_id = name in vocabularies
            dtype, lead = ("int32", 0) if is_id else ("float32", np.nan)
            of_row_0 = lead if column.owner is Owner.ITEM else None
            if column.owner is Owner.ITEM and column.column in wanted.columns.item_features and is_id:
                path = item_feature_path(folder, column.column)
                jobs.append(Joined(path, items.parts, "owners", name, dtype, of_row_0))
                path = vocabulary_path(folder, vocabulary_of(column.column))
                jobs.append(Joined(path, vocabularies[name].parts, "vocabulary", "value", self._types[name]))
            if column not in self._of_log:
                continue
            if owners:
                path = raw / f"{column.key}-{'codes' if is_id else 'numbers'}.npy"
                jobs.append(Joined(path, owners.parts, "owners", name, dtype, of_row_0))
            if is_id:
                path = raw_vocabulary_path(folder, column)
                jobs.append(Joined(path, vocabularies[name].parts, "vocabulary", "value", self._types[name]))
        jobs += joined_events(folder / PACKED_DIR, [part / "packed" for part in parts])
        if self._of_log:
            jobs += joined_events(raw, [part / "raw" for part in parts])
        for job in jobs:
            job.path.parent.mkdir(exist_ok=True)
        checksums: dict[Path, dict[str, str]] = {}
        for path, checksum in self._parallel(jobs, Joined.write):
            checksums.setdefault(Path(path).parent, {})[Path(path).name] = checksum
        if self._of_log:
            place = {column: index for index, column in enumerate(wanted.features)}
            owned = (Owner.USER, Owner.ITEM)
            known = {c: (0, c.owner in owned and told[place[c]]) for c in self._of_log}
            in_turn = dict(sorted(known.items(), key=lambda pair: place[pair[0]]))
            write_known(raw, in_turn, {})
            checksums[raw]["columns.json"] = checksum_of(raw / "columns.json")
        for into, found in checksums.items():
            write_found(into, found)

    def _actions(self, wanted: WantedColumns, vocabularies: Mapping[str, _Numbered]) -> tuple[str, ...]:
        if "action" not in vocabularies:
            return ()
        found = vocabularies["action"]
        if found.size > schema.MOST_ACTIONS:
            raise InputError(
                f"--action_column: must have at most {schema.MOST_ACTIONS} different values. Received: "
                f"{found.size:,} in {wanted.columns.action}. Name a column of what behaviours were, such as click and "
                "buy."
            )
        return tuple(text for part in found.parts for text in pq.read_table(part)["value"].to_pylist())

    def _facts(
        self,
        wanted: WantedColumns,
        users: _Numbered,
        items: _Numbered,
        vocabularies: Mapping[str, _Numbered],
        actions: tuple[str, ...],
    ) -> schema.DatasetFacts:
        columns = wanted.columns
        of_items = [column for column in map(RawColumn.of, shorthand(columns.item_features)) if column]
        sizes = {column.column: vocabularies[f"f{wanted.features.index(column)}"].size for column in of_items}
        return schema.DatasetFacts(
            num_users=users.size,
            num_items=items.size,
            num_events=users.events,
            has_labels=bool(columns.label),
            item_features=sizes,
            first_timestamp=0,
            last_timestamp=0,
            fingerprint="",
            sources={},
            reader=schema.READER,
            has_request_times=bool(columns.request),
            has_label_times=bool(columns.label_time),
            has_weights=bool(columns.weight),
            has_sessions=bool(columns.session),
            tasks=columns.tasks,
            actions=actions,
        )


def _look(file: File, form: Format, columns: Columns, features: Sequence[RawColumn]) -> Look:
    try:
        facts = fingerprint_files([file], columns.names)
        layout = layout_of(file, form, columns, features)
    except InputError as error:
        return Look(error=str(error))
    groups: tuple[int, ...] = ()
    if form is Format.PARQUET:
        with pq.ParquetFile(readable(file)) as parquet:
            found = parquet.metadata
            groups = tuple(found.row_group(number).num_rows for number in range(found.num_row_groups))
    return Look(layout, facts, groups)


def _pieces(place: int, file: File, layout: Layout, groups: Sequence[int]) -> list[Piece]:
    """Returns the pieces of a file: of Parquet some row groups each, otherwise the whole file."""
    if len(groups) < 2:
        return [Piece(place, file, layout)]
    found, start, own, held = [], 0, [], 0
    for number, rows in enumerate(groups):
        own.append(number)
        held += rows
        if held >= ROWS_PER_PIECE or number == len(groups) - 1:
            found.append(Piece(place, file, layout, start, tuple(own)))
            start, own, held = start + held, [], 0
    return found


def _type_of(
    wanted: WantedColumns,
    name: str,
    column: str,
    seeds: Mapping[str, pa.Array],
    summaries: Sequence[Summary],
    layouts: Mapping[File, Layout],
) -> str:
    """Returns the type of a column's ids: int64 or large_string."""
    if column in seeds and pa.types.is_integer(seeds[column].type):
        return "int64"
    read_as_text = wanted.form is Format.CSV or any(column in layout.partition for layout in layouts.values())
    told = [summary.integers[name] for summary in summaries if name in summary.integers]
    return "int64" if read_as_text and told and all(told) and name != "action" else "large_string"


def _raw_of_events(
    wanted: WantedColumns, of_log: Sequence[RawColumn], told: Mapping[int, bool]
) -> dict[str, tuple[str, str]]:
    """Returns the raw arrays with a value an event: column of the rows -> name and dtype; see `Sharding.raw`."""
    found = {}
    for index, column in enumerate(wanted.features):
        if column not in of_log:
            continue
        if column.owner in (Owner.USER, Owner.ITEM):
            if told[index]:
                found[f"told_f{index}"] = (f"{column.key}-told", "bool")
        elif column.kind is Kind.CATEGORY:
            found[f"f{index}"] = (f"{column.key}-codes", "int32")
        else:
            found[f"f{index}"] = (f"{column.key}-numbers", "float32")
    told_first = sorted(found.items(), key=lambda pair: not pair[0].startswith("told_"))
    return dict(told_first)  # before values become codes


def _with_codes(table: Any, vocabulary: _Numbered, name: str) -> Any:
    """Returns a table whose column `name` has 1 + the number of each value, null where it is missing."""
    from pyspark.sql import functions as F

    if not vocabulary.parts:
        return table.withColumn(name, F.lit(None).cast("int"))
    codes = vocabulary.frame("code").select(
        F.col("value").alias(f"{name}_value"), (F.col("code") + 1).cast("int").alias(f"{name}_code")
    )
    table = table.join(codes, F.col(name) == F.col(f"{name}_value"), "left").drop(name, f"{name}_value")
    return table.withColumnRenamed(f"{name}_code", name)


def _comparable(name: str, column: RawColumn) -> Any:
    """Returns a column of values, where the bits of -0.0 are those of 0.0."""
    from pyspark.sql import functions as F

    if column.kind is Kind.CATEGORY:
        return F.col(name)
    return F.when(F.col(name) == -(2**31), 0).otherwise(F.col(name))


def _shown(value: Any, column: RawColumn, kind: str | None) -> str:
    if column.kind is Kind.NUMBER:
        return f"{np.array(value, np.int32).view(np.float32):g}"
    return shown(int(value) if kind == "int64" else value)


def _ddl(found: pa.Schema) -> str:
    names = {"int8": "tinyint", "int16": "smallint", "int32": "int", "int64": "long", "string": "string"}
    return ", ".join(f"{field.name} {names[str(field.type)]}" for field in found)

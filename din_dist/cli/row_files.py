"""Shared by commands that give files of rows to an export: flags, the work by parts, and the report.

A row holds a user or a history. The parts of the result are published one by one, so the same command resumes after a
stop or a kill.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from din_dist.cli import entry
from din_dist.cli.flags import define_overrides, define_path, overridden
from din_dist.cli.help import theme
from din_dist.cli.saved_job import WHERE_DATA_LIES, config_of
from din_dist.config import Config, LogFormat, require
from din_dist.distributed.cores import claim_cores
from din_dist.errors import InputError, Interrupted
from din_dist.files import source_path
from din_dist.serving.manifest import DIGEST_HELP, read_manifest
from din_dist.serving.store_exports import local_export
from din_dist.tables.sources import absolute, find_local_files
from din_dist.tables.storage import File, RemoteFile, file_of
from din_dist.text import duration

if TYPE_CHECKING:
    from typing import TextIO

    from din_dist.data.event_store import EventStore
    from din_dist.distributed.runtime import Runtime
    from din_dist.serving.asked import Recommend
    from din_dist.serving.batch.parts import PartsFolder, Plan
    from din_dist.serving.batch.predictor import Histories, Predictor, RowColumns
    from din_dist.serving.bundle import Bundle
    from din_dist.serving.manifest import Manifest
    from din_dist.tables.ids import Field

with theme("model"):
    EXPORT_DIR = define_path(
        "export_dir",
        "",
        "The export to use, made by din_dist.cli.export, on this machine or in a store. Required.",
        parse=source_path,
    )
    EXPECT_DIGEST = flags.DEFINE_string("expect_digest", "", DIGEST_HELP)
with theme("input"):
    INPUT = define_path(
        "input",
        "",
        "Rows to read: one Parquet, CSV or JSON-lines file, a folder of them, or a quoted glob. Required.",
    )
    HISTORY_COLUMN = flags.DEFINE_string(
        "history_column",
        "history",
        "Column of the history: a list of item ids, oldest first. Not with --user_histories.",
    )
    HISTORY_NAMES_COLUMN = flags.DEFINE_string(
        "history_names_column",
        "history_names",
        "For models with several --histories: column of a list with the name of the history of each item in "
        "--history_column.",
    )
    LIST_SEPARATOR = flags.DEFINE_string(
        "list_separator",
        "",
        "Text between the ids of a list. Default: none. In CSV, a list is then a cell with a JSON array.",
    )
with theme("histories from prepared data"):
    USER_HISTORIES = define_path(
        "user_histories",
        "",
        "The --output_dir of a job: histories are taken from the job's prepared data, by the user in --user_column. A "
        "history is all that the user ever acted on (--behaviours_path, or the positives). A user that is not there "
        "has an empty one. Default: none, histories are in --history_column.",
    )
    USER_COLUMN = flags.DEFINE_string("user_column", "user_id", "Column of the user's id, for --user_histories.")
    BEFORE_COLUMN = flags.DEFINE_string(
        "before_column",
        "",
        "With --user_histories: column of a time, of the log's kind and unit. The history is what is known of the user "
        "before it, as in training (--history_delay, --label_time_column). Default: none, all of the history counts.",
    )
define_overrides(WHERE_DATA_LIES)
with theme("result"):
    PREDICTIONS_DIR = define_path(
        "predictions_dir",
        "",
        "Folder for the results, in the input's format: its rows with more columns. It may be in a store (s3://, "
        "gs://, abfs://, hdfs://); otherwise workers on several hosts must share it. Required.",
        parse=source_path,
    )
    ROWS_PER_PART = flags.DEFINE_integer(
        "rows_per_part", 200_000, "Rows of a file of results. A kill costs at most one file."
    )
    OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Begin anew, whatever was begun in --predictions_dir.")
with theme("logs"):
    LOG_FORMAT = flags.DEFINE_enum(
        "log_format",
        LogFormat.TEXT.value,
        [form.value for form in LogFormat],
        "Format of the lines on stderr: text for people, or json, one object per line.",
    )


class Wanted(NamedTuple):
    """The columns that a command adds to each row.

    Attributes:
        candidates: the column of the candidates to score; None: items are recommended.
        top_k: how many candidates to keep; 0: all.
        recommend: the request for items; None: candidates are scored.
        settings: flags by name, on which the results depend.
    """

    candidates: Field | None
    top_k: int = 0
    recommend: Recommend | None = None
    settings: Mapping[str, Any] = {}


def run(wanted_of: Callable[[Manifest, Sequence[Path]], Wanted]) -> None:
    """Reads the rows, adds what is wanted to each, and prints the report.

    Args:
        wanted_of: returns what to add, by the export's manifest and the files. It is called before TensorFlow starts.
    """
    started = time.perf_counter()
    files, folder = _checked_flags()
    export_dir = local_export(EXPORT_DIR.value, EXPECT_DIGEST.value)
    manifest = read_manifest(export_dir, EXPECT_DIGEST.value)
    wanted = wanted_of(manifest, files)
    job = overridden(config_of(Path(USER_HISTORIES.value)), WHERE_DATA_LIES) if USER_HISTORIES.value else None
    signals = entry.Signals("stopping after this batch; what is published is kept; Ctrl-C once more stops at once")
    cores = claim_cores()
    entry.import_tensorflow()  # takes seconds: wrong flags are answered before
    from din_dist.distributed.devices import claim_devices
    from din_dist.distributed.runtime import open_runtime
    from din_dist.serving.batch.parts import PartsFolder
    from din_dist.serving.batch.predictor import Predictor
    from din_dist.serving.batch.store_parts import StoreParts
    from din_dist.text import to_json

    runtime = open_runtime()
    claim_devices(runtime, len(cores))
    parts = StoreParts(folder) if isinstance(folder, RemoteFile) else PartsFolder(folder)
    with runtime.together():
        source = _open_source(job, files, (export_dir, manifest.digest), wanted)
        lock, plan = _begin(parts, source, files, wanted) if runtime.is_chief else (None, None)
    plan = _broadcast(plan, runtime)
    predictor = Predictor(
        source.bundle, source.histories, source.columns, parts, lambda: signals.stop, LogFormat(LOG_FORMAT.value)
    )
    begun = time.perf_counter()
    counts = _predict(predictor, source.histories, plan, parts, runtime)
    with runtime.together():
        if runtime.is_chief:
            parts.finish(plan)
    runtime.shutdown()
    if not runtime.is_chief:
        return
    seconds = {"start": begun - started, "predict": time.perf_counter() - begun}
    found = _report(plan, counts, seconds, runtime.world_size, wanted)
    if job:
        _report_histories(found, counts, source)
    entry.say(_table(found))
    print(to_json(found), flush=True)
    if lock:
        lock.close()


class _Source(NamedTuple):
    """The export, histories and columns that every row is scored with.

    Attributes:
        store: the prepared data of `--user_histories`.
    """

    bundle: Bundle
    histories: Histories
    columns: RowColumns
    store: EventStore | None


class _Counts(NamedTuple):
    """The counts of this run, summed over all ranks."""

    rows: int
    candidates: int
    parts: int
    unknown_users: int
    timed_rows: int  # of users who have a history
    too_early: int  # of these, with a time before all of it
    stopped: int  # ranks


def _open_source(job: Config | None, files: Sequence[Path], export: tuple[Path, str], wanted: Wanted) -> _Source:
    """Opens the export, of which folder and digest are given, and with `job` the histories in its prepared data."""
    from din_dist.data.prepared import open_prepared
    from din_dist.features.spec import Kind
    from din_dist.serving.batch.histories import GivenHistories, UserHistories, check_item_types
    from din_dist.serving.bundle import Bundle

    bundle = Bundle.open(*export)
    manifest = bundle.manifest
    if job is None:
        columns = _columns(manifest, None, files, wanted)
        _warn_of_absent(manifest, columns)
        return _Source(bundle, GivenHistories(manifest.max_history_length), columns, None)
    store = open_prepared(job.data)
    of_behaviours = [feature.name for feature in manifest.features_of("history") if feature.name in store.features]
    histories = UserHistories(store, manifest.max_history_length, of_behaviours)
    own = tuple(history.name for history in store.sets) if len(store.sets) > 1 else ()
    if own != tuple(manifest.histories):
        raise InputError(
            "--user_histories: must be of a job with the export's --histories, "
            f"{','.join(manifest.histories) or 'none'}. Received: {','.join(own) or 'none'}. Give the --output_dir of "
            "such a job."
        )
    check_item_types(histories, manifest.item_id_type == "integer", USER_HISTORIES.value)
    of_users = tuple(feature.name for feature in manifest.features_of("user") if feature.name in store.features)
    columns = dataclasses.replace(
        _columns(manifest, histories.users_are_integers, files, wanted), user_features=of_users
    )
    ages = [feature.name for feature in manifest.features_of("history") if feature.kind == Kind.TIME_SINCE]
    _warn_of_absent(manifest, columns, [name for name in of_behaviours if columns.before or name not in ages])
    return _Source(bundle, histories, columns, store)


def _begin(parts: PartsFolder, source: _Source, files: Sequence[Path], wanted: Wanted) -> tuple[TextIO | None, Plan]:
    """Locks the folder of results and plans its parts, or takes up the plan that is there. A store has no locks."""
    from din_dist.serving.batch.predictor import check_columns
    from din_dist.training.output_dir import claim_output_dir

    lock = claim_output_dir(parts.folder, flag="--predictions_dir") if isinstance(parts.folder, Path) else None
    data = source.store.facts.fingerprint if source.store else None
    plan = parts.begin(
        files,
        ROWS_PER_PART.value,
        {**_settings(source.bundle.manifest, source.columns, data), **wanted.settings},
        OVERWRITE.value,
        lambda plan: check_columns(plan, source.columns),
    )
    return lock, plan


def _broadcast(plan: Plan | None, runtime: Runtime) -> Plan:
    from din_dist.serving.batch.parts import Plan

    return Plan.from_json(runtime.broadcast_object(plan.to_json() if plan else None))


def _predict(predictor: Predictor, histories: Histories, plan: Plan, parts: PartsFolder, runtime: Runtime) -> _Counts:
    """Scores this rank's parts.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    import numpy as np

    from din_dist.serving.batch.predictor import Stopped

    stopped = False
    with runtime.together():
        try:
            predictor.run(plan, runtime.rank, runtime.world_size)
        except Stopped:
            stopped = True
    done = predictor.counts
    mine = [done.rows, done.candidates, done.parts, histories.num_unknown, histories.num_timed]
    mine += [histories.num_too_early, stopped]
    counts = _Counts(*runtime.sum(np.array(mine, np.int64)).tolist())
    if counts.stopped:
        raise Interrupted(
            f"on request, with {len(plan.parts()) - len(parts.missing(plan))} of {len(plan.parts())} parts published. "
            "The same command goes on from there"
        )
    return counts


def _report(plan: Plan, counts: _Counts, seconds: dict[str, float], world_size: int, wanted: Wanted) -> dict[str, Any]:
    speed = {"rows_per_second": round(counts.rows / seconds["predict"], 1)}
    if wanted.recommend is None:
        speed = {
            "candidates": counts.candidates,
            "candidates_per_second": round(counts.candidates / seconds["predict"], 1),
        }
    return {
        "predictions_dir": absolute(PREDICTIONS_DIR.value, PREDICTIONS_DIR.name),
        "num_rows": plan.num_rows,
        "num_parts": len(plan.parts()),
        "rows": counts.rows,
        "parts": counts.parts,
        **speed,
        "world_size": world_size,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _report_histories(found: dict[str, Any], counts: _Counts, source: _Source) -> None:
    """Adds to the report how many rows have no history. Warns if none has one because of its time."""
    found["rows_of_unknown_users"] = counts.unknown_users
    if not BEFORE_COLUMN.value:
        return
    found["rows_before_all_history"] = counts.too_early
    if counts.too_early == counts.timed_rows > 0:
        assert source.store
        facts = source.store.facts
        entry.warn(
            f"--before_column: no row has a history. All {counts.timed_rows:,} rows of users who have one have a time "
            f"before it; the log's times, as prepared, go from {facts.first_timestamp} to {facts.last_timestamp}. Are "
            "they of the same unit?"
        )


def _checked_flags() -> tuple[list[Path], File]:
    """Checks the flags. Returns the files to read and the folder to write to."""
    for flag in (EXPORT_DIR, INPUT, PREDICTIONS_DIR):
        require(bool(flag.value), "must be given", flag.name, flag.value, "See --help.")
    require(ROWS_PER_PART.value >= 1, "must be at least 1", ROWS_PER_PART.name, ROWS_PER_PART.value, "Say 200000.")
    values = flags.FLAGS
    if values[HISTORY_COLUMN.name].present and values[USER_HISTORIES.name].present:
        raise not_both(HISTORY_COLUMN.name, USER_HISTORIES.name)
    for flag in (USER_COLUMN, BEFORE_COLUMN):
        if values[flag.name].present and not USER_HISTORIES.value:
            raise InputError(
                f"--{flag.name}: is for users whose histories are elsewhere. Received: no --{USER_HISTORIES.name}. "
                "Give the --output_dir of a job there."
            )
    found, files = find_local_files(INPUT.value, "--input", "table")
    if found.passed_over:
        entry.say(found.describe())
    place = file_of(PREDICTIONS_DIR.value)
    if isinstance(place, RemoteFile):
        return files, place
    folder = place.absolute()
    inside = [file for file in files if folder in file.parents]
    source = Path(INPUT.value).absolute()
    if inside or (source.is_dir() and (source == folder or source in folder.parents)):
        raise InputError(
            f"--predictions_dir: must lie outside of --input, else results would be read. Received: {folder} for the "
            f"input {INPUT.value}. Name another folder."
        )
    return files, folder


def not_both(one: str, other: str) -> InputError:
    """Returns the error about two flags of which one may be given."""
    return InputError(f"--{one}: not with --{other}. Received: both. Give one of them.")


def _columns(manifest: Manifest, users_are_integers: bool | None, files: Sequence[Path], wanted: Wanted) -> RowColumns:
    """Returns the columns to read and to add, from the flags."""
    from din_dist.serving.batch.features import find_behaviour_features, find_features
    from din_dist.serving.batch.predictor import RowColumns
    from din_dist.tables.ids import Field

    integers = manifest.item_id_type == "integer"
    names = None
    if users_are_integers is None:
        history = Field(HISTORY_COLUMN.value, integers, is_list=True)
        names = Field(HISTORY_NAMES_COLUMN.value, integers=False, is_list=True) if manifest.histories else None
    else:
        history = Field(USER_COLUMN.value, users_are_integers)
    in_lists = wanted.candidates is not None and wanted.candidates.is_list
    features = find_features(manifest, files[0], in_lists, BEFORE_COLUMN.value) if manifest.features else []
    if wanted.candidates is None:  # which items are found is not known, nor are their own features
        features = [column for column in features if column.feature.owner != "candidate"]
    if users_are_integers is not None:
        features = [column for column in features if column.feature.owner != "user"]  # the prepared users' own
    return RowColumns(
        history,
        wanted.candidates,
        wanted.top_k,
        LIST_SEPARATOR.value,
        BEFORE_COLUMN.value,
        features=tuple(features),
        predictions=manifest.predictions,
        history_names=names,
        behaviour_features=tuple(find_behaviour_features(manifest, files[0])) if users_are_integers is None else (),
        recommend=wanted.recommend,
        integers=integers,
        finds_items=manifest.finds_items,
    )


def _warn_of_absent(manifest: Manifest, columns: RowColumns, in_store: Collection[str] = ()) -> None:
    """Warns in one line of features of the model that no column has, nor the prepared data.

    Args:
        manifest: of the export.
        columns: of the rows.
        in_store: the names of features of behaviours that prepared data give.
    """
    of_rows = (*columns.features, *columns.behaviour_features)
    found = {column.feature.name for column in of_rows} | {*columns.user_features, *in_store}
    names = [feature.name for feature in manifest.features if feature.owner != "item"]
    if absent := [name for name in names if name not in found]:
        entry.warn(f"--input: no column of {', '.join(absent)}. These features count as missing in every row.")


def _settings(manifest: Manifest, columns: RowColumns, data_fingerprint: str | None) -> dict[str, Any]:
    """Returns all that the results depend on, besides the files."""
    history = "--history_column" if data_fingerprint is None else "--user_column"
    return {
        "--export_dir": manifest.digest,
        history: columns.history.name,
        **({"--history_names_column": columns.history_names.name} if columns.history_names else {}),
        "--user_histories": data_fingerprint,
        "--before_column": columns.before,
        "--list_separator": columns.list_separator,
    }


def _table(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    kept = found["num_parts"] - found["parts"]
    lines = [f"  {found['num_rows']:,} rows in {found['num_parts']:,} part(s): {found['predictions_dir']}"]
    if kept:
        lines.append(f"  {kept:,} part(s) were there before")
    if not found["num_rows"]:
        lines.append("  the input has no rows, and so has the result")
    if "rows_per_second" in found:
        lines.append(f"  {found['rows_per_second']:,.0f} rows/s with {found['world_size']} worker(s)")
    elif found["candidates"]:
        lines.append(f"  {found['candidates_per_second']:,.0f} candidates/s with {found['world_size']} worker(s)")
    if found.get("rows_of_unknown_users"):
        lines.append(f"  {found['rows_of_unknown_users']:,} of {found['rows']:,} rows: the user is not in the data")
    if "rows_before_all_history" in found:
        lines.append(
            f"  {found['rows_before_all_history']:,} of {found['rows']:,} rows: the time is before all history"
        )
    lines.append(f"  {duration(seconds['predict'])}, after {duration(seconds['start'])} to start")
    return "\n".join(lines)

"""Scores files of any size with an export: `python -m din_dist.cli.predict`, alone or under `horovodrun`.

A row is a user, or a history, and a candidate or a list of them. Parts of the result are published one by one: the
same command goes on where it was stopped or killed. The last line on stdout tells this run as JSON.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from din_dist.cli import entry
from din_dist.cli.flags import define_path
from din_dist.cli.saved_job import WHERE_DATA_LIES, config_of, define_anew, said_anew
from din_dist.config import LogFormat, require
from din_dist.distributed.cores import claim_cores
from din_dist.errors import InputError, Interrupted
from din_dist.serving.manifest import DIGEST_HELP, read_manifest
from din_dist.tables.sources import find_files
from din_dist.text import duration

if TYPE_CHECKING:
    from din_dist.serving.batch.predictor import Histories, RowColumns
    from din_dist.serving.manifest import Manifest

EXPORT_DIR = define_path("export_dir", "", "The export to score with, made by din_dist.cli.export.")
EXPECT_DIGEST = flags.DEFINE_string("expect_digest", "", DIGEST_HELP)
INPUT = define_path(
    "input", "", "Rows to score: one Parquet, CSV or JSON-lines file, a folder of them, or a quoted glob."
)
PREDICTIONS_DIR = define_path(
    "predictions_dir",
    "",
    "Folder for the results, in the input's format: its rows with the columns logit and click_probability. Workers of "
    "several hosts must share it.",
)
HISTORY_COLUMN = flags.DEFINE_string(
    "history_column", "history", "Column of the history: a list of item ids, oldest first. Not with --user_histories."
)
ITEM_COLUMN = flags.DEFINE_string("item_column", "item_id", "Column of the candidate's item id.")
CANDIDATES_COLUMN = flags.DEFINE_string(
    "candidates_column",
    "candidates",
    "Column of a list of candidates. Taken for --item_column if that is not given and the first file has it.",
)
USER_HISTORIES = define_path(
    "user_histories",
    "",
    "Take the history of the user in --user_column from prepared data: that of the job with this --output_dir, whose "
    "flags.txt names it. It is all that the user ever acted on. A user that is not there has an empty one.",
)
USER_COLUMN = flags.DEFINE_string("user_column", "user_id", "Column of the user's id, for --user_histories.")
BEFORE_COLUMN = flags.DEFINE_string(
    "before_column",
    "",
    "With --user_histories: column of a time, of the log's kind and unit; the history is what the user did before. "
    "Default: all of it.",
)
LIST_SEPARATOR = flags.DEFINE_string(
    "list_separator",
    "",
    "Lists are text with this between the ids. Default: in CSV, a cell with a list is a JSON array.",
)
TOP_K = flags.DEFINE_integer(
    "top_k",
    0,
    "Of a list of candidates keep the best so many, best first, with their ids as top_items. 0: all, as given.",
)
ROWS_PER_PART = flags.DEFINE_integer("rows_per_part", 200_000, "Rows of a file of results; what a kill can cost.")
define_anew(WHERE_DATA_LIES)
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Begin anew, whatever was begun in --predictions_dir.")
LOG_FORMAT = flags.DEFINE_enum(
    "log_format", LogFormat.TEXT.value, [form.value for form in LogFormat], "Lines for people, or an object a line."
)


def main() -> None:
    started = time.perf_counter()
    files, folder = _checked_flags()
    export = Path(EXPORT_DIR.value)
    digest = read_manifest(export, EXPECT_DIGEST.value).digest
    job = said_anew(config_of(Path(USER_HISTORIES.value)), WHERE_DATA_LIES) if USER_HISTORIES.value else None
    requests = entry.Signals("stopping after this batch; what is published is kept; Ctrl-C once more stops at once")
    cores = claim_cores()
    entry.import_tensorflow()  # takes seconds: wrong flags are answered before
    import numpy as np

    from din_dist.data.prepared import open_prepared
    from din_dist.distributed.runtime import claim_devices, open_runtime
    from din_dist.serving.batch.histories import GivenHistories, UserHistories, check_item_types
    from din_dist.serving.batch.parts import PartsFolder, Plan
    from din_dist.serving.batch.predictor import Predictor, Stopped, check_columns
    from din_dist.serving.bundle import Bundle
    from din_dist.text import to_json
    from din_dist.training.output_dir import claim_output_dir

    runtime = open_runtime()
    claim_devices(runtime, len(cores))
    lock = plan = None
    with runtime.together():
        bundle = Bundle.open(export, digest)
        manifest = bundle.manifest
        users_are_integers = data = None
        histories: Histories = GivenHistories(manifest.max_history_length)
        if job:
            store = open_prepared(job.data)
            histories = UserHistories(store, manifest.max_history_length)
            check_item_types(histories, manifest.item_id_type == "integer", USER_HISTORIES.value)
            users_are_integers, data = histories.users_are_integers, store.facts.fingerprint
        columns = _columns(manifest, users_are_integers, files)
        parts = PartsFolder(folder)
        if runtime.is_chief:
            lock = claim_output_dir(folder, flag="--predictions_dir")
            plan = parts.begin(
                files,
                ROWS_PER_PART.value,
                _settings(manifest, columns, data),
                OVERWRITE.value,
                lambda plan: check_columns(plan, columns),
            )
    plan = Plan.from_json(runtime.broadcast_object(plan.to_json() if plan else None))
    predictor = Predictor(bundle, histories, columns, parts, lambda: requests.stop, LogFormat(LOG_FORMAT.value))
    begun = time.perf_counter()
    stopped = False
    with runtime.together():
        try:
            predictor.run(plan, runtime.rank, runtime.world_size)
        except Stopped:
            stopped = True
    done = predictor.counts
    mine = [done.rows, done.candidates, done.parts, histories.num_unknown, histories.num_timed]
    mine += [histories.num_too_early, stopped]
    rows, candidates, num_parts, unknown, timed, too_early, num_stopped = runtime.sum(np.array(mine, np.int64)).tolist()
    if num_stopped:
        raise Interrupted(
            f"on request, with {len(plan.parts()) - len(parts.missing(plan))} of {len(plan.parts())} parts published. "
            "The same command goes on from there"
        )
    with runtime.together():
        if runtime.is_chief:
            parts.finish(plan)
    runtime.shutdown()
    if not runtime.is_chief:
        return
    seconds = {"start": begun - started, "predict": time.perf_counter() - begun}
    found: dict[str, Any] = {
        "predictions_dir": str(folder),
        "num_rows": plan.num_rows,
        "num_parts": len(plan.parts()),
        "rows": rows,
        "parts": num_parts,
        "candidates": candidates,
        "candidates_per_second": round(candidates / seconds["predict"], 1),
        "world_size": runtime.world_size,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    if job:
        found["rows_of_unknown_users"] = unknown
    if job and BEFORE_COLUMN.value:
        found["rows_before_all_history"] = too_early
        if too_early == timed > 0:
            entry.warn(
                f"--before_column: no row has a history. All {timed:,} rows of users who have one have a time before "
                f"it; the log's times, as prepared, go from {store.facts.first_timestamp} to "
                f"{store.facts.last_timestamp}. Are they of the same unit?"
            )
    entry.say(_told(found))
    print(to_json(found), flush=True)
    if lock:
        lock.close()


def _checked_flags() -> tuple[list[Path], Path]:
    """The files to read, and the folder to write to."""
    for flag in (EXPORT_DIR, INPUT, PREDICTIONS_DIR):
        require(bool(flag.value), "must be given", flag.name, flag.value, "See --help.")
    require(ROWS_PER_PART.value >= 1, "must be at least 1", ROWS_PER_PART.name, ROWS_PER_PART.value, "Say 200000.")
    require(TOP_K.value >= 0, "must be at least 0", TOP_K.name, TOP_K.value, "0 keeps all candidates.")
    values = flags.FLAGS
    for one, other in ((HISTORY_COLUMN, USER_HISTORIES), (ITEM_COLUMN, CANDIDATES_COLUMN)):
        if values[one.name].present and values[other.name].present:
            raise InputError(f"--{one.name}: not with --{other.name}. Received: both. Give one of them.")
    for flag in (USER_COLUMN, BEFORE_COLUMN):
        if values[flag.name].present and not USER_HISTORIES.value:
            raise InputError(
                f"--{flag.name}: is for users whose histories are elsewhere. Received: no --{USER_HISTORIES.name}. "
                "Give the --output_dir of a job there."
            )
    found = find_files(INPUT.value, "--input", "table")
    files = found.files
    if found.passed_over:
        entry.say(found.describe())
    folder = Path(PREDICTIONS_DIR.value).absolute()
    inside = [file for file in files if folder in file.parents]
    source = Path(INPUT.value).absolute()
    if inside or (source.is_dir() and (source == folder or source in folder.parents)):
        raise InputError(
            f"--predictions_dir: must lie outside of --input, else results would be read. Received: {folder} for the "
            f"input {INPUT.value}. Name another folder."
        )
    return files, folder


def _columns(manifest: Manifest, users_are_integers: bool | None, files: Sequence[Path]) -> RowColumns:
    """Returns the columns to read and to add, from the flags."""
    from din_dist.serving.batch.predictor import RowColumns
    from din_dist.tables.ids import Field
    from din_dist.tables.survey import names_of

    integers = manifest.item_id_type == "integer"
    if users_are_integers is None:
        history = Field(HISTORY_COLUMN.value, integers, is_list=True)
    else:
        history = Field(USER_COLUMN.value, users_are_integers)
    lists = flags.FLAGS[CANDIDATES_COLUMN.name].present > 0
    if not lists and not flags.FLAGS[ITEM_COLUMN.name].present:
        lists = CANDIDATES_COLUMN.value in names_of(files[0])
    require(
        lists or not TOP_K.value, "needs a list of candidates", TOP_K.name, TOP_K.value, "Give --candidates_column."
    )
    candidates = Field(CANDIDATES_COLUMN.value if lists else ITEM_COLUMN.value, integers, is_list=lists)
    return RowColumns(history, candidates, TOP_K.value, LIST_SEPARATOR.value, BEFORE_COLUMN.value)


def _settings(manifest: Manifest, columns: RowColumns, data_fingerprint: str | None) -> dict[str, Any]:
    """All that the results depend on, besides the files."""
    history = "--history_column" if data_fingerprint is None else "--user_column"
    return {
        "--export_dir": manifest.digest,
        history: columns.history.name,
        "--candidates_column" if columns.candidates.is_list else "--item_column": columns.candidates.name,
        "--user_histories": data_fingerprint,
        "--before_column": columns.before,
        "--list_separator": columns.list_separator,
        "--top_k": columns.top_k,
    }


def _told(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    kept = found["num_parts"] - found["parts"]
    lines = [f"  {found['num_rows']:,} rows in {found['num_parts']:,} part(s): {found['predictions_dir']}"]
    if kept:
        lines.append(f"  {kept:,} part(s) were there before")
    if not found["num_rows"]:
        lines.append("  the input has no rows, and so has the result")
    if found["candidates"]:
        lines.append(f"  {found['candidates_per_second']:,.0f} candidates/s with {found['world_size']} worker(s)")
    if found.get("rows_of_unknown_users"):
        lines.append(f"  {found['rows_of_unknown_users']:,} of {found['rows']:,} rows: the user is not in the data")
    if "rows_before_all_history" in found:
        lines.append(
            f"  {found['rows_before_all_history']:,} of {found['rows']:,} rows: the time is before all history"
        )
    lines.append(f"  {duration(seconds['predict'])}, after {duration(seconds['start'])} to start")
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)

"""Prepared data, which `prepare` makes once and every worker opens with `open_prepared`.

DATA_DIR/BUILDER/CONFIG/VERSION/     published at once when complete
    events.tfrecord...               TFDS records, one a block of whole users
    facts.json  vocabulary/  item_features/  raw_features/
    packed/                          the arrays of `EventStore`, made from the records, and all that splits decide
DATA_DIR/locks/                      one empty file for each data set, locked while that is written
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from din_dist import progress, schema
from din_dist.config import LABELLED, DataConfig, list_text
from din_dist.config.data import Engine
from din_dist.data import encoding, event_store, history_folders, history_rows, history_sets
from din_dist.data.behaviour_log import BehaviourColumns
from din_dist.data.blocks import Block
from din_dist.data.builders.amazon_reviews import CATEGORIES, AmazonReviews
from din_dist.data.builders.base import EventsBuilder
from din_dist.data.builders.complete_journey import CompleteJourney, CompleteJourneyConfig
from din_dist.data.builders.event_log import EventLogBuilder, EventLogConfig
from din_dist.data.builders.synthetic import Synthetic, SyntheticConfig
from din_dist.data.builders.synthetic_impressions import SyntheticImpressions, SyntheticImpressionsConfig
from din_dist.data.event_store import EventStore
from din_dist.data.extension import Extension
from din_dist.data.forgetting import Forgetting
from din_dist.data.log_reader import Columns
from din_dist.data.memory_need import memory_need, why_in_memory
from din_dist.data.raw_columns import RawColumns
from din_dist.data.spilled_log import Room, SpilledLogReader
from din_dist.errors import InputError
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import TIME_KINDS, Owner
from din_dist.files import cache_folder, is_remote, locked_in_turn, make_folder, publish_folder, repair_publishing
from din_dist.machine import free_memory_bytes
from din_dist.tables.formats import Format, format_of
from din_dist.tables.sources import NothingThere, absolute, check_unchanged, find_files, partition_text
from din_dist.text import bytes_of

_WHERE_FILES_LIE = ("data_path", "items_path", "users_path", "offers_path", "behaviours_path")
FactsCheck = Callable[[schema.DatasetFacts], None]


def data_dir(config: DataConfig) -> Path:
    """Returns the folder of all prepared data: `--data_dir`, otherwise `din_dist` in the user's cache folder."""
    if config.data_dir:
        return Path(config.data_dir).absolute()
    try:
        return cache_folder()
    except RuntimeError as error:  # no HOME, and no entry of the user in /etc/passwd
        raise InputError(
            "--data_dir: lies in the home folder unless it is given. Received: no --data_dir, and no home folder. Give "
            "--data_dir, or set HOME."
        ) from error


def prepared_folder(config: DataConfig) -> Path:
    """Returns where the data of `config` lies once it is prepared, without reading anything that may be damaged."""
    root = data_dir(config)
    nowhere = root / "locks" / "none"  # an empty place, because TFDS reads what it finds
    return root / Path(_builder(config, nowhere).data_path).relative_to(nowhere)


def builder_for(config: DataConfig) -> EventsBuilder:
    """Returns the TFDS builder of `--dataset`, which writes to the data folder."""
    return _builder(config, data_dir(config))


def _builder(config: DataConfig, root: Path) -> EventsBuilder:
    kind, _, category = config.dataset.partition("/")
    features = _feature_columns(config)
    with _quietly():
        match kind:
            case "event_log":
                return EventLogBuilder(data_dir=root, config=_event_log(config))
            case "complete_journey":
                return CompleteJourney(
                    data_dir=root,
                    config=CompleteJourneyConfig.of(
                        features,
                        config.request_column,
                        config.weight_column,
                        config.action_column,
                        config.session_column,
                    ),
                )
            case "amazon_reviews":
                if category not in ("", *CATEGORIES):
                    raise InputError(
                        f"--dataset: unknown category of amazon_reviews. Received: {category!r}. "
                        f"Choose among {', '.join(CATEGORIES)}."
                    )
                return AmazonReviews(data_dir=root, config=category or None)
            case "synthetic":
                return Synthetic(data_dir=root, config=_synthetic_size(config))
            case "synthetic_impressions":
                impressions = SyntheticImpressionsConfig.of(_synthetic_size(config), _columns(config), features)
                return SyntheticImpressions(data_dir=root, config=impressions)
            case _:
                raise ValueError(config.dataset)


def _event_log(config: DataConfig) -> EventLogConfig:
    return EventLogConfig.for_source(
        config.data_path,
        _columns(config),
        _feature_columns(config),
        _behaviour_columns(config),
        Extension(absolute(config.extend, "extend")) if config.extend else None,
        Forgetting(config.min_item_events, config.forget_after, config.timestamp_unit),
        config.spark_master if config.engine is Engine.SPARK else "",
    )


def _behaviour_columns(config: DataConfig) -> BehaviourColumns | None:
    """Returns the log of behaviours, or None if there is none."""
    if not config.behaviours_path:
        return None
    return BehaviourColumns(
        absolute(config.behaviours_path, "behaviours_path"),
        config.behaviour_user_column or config.user_column,
        config.behaviour_item_column or config.item_column,
        config.behaviour_timestamp_column or config.timestamp_column,
        config.action_column,
    )


def _synthetic_size(config: DataConfig) -> SyntheticConfig:
    return SyntheticConfig.sized(
        num_users=config.synthetic_num_users,
        num_items=config.synthetic_num_items,
        num_categories=config.synthetic_num_categories,
        events_per_user=config.synthetic_events_per_user,
        seed=config.synthetic_seed,
    )


def _columns(config: DataConfig) -> Columns:
    return Columns(
        user=config.user_column,
        item=config.item_column,
        timestamp=config.timestamp_column,
        label=config.label_of_histories,
        label_required=config.label_column_required or bool(config.label_columns) or config.dataset != "event_log",
        tasks=config.label_columns,
        label_time=config.label_time_column,
        request=config.request_column,
        session=config.session_column,
        weight=config.weight_column,
        action="" if config.behaviours_path else config.action_column,
        item_features=config.item_features,
        item_features_required=config.item_features_required,
        presorted=config.presorted,
    )


def _feature_columns(config: DataConfig) -> RawColumns:
    """Returns what declared features need.

    Raises:
        InputError: the data set has no such columns.
    """
    kind, specs = config.dataset.partition("/")[0], config.feature_specs
    candidates = [spec.name for spec in specs if spec.owner is Owner.CANDIDATE and not spec.by]
    if kind not in LABELLED and candidates:
        raise InputError(
            f"--features: features of candidates take a log with labels, because a drawn negative has none. Received: "
            f'{candidates[0]}, and {kind} has no labels. Write of = "item" or of = "context".'
        )
    if kind not in (*LABELLED, "complete_journey") and (others := [s.name for s in specs if s.kind not in TIME_KINDS]):
        raise InputError(
            f"--features: {kind} has no columns besides those of --item_features; features of the time can be "
            f"declared. Received: {others[0]}. Drop it, or use --dataset=event_log."
        )
    return RawColumns.of(
        specs,
        absolute(config.items_path, "items_path") if config.items_path else "",
        absolute(config.users_path, "users_path") if config.users_path else "",
        absolute(config.offers_path, "offers_path") if config.offers_path else "",
        config.item_feature_conflict,
    )


def prepare(
    config: DataConfig,
    overwrite: bool = False,
    check: FactsCheck = lambda facts: None,
    tell: Callable[[str], None] = lambda line: None,
) -> EventStore:
    """Downloads and builds data that is missing, and opens it. Data that was prepared before is kept.

    Args:
        config: names the data set.
        overwrite: build the data again. The old data stays until the new is complete.
        check: is called with the facts of new data, with the chosen item features, before it is published. It may raise
            `InputError`.
        tell: is called with a line about a log that does not fit into `--memory_limit`.

    Raises:
        InputError: the source breaks a rule or changed since it was prepared, or the data folder cannot be written.
    """
    with progress.at(f"preparing data in {data_dir(config)}"):
        if overwrite or _is_due(config, prepared_folder(config)):
            with writing(config) as folder:
                if overwrite or _is_due(config, folder):  # another process may have been faster
                    build(config, folder, check, tell)
        return open_prepared(config)


def _is_due(config: DataConfig, folder: Path) -> bool:
    """Tells whether the data in `folder` is missing, or an earlier version may have read its source wrongly."""
    if not folder.exists():
        return True
    try:
        facts = event_store.read_facts(folder)
    except InputError:
        return False  # the user must see damage
    return bool(_present(facts)) and _outdated(config, facts) is not None


def _outdated(config: DataConfig, facts: schema.DatasetFacts) -> str | None:
    """Returns a file that an earlier version may have read wrongly, or None."""
    if config.dataset != "event_log" or facts.reader >= schema.READER:
        return None
    names = _columns(config).names
    for path in facts.sources:
        if format_of(Path(path)) is Format.JSON_LINES or partition_text(Path(path), names):
            return path
    return None


def open_prepared(config: DataConfig) -> EventStore:
    """Opens prepared data. If only its packed arrays are missing, one of the processes that need them makes them.

    A source that is gone altogether does not matter: prepared data is enough to train.

    Raises:
        InputError: the data was not prepared, its source changed since, or its packed arrays are damaged.
    """
    with progress.at(f"reading data in {data_dir(config)}"):
        folder = prepared_folder(config)
        if not folder.exists():
            raise InputError(
                f"{folder}: the data must be prepared before. Received: nothing there. "
                f"Run: python -m din_dist.cli.prepare_data {_flags(config)}"
            )
        facts = event_store.read_facts(folder)
        _check_sources(config, facts)
    features = _chosen_features(config, facts)
    if not event_store.is_packed(folder, facts):
        with writing(config):
            facts = event_store.read_facts(folder)  # another process may have been faster, or prepared it again
            if not event_store.is_packed(folder, facts):
                event_store.pack(folder, facts, _blocks(config, folder))
    store = _with_chosen_histories(config, event_store.open_store(folder, features))
    store = _with_history_rows(config, _with_named_histories(config, store))
    return dataclasses.replace(store, features=_declared_features(config, store))


def _with_chosen_histories(config: DataConfig, store: EventStore) -> EventStore:
    """Returns the store with histories as the settings say. One of the processes that need them cuts them.

    Raises:
        InputError: the settings do not fit the log, or the kept histories are damaged.
    """
    facts = history_folders.chosen_facts(store.facts, config)
    if facts is store.facts:
        return store
    folder = history_folders.histories_folder(store, facts)
    if not _keep(config, folder, lambda: history_folders.write_histories(folder, store, facts)):
        return history_folders.histories_in_memory(store, facts)
    return history_folders.open_histories(folder, store, facts)


def _with_named_histories(config: DataConfig, store: EventStore) -> EventStore:
    """Returns the store with the histories of `--histories`. One of the processes that need them cuts them.

    Raises:
        InputError: the log does not tell of one of them, or the kept ones are damaged.
    """
    if not (histories := config.named_histories):
        return store
    folder = history_sets.sets_folder(store, histories)
    if not _keep(config, folder, lambda: history_sets.write_sets(folder, store, histories)):
        return history_sets.sets_in_memory(store, histories)
    return history_sets.open_sets(folder, store, histories)


def _with_history_rows(config: DataConfig, store: EventStore) -> EventStore:
    """Returns the store with the rows of behaviours, if features of behaviours are declared.

    Raises:
        InputError: the kept rows are damaged.
    """
    declared = any(spec.owner is Owner.HISTORY for spec in config.feature_specs)
    if not declared or (folder := history_rows.rows_folder(store)) is None:
        return store
    if not _keep(config, folder, lambda: history_rows.write_rows(folder, store)):
        return history_rows.rows_in_memory(store)
    return history_rows.open_rows(folder, store)


def _declared_features(config: DataConfig, store: EventStore) -> Mapping[str, StoredFeature]:
    """Returns the declared features. One of the processes that need their encoded arrays makes them.

    Raises:
        InputError: no event is left to train on, a feature has no values, or the arrays are damaged.
    """
    if not config.feature_specs:
        return {}
    folder = encoding.encoded_folder(store, config)
    if not _keep(config, folder, lambda: encoding.write_encoded(folder, store, config)):
        return encoding.encoded_in_memory(store, config)
    return encoding.open_encoded(folder, store, config)


def _keep(config: DataConfig, folder: Path, write: Callable[[], None]) -> bool:
    """Makes a folder beside the packed arrays, in one process. Returns False where the disk cannot be written to."""
    if folder.is_dir():
        return True
    try:
        with writing(config):
            if not folder.is_dir():  # otherwise another process was faster
                write()
    except InputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        return False
    return True


def build(
    config: DataConfig,
    folder: Path,
    check: FactsCheck = lambda facts: None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes the records; `folder` holds them all or what it held before. `check` and `tell` as of `prepare`."""
    aside = folder.with_name(f"{folder.name}.incomplete")  # TFDS renames files that may not be on the disk yet
    shutil.rmtree(aside, ignore_errors=True)  # a process that was killed left it
    builder = _builder(config, aside)
    room = Room(folder.with_name(f"{folder.name}.sorting"), _memory_limit(config))
    by_spark = isinstance(builder, EventLogBuilder) and builder.builder_config.spark_master
    if isinstance(builder, EventLogBuilder) and not by_spark and _is_spilled(builder.builder_config, room, tell):
        builder.room = room
    try:
        with _quietly():
            builder.download_and_prepare(
                download_dir=data_dir(config) / "downloads",
                download_config=tfds.download.DownloadConfig(
                    manual_dir=None if is_remote(config.data_path) else config.data_path or None, try_download_gcs=False
                ),
            )
        facts = event_store.read_facts(Path(builder.data_path))
        chosen = {name: facts.item_features[name] for name in _chosen_features(config, facts)}
        chosen_facts = history_folders.chosen_facts(facts, config)
        for history in config.named_histories:
            history_sets.choice_of(facts, history.name)
        if config.named_histories:
            chosen_facts = chosen_facts.with_sets(config.named_histories)
        check(dataclasses.replace(chosen_facts, item_features=chosen))
        publish_folder(Path(builder.data_path), folder)
        room.clear()
    except Exception:  # unlike one that is ended, a run that fails is not to go on
        room.clear()
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: other data is there
            folder.parent.rmdir()
            folder.parent.parent.rmdir()


def _memory_limit(config: DataConfig) -> int:
    return bytes_of(config.memory_limit) or free_memory_bytes() // 2


def _is_spilled(config: EventLogConfig, room: Room, tell: Callable[[str], None]) -> bool:
    """Tells whether a log is prepared by way of files."""
    files = find_files(config.source).files
    if (need := memory_need(config, files)) <= room.most_bytes:
        return False
    line = f"memory: the log takes about {need / 2**30:,.1f} GiB, and may take {room.most_bytes / 2**30:,.1f} GiB."
    why = why_in_memory(config) or SpilledLogReader(files, config.columns, config.features, room).mixed_column()
    if why:
        tell(f"{line} It is prepared in memory all the same, because {why} cannot go by way of files yet.")
        return False
    tell(f"{line} It is sorted by way of files in {room.folder}.")
    return True


def _blocks(config: DataConfig, folder: Path) -> Iterator[Block]:
    """Yields the records in the order in which they were written, and holds one in memory at a time."""
    import tensorflow as tf

    read_config = tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1)
    try:
        with _quietly():
            records = builder_for(config).as_dataset(split=schema.EVENTS_SPLIT, read_config=read_config)
    except Exception as error:  # TFDS does not document the errors of its damaged files
        raise _unreadable(folder, error) from error
    try:
        for record in records.as_numpy_iterator():
            yield Block(
                first_user=int(record[schema.BLOCK_FIRST_USER]),
                offsets=record[schema.BLOCK_OFFSETS],
                item_ids=record[schema.BLOCK_ITEM_IDS],
                timestamps=record[schema.BLOCK_TIMESTAMPS],
                labels=record[schema.BLOCK_LABELS],
                **{name: record.get(name) for name in schema.OPTIONAL_BLOCKS},
            )
    except tf.errors.OpError as error:
        raise _unreadable(folder, error) from error


def describe_sources(config: DataConfig, facts: schema.DatasetFacts) -> list[str]:
    """Returns lines about the user's files that prepared data was made from; no lines for other data sets."""
    if config.dataset != "event_log":
        return []
    gone = [f"files: {len(facts.sources):,} read, which are gone now"]
    if not is_remote(config.data_path) and not _present(facts):
        return gone
    try:
        return [find_files(config.data_path).describe()]
    except NothingThere:
        return gone


def _unreadable(folder: Path, error: Exception) -> InputError:
    problem = re.sub(r"{{.*?}} |\[Op:.*", "", " ".join(str(error).split()))  # without names of graph nodes
    return InputError(
        f"{folder}: the records cannot be read ({problem.strip()[:300]}). "
        "Give launch/train.sh or prepare_data --overwrite_prepared."
    )


def _present(facts: schema.DatasetFacts) -> list[Path]:
    return [Path(path) for path in facts.sources if Path(path).exists()]


def _check_parent(facts: schema.DatasetFacts) -> None:
    """Refuses data whose parent was prepared anew since it was extended. A parent that is gone does not matter."""
    if not facts.extends or not Path(facts.extends["folder"], schema.FACTS_FILE).is_file():
        return
    folder = Path(facts.extends["folder"])
    if (now := event_store.read_facts(folder).fingerprint) != facts.extends["fingerprint"]:
        raise InputError(
            f"{folder}: must stay as it was when --extend read it. Received: other events, with the fingerprint {now}. "
            "Give prepare_data --overwrite_prepared once, to extend it anew."
        )


def _check_sources(config: DataConfig, facts: schema.DatasetFacts) -> None:
    _check_parent(facts)
    present = _present(facts)
    if present and (path := _outdated(config, facts)):
        raise InputError(
            f"{path}: the data of this file must be prepared by a version that reads columns that begin late, and "
            "those that folders' names give. Received: data of an earlier version of din_dist. Prepare it again: "
            f"python -m din_dist.cli.prepare_data {_flags(config)}"
        )
    if config.dataset != "event_log":
        check_unchanged({str(path): facts.sources[str(path)] for path in present}, present)
        return
    groups: dict[str, dict[str, Mapping[str, int | str]]] = {}  # the log, and each table
    for name, recorded in facts.sources.items():
        groups.setdefault(str(recorded.get("table", "")), {})[name] = recorded
    for table, sources in groups.items():
        if any(is_remote(name) or Path(name).exists() for name in sources):
            try:
                now = _event_log(config).find_tables()[table] if table else find_files(config.data_path).files
            except NothingThere:
                if all(map(is_remote, sources)):
                    continue  # as a local log whose files are gone
                raise
            check_unchanged(sources, now)


def _chosen_features(config: DataConfig, facts: schema.DatasetFacts) -> list[str]:
    optional = config.dataset == "event_log" and not config.item_features_required
    for name in config.item_features:
        if name not in facts.item_features and not optional:
            raise InputError(
                f"--item_features: must be features of {config.dataset}. Received: {name!r}. "
                f"Choose among {', '.join(facts.item_features) or 'none: it has no features'}."
            )
    return [name for name in config.item_features if name in facts.item_features]


def _flags(config: DataConfig) -> str:
    """Returns the flags that prepare the same data."""
    given = {"dataset": config.dataset}
    for field in dataclasses.fields(DataConfig):
        value = getattr(config, field.name)
        if _decides_what_is_prepared(field.name) and value != field.default:
            given[field.name] = list_text(value) if isinstance(value, tuple) else str(value)
    if config.label_column_required:
        given["label_column"] = config.label_column
    if config.item_features_required:
        given["item_features"] = list_text(config.item_features)
    if given.get("features"):
        given.pop("feature_declarations", None)
    return " ".join(f"--{name}={shlex.quote(value)}" for name, value in given.items())


def _decides_what_is_prepared(name: str) -> bool:
    names = [*_WHERE_FILES_LIE, "data_dir", "item_features", "presorted", "features", "feature_declarations"]
    names += ["label_columns", "history_label", "extend", "item_feature_conflict", "min_item_events"]
    names += ["forget_after"]
    return name in names or name.endswith("_column") or name.startswith("synthetic_")


@contextlib.contextmanager
def writing(config: DataConfig) -> Iterator[Path]:
    """Yields the data set's folder once no other process writes to it."""
    import tensorflow as tf  # here, because TFDS writes with it and raises its errors when a disk is full

    folder = prepared_folder(config)
    name = "-".join(folder.relative_to(data_dir(config)).parts)
    lock = data_dir(config) / "locks" / f"{name}.lock"
    try:
        make_folder(lock.parent)
        with locked_in_turn(lock):
            repair_publishing(folder)
            yield folder
    except (OSError, tf.errors.OpError) as error:
        raise InputError(
            f"{folder}: cannot be written ({' '.join(str(error).split())[:300]}). "
            "Make room or give rights there, or give another --data_dir."
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps TFDS from drawing progress bars and from reporting each of its steps."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)

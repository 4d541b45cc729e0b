"""Settings of the data: which events there are, and which examples are made of them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from typing import ClassVar, Self

from din_dist.config.settings import (
    INT64_MAX,
    Settings,
    count_setting,
    flagless,
    path_setting,
    require,
    setting,
    source_setting,
    text_setting,
    time_setting,
)
from din_dist.features.spec import FeatureConflict, FeatureSpec, from_text
from din_dist.features.times import UTC, Delay, TimestampUnit, is_zone
from din_dist.files import is_remote
from din_dist.schema import MOST_TASKS, NamedHistory
from din_dist.text import bytes_of

UNKNOWN_ITEM_RATE = 0.1
_EXPONENT, _LARGEST_EXPONENT = 0.75, 2  # of popularity
_PURCHASES = "complete_journey"
_IMPRESSIONS = "synthetic_impressions"
EVENT_LOG = "event_log"
LABELLED = (EVENT_LOG, _IMPRESSIONS)  # data sets that may have labels
_DATASETS = (_PURCHASES, "amazon_reviews", "event_log", "synthetic", _IMPRESSIONS)
ALL_BEHAVIOURS, SKIPPED, LONG = "all", "skipped", "long"  # histories that no action names
FORGETTING = ("min_item_events", "forget_after")  # settings that say what is forgotten
_MOST_HISTORIES = 8
_SYNTHETIC, _EXAMPLES = "synthetic data", "examples"


class Split(enum.StrEnum):
    LEAVE_ONE_OUT = "leave_one_out"
    LEAVE_TWO_OUT = "leave_two_out"
    TEMPORAL = "temporal"
    USERS = "users"


class Engine(enum.StrEnum):
    LOCAL = "local"
    SPARK = "spark"


class HistoryEnds(enum.StrEnum):
    AUTO = "auto"  # before_time with labels, before_event without
    BEFORE_TIME = "before_time"
    BEFORE_EVENT = "before_event"


class HistoryCut(enum.StrEnum):
    EVENT = "event"
    RANDOM = "random"
    FIXED = "fixed"


class UnknownItem(enum.StrEnum):
    UNTRAINED = "untrained"
    FEATURES = "features"


def _check_dataset(name: str, value: str) -> None:
    kind, _, category = value.partition("/")
    require(kind in _DATASETS, "unknown data set", name, value, f"Choose one of {', '.join(_DATASETS)}.")
    is_plain = kind == "amazon_reviews" or not category
    require(is_plain, "only amazon_reviews has configurations", name, value, f"Write --dataset={kind}.")


def _check_labels(name: str, value: tuple[str, ...]) -> None:
    given, remedy = ",".join(value), "For example click,buy."
    require(len(value) != 1, "names several columns; --label_column names one", name, given, remedy)
    require(len(value) <= MOST_TASKS, f"takes at most {MOST_TASKS} columns", name, given, "Drop some.")
    require(len(set(value)) == len(value), "each column may be named once", name, given, "Remove the repetition.")
    for column in value:
        rule = "their names are parts of others: letters of ASCII, digits and _ only, no digit first"
        require(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", column) is not None, rule, name, column, "Rename the column.")


def _check_features(name: str, value: tuple[str, ...]) -> None:
    is_unique = len(set(value)) == len(value)
    require(is_unique, "each feature may be named once", name, ",".join(value), "Remove the repetition.")


def _check_declarations(name: str, value: str) -> None:
    try:
        from_text(value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        require(False, "must be features as a saved job keeps them", name, value, "Give --features instead.")
        raise AssertionError from error


def _history_of(text: str, names: str = r"[A-Za-z0-9_]+") -> tuple[str, int]:
    """Reads NAME:LENGTH.

    Args:
        text: to read.
        names: the pattern of names.

    Raises:
        ValueError: it is of another form.
    """
    name, _, longest = text.rpartition(":")
    if not re.fullmatch(names, name) or not re.fullmatch(r"[1-9][0-9]{0,8}", longest):
        raise ValueError(text)
    return name, int(longest)


def _check_named_histories(name: str, value: tuple[str, ...]) -> None:
    for text in value:
        try:
            _history_of(text)
        except ValueError as error:
            rule = "must be NAME:LENGTH, the name of letters of ASCII, digits and _, the length at least 1"
            require(False, rule, name, text, "For example click:100,skipped:50.")
            raise AssertionError from error
    names, given = [text.partition(":")[0] for text in value], ",".join(value)
    require(len({*names}) == len(names), "each history may be named once", name, given, "Remove the repetition.")
    require(len(value) <= _MOST_HISTORIES, f"takes at most {_MOST_HISTORIES} histories", name, given, "Drop some.")


@dataclasses.dataclass(frozen=True)
class Negatives:
    """How training draws negatives, as users write it.

    Attributes:
        kind: `UNIFORM`; `POPULARITY`: by the power `exponent` of how often training clicks an item; `BATCH`: among the
            clicked items of the global batch.
        exponent: of the popularity.
    """

    UNIFORM: ClassVar[str] = "uniform"
    POPULARITY: ClassVar[str] = "popularity"
    BATCH: ClassVar[str] = "batch"

    kind: str = UNIFORM
    exponent: float = 0.0

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Reads uniform, popularity, popularity:EXPONENT or batch.

        Raises:
            ValueError: it is none of these.
        """
        kind, colon, exponent = text.partition(":")
        if kind not in (cls.UNIFORM, cls.POPULARITY, cls.BATCH) or (colon and kind != cls.POPULARITY):
            raise ValueError(text)
        found = cls(kind, {cls.UNIFORM: 0.0, cls.POPULARITY: _EXPONENT, cls.BATCH: 1.0}[kind])
        found = dataclasses.replace(found, exponent=float(exponent)) if colon else found
        if not 0 < found.exponent <= _LARGEST_EXPONENT and kind == cls.POPULARITY:
            raise ValueError(text)
        return found


def _check_negatives(name: str, value: str) -> None:
    try:
        Negatives.from_text(value)
    except ValueError as error:
        rule = f"must be uniform, batch or popularity:EXPONENT, the exponent above 0 and at most {_LARGEST_EXPONENT}"
        require(False, rule, name, value, "For example popularity:0.75.")
        raise AssertionError from error


def _check_long_history(name: str, value: str) -> None:
    try:
        _history_of(value or "none:1", r".+")
    except ValueError as error:
        rule = "must be FEATURE:LENGTH, the length at least 1"
        require(False, rule, name, value, "For example category_id:100.")
        raise AssertionError from error


def _check_delay(name: str, value: str) -> None:
    rule, remedy = "must be a whole number, alone or with s, m, h or d", "For example 90s, 15m, 6h or 1d."
    require(Delay.is_valid(value), rule, name, value, remedy)


def _check_gap(name: str, value: str) -> None:
    rule, remedy = "must be a whole number above 0, alone or with s, m, h or d", "For example 90s, 30m, 6h or 1d."
    is_long = Delay.is_valid(value) and Delay(value).in_units(TimestampUnit.SECONDS) > 0
    require(not value or is_long, rule, name, value, remedy)


def _check_zone(name: str, value: str) -> None:
    require(is_zone(value), "must be the IANA name of a time zone", name, value, "For example Europe/Vienna, or UTC.")


def _check_memory_limit(name: str, value: str) -> None:
    rule = "must be an amount of memory above 0, with KiB, MiB, GiB or TiB, or in bytes"
    require(not value or bool(bytes_of(value)), rule, name, value, "For example 4GiB.")


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """The events and the examples that are made of them."""

    THEME: ClassVar[str] = "data"

    dataset: str = text_setting(
        "complete_journey",
        "Data set: complete_journey (real purchases, installed with the package), amazon_reviews/CATEGORY (McAuley's "
        "5-core files), event_log (your own files, see --data_path), synthetic (any size, for tests) or "
        "synthetic_impressions (pages of shown items whose probabilities of clicks and purchases are known).",
        check=_check_dataset,
    )
    data_path: str = source_setting(
        "",
        "Your events, for --dataset=event_log, which is meant if no --dataset is given: one Parquet, CSV or JSON-lines "
        "file, a folder of them, or a quoted glob, on this machine or in a store (s3://, gs://, abfs://, hdfs://). For "
        "amazon_reviews: a folder with files downloaded by hand.",
    )
    engine: Engine = text_setting(
        Engine.LOCAL,
        "What prepares your files: local, on this machine, or spark, on the executors of --spark_master. The result is "
        "the same.",
        may_change=True,
        later=True,
    )
    spark_master: str = text_setting(
        "local[*]",
        "For --engine=spark: the cluster, as Spark takes it: local[2], yarn, spark://HOST:7077, k8s://...",
        may_change=True,
        later=True,
    )
    extend: str = path_setting(
        "",
        "Prepared data that the files of --data_path extend: the folder that prepare_data printed, or its --data_dir. "
        "--data_path then has the newer events alone. Ids keep their numbers, and users' new events join their "
        "histories. Default: --data_path has all events.",
        may_change=True,
        later=True,
    )
    item_feature_conflict: FeatureConflict = text_setting(
        FeatureConflict.ERROR,
        "What counts if rows of the log give an item or a user different values of a feature: first or last (in the "
        "order of the files; those of --extend come first), or error.",
        later=True,
    )
    min_item_events: int = count_setting(
        "Forget items with fewer events: they and their events are left out, and their ids are unknown. With "
        "--forget_after, once their first event is so old. 0: none.",
        later=True,
    )
    forget_after: int = count_setting(
        "Forget items and users without an event in so many days before the newest event, likewise. 0: none.",
        later=True,
    )
    data_dir: str = path_setting(
        "",
        "Folder of the prepared data. Default: the folder `din_dist` in the user's cache folder.",
        may_change=True,
    )
    memory_limit: str = text_setting(
        "",
        "How much memory the rows of a log may take while it is prepared, such as 4GiB. A larger log is sorted by way "
        "of files beside the prepared data, with the same result. Default: half of what is free.",
        check=_check_memory_limit,
        may_change=True,
        later=True,
    )
    user_column: str = text_setting("user_id", "Column of the user's id (string or integer).")
    item_column: str = text_setting("item_id", "Column of the item's id (string or integer).")
    timestamp_column: str = text_setting("timestamp", "Column of the event's time (integer, any unit, or a date type).")
    label_column: str = text_setting(
        "label",
        "Column of the click label, 0 or 1. The default column may be absent; every event is then a positive.",
    )
    label_columns: tuple[str, ...] = text_setting(
        (),
        "Columns of the labels to predict, comma-separated (click,buy), 0 or 1 each: one model learns them all. "
        "Default: --label_column alone.",
        check=_check_labels,
        later=True,
    )
    history_label: str = text_setting(
        "", "Which of --label_columns makes histories: those of its positives. Default: the first.", later=True
    )
    label_time_column: str = text_setting(
        "",
        "Column of the time at which a positive came, where that is later than the event's own time (the click after "
        "the impression). From then on it is in histories. Default: the event's time.",
        later=True,
    )
    request_column: str = text_setting(
        "",
        "Column of the id of the request (page, basket, session) in which the item was shown. The history of each of "
        "its events ends before the request's first time, so none sees another. Default: the same user and time.",
        later=True,
    )
    session_column: str = text_setting(
        "",
        "Column of the id of the session to which an event of its user belongs. A history then has the events of the "
        "same session alone. Default: a history has all that the user did before; see also --session_gap.",
        later=True,
    )
    weight_column: str = text_setting(
        "",
        "Column of the event's weight, a number of at least 0: its loss in training counts so much more or less. "
        "Metrics count each example once. Default: all count alike.",
        later=True,
    )
    label_column_required: bool = flagless(
        False
    )  # true if the user gave the flag; the fingerprint tells what was found
    item_features: tuple[str, ...] = text_setting(
        ("category_id",),
        "Columns that describe the item (category, brand, ...), comma-separated. Each gets an embedding, which is "
        "concatenated with the item's own. Empty for none. The default column may be absent.",
        check=_check_features,
    )
    item_features_required: bool = flagless(False)  # likewise
    features: str = path_setting(
        "",
        "File that declares features of users, events (context), candidates, items and behaviours, in TOML; see "
        "din_dist/data/README.md.",
        may_change=True,
        later=True,
    )
    feature_declarations: str = text_setting(
        "",
        "The features that --features declares, as a saved job keeps them: as JSON. Give --features instead.",
        check=_check_declarations,
        later=True,
    )
    items_path: str = source_setting(
        "",
        "A table of the items for --features: Parquet, CSV or JSON-lines files with --item_column and one row an item.",
        later=True,
    )
    users_path: str = source_setting(
        "",
        "A table of the users for --features: Parquet, CSV or JSON-lines files with --user_column and one row a user.",
        later=True,
    )
    offers_path: str = source_setting(
        "",
        "A table of offers for --features with by = [COLUMNS]: Parquet, CSV or JSON-lines files with --item_column, "
        "those columns, and one row for each item under each circumstance (a price in a store, a promotion of a week).",
        later=True,
    )
    timestamp_unit: TimestampUnit = text_setting(
        TimestampUnit.AUTO,
        "Unit of the timestamps, for features that are made from them. auto: by their size; dates are microseconds.",
        later=True,
    )
    timezone: str = text_setting(
        UTC,
        "Time zone of features that are made from timestamps, by its IANA name (Europe/Vienna).",
        check=_check_zone,
        later=True,
    )
    behaviours_path: str = source_setting(
        "",
        "A log of behaviours: Parquet, CSV or JSON-lines files with a user, an item and a time in each row. Histories "
        "then come from it alone, and --data_path has the examples, of the same users. Items that only behaviours have "
        "are never candidates. Default: the positives of --data_path make histories.",
        later=True,
    )
    behaviour_user_column: str = text_setting(
        "", "Column of the user's id in --behaviours_path. Default: --user_column.", later=True
    )
    behaviour_item_column: str = text_setting(
        "",
        "Column of the item's id in --behaviours_path, none if there is no such column. A behaviour without an id is "
        "known by its categories, --item_features and the like. Default: --item_column.",
        later=True,
    )
    behaviour_timestamp_column: str = text_setting(
        "", "Column of the behaviour's time in --behaviours_path. Default: --timestamp_column.", later=True
    )
    action_column: str = text_setting(
        "",
        "Column of what a behaviour was (click, cart, buy), for --histories: in --behaviours_path, or else in "
        "--data_path. A value may be missing.",
        later=True,
    )
    presorted: bool = setting(
        False, "Keep the order of the log's rows. Preparing fails if a user's events are not in order of time."
    )
    synthetic_num_users: int = setting(10_000, "Users of synthetic data.", at_least=1, theme=_SYNTHETIC)
    synthetic_num_items: int = setting(10_000, "Items of synthetic data.", at_least=2, theme=_SYNTHETIC)
    synthetic_num_categories: int = setting(100, "Item categories of synthetic data.", at_least=1, theme=_SYNTHETIC)
    synthetic_events_per_user: int = setting(
        30, "Mean number of events per user of synthetic data.", at_least=2, theme=_SYNTHETIC
    )
    synthetic_seed: int = setting(0, "Seed of synthetic data.", at_least=0, at_most=INT64_MAX, theme=_SYNTHETIC)
    split: Split = setting(
        Split.LEAVE_ONE_OUT,
        "leave_one_out: each user's last event is the test example and the others train (the authors' protocol). "
        "leave_two_out: the last event tests and the one before it validates. temporal: the splits are cut by time. "
        "users: 80 % of the users train, 10 % validate and 10 % test, by a hash of the user's id; the first 80 % of "
        "the events of a user who does not train are history, and the others are examples.",
        theme=_EXAMPLES,
    )
    validation_from: int = setting(
        0,
        "For --split=temporal: events from this timestamp on validate. 0: the time before which 80 % of the events "
        "lie.",
        at_most=INT64_MAX,
        theme=_EXAMPLES,
    )
    test_from: int = setting(
        0,
        "For --split=temporal: events from this timestamp on test. 0: the time before which 90 % of the events lie.",
        at_most=INT64_MAX,
        theme=_EXAMPLES,
    )
    train_from: int = time_setting(
        0,
        "Events before this timestamp are history only: no training example is made of them. They still count in the "
        "statistics of features and in popularity. 0: all events train that are not held out.",
        theme=_EXAMPLES,
        later=True,
    )
    max_history_length: int = setting(
        100, "Longest behaviour history, in events; the newest are kept.", at_least=1, theme=_EXAMPLES
    )
    histories: tuple[str, ...] = text_setting(
        (),
        "Several histories, each with a name and its own longest length: click:100,buy:50,skipped:50. A name is a "
        "value of --action_column or one of --label_columns; all stands for every behaviour, and skipped for what was "
        "shown and not acted on (label 0). Each has its own attention, unless --share_attention. Default: one history, "
        "of at most --max_history_length.",
        check=_check_named_histories,
        theme=_EXAMPLES,
        later=True,
    )
    long_history: str = text_setting(
        "",
        "One more history: of all behaviours that share an item feature with the candidate the newest so many, however "
        "long ago. category_id:100 takes those of the candidate's category. Default: none.",
        check=_check_long_history,
        theme=_EXAMPLES,
        later=True,
    )
    history_ends: HistoryEnds = text_setting(
        HistoryEnds.AUTO,
        "Where a history ends. before_time: it has what is known before the time of the request. before_event: it has "
        "all that stands before the event in the log, as the next item of a basket does; with labels, clicks of the "
        "same page leak. auto: before_time with labels, before_event without.",
        theme=_EXAMPLES,
        later=True,
    )
    history_delay: str = text_setting(
        "0",
        "How long after its time a behaviour is known: 90s, 15m, 6h or 1d, or a number in the unit of the timestamps.",
        check=_check_delay,
        theme=_EXAMPLES,
        later=True,
    )
    session_gap: str = text_setting(
        "",
        "The longest time between neighbours of a session: 90s, 30m, 6h or 1d, or a number in the unit of the "
        "timestamps. A history then has the events of the current session alone. Default: there are no sessions.",
        check=_check_gap,
        theme=_EXAMPLES,
        later=True,
    )
    history_cut: HistoryCut = text_setting(
        HistoryCut.EVENT,
        "For models that find items: where training cuts a user's events into history and target. event: before each "
        "event, which is the target. random: each epoch draws as many cuts as the user has events, anew. fixed: once; "
        "the first 80 % are the history of all the user's examples, and each later event is a target.",
        theme=_EXAMPLES,
        later=True,
    )
    negatives_per_positive: int = setting(
        1,
        "For logs without labels: random items that the user never touched, per positive, for training. Models that "
        "find items have none, but --num_sampled.",
        at_least=0,
        theme=_EXAMPLES,
    )
    negatives: str = text_setting(
        Negatives.UNIFORM,
        "For logs without labels: how training draws negatives. uniform: every item alike. popularity:0.75: by that "
        "power of how often training clicks the item. batch: among the clicked items of the global batch, whose rows "
        "are read anyway; they differ from epoch to epoch. Always items that the user never touched, and the loss is "
        "corrected, so logits mean the same. Validation and test draw uniformly.",
        check=_check_negatives,
        theme=_EXAMPLES,
        later=True,
    )
    resample_negatives: bool = setting(False, "Draw other training negatives in each epoch.", theme=_EXAMPLES)
    group_negatives: bool = setting(
        False,
        "For logs without labels: keep an event and its negatives together in the order of an epoch. They share a "
        "history, so an update has fewer distinct items, and sends and changes fewer table rows. Each row is then in "
        "fewer updates: a penalty on the rows in use (--embedding_l2) may be larger.",
        theme=_EXAMPLES,
    )
    evaluation_negatives_per_positive: int = setting(
        1,
        "For logs without labels: negatives per positive for validation and test (the authors use 1). They are never "
        "redrawn.",
        at_least=1,
        may_change=True,
        theme=_EXAMPLES,
    )
    unknown_item: UnknownItem = setting(
        UnknownItem.UNTRAINED,
        "How the model scores items that training never saw. untrained: by vectors that have learned nothing. "
        "features: by their item features, which the model learns by hiding item ids at random (--unknown_item_rate).",
        theme=_EXAMPLES,
    )
    unknown_item_rate: float = setting(
        UNKNOWN_ITEM_RATE,
        "For --unknown_item=features: share of the item ids that training hides, between 0 and 1.",
        above=0,
        below=1,
        theme=_EXAMPLES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        self._check_columns()
        self._check_features()
        self._check_split()
        self._check_histories()
        self._check_behaviours()
        self._check_sessions()
        self._check_forgetting()
        require(
            self.unknown_item is UnknownItem.FEATURES or self.unknown_item_rate == UNKNOWN_ITEM_RATE,
            "belongs to --unknown_item=features",
            "unknown_item_rate",
            self.unknown_item_rate,
            "Add --unknown_item=features, or drop it.",
        )

    def _check_source(self) -> None:
        kind = self.dataset.partition("/")[0]
        require(
            kind != "event_log" or bool(self.data_path),
            "--dataset=event_log needs your files",
            "data_path",
            self.data_path,
            "Give a file, a folder or a glob.",
        )
        require(
            kind in ("event_log", "amazon_reviews") or not self.data_path,
            f"--dataset={kind} reads no files of yours",
            "data_path",
            self.data_path,
            "Add --dataset=event_log.",
        )
        self._check_engine()
        conflict = ("item_feature_conflict", FeatureConflict.ERROR)
        forgets = [(name, 0) for name in FORGETTING]
        for name, default in (("extend", ""), conflict, ("memory_limit", ""), ("engine", Engine.LOCAL), *forgets):
            value = getattr(self, name)
            rule = "belongs to --dataset=event_log"
            shown = value if isinstance(value, int) else str(value)
            require(kind == "event_log" or value == default, rule, name, shown, "Drop it.")
        require(
            kind == "event_log" or not is_remote(self.data_path),
            f"--dataset={kind} reads a local folder",
            "data_path",
            self.data_path,
            "Copy the files to one.",
        )

    def _check_engine(self) -> None:
        drop = "Drop it, or use --engine=local."
        for name in ("extend", "behaviours_path", "items_path", "users_path", "offers_path"):
            value, rule = getattr(self, name), "is not read by --engine=spark yet"
            require(self.engine is Engine.LOCAL or not value, rule, name, value, drop)
        for name in (*FORGETTING, "memory_limit"):
            value, rule = getattr(self, name), "does not go with --engine=spark yet"
            require(self.engine is Engine.LOCAL or not value, rule, name, value, drop)
        on_spark = ("spark_master", "local[*]")
        rule = "belongs to --engine=spark"
        is_default = self.engine is Engine.SPARK or self.spark_master == on_spark[1]
        require(is_default, rule, on_spark[0], self.spark_master, "Add --engine=spark, or drop it.")

    def _check_columns(self) -> None:
        own = "" if self.behaviours_path else self.action_column
        optional = (self.label_time_column, self.request_column, self.session_column, self.weight_column, own)
        given = [name for name in optional if name]
        ids = (self.user_column, self.item_column, self.timestamp_column, *(self.label_columns or [self.label_column]))
        columns = (*ids, *given, *self.item_features)
        for name in columns:
            require(columns.count(name) == 1, "a column can have one role", "item_features", name, "Use it once.")
            rule, remedy = "a column's name must be one line", "Rename the column."
            require(len(name.splitlines()) <= 1, rule, "item_features", name, remedy)

    @property
    def label_of_histories(self) -> str:
        """The column of the label whose positives are behaviours; empty for none."""
        named = self.label_column_required or self.dataset != _IMPRESSIONS
        return self.history_label or next(iter(self.label_columns), self.label_column if named else "click")

    @property
    def named_histories(self) -> tuple[NamedHistory, ...]:
        """The histories that have names; none if there is one history."""
        named = [NamedHistory(*_history_of(text)) for text in self.histories]
        if self.long_history:
            feature, longest = _history_of(self.long_history, r".+")
            named = named or [NamedHistory(ALL_BEHAVIOURS, self.max_history_length)]
            named.append(NamedHistory(LONG, longest, feature))
        return tuple(named)

    @property
    def drawn_negatives(self) -> Negatives:
        """How training draws negatives."""
        return Negatives.from_text(self.negatives)

    @functools.cached_property
    def feature_specs(self) -> tuple[FeatureSpec, ...]:
        """The features that `--features` declares."""
        return from_text(self.feature_declarations)

    def _check_features(self) -> None:
        declared = {spec.name for spec in self.feature_specs}
        both = next((name for name in self.item_features if name in declared), "")
        remedy = "Drop it there, or rename the feature and name its column by column."
        require(not both, "names no feature that --features declares", "item_features", both, remedy)
        declares = bool(declared) or not self.features
        require(declares, "must declare a feature", "features", self.features, "Add one, or drop the flag.")
        is_log = self.dataset == "event_log"
        for name in ("items_path", "users_path", "offers_path"):
            value = getattr(self, name)
            require(is_log or not value, "belongs to --dataset=event_log", name, value, "Drop it.")
            rule = "only declared features are read from it"
            require(bool(declared) or not value, rule, name, value, "Add --features, or drop it.")
        looked_up = next((spec.name for spec in self.feature_specs if spec.by), "")
        rule, remedy = "only features with by are read from it", "Write by in the file of --features, or drop the flag."
        require(bool(looked_up) or not self.offers_path, rule, "offers_path", self.offers_path, remedy)
        has_table = bool(self.offers_path) or not is_log or not looked_up
        rule = f"features with by, such as {looked_up}, are looked up in it"
        require(has_table, rule, "offers_path", self.offers_path, "Give the table of offers, or drop by.")

    def _check_histories(self) -> None:
        kind = self.dataset.partition("/")[0]
        both = (*LABELLED, _PURCHASES)
        columns: dict[str, tuple[str, ...]] = dict.fromkeys(("label_time_column", "label_columns"), LABELLED)
        columns |= dict.fromkeys(("request_column", "session_column", "weight_column", "action_column"), both)
        for name, kinds in columns.items():
            value = getattr(self, name)
            value = ",".join(value) if isinstance(value, tuple) else value
            rule = f"--dataset={kind} has no such column"
            require(kind in kinds or not value, rule, name, value, "Drop it, or use --dataset=event_log.")
        replaced = bool(self.label_columns) and self.label_column_required
        rule = "--label_columns takes its place"
        require(not replaced, rule, "label_column", self.label_column, "Drop it, and name all labels there.")
        known = not self.history_label or self.history_label in self.label_columns
        rule, remedy = "must be one of --label_columns", f"Choose among {', '.join(self.label_columns) or 'them'}."
        require(known, rule, "history_label", self.history_label, remedy)
        for history in self.named_histories:
            known = not history.feature or history.feature in self.item_features
            remedy = "Name it there."
            require(known, "must be one of --item_features", "long_history", self.long_history, remedy)
        taken = any(text.startswith(f"{LONG}:") for text in self.histories)
        rule, remedy = f"may not name {LONG}, which is --long_history", "Use another name."
        require(not taken, rule, "histories", ",".join(self.histories), remedy)
        told = {LONG, ALL_BEHAVIOURS, SKIPPED, *self.label_columns}
        for history in self.named_histories if not self.action_column else ():
            remedy = "Name --action_column, or --label_columns."
            require(history.name in told, "names what no column tells", "histories", history.name, remedy)
        rule, remedy = "is for --histories", "Add --histories, or drop it."
        require(bool(self.histories) or not self.action_column, rule, "action_column", self.action_column, remedy)
        if self.history_ends is HistoryEnds.BEFORE_EVENT:
            for name, default in (("label_time_column", ""), ("request_column", ""), ("history_delay", "0")):
                value = getattr(self, name)
                rule = "belongs to histories that end before the time of a request"
                require(value == default, rule, name, value, "Drop it, or use --history_ends=before_time.")

    def _check_behaviours(self) -> None:
        is_log, path = self.dataset == "event_log", self.behaviours_path
        rule = "cannot be extended, because behaviours of users without events were left out when it was prepared"
        remedy = "Drop --extend, and prepare all files together."
        require(not (self.extend and path), rule, "behaviours_path", path, remedy)
        rule = "cannot be extended, because only the offers of its events were kept when it was prepared"
        require(not (self.extend and self.offers_path), rule, "offers_path", self.offers_path, remedy)
        require(is_log or not path, "belongs to --dataset=event_log", "behaviours_path", path, "Drop it.")
        columns = ("behaviour_user_column", "behaviour_item_column", "behaviour_timestamp_column")
        for name in columns:
            value = getattr(self, name)
            rule, remedy = "names a column of --behaviours_path", "Give --behaviours_path, or drop it."
            require(bool(path) or not value, rule, name, value, remedy)
            rule, remedy = "a column's name must be one line", "Rename the column."
            require(len(value.splitlines()) <= 1, rule, name, value, remedy)
        if not path:
            return
        own = [getattr(self, name) or getattr(self, name.removeprefix("behaviour_")) for name in columns]
        own += [self.action_column] if self.action_column else []
        twice = next((name for name in own if own.count(name) > 1), "")
        require(not twice, "a column can have one role", "behaviours_path", twice, "Name others.")
        for name in ("label_time_column", "history_label"):
            value = getattr(self, name)
            rule = "tells of histories from --data_path"
            require(not value, rule, name, value, "Drop it, because --behaviours_path makes the histories.")
        rule, remedy = "orders behaviours as events, and those of --behaviours_path are none", "Drop it."
        ends = self.history_ends
        require(ends is not HistoryEnds.BEFORE_EVENT, rule, "history_ends", str(ends), remedy)

    def _check_forgetting(self) -> None:
        for name in FORGETTING:
            value = getattr(self, name)
            for other in ("behaviours_path", "offers_path"):
                rule = f"cannot be used with --{other} yet"
                require(not (value and getattr(self, other)), rule, name, value, "Drop one of the two.")
        rule = "with --extend needs --forget_after, because new items of a day would have too few events"
        remedy = "Say in --forget_after within how many days an item must have so many."
        holds = not (self.extend and self.min_item_events) or bool(self.forget_after)
        require(holds, rule, "min_item_events", self.min_item_events, remedy)
        rule, remedy = "forgets nothing below 2", "Give 2 or more, or drop it."
        require(self.min_item_events != 1, rule, "min_item_events", self.min_item_events, remedy)

    @property
    def has_sessions(self) -> bool:
        """True if a history has the events of its session alone."""
        return bool(self.session_column or self.session_gap)

    def _check_sessions(self) -> None:
        if not self.has_sessions:
            return
        gap, column = self.session_gap, self.session_column
        rule, remedy = "says what a session is, and so does --session_column", "Drop one of them."
        require(not (gap and column), rule, "session_gap", gap, remedy)
        refused = {
            "behaviours_path": (self.behaviours_path, "", "has no sessions"),
            "long_history": (self.long_history, "", "goes beyond the session"),
            "history_cut": (str(self.history_cut), HistoryCut.EVENT, "cuts all events of a user, and not a session"),
        }
        for name, (value, default, rule) in refused.items():
            remedy = f"Drop it, or --{'session_gap' if gap else 'session_column'}."
            require(value == default, rule, name, value, remedy)

    def _check_split(self) -> None:
        if self.split is not Split.TEMPORAL:
            for name in ("validation_from", "test_from"):
                value = getattr(self, name)
                require(not value, "belongs to --split=temporal", name, value, "Drop it, or use --split=temporal.")
        first = self.validation_from or self.test_from
        rule = "must be earlier than --validation_from and --test_from"
        remedy = f"Give a timestamp before {first}."
        require(not (self.train_from and first) or self.train_from < first, rule, "train_from", self.train_from, remedy)
        if self.split is Split.TEMPORAL and self.validation_from and self.test_from:
            require(
                self.validation_from <= self.test_from,  # equal: nothing validates
                "must not be later than --test_from",
                "validation_from",
                self.validation_from,
                f"Give a timestamp up to {self.test_from}.",
            )

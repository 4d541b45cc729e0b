"""Names, dtypes and shapes of prepared data and of a batch, as they pass between the rooms.

Letters of shapes: U users of a block, or distinct items of a batch; E events; P behaviours; B examples in a batch, N
history positions in all of them; H width of an item vector (its embeddings side by side).
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from din_dist.text import is_count, is_integer, shown

# 2: columns that folders' names give, and those of JSON lines that begin late.
READER = 2

UNKNOWN_ID = 0  # of every vocabulary: an id never seen, and padding
MOST_TASKS = 8  # their labels share a byte
MOST_ACTIONS = 255  # one takes a byte


class SessionGraph(NamedTuple):
    """The graphs of packed histories, with M nodes and E edges in all; no two edges are equal.

    A history's distinct items are its nodes. An edge leads from each item to the one after it.
    """

    item_of: Any  # int32 [M], the item of each node, by the place of its vector
    node_of: Any  # int32 [N], the node of each history position
    edge_from: Any  # int32 [E], the node that an edge leaves
    edge_to: Any  # int32 [E], the node that it enters
    num_incoming: Any  # int32 [M], the edges that enter each node
    num_outgoing: Any  # int32 [M], the edges that leave it


class Batch(NamedTuple):
    """A packed batch: flat arrays, nothing padded. If an item's own id is hidden, -id stands for the id.

    Each field is a tensor, or its TensorSpec in a signature. Scoring needs the first three; None stands for the others.
    """

    candidate_item_ids: Any  # int32 [B]
    # Of S named histories, those of the first name come before those of the second.
    history_item_ids: Any  # int32 [N], the histories concatenated, each oldest first
    history_lengths: Any  # int32 [S * B], sum N
    dropout_seeds: Any = None  # int64 [B], a number for (seed, epoch, example)
    labels: Any = None  # float32 [B], 0 or 1; of T tasks [B, T]
    distinct_item_ids: Any = None  # int32 [U], the items of candidates and histories, each once
    item_index: Any = None  # int32 [B + N], the place of each candidate and then each history position among those
    example_ids: Any = None  # int64 [B], position among the split's examples
    # Name -> the user, context and candidate features of each example, by form: int32 [B], `Lists` of B, float32 [B] or
    # float16 [B, D]. () stands for none: a signature may hold nothing but TensorSpecs.
    features: Any = ()
    # Side information of behaviours: name -> int32 [T], each combination of values once; () for none.
    sides: Any = ()
    side_index: Any = ()  # int32 [N], the place of each history position among those
    # float32 [B], by how much each example's loss counts, 1 on average over the split; () for 1 everywhere.
    weights: Any = ()
    # float32 [B], added to the logits in the loss: the correction for negatives that are drawn unevenly; () for 0.
    logit_offsets: Any = ()
    # int32 [S], the items that a softmax compares all targets with, which then are the candidates; () without one.
    # `item_index` is then [B + N + S], with these items' places at its end.
    sampled_item_ids: Any = ()
    sampled_offsets: Any = ()  # float32 [S], as logit_offsets
    example_ages: Any = ()  # float32 [B], from 0 for the newest time of training to 1 for the oldest; () if not read
    # `SessionGraph`, whose items are places among `distinct_item_ids`; () if the model reads none, or finds it itself.
    graph: Any = ()

    @property
    def extras(self) -> tuple[str, ...]:
        """The names of `EXTRAS` that this batch has."""
        values = {name: getattr(self, name) for name in EXTRAS}
        return tuple(name for name, value in values.items() if not isinstance(value, tuple) or value)


# The fields that only some batches have. All but `graph` are for training alone.
EXTRAS = ("weights", "logit_offsets", "sampled_item_ids", "sampled_offsets", "example_ages", "graph")


# --- A record of prepared data: one block of whole users, their events in time order. ---
BLOCK_FIRST_USER = "first_user"  # int64, dense index (from 0) of the block's first user
BLOCK_OFFSETS = "offsets"  # int64 [U + 1], where each user's events begin in this block
BLOCK_ITEM_IDS = "item_ids"  # int32 [E], dense ids from 1
BLOCK_TIMESTAMPS = "timestamps"  # int64 [E]
BLOCK_LABELS = "labels"  # uint8 [E]; all 1 where the log has no labels
BLOCK_REQUEST_TIMES = "request_times"  # int64 [E], the time of each event's request; absent without --request_column
BLOCK_WEIGHTS = "weights"  # float32 [E], how much each event counts in training; absent without --weight_column
BLOCK_TASK_LABELS = "task_labels"  # uint8 [E], bit t is the label of task t; absent without --label_columns
BLOCK_LABEL_TIMES = "label_times"  # int64 [E], when each positive came; absent without --label_time_column
# int32 [E], the place among its user's events of the first event of each one's session; absent without --session_column
BLOCK_SESSION_PLACES = "session_places"
BLOCK_ACTIONS = "actions"  # uint8 [E], 1 + the place among `DatasetFacts.actions`, 0: none; absent without actions
# Of P behaviours of a log of their own, each user's in time order; absent without --behaviours_path.
BLOCK_BEHAVIOUR_OFFSETS = "behaviour_offsets"  # int64 [U + 1], where each user's behaviours begin in this block
BLOCK_BEHAVIOUR_ITEM_IDS = "behaviour_item_ids"  # int32 [P]
BLOCK_BEHAVIOUR_TIMES = "behaviour_times"  # int64 [P]
BLOCK_BEHAVIOUR_ACTIONS = "behaviour_actions"  # uint8 [P], as of events; absent without actions
OPTIONAL_BLOCKS = (
    BLOCK_REQUEST_TIMES,
    BLOCK_WEIGHTS,
    BLOCK_TASK_LABELS,
    BLOCK_LABEL_TIMES,
    BLOCK_SESSION_PLACES,
    BLOCK_ACTIONS,
    BLOCK_BEHAVIOUR_OFFSETS,
    BLOCK_BEHAVIOUR_ITEM_IDS,
    BLOCK_BEHAVIOUR_TIMES,
    BLOCK_BEHAVIOUR_ACTIONS,
)

EVENTS_SPLIT = "events"  # the one split of every builder's records; train, validation and test are cut from it later

# --- Files beside the records. ---
FACTS_FILE = "facts.json"  # a DatasetFacts
VOCABULARY_DIR = "vocabulary"  # NAME.parquet, column "id": row i holds the user's own id of dense id i + 1
ITEM_FEATURES_DIR = "item_features"  # NAME.npy, int32 [num_items + 1]: an item's dense id -> its feature's dense id


METRICS_OF_TASKS = ("gauc", "auc", "log_loss")  # of each label, if there are several


def metric_of(name: str, task: str) -> str:
    """Returns what a metric of one of several labels is called."""
    return f"{name}_{task}"


BY_COLUMN = "by_column"  # what a session is; otherwise the longest gap between its events


class NamedHistory(NamedTuple):
    """One of several histories that a model reads.

    Attributes:
        name: of the history.
        longest: the most behaviours; the newest are kept.
        feature: only behaviours that share this feature of their item with the candidate; empty: all of the history.
    """

    name: str
    longest: int
    feature: str = ""


class HistoryRule(enum.StrEnum):
    """The rule by which the history of an event ends."""

    BEFORE_EVENT = "before_event"  # all that comes before it in the user's order: the next item of a basket
    BEFORE_TIME = "before_time"  # all that is known before its request: not what was clicked on the same page

    @classmethod
    def of(cls, *, has_order: bool) -> Self:
        """Returns the rule for logs whose order is that of the behaviours, or for others."""
        return cls(cls.BEFORE_EVENT if has_order else cls.BEFORE_TIME)


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """The contents of a prepared data set, written with it as JSON.

    `num_items` and the values of `item_features` count real ids: tables need one row more, for `UNKNOWN_ID`.
    `sources` names what it was made from: path -> size, mtime_ns and content digest, empty where nothing can change.
    `fingerprint` differs whenever the prepared events or their histories would differ.
    `history_rule` is the one by which histories were cut; earlier versions knew one only, and wrote none.
    `reader` counts what was changed in reading: data that an earlier one read may lack columns.
    `has_request_times`, `has_label_times` and `has_weights` tell that the log names requests, when positives came, and
    how much each event counts.
    `history_delay` is how long after its time a behaviour is known, in the unit of the timestamps.
    `tasks` names the labels to predict, if there are several; those that make histories are among them.
    `actions` names what behaviours were, as a column of the log tells, in the order of their codes from 1.
    `num_behaviours` counts those of a log of their own, None without one, and `num_only_behaviours` the items that no
    event has. Their dense ids come last, and they are never candidates. `num_without_id` counts the last of them, which
    stand for behaviours without an item's id: they have no row of their own in the table of items.
    `histories` are those that a model reads, if there are several. Prepared data do not choose, so theirs is empty.
    `has_sessions` tells that the log names sessions. `sessions` is what a session is where histories are those of the
    session alone: `BY_COLUMN`, or the longest gap in the unit of the timestamps; likewise empty in prepared data.
    `extends` tells of the prepared data that newer files have extended: its `folder`, `fingerprint` and number of
    `events`, and `ids` and `digest` of each of its vocabularies. It is None if there is none.
    `forgotten` tells what was left out: `min_item_events` and `forget_after`, the number of `events` (`newer_events` of
    them later than all that was extended), and `ids` and `digest` of `users` and `items`. It is None without a rule.
    """

    num_users: int
    num_items: int
    num_events: int
    has_labels: bool
    item_features: Mapping[str, int]
    first_timestamp: int
    last_timestamp: int
    fingerprint: str
    sources: Mapping[str, Mapping[str, int | str]]
    history_rule: HistoryRule = HistoryRule.BEFORE_EVENT
    reader: int = 1
    has_request_times: bool = False
    has_label_times: bool = False
    has_weights: bool = False
    history_delay: int = 0
    tasks: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    num_behaviours: int | None = None
    num_only_behaviours: int = 0
    num_without_id: int = 0
    histories: tuple[NamedHistory, ...] = ()
    has_sessions: bool = False
    sessions: str = ""
    extends: Mapping[str, Any] | None = None
    forgotten: Mapping[str, Any] | None = None

    @property
    def has_behaviours(self) -> bool:
        """True if histories come from a log of their own."""
        return self.num_behaviours is not None

    @property
    def selects_behaviours(self) -> bool:
        """True if behaviours are other than all events in their order: positives, or those of a log of their own."""
        return self.has_labels or self.has_behaviours

    @property
    def keeps_behaviours(self) -> bool:
        """True if behaviours have arrays of their own, because they are other events or in another order."""
        return self.selects_behaviours or bool(self.sessions)

    @property
    def num_candidates(self) -> int:
        """How many items can be candidates: those that events have. Their dense ids come first."""
        return self.num_items - self.num_only_behaviours

    @property
    def num_histories(self) -> int:
        """How many histories a model reads."""
        return max(1, len(self.histories))

    @property
    def num_tasks(self) -> int:
        """How many labels of each example are predicted."""
        return max(1, len(self.tasks))

    @property
    def present_rule(self) -> HistoryRule:
        """The rule by which histories of such a log are cut today."""
        return HistoryRule.of(has_order=not self.selects_behaviours)

    @property
    def histories_end(self) -> str:
        """The end of each history, in words."""
        whose = ", and begin with its session" if self.sessions else ""
        if self.history_rule is HistoryRule.BEFORE_EVENT:
            return f"before the event, in the order of the log (--history_ends=before_event){whose}"
        words = f"before the time of the {'request' if self.has_request_times else 'event'}{whose}"
        if self.has_label_times:
            words += "; a positive is known from its own time on"
        if self.history_delay:
            words += f"; a behaviour is known {self.history_delay:,} after its time, in the unit of the timestamps"
        return words

    def by_present_rule(self) -> DatasetFacts:
        """Returns the facts of the same events with histories cut by `present_rule`; their fingerprint is another."""
        if self.history_rule is self.present_rule:
            return self
        return self._with_histories(f"{self.fingerprint} {self.present_rule}", self.present_rule, 0)

    def with_histories(self, rule: HistoryRule, delay: int, sessions: str = "") -> DatasetFacts:
        """Returns the facts of the same events with histories cut otherwise; their fingerprint is another."""
        if (rule, delay, sessions) == (self.history_rule, self.history_delay, self.sessions):
            return self
        words = filter(None, (self.fingerprint, str(rule), str(delay), sessions))
        return dataclasses.replace(self._with_histories(" ".join(words), rule, delay), sessions=sessions)

    def with_sets(self, histories: Sequence[NamedHistory]) -> DatasetFacts:
        """Returns the facts of the same events with several histories; their fingerprint is another."""
        names = ",".join(":".join(filter(None, (history.name, history.feature))) for history in histories)
        facts = self._with_histories(f"{self.fingerprint} {names}", self.history_rule, self.history_delay)
        return dataclasses.replace(facts, histories=tuple(histories))

    def _with_histories(self, text: str, rule: HistoryRule, delay: int) -> DatasetFacts:
        fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return dataclasses.replace(self, fingerprint=fingerprint, history_rule=rule, history_delay=delay)

    @classmethod
    def from_json(cls, fields: Mapping) -> DatasetFacts:
        """Returns the facts that `to_json` has written.

        Raises:
            ValueError, TypeError: `fields` are no such facts.
        """
        facts = cls(**fields)
        for name, is_possible in _POSSIBLE.items():
            if not is_possible(getattr(facts, name)):
                raise ValueError(f"{name} cannot be {shown(getattr(facts, name))}")
        rule, tasks, actions = HistoryRule(facts.history_rule), tuple(facts.tasks), tuple(facts.actions)
        return dataclasses.replace(facts, history_rule=rule, tasks=tasks, actions=actions)

    def to_json(self) -> dict:
        """Returns the fields, those that came later only where they differ from their default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in _LATER}
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in _LATER or value != defaults[name]}


_LATER = (
    "has_request_times",
    "has_label_times",
    "has_weights",
    "history_delay",
    "tasks",
    "actions",
    "num_behaviours",
    "num_only_behaviours",
    "num_without_id",
    "histories",
    "has_sessions",
    "sessions",
    "extends",
    "forgotten",
)


def _are_names(value: Any, most: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) <= most
        and all(isinstance(name, str) for name in value)
        and len({*value}) == len(value)
    )


def _are_sources(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(source, Mapping) for source in value.values())


def _is_extension(value: Any) -> bool:
    texts = ("folder", "fingerprint")
    return value is None or (isinstance(value, Mapping) and all(isinstance(value.get(text), str) for text in texts))


def _tells_of_forgotten(value: Any) -> bool:
    if value is None:
        return True
    counts = ("min_item_events", "forget_after", "events")
    ids = [value.get(name) for name in ("users", "items")] if isinstance(value, Mapping) else [None]
    are_ids = all(isinstance(told, Mapping) and is_count(told.get("ids")) for told in ids)
    return are_ids and all(is_count(value.get(name)) for name in counts)


_POSSIBLE: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("num_users", "num_items", "num_events", "reader", "history_delay", "num_only_behaviours", "num_without_id"),
        is_count,
    ),
    "num_behaviours": lambda value: value is None or is_count(value),
    **dict.fromkeys(("first_timestamp", "last_timestamp"), is_integer),
    **dict.fromkeys(
        ("has_labels", "has_request_times", "has_label_times", "has_weights", "has_sessions"),
        lambda value: isinstance(value, bool),
    ),
    **dict.fromkeys(("fingerprint", "sessions"), lambda value: isinstance(value, str)),
    "item_features": lambda value: isinstance(value, Mapping) and all(map(is_count, value.values())),
    "sources": _are_sources,
    "extends": _is_extension,
    "forgotten": _tells_of_forgotten,
    "tasks": lambda value: _are_names(value, MOST_TASKS),
    "actions": lambda value: _are_names(value, MOST_ACTIONS),
}
_FEATURE = "feature:"
_OURS = {"item", "items", "user", "users", "events", "popularity"}


def feature_label(name: str) -> str:
    """Returns what an item feature is called where it stands among names of ours: its own name, where that will do.

    No two features have one label, and none has a label that is ours.
    """
    return f"{_FEATURE}{name}" if name in _OURS or name.startswith(_FEATURE) else name


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """One embedding table: `[num_rows, width]` float32, row 0 for `UNKNOWN_ID`.

    `name` is `item`, or a feature's label.
    """

    name: str
    num_rows: int
    width: int

"""A log of behaviours beside the log of events: histories come from it alone, against plain Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from din_dist.assembly import Assembly
from din_dist.config import Config, Split, UnknownItem
from din_dist.data import blocks, event_store
from din_dist.data.event_store import EventStore
from din_dist.data.popularity import popularity
from din_dist.data.prepared import open_prepared, prepare
from din_dist.data.splits import behaviour_counts, split_examples
from din_dist.data.statistics import describe
from din_dist.data.trained_items import row_of_item, trained_items
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.evaluation.retrieval import PopularityScorer, Task, queries_of, rank
from din_dist.serving.batch.histories import UserHistories
from din_dist.tables.ids import Ids
from tests.support.declared_features import Row, config_for, write_table
from tests.support.small_log import small_config
from tests.support.thorough import up_to

FORMATS = [".parquet", ".csv", ".jsonl"]
# What was shown: users a and b, items x, y and z.
SHOWN: list[Row] = [
    {"user_id": "a", "item_id": "x", "timestamp": 10, "label": 1},
    {"user_id": "a", "item_id": "y", "timestamp": 20, "label": 0},
    {"user_id": "a", "item_id": "z", "timestamp": 30, "label": 1},
    {"user_id": "b", "item_id": "x", "timestamp": 20, "label": 0},
    {"user_id": "b", "item_id": "z", "timestamp": 40, "label": 1},
]
# What they did elsewhere: p and q are never shown, and user c never sees anything.
DONE: list[Row] = [
    {"user_id": "b", "item_id": "q", "timestamp": 39, "kind": "k2"},
    {"user_id": "a", "item_id": "p", "timestamp": 12, "kind": "k1"},
    {"user_id": "c", "item_id": "r", "timestamp": 5, "kind": "k9"},
    {"user_id": "a", "item_id": "z", "timestamp": 20, "kind": None},
    {"user_id": "a", "item_id": "p", "timestamp": 9, "kind": "k1"},
]


def config_of(folder: Path, suffix: str = ".parquet", shown: list[Row] = SHOWN, **data: Any) -> Config:
    done = data.pop("done", DONE)
    log = write_table(folder / f"shown{suffix}", shown)
    behaviours = write_table(folder / f"done{data.pop('done_suffix', suffix)}", done)
    given = {"data_path": str(log), "behaviours_path": str(behaviours), "item_features": (), "embedding_dim": (6,)}
    return small_config(folder, **given | data)


def histories(store: EventStore, longest: int = 100) -> list[list[str]]:
    """Each event's history, in the ids of the log."""
    users = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))
    assert store.history_ends is not None
    starts = np.maximum(store.history_offsets[users], store.history_ends - longest)
    windows = zip(starts, store.history_ends, strict=True)
    return [store.own_ids(event_store.ITEMS, store.history_item_ids[start:end]) for start, end in windows]


@pytest.mark.parametrize("suffix", FORMATS)
def test_histories_are_behaviours_strictly_before(tmp_path: Path, suffix: str) -> None:
    store = prepare(config_of(tmp_path, suffix).data)
    assert histories(store) == [["p"], ["p", "p"], ["p", "p", "z"], [], ["q"]]
    facts = store.facts
    assert (facts.num_users, facts.num_items, facts.num_events) == (2, 5, 5)
    assert (facts.num_behaviours, facts.num_only_behaviours, facts.num_candidates) == (4, 2, 3)
    assert store.vocabulary("items").to_pylist() == ["x", "y", "z", "q", "p"]  # user c's r is not there
    assert store.vocabulary("users").to_pylist() == ["a", "b"]
    (line,) = [line for line in describe(store, 100) if line.startswith("behaviours:")]
    assert line == (
        "behaviours: 4 in a log of their own, timestamps 9 to 39; 0 users have none, 2 items have no event and are "
        "never candidates"
    )


def test_the_formats_of_both_logs_may_differ(tmp_path: Path) -> None:
    shown = [row | {"item_id": number} for number, row in enumerate(SHOWN)]
    done = [row | {"item_id": number} for number, row in enumerate(DONE, start=3)]
    store = prepare(config_of(tmp_path, ".parquet", shown, done=done, done_suffix=".csv").data)
    assert store.vocabulary("items").to_pylist() == [0, 1, 2, 3, 4, 6, 7]
    assert histories(store)[2] == ["7", "4", "6"]


def test_columns_of_other_names_and_a_delay(tmp_path: Path) -> None:
    renamed = {"user_id": "who", "item_id": "what", "timestamp": "at"}
    done = [{renamed.get(name, name): value for name, value in row.items()} for row in DONE]
    columns = {"behaviour_user_column": "who", "behaviour_item_column": "what", "behaviour_timestamp_column": "at"}
    config = config_of(tmp_path, done=done, **columns)
    now = prepare(config.data)
    assert histories(now)[2] == ["p", "p", "z"]
    later = prepare(config.replace(history_delay="8").data)
    assert later.folder == now.folder
    assert histories(later) == [[], ["p"], ["p", "p", "z"], [], []]
    assert later.facts.fingerprint != now.facts.fingerprint
    assert histories(open_prepared(config.data)) == histories(now)


def test_features_of_items_that_are_never_shown(tmp_path: Path) -> None:
    """They come from the log of behaviours, and q's kind has a row of its own, because training saw it."""
    shown = [row | {"kind": {"x": "k1", "y": "k3"}.get(row["item_id"])} for row in SHOWN]
    declared = '[kind]\nof = "item"\nkind = "category"\n'
    config = config_of(tmp_path, shown=shown)
    data = config_for(
        tmp_path / "shown.parquet",
        declared,
        behaviours_path=config.data.behaviours_path,
        item_features=(),
        split=Split.TEMPORAL,
        validation_from=41,
        test_from=42,
    )
    store = prepare(data)
    kinds = [None, *store.feature_vocabulary("kind").to_pylist()]
    assert [kinds[row] for row in store.features["kind"].values] == [None, "k1", "k3", None, "k2", "k1"]
    by_shorthand = prepare(config.replace(item_features=("kind",), embedding_dim=(6, 4)).data)
    names = [None, *by_shorthand.vocabulary("kind").to_pylist()]
    assert [names[row] for row in by_shorthand.item_features["kind"]] == [None, "k1", "k3", None, "k2", "k1"]


def test_two_values_of_a_feature_in_two_logs(tmp_path: Path) -> None:
    shown = [row | {"kind": "k5"} for row in SHOWN]
    with pytest.raises(InputError, match=r"done.parquet, row 1: a feature of items has one value .*'x' with 'k5'"):
        prepare(
            config_of(
                tmp_path, shown=shown, done=[DONE[1] | {"item_id": "x"}], item_features=("kind",), embedding_dim=(6, 4)
            ).data
        )


WITHOUT_IDS = [
    {"user_id": "a", "item_id": None, "timestamp": 5, "kind": "k3", "brand": None},
    {"user_id": "a", "item_id": None, "timestamp": 6, "kind": "k3", "brand": "b1"},
    {"user_id": "a", "item_id": "p", "timestamp": 7, "kind": "k3", "brand": "b1"},
    {"user_id": "b", "item_id": None, "timestamp": 8, "kind": "k3", "brand": "b1"},
    {"user_id": "b", "item_id": None, "timestamp": 9, "kind": None, "brand": "b2"},
    {"user_id": "c", "item_id": None, "timestamp": 9, "kind": None, "brand": None},  # of nobody's here
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_behaviours_without_ids_are_items_of_their_categories(tmp_path: Path, suffix: str) -> None:
    """One item for each combination; they come last, are never candidates, and share the reserved row."""
    features = {"item_features": ("kind", "brand"), "embedding_dim": (6, 4, 4)}
    shown = [row | {"kind": "k3", "brand": "b1"} for row in SHOWN]
    config = config_of(tmp_path, suffix, shown, done=WITHOUT_IDS, **features)
    store = prepare(config.data)
    made_up = ["brand=b2", "kind=k3", "kind=k3, brand=b1"]
    assert sorted(store.vocabulary("items").to_pylist()[4:]) == made_up
    assert histories(store) == [["kind=k3", "kind=k3, brand=b1", "p"]] * 3 + [["kind=k3, brand=b1", "brand=b2"]] * 2
    facts = store.facts
    assert (facts.num_items, facts.num_candidates, facts.num_only_behaviours, facts.num_without_id) == (7, 3, 4, 3)
    for name in ("kind", "brand"):
        of_items = dict(zip(store.vocabulary("items").to_pylist(), store.item_features[name][1:], strict=True))
        found = {item: store.own_ids(name, [of_items[item]], unknown="")[0] for item in [*made_up, "p"]}
        whole = {"kind": ["", "k3", "k3", "k3"], "brand": ["b2", "", "b1", "b1"]}[name]
        assert list(found.values()) == whole
    rows = row_of_item(facts, None)
    assert rows is not None
    assert rows.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    (line,) = [line for line in describe(store, 100) if line.startswith("behaviours:")]
    assert line.endswith(
        "4 items have no event and are never candidates, 3 of which stand for behaviours without an item's id"
    )
    known = config.replace(
        unknown_item=UnknownItem.FEATURES, split=Split.TEMPORAL, validation_from=41, test_from=42
    ).data
    trained = trained_items(store, known, split_examples(store, known))
    assert trained
    assert row_of_item(facts, trained).tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert trained.ids.tolist() == [0, 1, 2, 3]


def test_ids_that_are_made_up_are_nobodys(tmp_path: Path) -> None:
    features = {"item_features": ("kind",), "embedding_dim": (6, 4)}
    shown = [row | {"item_id": number - 7, "kind": "k1"} for number, row in enumerate(SHOWN)]
    done = [row | {"item_id": None, "kind": f"k{number}"} for number, row in enumerate(DONE)]
    store = prepare(config_of(tmp_path, shown=shown, done=done, **features).data)
    assert store.vocabulary("items").to_pylist() == [-7, -6, -5, -4, -3, -8, -9, -10, -11]
    other = tmp_path / "other"
    other.mkdir()
    shown = [row | {"item_id": "kind=k1", "kind": "k1"} for row in SHOWN]
    store = prepare(config_of(other, shown=shown, done=[DONE[1] | {"item_id": None}], **features).data)
    assert store.vocabulary("items").to_pylist() == ["kind=k1", "kind=k1'"]


def test_a_log_without_a_column_of_items(tmp_path: Path) -> None:
    """A number of an item is not known of what has no id: a caller could not give it."""
    done = [{name: value for name, value in row.items() if name != "item_id"} for row in DONE if row["kind"]]
    done = [row | {"price": float(number)} for number, row in enumerate(done)]
    config = config_of(tmp_path, shown=[row | {"price": 3.0, "kind": "k1"} for row in SHOWN], done=done)
    declared = '[kind]\nof = "item"\nkind = "category"\n[price]\nof = "item"\nkind = "number"\nencode = "none"\n'
    given = {"behaviours_path": config.data.behaviours_path, "behaviour_item_column": "none", "item_features": ()}
    store = prepare(config_for(tmp_path / "shown.parquet", declared, **given))
    assert histories(store)[2] == ["kind=k1", "kind=k1"]
    assert histories(store)[4] == ["kind=k2"]
    assert np.isnan(store.features["price"].values[-2:]).all()
    assert not np.isnan(store.features["price"].values[1:-2]).any()


def plain_history(shown: Row, done: list[Row], delay: int) -> list[str]:
    own = [row for row in done if row["user_id"] == shown["user_id"] and row["timestamp"] + delay < shown["timestamp"]]
    return [row["item_id"] for row in sorted(own, key=lambda row: row["timestamp"])]


ids = st.sampled_from("abcd")


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Row], list[Row], bool]:
    """Events and behaviours full of ties, of which some users have only one kind."""
    labelled = draw(st.booleans())

    def rows(users: str, items: str, least: int, most: int) -> list[Row]:
        pick = st.tuples(st.sampled_from(users), st.sampled_from(items), st.integers(0, 6))
        found = draw(st.lists(pick, min_size=least, max_size=most))
        return [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in found]

    shown = rows("abc", "stuvwxyz", 2, 20)
    shown = [row | ({"label": draw(st.integers(0, 1))} if labelled else {}) for row in shown]
    return shown, [*rows("bcd" + shown[0]["user_id"], "uvwxyzpq", 1, 20), shown[0] | {"timestamp": 0}], labelled


@settings(max_examples=up_to(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs(), st.integers(0, 3), st.sampled_from([1, 80_000]))
@example((SHOWN, DONE, True), 0, 1)
def test_against_plain_python(tmp_path_factory: Any, log: Any, delay: int, events_per_block: int) -> None:
    shown, done, labelled = log
    folder = tmp_path_factory.mktemp("log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "EVENTS_PER_BLOCK", events_per_block)
        store = prepare(config_of(folder, ".jsonl", shown, done=done, history_delay=str(delay)).data)
    users = store.vocabulary("users").to_pylist()
    assert users == list(dict.fromkeys(row["user_id"] for row in shown))
    expected = []
    for user in users:
        own = sorted((row for row in shown if row["user_id"] == user), key=lambda row: row["timestamp"])
        expected += [plain_history(row, done, delay) for row in own]
    assert histories(store) == expected
    candidates = list(dict.fromkeys(row["item_id"] for row in shown))
    assert store.own_ids("items", range(1, store.facts.num_candidates + 1)) == candidates
    if not labelled:
        for number, user in enumerate(users):
            touched = {row["item_id"] for row in (*shown, *done) if row["user_id"] == user} & set(candidates)
            gaps = store.touched_gaps[slice(*store.touched_offsets[number : number + 2])]
            places = gaps + 1 + np.arange(len(gaps))
            assert {*store.own_ids("items", places)} == touched


def synthetic(folder: Path, *, labels: bool) -> Config:
    """Events of 60 users, and behaviours that name 10 items that are never shown."""
    random = np.random.default_rng(0)
    shown, done = [], []
    for user in range(60):
        of_user = {"user_id": f"u{user}"}
        for time in random.permutation(30)[:10]:
            item = int(random.integers(30))
            row = of_user | {"item_id": f"i{item}", "timestamp": int(time), "category_id": f"c{item % 5}"}
            shown.append(
                row | ({"label": int(random.random() < (0.8 if item % 5 == user % 5 else 0.2))} if labels else {})
            )
        for time in random.permutation(30)[:8]:
            item = int(random.integers(8)) * 5 + user % 5
            done.append(of_user | {"item_id": f"i{item}", "timestamp": int(time), "category_id": f"c{item % 5}"})
    split = {"split": Split.TEMPORAL, "validation_from": 20, "test_from": 25}
    return config_of(folder, shown=shown, done=done, item_features=("category_id",), embedding_dim=(6, 4), **split)


def test_only_items_of_events_are_candidates(tmp_path: Path) -> None:
    """They are drawn as negatives, in training, in ranking and by popularity; a user's behaviours never are."""
    config = synthetic(tmp_path, labels=False).replace(negatives_per_positive=20, unknown_item=UnknownItem.FEATURES)
    store = prepare(config.data)
    assert store.facts.num_only_behaviours > 0
    splits = split_examples(store, config.data)
    done = {user: set() for user in range(store.facts.num_users)}
    for user, own in done.items():
        own |= {*store.item_ids[slice(*store.user_offsets[user : user + 2])].tolist()}
        own |= {*store.history_item_ids[slice(*store.history_offsets[user : user + 2])].tolist()}
    trained = trained_items(store, config.data, splits)
    assert trained is not None
    seen = {*store.item_ids[np.concatenate([*splits["train"].event_parts()])].tolist()}
    only = set(range(store.facts.num_candidates + 1, store.facts.num_items + 1))
    counts = behaviour_counts(store, splits["train"])
    assert {*np.flatnonzero(trained.occur).tolist()} >= seen | ({*np.flatnonzero(counts).tolist()} & only)
    ways = [(negatives, UnknownItem.FEATURES) for negatives in ("uniform", "popularity:0.75", "batch")]
    for negatives, unknown_item in [*ways, ("uniform", UnknownItem.UNTRAINED)]:
        job = Assembly(config.replace(negatives=negatives, unknown_item=unknown_item), Runtime(), store)
        batch = next(iter(job.batches(0, 1)))
        users, _ = splits["train"].users_and_events(batch.example_ids.numpy())
        drawn = batch.labels.numpy() == 0
        candidates = np.abs(batch.candidate_item_ids.numpy())[drawn]
        assert candidates.max() <= store.facts.num_candidates
        assert not any(item in done[user] for user, item in zip(users[drawn], candidates, strict=True))
    plain = config.replace(unknown_item=UnknownItem.UNTRAINED, negatives="popularity:0.75")
    weights = popularity(store, plain.data, splits, None)
    assert weights is not None
    assert weights.cumulative[store.facts.num_candidates] == weights.cumulative[-1]


@pytest.mark.parametrize("against", [0, 5])
def test_ranking_leaves_out_what_is_never_shown(tmp_path: Path, against: int) -> None:
    """The targets' ranks are those of brute force over the items that events have, without the user's behaviours."""
    config = synthetic(tmp_path, labels=True)
    store = prepare(config.data)
    splits = split_examples(store, config.data)
    queries = queries_of(store, splits["test"], 8, 1000)
    num_candidates = store.facts.num_candidates
    scores = np.random.default_rng(0).permutation(num_candidates + 1).astype(np.float32)
    found = rank(store, queries, Task(against, not against, seed=1), PopularityScorer(scores), 5, Runtime())
    for place, user in enumerate(queries.users):
        history = store.history_item_ids[queries.seen_starts[place] : queries.history_ends[place]]
        own = store.item_ids[slice(*store.user_offsets[user : user + 2])]
        behaviours = store.history_item_ids[slice(*store.history_offsets[user : user + 2])]
        touched, target = {*own.tolist(), *behaviours.tolist()}, int(queries.targets[place])
        if against:
            assert found.num_candidates[place] == 1 + min(
                against, num_candidates - len(touched & {*range(num_candidates + 1)})
            )
            assert not touched & ({*found.top_items[place].tolist()} - {0, target})
        else:
            rivals = {*range(1, num_candidates + 1)} - {*history.tolist()} | {target}
            assert found.num_candidates[place] == len(rivals)
            assert found.greater[place] == sum(scores[item] > scores[target] for item in rivals)


@pytest.mark.parametrize("labels", [True, False])
def test_predict_reads_the_histories_that_training_had(tmp_path: Path, labels: bool) -> None:
    config = synthetic(tmp_path, labels=labels).replace(history_delay="2")
    store = prepare(config.data)
    names = store.vocabulary("users").to_pylist()
    users = np.repeat(np.arange(len(names)), np.diff(store.user_offsets))
    encoded, lengths = UserHistories(store, 6).of(
        Ids(pa.array([names[user] for user in users]).cast(pa.large_string())), store.timestamps
    )
    assert store.history_ends is not None
    expected = np.minimum(store.history_ends - store.history_offsets[users], 6)
    assert lengths.tolist() == expected.tolist()
    flat = [item for history in histories(store, 6) for item in history]
    assert [item.decode() for item in encoded.distinct.numpy()[encoded.codes]] == flat


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"done": [DONE[2]]}, "--behaviours_path: must have behaviours of users of --data_path. Received: none"),
        ({"done": [DONE[1] | {"user_id": None}, DONE[0]]}, "done.parquet, row 1: every event needs its user_id"),
        (
            {"done": [DONE[1] | {"item_id": None}, DONE[0]]},
            "done.parquet, row 1: a behaviour needs the id of its item, or a category of it. Received: no item_id. "
            "Fill it in, drop the row, or name columns of the files in --item_features.",
        ),
        (
            {
                "shown": [row | {"kind": "k3"} for row in SHOWN],
                "done": [DONE[0], DONE[3] | {"item_id": None}],
                "item_features": ("kind",),
                "embedding_dim": (6, 4),
            },
            "done.parquet, row 2: a behaviour needs the id of its item, or a category of it. Received: neither item_id "
            "nor kind. Fill it in",
        ),
        ({"done": [row | {"timestamp": "2020-01-01"} for row in DONE]}, "all timestamps must be of one kind"),
        ({"behaviour_item_column": "sku"}, "column 'sku' is missing"),
        ({"behaviours_path": "nothing.csv"}, "nothing.csv: no such file, folder, or match of a glob. Correct"),
        (
            {"shown": [row | {"item_id": 1} for row in SHOWN]},
            "--behaviours_path: item ids must be of the type that they have in --data_path, int64. Received: item_id=",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        prepare(config_of(tmp_path, **changes).data)


def test_a_file_that_changed(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    prepare(config.data)
    write_table(tmp_path / "done.parquet", DONE[:-1])
    with pytest.raises(InputError, match=r"done.parquet.* changed"):
        open_prepared(config.data)
    assert histories(prepare(config.data, overwrite=True)) == [[], ["p"], ["p", "z"], [], ["q"]]

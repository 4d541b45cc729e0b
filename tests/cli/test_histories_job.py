"""A job with several histories from end to end: every command gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.config import DataConfig, Split
from din_dist.data.prepared import open_prepared
from din_dist.serving.bundle import Bundle
from din_dist.serving.given_behaviours import GivenBehaviours
from tests.support.changed_manifest import assert_refused, fields_of
from tests.support.commands import command
from tests.support.finished_job import finish, run
from tests.support.preloaded import Preloaded
from tests.support.served import serving

VALIDATE_FROM, TEST_FROM = 12, 16
WORDS = [
    *("--action_column=action", "--histories=buy:3,view:2,skipped:4", "--long_history=category_id:2"),
    "--split=temporal",
    *(f"--validation_from={VALIDATE_FROM}", f"--test_from={TEST_FROM}", "--epochs=15", "--learning_rate=0.005"),
]
HISTORIES = {"buy": 3, "view": 2, "skipped": 4, "long": 2}
ITEMS = ["i1", "i2", "i3", "i1", "never seen", "i4", "i5", "i6", "i9", "i4", "i7", "i14"]
NAMES = ["buy", "view", "buy", "skipped", "buy", "buy", "view", "view", *4 * ["long"]]
LENGTHS = [5, 0, 7]
CANDIDATES = ["i7", "i8", "i9"]  # of categories c2, c3 and c4; of c4 the long history has i9, i4 and i14


def write_log(path: Path, num_users: int = 300) -> None:
    """Pages of items of which some were viewed and some were bought too; each user likes one category."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(num_users):
        for time in range(random.integers(12, 22)):
            item = int(random.integers(30))
            likes = random.random() < (0.8 if item % 5 == user % 5 else 0.2)
            action = ("buy" if random.random() < 0.4 else "view") if likes else None
            row = {"user_id": f"u{user}", "item_id": f"i{item}", "category_id": f"c{item % 5}", "timestamp": time}
            rows.append(row | {"label": int(likes), "action": action})
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def folder(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job."""
    folder = tmp_path_factory.mktemp("histories")
    write_log(folder / "log.parquet")
    return finish(commands, folder, *WORDS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    """The logits of the behaviours above."""
    bundle = Bundle.open(folder / "export")
    assert (bundle.manifest.histories, bundle.manifest.long_history) == (HISTORIES, "category_id")
    return bundle.score(GivenBehaviours(ITEMS, NAMES), LENGTHS, CANDIDATES)


def test_each_history_is_cut_to_its_own_newest(folder: Path, expected: np.ndarray) -> None:
    bundle = Bundle.open(folder / "export")
    longer = bundle.score(GivenBehaviours(["i9", *ITEMS], ["skipped", *NAMES]), [6, 0, 7], CANDIDATES)
    assert abs(longer[0] - expected[0]) > 1e-4
    np.testing.assert_allclose(longer[1:], expected[1:], atol=1e-6)
    # Older views are not read, nor older ones of the candidate's category, nor any of another.
    more, names = ["i9", "i8", "i19", "i3", "i1"], ["view", "view", "long", "long", "long"]
    older = bundle.score(GivenBehaviours([*more, *ITEMS[5:]], [*names, *NAMES[5:]]), [12], ["i9"])
    np.testing.assert_allclose(older[0], expected[2], atol=1e-6)
    newer = bundle.score(GivenBehaviours([*ITEMS[5:], "i19"], [*NAMES[5:], "long"]), [8], ["i9"])
    assert abs(newer[0] - expected[2]) > 1e-4


def test_evaluate_finds_what_the_trainer_found(folder: Path, commands: Preloaded) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["test_auc"] > 0.6
    found = {}
    for which in (f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'export'}"):
        done = commands.run("evaluate", which, "--bootstrap_samples=50", "--max_events=60")
        assert done.returncode == 0, done.stderr
        found[which] = json.loads(done.stdout.splitlines()[-1])
        assert found[which]["auc"] == pytest.approx(summary["test_auc"], abs=1e-6)
    one, other = (each["retrieval"]["metrics"] for each in found.values())
    assert one == pytest.approx(other, abs=1e-6)


def test_all_ways_give_the_same(folder: Path, commands: Preloaded, expected: np.ndarray, tmp_path: Path) -> None:
    bundle = Bundle.open(folder / "export")
    found = bundle.rank_histories(GivenBehaviours(ITEMS, NAMES), LENGTHS, CANDIDATES, [1, 1, 1])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ranked = bundle.rank(GivenBehaviours(ITEMS[5:], NAMES[5:]), np.array(CANDIDATES, object), 3)
    assert expected[2] == pytest.approx(ranked["logits"][ranked["places"].tolist().index(2)], abs=1e-5)
    ends = np.cumsum(LENGTHS)
    rows = [(ITEMS[end - n : end], NAMES[end - n : end]) for end, n in zip(ends, LENGTHS, strict=True)]
    padded = [[*items, *["x"] * (7 - len(items))] for items, _ in rows]
    padded_names = [[*names, *[""] * (7 - len(names))] for _, names in rows]
    inputs = {"history_item_ids": padded, "history_names": padded_names, "history_lengths": LENGTHS}
    found = bundle.call("score_padded", inputs | {"candidate_item_ids": CANDIDATES})["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)

    table = pa.table({"history": [r[0] for r in rows], "history_names": [r[1] for r in rows], "item_id": CANDIDATES})
    pq.write_table(table, tmp_path / "rows.parquet")
    flags = [f"--export_dir={folder / 'export'}", f"--input={tmp_path / 'rows.parquet'}"]
    run(commands, "predict", *flags, f"--predictions_dir={tmp_path / 'out'}")
    (part,) = (tmp_path / "out").glob("part-*")
    np.testing.assert_allclose(pq.read_table(part)["logit"], expected, atol=1e-5)

    with serving(commands, "shop", f"--export_dir={folder / 'export'}") as served:
        both = zip(rows, CANDIDATES, strict=True)
        keys = ("history_item_ids", "history_names", "candidate_item_id")
        instances = [dict(zip(keys, (*row, one), strict=True)) for row, one in both]
        answers = served.predict({"instances": instances})["predictions"]
        np.testing.assert_allclose([one["logits"] for one in answers], expected, atol=1e-5)
        columns = {"history_item_ids": ITEMS, "history_names": NAMES, "history_lengths": LENGTHS}
        answer = served.predict({"inputs": columns | {"candidate_item_ids": CANDIDATES}})["outputs"]
        np.testing.assert_allclose(answer["logits"], expected, atol=1e-5)
        lists = {"history_item_ids": [r[0] for r in rows], "history_names": [r[1] for r in rows]}
        answer = served.predict({"inputs": lists | {"candidate_item_ids": CANDIDATES}})["outputs"]
        np.testing.assert_allclose(answer["logits"], expected, atol=1e-5)
        one = {"history_item_ids": ITEMS[5:], "history_names": NAMES[5:], "candidate_item_ids": CANDIDATES}
        answer = served.predict({"signature_name": "rank", "inputs": one})["outputs"]
        np.testing.assert_allclose(answer["logits"], ranked["logits"], atol=1e-5)
        wrong = instances[0] | {"history_names": ["buy", "view", "buy", "liked", "buy"]}
        assert "instances[0].history_names must have names of histories, buy, view, skipped, long" in served.refused(
            {"instances": [wrong]}
        )
        metadata = json.loads(served.get("/v1/models/shop/metadata"))["metadata"]
        assert "history_names" in metadata["signature_def"]["signature_def"]["score"]["inputs"]
        assert metadata["din_dist"]["histories"] == HISTORIES
        assert metadata["din_dist"]["long_history"] == "category_id"


def test_predict_cuts_histories_as_training_does(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    """By users and times, from prepared data; and by what plain Python finds in the log."""
    log = pq.read_table(folder / "log.parquet").to_pylist()
    rows = [row for row in log if row["timestamp"] >= TEST_FROM][:40]
    lists: dict[str, list[Any]] = {"history": [], "history_names": [], "item_id": [row["item_id"] for row in rows]}
    for row in rows:
        own = [one for one in log if one["user_id"] == row["user_id"] and one["timestamp"] < row["timestamp"]]
        clicked = [one for one in own if one["label"]]
        lists["history"].append([one["item_id"] for one in (*own, *clicked)])
        lists["history_names"].append([*(one["action"] or "skipped" for one in own), *["long"] * len(clicked)])
    by_user = pa.Table.from_pylist([{name: row[name] for name in ("user_id", "item_id", "timestamp")} for row in rows])
    logits = {}
    for name, table, flags in (
        ("user", by_user, [f"--user_histories={folder / 'run'}", "--before_column=timestamp"]),
        ("given", pa.table(lists), []),
    ):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        words = [f"--export_dir={folder / 'export'}", f"--input={tmp_path / f'{name}.parquet'}", *flags]
        run(commands, "predict", *words, f"--predictions_dir={tmp_path / name}")
        (part,) = (tmp_path / name).glob("part-*")
        logits[name] = pq.read_table(part)["logit"].to_numpy()
    np.testing.assert_allclose(logits["user"], logits["given"], atol=1e-5)


def test_histories_of_the_store(folder: Path) -> None:
    log = pq.read_table(folder / "log.parquet").to_pylist()
    store = open_prepared(config_of(folder))
    users = store.vocabulary("users").to_pylist()
    rows = sorted(log, key=lambda row: (users.index(row["user_id"]), row["timestamp"]))
    user_of = np.repeat(np.arange(len(users)), np.diff(store.user_offsets))
    assert [history.name for history in store.sets] == [*HISTORIES]
    for history in store.sets[:-1]:
        for event in range(0, len(rows), 7):
            own = [one for one in rows if one["user_id"] == rows[event]["user_id"]]
            earlier = [one for one in own if one["timestamp"] < rows[event]["timestamp"]]
            wanted = [one["item_id"] for one in earlier if (one["action"] or "skipped") == history.name]
            assert history.ends is not None
            window = history.item_ids[history.offsets[user_of[event]] : history.ends[event]]
            assert store.own_ids("items", window) == wanted


def config_of(folder: Path, **changes: Any) -> DataConfig:
    settings = {"histories": ("buy:3", "view:2", "skipped:4"), "action_column": "action", "split": Split.TEMPORAL}
    settings["long_history"] = "category_id:2"
    settings |= {"validation_from": VALIDATE_FROM, "test_from": TEST_FROM} | changes
    log, prepared = str(folder / "log.parquet"), str(folder / "prepared")
    return DataConfig(dataset="event_log", data_path=log, data_dir=prepared, **settings)


@pytest.mark.thorough  # as test_sides_job.py and test_elastic.py do
def test_a_resumed_job_ends_the_same(folder: Path, commands: Preloaded) -> None:
    output = folder / "resumed"
    flags = command("train", folder, *WORDS, f"--output_dir={output}")[3:]
    run(commands, "train", *flags, "--max_steps=15")
    run(commands, "train", *flags)
    newest = max((output / "checkpoints").glob("step-*"))
    names = {path.name for path in newest.glob("*.npy")}
    assert any("interest_norm_view" in name for name in names)
    for name in names:
        whole = np.load(folder / "run" / "checkpoints" / newest.name / name)
        np.testing.assert_allclose(np.load(newest / name), whole, atol=1e-5)


def test_other_histories_do_not_resume(folder: Path, commands: Preloaded) -> None:
    """The settings of the job stay as they are: report and export read them."""
    before = (folder / "run" / "flags.txt").read_text()
    flags = command("train", folder, *WORDS, "--histories=buy:3,view:2")[3:]
    done = commands.run("train", *flags)
    assert done.returncode == 2
    assert "--histories: ['buy:3', 'view:2', 'skipped:4'], now ['buy:3', 'view:2']" in done.stderr
    assert (folder / "run" / "flags.txt").read_text() == before


def test_the_report_is_written(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    run(commands, "report", f"--output_dir={folder / 'run'}", f"--report_path={tmp_path / 'report.html'}")
    text = (tmp_path / "report.html").read_text()
    assert "buy up to 3, view up to 2, skipped up to 4, long up to 2 of the candidate&#39;s category_id events" in text
    for name in ("buy", "view", "skipped", "long"):
        assert f"In the history <bdi>{name}</bdi>" in text


@pytest.mark.parametrize("histories", [{"buy": 3}, {"buy": -1, "view": 2}, {"buy": "3", "view": 2}])
def test_a_manifest_that_was_changed(folder: Path, tmp_path: Path, histories: dict) -> None:
    assert_refused(fields_of(folder / "export") | {"histories": histories}, tmp_path, "histories of ")

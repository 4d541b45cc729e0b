"""A job with features of behaviours from end to end: every command gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.errors import InputError
from din_dist.serving.bundle import Bundle
from din_dist.serving.given_behaviours import GivenBehaviours
from tests.support.commands import command
from tests.support.declared_features import OF_BEHAVIOURS
from tests.support.finished_job import finish, run
from tests.support.preloaded import Preloaded
from tests.support.served import serving

VALIDATE_FROM, TEST_FROM = 800, 900
ITEMS = ["i1", "i2", "never seen", "i4", "i5", "i6"]
SIDES = {  # of these behaviours; the last of each is missing
    "how": ["tap", "swipe", "never seen", "tap", "tap", ""],
    "pieces": [1.0, 5.0, 2.0, 100.0, 3.0, np.nan],
    "age": [5, 0, 1000, 70, 3, np.iinfo(np.int64).min],
}
LENGTHS, CANDIDATES = [2, 0, 4], ["i7", "i8", "i9"]


@pytest.fixture(scope="module")
def folder(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job."""
    folder, random, rows = tmp_path_factory.mktemp("sides"), np.random.default_rng(0), []
    for user in range(150):
        for time in np.sort(random.integers(0, 1000, random.integers(8, 20))):
            item = int(random.integers(30))
            row = {"user_id": f"u{user}", "item_id": f"i{item}", "category_id": f"c{item % 5}", "timestamp": int(time)}
            row |= {"kind": random.choice(["tap", "swipe"]), "quantity": float(random.integers(1, 9))}
            rows.append(row | {"label": int(random.random() < (0.8 if item % 5 == user % 5 else 0.3))})
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    (folder / "features.toml").write_text(OF_BEHAVIOURS)
    return finish(commands, folder, *words(folder))


def words(folder: Path) -> list[str]:
    return [
        *(f"--features={folder / 'features.toml'}", "--split=temporal", f"--validation_from={VALIDATE_FROM}"),
        *(f"--test_from={TEST_FROM}", "--epochs=3", "--learning_rate=0.02"),
    ]


def sides_of(places: slice) -> dict[str, list]:
    return {name: values[places] for name, values in SIDES.items()}


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    """The logits of the behaviours above."""
    return Bundle.open(folder / "export").score(GivenBehaviours(ITEMS, features=SIDES), LENGTHS, CANDIDATES)


def test_each_feature_counts(folder: Path, expected: np.ndarray) -> None:
    bundle = Bundle.open(folder / "export")
    for name, value in (("how", "swipe"), ("pieces", 8.0), ("age", 500)):
        changed = SIDES | {name: [value, *SIDES[name][1:]]}
        found = bundle.score(GivenBehaviours(ITEMS, features=changed), LENGTHS, CANDIDATES)
        assert abs(found[0] - expected[0]) > 1e-5, name
        np.testing.assert_allclose(found[1:], expected[1:], atol=1e-6)
    near = bundle.score(GivenBehaviours(ITEMS, features=SIDES | {"age": [7, *SIDES["age"][1:]]}), LENGTHS, CANDIDATES)
    np.testing.assert_allclose(near, expected, atol=1e-6)  # 4 to 7 are one row
    with pytest.raises(InputError, match="history features: must be features of the model. Received: 'color'"):
        bundle.score(GivenBehaviours(ITEMS, features={"color": ITEMS}), LENGTHS, CANDIDATES)
    with pytest.raises(InputError, match="history_how must have one value for each behaviour"):
        bundle.score(GivenBehaviours(ITEMS, features={"how": ["tap"]}), LENGTHS, CANDIDATES)


def test_evaluate_finds_what_the_trainer_found(folder: Path, commands: Preloaded) -> None:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    found = []
    for which in (f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'export'}"):
        done = commands.run("evaluate", which, "--bootstrap_samples=50", "--max_events=60")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
        assert found[-1]["auc"] == pytest.approx(summary["test_auc"], abs=1e-6)
    one, other = (each["retrieval"]["metrics"] for each in found)
    assert one == pytest.approx(other, abs=1e-6)


def test_all_ways_give_the_same(folder: Path, commands: Preloaded, expected: np.ndarray, tmp_path: Path) -> None:
    bundle, last = Bundle.open(folder / "export"), slice(2, 6)
    found = bundle.rank_histories(GivenBehaviours(ITEMS, features=SIDES), LENGTHS, CANDIDATES, [1, 1, 1])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ranked = bundle.rank(GivenBehaviours(ITEMS[last], features=sides_of(last)), np.array(CANDIDATES, object), 3)
    assert expected[2] == pytest.approx(ranked["logits"][ranked["places"].tolist().index(2)], abs=1e-5)
    parts = [slice(0, 2), slice(2, 2), last]
    filler = {"how": "tap", "pieces": 4.0, "age": 9}
    padded = {
        f"history_{name}": [[*values[part], *[filler[name]] * (4 - len(values[part]))] for part in parts]
        for name, values in SIDES.items()
    }
    padded["history_item_ids"] = [[*ITEMS[part], *["x"] * (4 - len(ITEMS[part]))] for part in parts]
    inputs = padded | {"history_lengths": LENGTHS, "candidate_item_ids": CANDIDATES}
    np.testing.assert_allclose(bundle.call("score_padded", inputs)["logits"], expected, atol=1e-5)

    def as_json(name: str) -> list:
        """The values of a feature, null where one is missing."""
        return [None if value in ("", np.iinfo(np.int64).min) or value != value else value for value in SIDES[name]]

    lists = {f"history_{name}": [as_json(name)[part] for part in parts] for name in SIDES}
    table = pa.table({"history": [ITEMS[part] for part in parts], "item_id": CANDIDATES, **lists})
    pq.write_table(table, tmp_path / "rows.parquet")
    flags = [f"--export_dir={folder / 'export'}", f"--input={tmp_path / 'rows.parquet'}"]
    run(commands, "predict", *flags, f"--predictions_dir={tmp_path / 'out'}")
    (part_file,) = (tmp_path / "out").glob("part-*")
    np.testing.assert_allclose(pq.read_table(part_file)["logit"], expected, atol=1e-5)

    with serving(commands, "shop", f"--export_dir={folder / 'export'}") as served:
        rows = [
            {
                "history_item_ids": ITEMS[part],
                "history_features": {name: as_json(name)[part] for name in SIDES},
                "candidate_item_id": candidate,
            }
            for part, candidate in zip(parts, CANDIDATES, strict=True)
        ]
        answers = served.predict({"instances": rows})["predictions"]
        np.testing.assert_allclose([one["logits"] for one in answers], expected, atol=1e-5)
        flat = {"history_item_ids": ITEMS, "history_lengths": LENGTHS, "candidate_item_ids": CANDIDATES}
        flat["history_features"] = {name: as_json(name) for name in SIDES}
        np.testing.assert_allclose(served.predict({"inputs": flat})["outputs"]["logits"], expected, atol=1e-5)
        of_rows: dict[str, Any] = {
            "history_item_ids": [ITEMS[part] for part in parts],
            "candidate_item_ids": CANDIDATES,
        }
        of_rows["history_features"] = {name: [as_json(name)[part] for part in parts] for name in SIDES}
        np.testing.assert_allclose(served.predict({"inputs": of_rows})["outputs"]["logits"], expected, atol=1e-5)
        one = {"history_item_ids": ITEMS[last], "candidate_item_ids": CANDIDATES}
        one["history_features"] = {name: as_json(name)[last] for name in SIDES}
        answer = served.predict({"signature_name": "rank", "inputs": one})["outputs"]
        np.testing.assert_allclose(answer["logits"], ranked["logits"], atol=1e-5)
        in_full = [
            {
                "history_item_ids": ids,
                "history_lengths": length,
                "candidate_item_ids": candidate,
                "history_features": {name: [*as_json(name)[part], *[None] * (4 - length)] for name in SIDES},
            }
            for ids, length, candidate, part in zip(padded["history_item_ids"], LENGTHS, CANDIDATES, parts, strict=True)
        ]
        answers = served.predict({"signature_name": "score_padded", "instances": in_full})["predictions"]
        np.testing.assert_allclose([one["logits"] for one in answers], expected, atol=1e-5)
        short = rows[0] | {"history_features": {"how": ["tap"]}}
        assert "instances[0].history_features.how must have 2 values, one for each item. Received: 1" in (
            served.refused({"instances": [short]})
        )


def test_predict_finds_what_the_log_tells(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    """By users and times, from prepared data; and by what plain Python finds in the log."""
    log = pq.read_table(folder / "log.parquet").to_pylist()
    rows = [row for row in log if row["timestamp"] >= TEST_FROM][:40]
    names = ("history", "history_how", "history_pieces", "history_age")
    lists: dict[str, list[Any]] = {name: [] for name in names} | {"item_id": [row["item_id"] for row in rows]}
    for row in rows:
        own = [one for one in log if one["user_id"] == row["user_id"] and one["timestamp"] < row["timestamp"]]
        own = [one for one in own if one["label"]]
        for name, column in zip(names[:3], ("item_id", "kind", "quantity"), strict=True):
            lists[name].append([one[column] for one in own])
        lists["history_age"].append([row["timestamp"] - one["timestamp"] for one in own])
    by_user = pa.Table.from_pylist([{name: row[name] for name in ("user_id", "item_id", "timestamp")} for row in rows])
    logits = {}
    for name, table, flags in (
        ("user", by_user, [f"--user_histories={folder / 'run'}", "--before_column=timestamp"]),
        ("given", pa.table(lists), []),
    ):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        flags += [f"--export_dir={folder / 'export'}", f"--input={tmp_path / f'{name}.parquet'}"]
        run(commands, "predict", *flags, f"--predictions_dir={tmp_path / name}")
        (part,) = (tmp_path / name).glob("part-*")
        logits[name] = pq.read_table(part)["logit"].to_numpy()
    np.testing.assert_allclose(logits["user"], logits["given"], atol=1e-5)
    ages = pa.table({**lists, "history_age": [[]] * len(rows)})
    pq.write_table(ages, tmp_path / "wrong.parquet")
    done = commands.run(
        "predict",
        f"--export_dir={folder / 'export'}",
        f"--input={tmp_path / 'wrong.parquet'}",
        f"--predictions_dir={tmp_path / 'wrong'}",
    )
    assert done.returncode == 2
    assert "history_age must have one value for each of the " in done.stderr
    assert " behaviours. Received: 0 values. Correct the row." in done.stderr


def test_a_resumed_job_ends_the_same(folder: Path, commands: Preloaded) -> None:
    output = folder / "resumed"
    flags = command("train", folder, *words(folder), f"--output_dir={output}")[3:]
    run(commands, "train", *flags, "--max_steps=15")
    run(commands, "train", *flags)
    newest = max((output / "checkpoints").glob("step-*"))
    names = {path.name for path in newest.glob("*.npy")}
    assert any("sides" in name and "age" in name for name in names)
    for name in names:
        whole = np.load(folder / "run" / "checkpoints" / newest.name / name)
        np.testing.assert_allclose(np.load(newest / name), whole, atol=1e-5)


def test_the_report_says_what_each_feature_is_worth(folder: Path, commands: Preloaded, tmp_path: Path) -> None:
    run(commands, "report", f"--output_dir={folder / 'run'}", f"--report_path={tmp_path / 'report.html'}")
    text = (tmp_path / "report.html").read_text()
    for name in ("how", "pieces", "age"):
        assert f"{name}</" in text


def test_slices_are_not_of_behaviours(folder: Path, commands: Preloaded) -> None:
    done = commands.run("evaluate", f"--output_dir={folder / 'run'}", "--slice_by=how")
    assert done.returncode == 2
    assert "--slice_by: must be features of the model. Received: 'how'. Choose among category_id." in done.stderr

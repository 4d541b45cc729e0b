"""A job with a feature of every owner and kind, exported and used as users do: files, a server, evaluation, report."""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from din_dist.features.spec import Owner
from tests.support.commands import assert_one_line
from tests.support.featured_log import featured_config
from tests.support.preloaded import Preloaded, Running
from tests.support.served import serving

LONGEST = 8
OF_USERS = ("age", "income", "interests", "interest_weights", "taste")
OF_CONTEXTS = ("device id", "page", "timestamp")
OF_CANDIDATES = ("price", "rank", "badges", "discount", "perks")


@dataclasses.dataclass
class Job:
    """The job, the rows of its log and the model that the trainer has."""

    commands: Preloaded
    folder: Path
    rows: list[dict[str, Any]]
    model: Any
    store: Any

    def predict(self, source: Path, out: Path, *words: str) -> Running:
        flags = (f"--export_dir={self.folder / 'export'}", f"--input={source}", f"--predictions_dir={out}")
        return self.commands.start("predict", *flags, *words)

    def history_of(self, row: int) -> list[int]:
        """A made-up history for a row of the log."""
        return [100 + (row * 7 + step) % 30 for step in range(row % 5)]

    def events_of(self, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The user and the event of each row, by its own id and time."""
        users = {own: number for number, own in enumerate(self.store.vocabulary("users").to_pylist())}
        found = []
        for row in rows:
            user = users[self.rows[row]["user_id"]]
            begin, end = self.store.user_offsets[user : user + 2]
            (event,) = np.flatnonzero(self.store.timestamps[begin:end] == self.rows[row]["timestamp"])
            found.append((user, begin + event))
        return tuple(np.array(found).T)

    def logits(
        self, histories: list[list[int]], items: list[int], users: np.ndarray, contexts: np.ndarray, candidates: Any
    ) -> np.ndarray:
        """What the trainer's model gives; `candidates` are events, or None for own features that are missing."""
        import tensorflow as tf

        from din_dist.data.pipeline import ExampleFeatures
        from din_dist.features.gathering import missing_values
        from din_dist.schema import Batch

        values = ExampleFeatures(self.store)
        dense = {own: number for number, own in enumerate(self.store.vocabulary("items").to_pylist(), start=1)}
        shown = tf.constant([dense[item] for item in items], tf.int32)
        features = dict(values.of(tf.constant(users), tf.constant(contexts), shown))
        own = [each for each in self.model.encodings if each.spec.owner is Owner.CANDIDATE]
        given = missing_values(own, len(items))
        if candidates is not None:
            given = values.of(tf.constant(users), tf.constant(candidates), shown)
        features |= {each.spec.name: given[each.spec.name] for each in own}
        kept = [history[-LONGEST:] for history in histories]
        batch = Batch(
            candidate_item_ids=shown,
            history_item_ids=tf.constant([dense[item] for history in kept for item in history], tf.int32),
            history_lengths=tf.constant([len(history) for history in kept], tf.int32),
            features=features,
        )
        return self.model(batch, training=False).numpy()


@pytest.fixture(scope="module")
def job(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Job:
    from tests.support.trained_job import write_job

    folder = tmp_path_factory.mktemp("featured")
    model, store = write_job(featured_config(folder))
    done = commands.run("export", f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'export'}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["max_difference"] < 1e-5
    return Job(commands, folder, pq.read_table(folder / "log.parquet").to_pylist(), model, store)


def results(folder: Path) -> Path:
    (path,) = folder.glob("part-*")
    return path


def test_files_are_scored_with_the_features_of_their_rows(job: Job, tmp_path: Path) -> None:
    """In Parquet and in CSV with one candidate a row, and in JSON lines with several and the prepared users."""
    chosen = list(range(0, len(job.rows), 4))
    users, events = job.events_of(chosen)
    histories = [job.history_of(row) for row in chosen]
    items = [job.rows[row]["item_id"] for row in chosen]
    expected = job.logits(histories, items, users, events, events)
    assert expected.std() > 0.1
    table = pq.read_table(job.folder / "log.parquet").take(pa.array(chosen))
    table = table.append_column("history", pa.array(histories, pa.list_(pa.int64())))
    own_ids = pa.array([job.rows[row]["user_id"] for row in chosen])
    table = table.append_column("user_style", own_ids)  # trained vectors go by the user's id
    pq.write_table(table, tmp_path / "rows.parquet")
    as_text = [pa.array([json.dumps(value) if isinstance(value, list) else value for value in column.to_pylist()])
               for column in table.columns]  # fmt: skip
    pyarrow.csv.write_csv(pa.table(as_text, table.column_names), tmp_path / "rows.csv")

    lines, both = tmp_path / "lines.jsonl", []
    with lines.open("w") as file:
        for first, second in zip(chosen[::2], chosen[1::2], strict=False):
            pair = [job.rows[first], job.rows[second]]
            row = {name: pair[0][name] for name in ("user_id", *OF_CONTEXTS)}
            row |= {name: [one[name] for one in pair] for name in OF_CANDIDATES}
            file.write(json.dumps(row | {"candidates": [one["item_id"] for one in pair]}) + "\n")
            both.append((first, second))
    running = [
        job.predict(tmp_path / "rows.parquet", tmp_path / "parquet"),
        job.predict(tmp_path / "rows.csv", tmp_path / "csv"),
        job.predict(
            lines, tmp_path / "jsonl", f"--user_histories={job.folder / 'run'}", "--candidates_column=candidates"
        ),
    ]
    done = [command.wait() for command in running]
    assert [command.returncode for command in done] == [0, 0, 0], [command.stderr for command in done]
    assert not [command.stderr for command in done if "count as missing" in command.stderr]
    np.testing.assert_allclose(pq.read_table(results(tmp_path / "parquet"))["logit"], expected, atol=2e-5)
    found = pyarrow.csv.read_csv(results(tmp_path / "csv"))["logit"]
    np.testing.assert_allclose(found, expected, atol=2e-5)

    ids = job.store.vocabulary("items").to_pylist()
    firsts, seconds = ([*rows] for rows in zip(*both, strict=True))
    users, contexts = job.events_of(firsts)
    _, others = job.events_of(seconds)
    bounds = job.store.history_offsets
    histories = [
        [ids[item - 1] for item in job.store.history_item_ids[bounds[user] : bounds[user + 1]]] for user in users
    ]
    wanted = [
        job.logits(histories, [job.rows[row]["item_id"] for row in rows], users, contexts, own)
        for rows, own in ((firsts, contexts), (seconds, others))
    ]
    found = [json.loads(line)["logit"] for line in results(tmp_path / "jsonl").read_text().splitlines()]
    np.testing.assert_allclose(found, np.stack(wanted, axis=1), atol=2e-5)


def test_columns_that_are_not_there_are_missing(job: Job, tmp_path: Path) -> None:
    """With one line that names them."""
    source = tmp_path / "rows.jsonl"
    source.write_text('{"history": [100, 101], "item_id": 102, "context_device": 3}\n')
    done = job.predict(source, tmp_path / "out").wait()
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "missing in every row" in line]
    assert "no column of age, who, income" in line
    assert "device" not in line
    from din_dist.serving.bundle import Bundle

    bundle = Bundle.open(job.folder / "export")
    (found,) = json.loads(f"[{results(tmp_path / 'out').read_text()}]")
    assert abs(found["logit"] - bundle.score([100, 101], [2], [102], context={"device": [3]})[0]) < 1e-5
    assert abs(found["logit"] - bundle.score([100, 101], [2], [102])[0]) > 1e-5


WRONG_ROWS = {
    "text": ({"income": "much"}, "row 2: income must hold numbers, as in the log of the model. Received: 'much'"),
    "an id": ({"device id": "x"}, "row 2: device id must hold integers, as in the log of the model. Received: 'x'"),
    "vector": ({"taste": [1.0, 2.0]}, "taste must have 3 numbers, as in the log of the model. Received: 2 numbers"),
    "weights": ({"interests": ["t1"], "interest_weights": []}, "row 2: interest_weights must have one weight for each"),
    "infinite": ({"income": 1e39}, "row 2: numbers must be finite and fit float32"),
    "a unit": ({"timestamp": 10**12}, "row 2: timestamp must hold times in seconds, as the log of the model. Received"),
    "a time": ({"timestamp": "soon"}, "row 2: a timestamp must be"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_wrong_values_name_their_row(job: Job, tmp_path: Path, case: str) -> None:
    wrong, message = WRONG_ROWS[case]
    good = {"interest_weights": []} if "interests" in wrong else {}
    good |= {"timestamp": 3} if "timestamp" in wrong else {}
    rows = [{"history": [100], "item_id": 102, **dict.fromkeys(wrong), **good}]
    rows.append({"history": [100], "item_id": 102, **wrong})
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = job.predict(source, tmp_path / "out").wait()
    others = ("count as missing", "oneDNN supports DT_HALF")  # TensorFlow remarks on CPUs that lack half floats
    lines = [line for line in done.stderr.splitlines(keepends=True) if not any(other in line for other in others)]
    done.stderr = "".join(lines)
    assert_one_line(done, message)


def own_features(row: dict[str, Any]) -> dict[str, Any]:
    """The features of a row of the log as a client of the server sends them."""
    weighted = {"values": row["interests"], "weights": row["interest_weights"]}
    user = {"age": row["age"], "who": row["user_id"], "income": row["income"], "taste": row["taste"]}
    context = {"device": row["device id"], "page größe": row["page"]}
    times = {"hour": row["timestamp"], "weekday": row["timestamp"]}
    return {
        "user": user | {"interests": weighted, "style": row["user_id"]},
        "context": context | times,
        "candidate_features": {name: row[name] for name in OF_CANDIDATES},
    }


def test_a_server_takes_features(job: Job) -> None:
    """Answers are the trainer's, of one candidate and of several; a mistake is one line."""
    chosen = list(range(0, 40, 2))
    users, events = job.events_of(chosen)
    histories = [job.history_of(row) for row in chosen]
    items = [job.rows[row]["item_id"] for row in chosen]
    expected = job.logits(histories, items, users, events, events)
    with serving(job.commands, "featured", f"--export_dir={job.folder / 'export'}") as served:
        rows = [
            {"history_item_ids": history, "candidate_item_id": item, **own_features(job.rows[row])}
            for row, history, item in zip(chosen, histories, items, strict=True)
        ]
        found = served.predict({"instances": rows})["predictions"]
        np.testing.assert_allclose([one["logits"] for one in found], expected, atol=2e-5)
        rows = [
            {"history_item_ids": history, "history_lengths": len(history), "candidate_item_ids": item}
            | own_features(job.rows[row])
            for row, history, item in zip(chosen, histories, items, strict=True)
        ]
        found = served.predict({"signature_name": "score_padded", "instances": rows})["predictions"]
        np.testing.assert_allclose([one["logits"] for one in found], expected, atol=2e-5)

        columns = {"history_item_ids": histories, "candidate_item_ids": items}
        own_rows = [own_features(job.rows[row]) for row in chosen]
        columns |= {
            key: {name: [own[key][name] for own in own_rows] for name in own_rows[0][key]} for key in own_rows[0]
        }
        found = served.predict({"inputs": columns})["outputs"]
        np.testing.assert_allclose(found["logits"], expected, atol=2e-5)

        own = own_features(job.rows[chosen[0]])
        own["candidate_features"] = {name: [job.rows[row][name] for row in chosen] for name in OF_CANDIDATES}
        row = {"history_item_ids": histories[1], "candidate_item_ids": items, **own}
        (found,) = served.predict({"signature_name": "rank", "instances": [row]})["predictions"]
        one = np.full(len(chosen), users[0]), np.full(len(chosen), events[0])
        wanted = job.logits([histories[1]] * len(chosen), items, *one, events)
        np.testing.assert_allclose(np.array(found["logits"]), np.sort(wanted)[::-1], atol=2e-5)

        with_brand = {"brand": [None] * len(items)}
        row["candidate_features"] = own["candidate_features"] | with_brand
        (again,) = served.predict({"signature_name": "rank", "instances": [row]})["predictions"]
        np.testing.assert_allclose(again["logits"], found["logits"], atol=2e-5)

        none = [
            {"history_item_ids": history, "candidate_item_id": item}
            for history, item in zip(histories, items, strict=True)
        ]
        found = served.predict({"instances": none})["predictions"]
        assert np.abs(np.array([one["logits"] for one in found]) - expected).max() > 0.1

        for part, message in WRONG_FEATURES:
            body = {"instances": [{"history_item_ids": [100], "candidate_item_id": 101, **part}]}
            with pytest.raises(urllib.error.HTTPError) as caught:
                served.predict(body)
            assert caught.value.code == 400
            (line,) = json.loads(caught.value.read())["error"].splitlines()
            assert message in line
        told = json.loads(served.get("/v1/models/featured/metadata"))["metadata"]["din_dist"]
        assert {feature["name"] for feature in told["features"]} == set(job.store.features)


WRONG_FEATURES: list[tuple[dict[str, Any], str]] = [
    ({"user": {"hour": 3}}, "instances[0].user must have only age, who"),
    ({"user": [3]}, "instances[0].user must be an object. Received: a list"[:38]),
    ({"user": {"age": 3}}, "instances[0].user.age must be a string. Received: 3."),
    ({"user": {"income": "much"}}, 'instances[0].user.income must be a number that fits float32. Received: "much".'),
    ({"user": {"income": True}}, "instances[0].user.income must be a number"),
    ({"user": {"taste": [1, 2]}}, "instances[0].user.taste must be a list of 3 numbers."),
    ({"user": {"interests": ["t1"]}}, "instances[0].user.interests must be an object."),
    ({"user": {"interests": {"values": ["t1"], "weights": []}}}, "interests.weights must have as many entries as"),
    ({"context": {"hour": 1.5}}, "instances[0].context.hour must be an integer. Received: 1.5."),
    ({"candidate_features": {"badges": 3}}, "candidate_features.badges must be a list of integers. Received: 3."),
    (
        {"candidate_features": {"tags": []}},
        "candidate_features must have only brand, price, rank, badges, discount, perks. Received:",
    ),
]


def test_checkpoint_and_export_evaluate_alike(job: Job) -> None:
    """All metrics, retrieval among them, and slices by features of every kind."""
    names = "age,who,income,interests,taste,page größe,hour,weekday,price,badges,discount,perks,brand,weight,tags"
    names += ",picture,text"
    words = (f"--slice_by={names}", "--bootstrap_samples=0", "--ks=1,5")
    against_few = ("--rank_against=5", "--ks=1", "--evaluation_split=train")  # which has users of both labels
    running = [
        job.commands.start("evaluate", f"--output_dir={job.folder / 'run'}", *words),
        job.commands.start("evaluate", f"--export_dir={job.folder / 'export'}", *words),
        job.commands.start("evaluate", f"--export_dir={job.folder / 'export'}", *against_few),
        job.commands.start("evaluate", f"--output_dir={job.folder / 'run'}", *against_few),
    ]
    done = [command.wait() for command in running]
    assert [command.returncode for command in done] == [0] * 4, [command.stderr for command in done]
    trainer, exported, *against = [json.loads(command.stdout.splitlines()[-1]) for command in done]
    for one, other in ((trainer, exported), against):
        for metric in ("gauc", "auc", "log_loss"):
            assert one[metric] == pytest.approx(other[metric], abs=1e-6)
        assert one["retrieval"]["metrics"] == pytest.approx(other["retrieval"]["metrics"], abs=1e-6)
    assert list(trainer["slices"]) == names.split(",")
    for name, parts in trainer["slices"].items():
        assert sum(part["num_examples"] for part in parts) == trainer["num_examples"], name
        for part in parts:
            assert set(part["values"]) == {"model", "popularity"}
    hours = [part["name"] for part in trainer["slices"]["hour"]]
    assert {"all others", "14:00"} & set(hours)
    assert trainer["slices"]["income"][0]["name"] == "(missing)" or " to " in trainer["slices"]["income"][0]["name"]
    assert "by income" in done[0].stderr
    wrong = job.commands.run("evaluate", f"--output_dir={job.folder / 'run'}", "--slice_by=colour")
    assert_one_line(wrong, "--slice_by: must be features of the model. Received: 'colour'. Choose among age")


def test_the_report_says_what_each_feature_is_worth(job: Job) -> None:
    done = job.commands.run("report", f"--output_dir={job.folder / 'run'}", f"--report_path={job.folder / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    page = (job.folder / "page.html").read_text()
    section = page.split("What each feature is worth")[1].split("</section>")[0]
    for name in job.store.features:
        assert f"<bdi>{name}</bdi>" in section
        assert f"By <bdi>{name}</bdi>" in page

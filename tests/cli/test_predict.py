"""`predict` as users run it, on a job that was trained and exported as users do it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http import authentication
from horovod.runner.http.http_server import RendezvousServer

from tests.support.commands import assert_one_line
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded, Running

LONGEST = 10  # --max_history_length of the job


@dataclasses.dataclass
class Job:
    """A job with its export, and the histories of its log, found without it."""

    commands: Preloaded
    folder: Path
    histories: dict[str, list[str]]

    def predict(self, *words: str, environment: dict[str, str] | None = None) -> Running:
        return self.commands.start("predict", f"--export_dir={self.folder / 'export'}", *words, environment=environment)

    def by_user(self, source: Path, out: Path) -> tuple[str, ...]:
        return f"--input={source}", f"--predictions_dir={out}", f"--user_histories={self.folder / 'run'}"


@pytest.fixture(scope="module")
def job(commands: Preloaded, exported_job: Path) -> Job:
    events = pq.read_table(exported_job / "log.parquet").to_pylist()
    histories: dict[str, list[str]] = {}
    for event in sorted(events, key=lambda event: event["timestamp"]):  # stable
        histories.setdefault(event["user_id"], []).append(event["item_id"])
    return Job(commands, exported_job, histories)


def rows_of(job: Job, num_rows: int, seed: int = 0) -> pa.Table:
    """Users and candidates, among them such that nobody has seen."""
    random = np.random.default_rng(seed)
    users = [*job.histories, "a stranger"]
    items = [*(f"i{number}" for number in range(30)), "something new"]
    return pa.table(
        {
            "user_id": [users[number] for number in random.integers(len(users), size=num_rows)],
            "item_id": [items[number] for number in random.integers(len(items), size=num_rows)],
        }
    )


def trainer_logits(job: Job, histories: list[list[str]], candidates: list[str]) -> np.ndarray:
    """What the model says that the trainer would go on with."""
    import tensorflow as tf

    from din_dist.cli.saved_job import config_of, trained_model
    from din_dist.data.prepared import open_prepared
    from din_dist.schema import Batch

    config = config_of(job.folder / "run")
    store = open_prepared(config.data)
    model, _ = trained_model(config, store)
    dense = {item: number for number, item in enumerate(store.vocabulary("items").to_pylist(), start=1)}
    kept = [history[-LONGEST:] for history in histories]
    batch = Batch(
        candidate_item_ids=tf.constant([dense.get(item, 0) for item in candidates], tf.int32),
        history_item_ids=tf.constant([dense.get(item, 0) for history in kept for item in history], tf.int32),
        history_lengths=tf.constant([len(history) for history in kept], tf.int32),
    )
    return model(batch, training=False).numpy()


def results(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def test_logits_are_those_of_the_trainer(job: Job, tmp_path: Path) -> None:
    """In each format, by users and by histories; and the export itself says the same."""
    from din_dist.serving.bundle import Bundle

    rows = rows_of(job, 500)
    users, items = rows["user_id"].to_pylist(), rows["item_id"].to_pylist()
    histories = [job.histories.get(user, []) for user in users]
    expected = trainer_logits(job, histories, items)
    assert expected.std() > 0.1  # it has learned something to tell apart
    kept = [history[-LONGEST:] for history in histories]
    flat, lengths = [item for history in kept for item in history], [len(history) for history in kept]
    exported = Bundle.open(job.folder / "export").score(flat, lengths, items)
    np.testing.assert_allclose(exported, expected, atol=1e-5)

    times = np.random.default_rng(1).integers(LONGEST + 5, size=500)  # a user's events have the times 0, 1, ...
    rows = rows.append_column("time", pa.array(times))
    pq.write_table(rows, tmp_path / "rows.parquet")
    lists = tmp_path / "lists.jsonl"  # two candidates each
    lists.write_text(
        "".join(
            json.dumps({"h": histories[number], "c": items[number : number + 2], "n": number}) + "\n"
            for number in range(0, 500, 2)
        )
    )
    text = pa.table({"history": [";".join(history) for history in histories], "item_id": items})
    pyarrow.csv.write_csv(text, tmp_path / "text.csv")
    running = [
        job.predict(*job.by_user(tmp_path / "rows.parquet", tmp_path / "parquet"), "--rows_per_part=200",
                    "--before_column=time"),
        job.predict(f"--input={lists}", f"--predictions_dir={tmp_path / 'jsonl'}", "--history_column=h",
                    "--candidates_column=c", "--top_k=1"),
        job.predict(f"--input={tmp_path / 'text.csv'}", f"--predictions_dir={tmp_path / 'csv'}", "--list_separator=;"),
    ]  # fmt: skip
    done = [command.wait() for command in running]
    assert [command.returncode for command in done] == [0, 0, 0], [command.stderr for command in done]
    told = json.loads(done[0].stdout.splitlines()[-1])
    assert (told["rows"], told["parts"], told["candidates"]) == (500, 3, 500)
    assert told["rows_of_unknown_users"] == users.count("a stranger") > 0

    found = pa.concat_tables(pq.read_table(path) for path in results(tmp_path / "parquet"))
    assert found.select(["user_id", "item_id", "time"]).equals(rows)
    earlier = trainer_logits(job, [history[:time] for history, time in zip(histories, times, strict=True)], items)
    np.testing.assert_allclose(found["logit"], earlier, atol=1e-5)
    np.testing.assert_allclose(found["click_probability"], 1 / (1 + np.exp(-earlier)), atol=1e-5)
    (path,) = results(tmp_path / "csv")
    as_text = pyarrow.csv.read_csv(path)
    assert as_text["item_id"].to_pylist() == items
    np.testing.assert_allclose(as_text["logit"], expected, atol=1e-5)
    (path,) = results(tmp_path / "jsonl")
    best = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["n"] for row in best] == list(range(0, 500, 2))
    pairs = trainer_logits(job, [histories[number // 2 * 2] for number in range(500)], items).reshape(-1, 2)
    np.testing.assert_allclose([row["logit"] for row in best], pairs.max(1, keepdims=True), atol=1e-5)
    for row, (first, second) in zip(best, pairs, strict=True):
        if abs(first - second) > 1e-4:
            assert row["top_items"] == [row["c"][int(second > first)]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def interrupted(job: Job, words: tuple[str, ...], out: Path, number: signal.Signals) -> subprocess.CompletedProcess:
    """Sends the signal while the second part is being written."""
    command = job.predict(*words)
    until = time.monotonic() + PATIENCE
    while not any(path.name.endswith(str(command.pid)) for path in out.glob(".part-00001*")):
        assert time.monotonic() < until, command.stderr
        time.sleep(0.002)
    os.kill(command.pid, number)
    return command.wait()


def test_stopped_or_killed_it_goes_on_and_ends_the_same(job: Job, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl.gz"
    rows = rows_of(job, 40_000)
    lines = "".join(
        f'{{"user_id":"{user}","item_id":"{item}"}}\n' for user, item in zip(*rows.to_pydict().values(), strict=True)
    )
    with pa.CompressedOutputStream(str(source), "gzip") as stream:
        stream.write(lines.encode())
    first, killed, stopped = (tmp_path / name for name in ("first", "killed", "stopped"))
    done = job.predict(*job.by_user(source, first), "--rows_per_part=9000").wait()
    assert done.returncode == 0, done.stderr
    assert len(results(first)) == 5

    words = (*job.by_user(source, killed), "--rows_per_part=9000")
    assert interrupted(job, words, killed, signal.SIGKILL).returncode == -signal.SIGKILL
    assert 1 <= len(results(killed)) < 5
    assert len(list(killed.glob(".part-*"))) == 2  # a claim, and what was being written
    words = (*job.by_user(source, stopped), "--rows_per_part=9000")
    end = interrupted(job, words, stopped, signal.SIGHUP)  # SIGTERM is heard alike
    assert end.returncode == 75
    assert "stopped: on request, with 1 of 5 parts published. The same command goes on" in end.stderr
    assert [path.name for path in stopped.glob(".part-*")] == []

    other = job.predict(*job.by_user(source, killed)).wait()
    assert_one_line(other, "--rows_per_part: predictions that were begun go on with the same")
    for folder in (killed, stopped):
        again = job.predict(*job.by_user(source, folder), "--rows_per_part=9000").wait()
        assert again.returncode == 0, again.stderr
        assert "1 part(s) were there before" in again.stderr
        assert contents(folder) == contents(first)


def together(job: Job, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """Two processes, as `horovodrun -np 2` would start them."""
    key = authentication.make_key()
    rendezvous = RendezvousServer()
    with mock.patch.dict(os.environ, {authentication.KEY_VARIABLE: key}):
        port = rendezvous.start("127.0.0.1")
    slots = get_host_assignments(parse_hosts("localhost:2"), 2)
    rendezvous.init(slots)
    shared = {authentication.KEY_VARIABLE: key,
              "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
              "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "HOROVOD_GLOO_IFACE": "lo"}  # fmt: skip
    try:
        ranks = [
            job.predict(
                *words,
                environment=shared | {"HOROVOD_HOSTNAME": "localhost"} | {
                    f"HOROVOD_{name.upper()}": str(getattr(slot, name))
                    for name in ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
                },
            )
            for slot in slots
        ]  # fmt: skip
        return [rank.wait() for rank in ranks]
    finally:
        rendezvous.stop()


def test_two_processes_do_what_one_does(job: Job, tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    rows = rows_of(job, 30_000)
    pq.write_table(rows, source)
    words = (f"--user_histories={job.folder / 'run'}", f"--input={source}", "--rows_per_part=2000")
    alone = job.predict(*words, f"--predictions_dir={tmp_path / 'one'}").wait()
    chief, other = together(job, *words, f"--predictions_dir={tmp_path / 'two'}")
    assert (alone.returncode, chief.returncode, other.returncode) == (0, 0, 0), chief.stderr + other.stderr
    told = json.loads(chief.stdout)
    assert (told["world_size"], told["parts"], told["rows"], other.stdout) == (2, 15, 30_000, "")
    one, two = (pa.concat_tables(pq.read_table(path) for path in results(tmp_path / name)) for name in ("one", "two"))
    assert one.select([0, 1]).equals(two.select([0, 1]))
    np.testing.assert_allclose(one["logit"], two["logit"], atol=1e-6)

    # One of them meets a row that it cannot take.
    bad = rows.set_column(1, "item_id", pc.if_else(pa.array(np.arange(30_000) == 16_500), None, rows["item_id"]))
    pq.write_table(bad, source)
    other, refusing = sorted(
        together(job, *words, f"--predictions_dir={tmp_path / 'bad'}"), key=lambda done: done.returncode
    )
    assert_one_line(refusing, "rows.parquet, row 16501: every row needs its item_id. Received: none")
    # Where the refusing one is gone first, Horovod may remark on the lost connection.
    lines = [line for line in other.stderr.splitlines() if not line.startswith("row ") and "Horovod" not in line]
    assert (other.returncode, lines, other.stdout) == (1, [], "")
    assert not (tmp_path / "bad" / "predictions.json").exists()


def test_no_rows_give_no_rows(job: Job, tmp_path: Path) -> None:
    pq.write_table(
        rows_of(job, 0).cast(pa.schema({"user_id": pa.string(), "item_id": pa.string()})), tmp_path / "rows.parquet"
    )
    digest = hashlib.sha256((job.folder / "export" / "assets.extra" / "manifest.json").read_bytes()).hexdigest()
    words = job.by_user(tmp_path / "rows.parquet", tmp_path / "out")
    done = job.predict(*words, f"--expect_digest={digest}").wait()
    assert done.returncode == 0, done.stderr
    assert "the input has no rows, and so has the result" in done.stderr
    (path,) = results(tmp_path / "out")
    assert pq.read_table(path).to_pydict() == {"user_id": [], "item_id": [], "logit": [], "click_probability": []}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--predictions_dir=",), "--predictions_dir: must be given"),
        (("--input={}/none.csv",), "none.csv: no such file, folder, or match of a glob. Correct --input"),
        (("--export_dir={}",), "must be an export. Received: a folder without"),
        (("--user_histories={}",), "holds the settings of a training job. Received: no such file"),
        (("--predictions_dir={}/deeper",), "--predictions_dir: must lie outside of --input"),
        (("--rows_per_part=0",), "--rows_per_part: must be at least 1"),
        (("--top_k=-1",), "--top_k: must be at least 0"),
        (("--history_column=h",), "--history_column: not with --user_histories. Received: both"),
        (("--item_column=a", "--candidates_column=b"), "--item_column: not with --candidates_column"),
        (("--user_histories=", "--user_column=u"), "--user_column: is for users whose histories are elsewhere"),
        (("--user_histories=", "--before_column=t"), "--before_column: is for users whose histories are elsewhere"),
        (("--expect_digest=abc",), "--expect_digest: must be the SHA-256 of a manifest, 64 hexadecimal digits. Rec"),
        ((f"--expect_digest={'0' * 64}",), "manifest.json. Received: " + "0" * 64 + ", and a manifest with "),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit(job: Job, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    pq.write_table(rows_of(job, 10), tmp_path / "rows.parquet")
    given = job.by_user(tmp_path, tmp_path.with_suffix(".out"))
    assert_one_line(job.predict(*given, *(word.format(tmp_path) for word in words)).wait(), message)


def test_tables_and_folders_that_do_not_fit(job: Job, tmp_path: Path) -> None:
    rows = rows_of(job, 10)
    tables = {
        "named.parquet": rows.rename_columns(["user", "item_id"]),
        "scored.parquet": rows.append_column("logit", rows["item_id"]),
        "numbers.parquet": rows.set_column(1, "item_id", pa.array(range(10))),
        "good.parquet": rows,
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / name)
    file = tmp_path / "file"
    file.touch()
    running = {
        message: job.predict(*job.by_user(tmp_path / name, out), *more)
        for name, out, more, message in (
            ("named.parquet", tmp_path / "1", (), "column 'user_id' is missing. Received: columns user, item_id"),
            ("scored.parquet", tmp_path / "2", (), "scored.parquet: column 'logit' is to be added"),
            ("numbers.parquet", tmp_path / "3", (), "numbers.parquet, row 1: item_id must hold strings, as in the log"),
            ("good.parquet", file / "out", (), "--predictions_dir: must be a folder that can be written"),
            ("good.parquet", tmp_path / "4", ("--top_k=2",), "--top_k: needs a list of candidates"),
        )
    }  # fmt: skip
    for message, command in running.items():
        assert_one_line(command.wait(), message)
    for folder in ("1", "2", "4"):
        assert contents(tmp_path / folder) == {} if (tmp_path / folder).exists() else True


def test_a_full_disk(job: Job, tmp_path: Path) -> None:
    """As far as a limit on the size of a file is like one; what was published stays."""
    pq.write_table(rows_of(job, 20_000), tmp_path / "rows.parquet")
    words = (*job.by_user(tmp_path / "rows.parquet", tmp_path / "out"), "--rows_per_part=10000")
    command = job.predict(*words)
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = command.wait()
    assert_one_line(done, "--predictions_dir: must be a folder that can be written. Received: ")
    assert "File too large" in done.stderr
    assert not results(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".part-*"))
    shutil.rmtree(tmp_path / "out")


def test_times_before_all_history_are_told(job: Job, tmp_path: Path) -> None:
    """As days for hours: each may be a time of the log, but all of them are too early."""
    rows = rows_of(job, 50)
    for name, times in (("early", [-1] * 50), ("mixed", [-1, 100] * 25), ("late", [100] * 50)):
        source = tmp_path / f"{name}.parquet"
        pq.write_table(rows.append_column("time", pa.array(times)), source)
        done = job.predict(*job.by_user(source, tmp_path / name), "--before_column=time").wait()
        assert done.returncode == 0, done.stderr
        with_history = sum(user in job.histories for user in rows["user_id"].to_pylist())
        found = json.loads(done.stdout.splitlines()[-1])["rows_before_all_history"]
        if name == "early":
            assert found == with_history
            assert (
                f"warning: --before_column: no row has a history. All {found} rows of users who have one have a time "
                "before it; the log's times, as prepared, go from 0 to "
            ) in done.stderr
        else:
            assert "warning" not in done.stderr
            assert (found == 0) == (name == "late") and found < with_history
        assert f"  {found} of 50 rows: the time is before all history" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "rows.csv",
            "user_id,item_id\nu1,i1\nu2\n",
            "rows.csv, row 2: must be CSV from end to end. Received: CSV",
        ),
        (
            "rows.jsonl",
            '{"user_id": "u1", "item_id": "i1"}\n{"user_id": "u1"',
            "rows.jsonl, row 2: each line must be",
        ),
        ("rows.CSV", "user_id,item_id\nu1,i1\n,i2\n", "rows.CSV, row 2: every row needs its user_id. Received: none"),
        ("rows.csv.xz", "user_id,item_id\n", "rows.csv.xz: must be CSV from end to end. Received: "),
    ],
)
def test_a_wrong_row_is_named(job: Job, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    assert_one_line(job.predict(*job.by_user(tmp_path / name, tmp_path / "out")).wait(), message)
    assert not list((tmp_path / "out").glob("part-*"))


def test_what_is_passed_over_is_told(job: Job, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(rows_of(job, 5), tmp_path / "in" / "rows.parquet")
    (tmp_path / "in" / "notes.txt").touch()
    done = job.predict(*job.by_user(tmp_path / "in", tmp_path / "out")).wait()
    assert done.returncode == 0
    assert "files: 1 read, 1 passed over: notes.txt" in done.stderr

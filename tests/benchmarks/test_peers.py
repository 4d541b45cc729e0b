"""The comparison with peers: that a peer of several histories gets those of the log, and what the flags refuse."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.repository import ROOT

PEERS = ROOT / "tests" / "benchmarks" / "peers"
WIDTHS = {"all": 4, "coupon": 2}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)


def write_log(path: Path) -> dict[str, list[tuple[int, str, str | None]]]:
    """Writes a log and returns the events of each user in their order: time, item and action. Users as they appear."""
    chance = random.Random(1)
    log = {
        f"u{user}": [
            (time, f"i{chance.randrange(30)}", chance.choice(["coupon", "plain", None]))
            for time in range(chance.randrange(3, 12))
        ]
        for user in range(20)
    }
    rows = [
        {"user_id": user, "item_id": item, "timestamp": time, "action": action, "category_id": f"c{int(item[1:]) % 4}"}
        for user, events in log.items()
        for time, item, action in events
    ]
    chance.shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return {user: log[user] for user in dict.fromkeys(row["user_id"] for row in rows)}


def named(log: dict[str, list[tuple[int, str, str | None]]], folder: Path) -> tuple[list[str], list[str]]:
    """Finds which user and which item each dense id of the export stands for, by the users' whole events."""
    users = np.load(folder / "users.npz")
    own = np.split(users["item_ids"], users["offsets"][1:-1])
    order = list(log)
    assert [len(ids) for ids in own] == [len(log[user]) for user in order]
    item_of = {0: ""}
    for user, ids in zip(order, own, strict=True):
        for dense, (_, item, _) in zip(ids.tolist(), log[user], strict=True):
            assert item_of.setdefault(dense, item) == item
    return order, [item_of.get(dense, "") for dense in range(max(item_of) + 1)]


def test_a_peer_gets_the_histories_of_the_log(tmp_path: Path) -> None:
    log, folder = write_log(tmp_path / "log.parquet"), tmp_path / "export"
    flags = {
        "data_path": tmp_path / "log.parquet",
        "data_dir": tmp_path / "prepared",
        "item_features": "category_id",
        "action_column": "action",
        "histories": ",".join(f"{name}:{width}" for name, width in WIDTHS.items()),
        "global_batch_size": 16,
        "export_dir": folder,
    }
    exported = run(str(PEERS / "export.py"), "--dataset=event_log", *(f"--{name}={v}" for name, v in flags.items()))
    assert exported.returncode == 0, exported.stderr
    job = {"mode": "prepare", "data": str(folder), "histories": [*WIDTHS.values()], "long_history": ""}
    prepared = run(str(PEERS / "run_fuxictr.py"), json.dumps(job))
    assert prepared.returncode == 0, prepared.stderr
    users, items = named(log, folder)
    category_of = np.load(folder / "items.npz")["category_ids"]
    num_examples = 0
    for split, last in (("train", False), ("test", True)):
        examples, rows = np.load(folder / f"{split}.npz"), np.load(folder / "fuxictr" / f"{split}.npz")
        for row, (user, place) in enumerate(zip(examples["users"], examples["history_ends"], strict=True)):
            events = log[users[user]]
            assert (place == len(events) - 1) == last
            touched = [item for _, item, _ in events]
            assert (items[rows["item_id"][row]] == touched[place]) == rows["label"][row]
            seen = {"all": touched[:place], "coupon": [item for _, item, what in events[:place] if what == "coupon"]}
            for number, (name, width) in enumerate(WIDTHS.items()):
                ids = rows[f"item_id_{number}"][row]
                found = seen[name][-width:]
                assert [items[dense] for dense in ids] == found + [""] * (width - len(found))
                assert rows[f"cate_id_{number}"][row].tolist() == category_of[ids].tolist()
            num_examples += 1
    assert num_examples == 2 * sum(len(events) - 1 for events in log.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--histories=all:4,coupon:2 --action_column=action",
            "--peers: takes no features and one history. Received: 'deepctr'. Give --peers=fuxictr.",
        ),
        (
            "--peers=fuxictr --histories=coupon:2 --action_column=action --long_history=category_id:20",
            "--histories: beside --long_history there is the newest of all alone. Received: 'coupon:2'. "
            "For example --histories=all:20.",
        ),
        (
            "--peers=fuxictr --histories=all:4,coupon:2 --action_column=action --features=features.toml",
            "--features: does not go with --histories. Received: 'features.toml'. Drop one.",
        ),
        (
            "--peers=fuxictr --histories=coupon:2",
            "--histories: names what no column tells. Received: 'coupon'. Name --action_column, or --label_columns.",
        ),
    ],
)
def test_flags_that_do_not_fit(flags: str, message: str) -> None:
    done = run("-m", "tests.benchmarks.peers", "--data_path=log.parquet", *flags.split())
    assert (done.returncode, done.stderr.strip(), done.stdout) == (2, f"error: {message}", "")

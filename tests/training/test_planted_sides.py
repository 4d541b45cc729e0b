"""Features of behaviours find what was planted in them alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.assembly import Assembly
from din_dist.config import OptimizerKind, Split
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.features.declarations import parse_declarations
from din_dist.features.spec import to_text
from din_dist.metrics.ranking import auc
from tests.support.small_log import small_config

LIKED, OTHER = 0.9, 0.1  # the probability of a click on what the user likes, and on other items
TEST_FROM = 1400
AGE = '[age]\nof = "history"\nkind = "time_since"\nfrom = "timestamp"\n'
MOOD = '[mood]\nof = "history"\nkind = "category"\n'


def decaying(random: np.random.Generator) -> list[dict]:
    """A user who likes the category of the newest click, and none after 8 units of time without one."""
    rows, time = [], 0
    liked, since = -1, 0
    while time < 1600:
        time += int(random.choice([2, 40]))
        item = int(random.integers(20))
        if random.random() < 0.5 and liked >= 0:
            item = item // 5 * 5 + liked
        chance = LIKED if item % 5 == liked and time - since <= 8 else OTHER if time - since <= 8 else 0.5
        label = int(random.random() < chance)
        rows.append({"item_id": f"i{item}", "timestamp": time, "label": label, "chance": chance})
        if label:
            liked, since = item % 5, time
    return rows


def moody(random: np.random.Generator) -> list[dict]:
    """A user who clicks twice as an errand for each click of their own, whose category alone is liked."""
    liked, rows = int(random.integers(5)), []
    for time in range(100, 1700, 80):
        item = int(random.integers(20))
        own = item % 5 == liked
        chance = LIKED if own else 0.5
        label = int(random.random() < chance)
        mood = "own" if own else "errand"
        rows.append({"item_id": f"i{item}", "timestamp": time, "label": label, "chance": chance, "mood": mood})
    return rows


@pytest.mark.parametrize(("user_of", "declared"), [(decaying, AGE), (moody, MOOD)], ids=["age", "mood"])
def test_it_helps_where_it_was_planted_to(tmp_path: Path, user_of, declared: str) -> None:
    """The best AUC that any model could have is that of the planted chances."""
    random, log = np.random.default_rng(0), tmp_path / "log.parquet"
    rows = [row | {"user_id": f"u{user}"} for user in range(300) for row in user_of(random)]
    for row in rows:
        row["category_id"] = f"c{int(row['item_id'][1:]) % 5}"
    pq.write_table(pa.Table.from_pylist(rows), log)
    found = []
    for text in ("", declared):
        config = small_config(
            tmp_path,
            output_dir=str(tmp_path / f"run{len(found)}"),
            embedding_dim=(8,),
            max_history_length=5,
            feature_declarations=to_text(parse_declarations(text, tmp_path / "features.toml")),
            split=Split.TEMPORAL,
            validation_from=TEST_FROM - 1,
            test_from=TEST_FROM,
            epochs=6,
            optimizer=OptimizerKind.LAZY_ADAM,
            learning_rate=0.01,
        )
        job = Assembly(config, Runtime(), prepare(config.data))
        job.trainer.train()
        found.append(job.trainer.test()["auc"])
        job.telemetry.close()
    tested = [row for row in rows if row["timestamp"] >= TEST_FROM]
    best = auc(np.array([row["chance"] for row in tested]), np.array([row["label"] for row in tested]))
    without, with_it = found
    assert with_it > without + 0.02
    assert with_it > best - 0.03

"""Several histories find what was planted in one of them alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from din_dist.assembly import Assembly
from din_dist.config import OptimizerKind, Split
from din_dist.data.prepared import prepare
from din_dist.distributed.runtime import Runtime
from din_dist.metrics.ranking import auc
from tests.support.small_log import small_config

LIKED, TIRED = 0.5, 0.03  # the probability of a click, and that of an item which the user has skipped before


def write_log(path: Path, num_users: int = 400) -> None:
    """Each user sees five items again and again, and never clicks again what was skipped once."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(num_users):
        shown, skipped = random.choice(20, 5, replace=False), set()
        for time in range(20):
            item = int(random.choice(shown))
            chance = TIRED if item in skipped else LIKED
            label = int(random.random() < chance)
            if not label:
                skipped.add(item)
            row = {"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": time, "label": label, "chance": chance}
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_skipped_items_help_where_they_were_planted_to(tmp_path: Path) -> None:
    """The best AUC that any model could have is that of the planted chances."""
    log = tmp_path / "log.parquet"
    write_log(log)
    found = {}
    for histories in ((), ("all:20", "skipped:20")):
        config = small_config(
            tmp_path,
            output_dir=str(tmp_path / f"run{len(histories)}"),
            item_features=(),
            embedding_dim=(8,),
            max_history_length=20,
            histories=histories,
            split=Split.TEMPORAL,
            validation_from=15,
            test_from=17,
            epochs=20,
            optimizer=OptimizerKind.LAZY_ADAM,
            learning_rate=0.01,
        )
        job = Assembly(config, Runtime(), prepare(config.data))
        job.trainer.train()
        found[histories] = job.trainer.test()["auc"]
        job.telemetry.close()
    rows = [row for row in pq.read_table(log).to_pylist() if row["timestamp"] >= 17]
    best = auc(np.array([row["chance"] for row in rows]), np.array([row["label"] for row in rows]))
    alone, both = found.values()
    assert both > alone + 0.02
    assert both > best - 0.02

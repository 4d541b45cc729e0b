"""Seconds and peak memory of preparing 1.5 million events: the Complete Journey, written out as a user would have it.

    python tests/benchmarks/prepare_data.py [parquet|csv|jsonl ...]

Ids are strings. Each preparation is a process of its own: imports count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from din_dist.data.builders.complete_journey import package_data

PREPARE = """
import sys
from din_dist.config import DataConfig
from din_dist.data.prepared import prepare
store = prepare(DataConfig(dataset="event_log", data_path=sys.argv[1], data_dir=sys.argv[2]))
assert store.facts.num_events == 1_469_307 and store.facts.num_items == 68_509, store.facts
"""


def export(folder: Path, form: str) -> Path:
    """Writes the purchases with user_id, item_id, category_id as text and timestamp as an integer."""
    purchases = pq.read_table(package_data() / "transactions.parquet")
    products = pq.read_table(package_data() / "products.parquet", columns=["product_id", "product_category"])
    joined = purchases.join(products, "product_id").sort_by("transaction_timestamp")
    table = pa.table(
        {
            "user_id": pc.binary_join_element_wise("user", joined["household_id"].cast("string"), "-"),
            "item_id": pc.binary_join_element_wise("item", joined["product_id"].cast("string"), "-"),
            "category_id": joined["product_category"],
            "timestamp": joined["transaction_timestamp"].cast("timestamp[us]").cast("int64"),
        }
    )
    path = folder / f"log.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    elif form == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for batch in table.to_batches() for row in batch.to_pylist())
    return path


def main(forms: list[str]) -> None:
    for form in forms or ["parquet", "csv", "jsonl"]:
        with tempfile.TemporaryDirectory() as folder:
            log = export(Path(folder), form)
            start = time.perf_counter()
            worker = subprocess.Popen([sys.executable, "-c", PREPARE, str(log), str(Path(folder, "prepared"))])
            _, status, usage = os.wait4(worker.pid, 0)
            seconds = time.perf_counter() - start
            if status:
                sys.exit(f"{form}: failed")
            print(
                f"{form}: {log.stat().st_size / 1e6:.0f} MB, {seconds:.1f} s, peak {usage.ru_maxrss / 2**20:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])

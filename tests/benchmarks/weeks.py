"""Daily training of the Complete Journey, week after week, against training from the start on all weeks.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.weeks FOLDER [--weeks=14] [--compare_at=6,10,13] [trainer flags]

The first weeks of the log become a file each. `din-dist daily --period=week` goes through them: each week's model
starts from that of the week before, with one pass over the new week. It is judged on the week after, which it has not
seen.
At the weeks of --compare_at a model of the same settings also trains from the start, one pass over all weeks up to
there, and is judged on the same events. A line of JSON for each week: GAUC, updates, seconds. FOLDER keeps everything,
and the same command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from din_dist.data.builders.complete_journey import package_data

FIRST = datetime.date(2017, 1, 1)
NEVER = 2**63 - 1
SETTINGS = [
    "--item_features=category_id",
    "--max_history_length=20",
    "--embedding_dim=32,16",
    "--attention_hidden_units=32,16",
    "--hidden_units=80,40",
    "--activation=dice",
    "--optimizer=lazy_adam",
    "--learning_rate=0.002",
    "--global_batch_size=1024",
    "--metrics_port=-1",
]


def write_weeks(folder: Path, num_weeks: int) -> list[datetime.date]:
    """Writes one file for each week, unless it is there; returns the dates with which weeks begin."""
    dates = [FIRST + datetime.timedelta(days=7 * number) for number in range(num_weeks)]
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{date}.parquet").exists() for date in dates):
        return dates
    data = package_data()
    events = pq.read_table(
        data / "transactions.parquet", columns=["household_id", "product_id", "transaction_timestamp"]
    )
    products = pq.read_table(data / "products.parquet", columns=["product_id", "product_category"]).combine_chunks()
    rows = pc.index_in(events["product_id"].combine_chunks(), products["product_id"].combine_chunks())
    category = products["product_category"].combine_chunks().take(rows)
    table = pa.table(
        {
            "user_id": events["household_id"],
            "item_id": events["product_id"],
            "timestamp": events["transaction_timestamp"],
            "category_id": category,
        }
    )
    days = pc.cast(table["timestamp"], pa.timestamp("us")).cast(pa.date32(), safe=False)
    for date in dates:
        ours = pc.and_(
            pc.greater_equal(days, pa.scalar(date)), pc.less(days, pa.scalar(date + datetime.timedelta(days=7)))
        )
        pq.write_table(table.filter(ours), folder / f"{date}.parquet")
    return dates


def run(name: str, *words: str) -> None:
    """Runs a command, which must succeed. What it says goes to the terminal."""
    subprocess.run([sys.executable, "-m", f"din_dist.cli.{name}", *words], check=True, stdout=subprocess.DEVNULL)


def steps_of(job: Path) -> int:
    return json.loads((job / "summary.json").read_text())["steps"]


def from_the_start(folder: Path, dates: list[datetime.date], place: int, settings: list[str]) -> dict[str, Any]:
    """Trains on all weeks up to `place` and judges the model on the week after; returns what was found."""
    before, date, after = (dates[number] for number in (place - 1, place, place + 1))
    work, job = folder / "work", folder / "from_the_start" / str(date)
    started = time.perf_counter()
    where = ["--dataset=event_log", f"--data_path={folder / 'log' / f'{date}.parquet'}"]
    where += [f"--data_dir={work / 'prepared' / str(date)}", f"--extend={work / 'prepared' / str(before)}"]
    never = ["--split=temporal", f"--validation_from={NEVER}", f"--test_from={NEVER}", "--epochs=1"]
    run("launch", *settings, *where, *never, f"--output_dir={job}")
    seconds = time.perf_counter() - started
    prepared = json.loads((work / "days" / str(after) / "prepared.json").read_text())
    result = job / "evaluation.json"
    run(
        "evaluate",
        f"--output_dir={job}",
        f"--evaluation_from={prepared['train_from']}",
        "--rank_against=none",
        f"--evaluation_path={result}",
        f"--data_path={prepared['source']}",
        f"--data_dir={work / 'prepared' / str(after)}",
        f"--extend={work / 'prepared' / str(date)}",
    )
    return {"gauc": json.loads(result.read_text())["gauc"], "updates": steps_of(job), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weeks", type=int, default=14)
    parser.add_argument("--compare_at", default="6,10,13", help="weeks, counted from 1")
    given, more = parser.parse_known_args()
    settings = [*SETTINGS, *more]
    dates = write_weeks(given.folder / "log", given.weeks)
    work = given.folder / "work"
    run(
        "daily",
        f"--log={given.folder / 'log'}",
        f"--from={dates[0]}",
        f"--work_dir={work}",
        "--period=week",
        f"--keep={given.weeks}",
        "--largest_drop=0.99",
        *settings,
    )
    compared = {int(text) for text in given.compare_at.split(",") if text}
    updates = 0
    for number, date in enumerate(dates[:-1], start=1):
        judged = json.loads((work / "days" / str(dates[number]) / "evaluated.json").read_text())
        job = work / "jobs" / str(date)
        updates += steps_of(job)
        line = {"week": number, "gauc": judged["gauc"], "updates": steps_of(job), "updates_so_far": updates}
        if number in compared and number > 1:
            line["from_the_start"] = from_the_start(given.folder, dates, number - 1, settings)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

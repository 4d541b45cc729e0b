"""Two stages against each alone: `python -m tests.benchmarks.cascade FOLDER --data_path=LOG`, run by hand.

A model that finds items (--finder, by `FINDER`) and DIN (`launch/flags/recommended.flags`) train on a log, and an
export of DIN takes the other one in. All of that stays in FOLDER, and the same command goes on there. Test events of
--max_events whole users are then asked for their item among all, without those of the history.

Prints recall and NDCG of: the finder alone, DIN over all items, and DIN over the N best of the finder for each N of
--num_retrieved. Intervals are 95 % over users, also those of the difference from the finder. `found` is the finder's
recall at N, beyond which no order of DIN comes. The latency is that of one user in one call, median and 95th
percentile of --calls, in turn. Last comes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.repository import ROOT

if TYPE_CHECKING:
    from din_dist.data.event_store import EventStore
    from din_dist.evaluation.retrieval import CandidateScorer, Queries
    from din_dist.serving.bundle import Bundle
    from din_dist.serving.scorer import ExportScorer

KS, WARMUP = (10, 20), 10
COMMON = ["--dataset=event_log", "--split=leave_two_out", "--item_features=category_id", "--metrics_port=-1"]
FINDER = [
    *("--num_interests=4", "--embedding_dim=32,16", "--max_history_length=20", "--optimizer=lazy_adam"),
    *("--normalize_vectors", "--temperature=0.05", "--learning_rate=0.01", "--learning_rate_schedule=warmup_linear"),
    *("--warmup_steps=50", "--num_sampled=256", "--global_batch_size=256", "--epochs=4"),
]
RANKER = [f"--flagfile={ROOT / 'launch/flags/recommended.flags'}"]
Sums = Mapping[str, tuple[np.ndarray, np.ndarray]]  # metric -> each user's share of numerator and denominator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--finder", default="comirec_sa")
    parser.add_argument("--num_retrieved", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--max_events", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=200)
    given = parser.parse_args()
    seconds = build(given.folder, given.data_path, given.finder)
    print(json.dumps({"seconds_to_train": seconds} | measure(given)), flush=True)


def build(folder: Path, data_path: str, finder: str) -> dict[str, float]:
    """Trains and exports both stages, unless they are there. Returns the seconds that each trained."""
    common = [*COMMON, f"--data_path={Path(data_path).absolute()}", f"--data_dir={folder / 'data'}"]
    jobs = {"finder": [*FINDER, f"--model={finder}"], "ranker": RANKER}
    seconds = {}
    for name, words in jobs.items():
        output, export = folder / name, folder / f"{name}-export"
        settings = [*words, *common, f"--output_dir={output}"]
        if not (output / "summary.json").exists():
            _run("prepare_data", *settings)
            _run("train", *settings)
        seconds[name] = json.loads((output / "summary.json").read_text())["seconds"]["training"]
        if not export.exists():
            inside = [f"--retriever_export_dir={folder / 'finder-export'}"] if name == "ranker" else []
            _run("export", f"--output_dir={output}", f"--export_dir={export}", *inside)
    return seconds


def _run(command: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"din_dist.cli.{command}", *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables. Returns their numbers."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    from din_dist.cli.saved_job import config_of
    from din_dist.data.prepared import open_prepared
    from din_dist.data.splits import item_counts, split_examples
    from din_dist.distributed.runtime import Runtime
    from din_dist.evaluation.retrieval import Task, by_user, queries_of, rank
    from din_dist.serving.asked import Recommend
    from din_dist.serving.bundle import Bundle
    from din_dist.serving.scorer import ExportScorer, FoundScorer

    config = config_of(given.folder / "ranker")
    store = open_prepared(config.data)
    splits = split_examples(store, config.data)
    queries = queries_of(store, splits["test"], config.data.max_history_length, given.max_events)
    popularity = item_counts(store, splits)
    bundle = Bundle.open(given.folder / "ranker-export")
    ranker = ExportScorer(bundle, store)
    longest = max(given.num_retrieved)

    def sums_of(scorer: CandidateScorer, ks: list[int]) -> Sums:
        return by_user(queries, rank(store, queries, Task(0, True, 0), scorer, max(ks), Runtime()), popularity, ks)

    every = sorted({*KS, *given.num_retrieved})
    found: dict[str, Sums] = {
        "finder": sums_of(FoundScorer(bundle.nearest, Recommend(longest, longest), ranker), every)
    }
    for num in given.num_retrieved:
        found[f"{num} found, ranked"] = sums_of(
            FoundScorer(bundle.recommend, Recommend(num, num), ranker), [k for k in every if k <= num]
        )
    found["all ranked"] = sums_of(ranker, every)
    times = _latencies(bundle, ranker, store, queries, given)
    return _tables(found, times, given.num_retrieved, len(queries), store.facts.num_candidates)


def _latencies(
    bundle: Bundle, ranker: ExportScorer, store: EventStore, queries: Queries, given: argparse.Namespace
) -> dict[str, list[float]]:
    """Returns the seconds of each call for one user, by what is called, in turn."""
    times: dict[str, list[float]] = {}
    all_items = ranker.own_ids(np.arange(ranker.num_items) + 1)
    for number in range(given.calls + WARMUP):
        at = number % len(queries)
        history = ranker.own_ids(store.history_item_ids[queries.history_starts[at] : queries.history_ends[at]])
        calls = _calls(bundle, history, given.num_retrieved)
        if number % 5 == 0:  # it takes long
            calls["all ranked"] = _ranks_all(bundle, history, all_items)
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number >= WARMUP:
                times.setdefault(name, []).append(time.perf_counter() - started)
    return times


def _calls(bundle: Bundle, history: Any, retrieved: Sequence[int]) -> dict[str, Callable[[], Any]]:
    from din_dist.serving.asked import Recommend

    lengths, most = np.array([len(history)]), max(KS)
    return {
        "finder": lambda: bundle.nearest(history, lengths, Recommend(most)),
        **{
            f"{num} found, ranked": lambda num=num: bundle.recommend(history, lengths, Recommend(most, num))
            for num in retrieved
        },
    }


def _ranks_all(bundle: Bundle, history: Any, items: Any) -> Callable[[], Any]:
    return lambda: bundle.rank_histories(history, np.array([len(history)]), items, np.array([len(items)]))


def _tables(
    found: Mapping[str, Sums], times: Mapping[str, list[float]], retrieved: list[int], num_events: int, num_items: int
) -> dict[str, Any]:
    from din_dist.evaluation.confidence import intervals_of_sums

    names = [f"{metric}@{k}" for k in KS for metric in ("recall", "ndcg")]
    print(f"{num_events:,} events, {num_items:,} items")
    print(f"| | {' | '.join(names)} | {names[0]} from the finder | ms a user, median and 95 % |")
    print(f"|{'---|' * (len(names) + 3)}")
    report: dict[str, Any] = {"events": num_events, "items": num_items, "metrics": {}, "milliseconds": {}}
    first = found["finder"]
    for name, sums in found.items():
        own = {metric: sums[metric] for metric in names}
        values, bounds = _values(own), intervals_of_sums(own, 1000, seed=0)
        less = {names[0]: (sums[names[0]][0] - first[names[0]][0], sums[names[0]][1])}
        difference, (low, high) = _values(less)[names[0]], intervals_of_sums(less, 1000, seed=0)[names[0]]
        median, late = (1e3 * float(np.quantile(times[name], share)) for share in (0.5, 0.95))
        cells = [f"{values[metric]:.4f} ({bounds[metric][0]:.4f} to {bounds[metric][1]:.4f})" for metric in names]
        cells += ["" if name == "finder" else f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"]
        print(f"| {name} | {' | '.join(cells)} | {median:.1f} and {late:.1f} |")
        report["metrics"][name], report["milliseconds"][name] = values, [median, late]
    report["found"] = {num: _values({"found": first[f"recall@{num}"]})["found"] for num in retrieved}
    print("recall of the finder at N: " + ", ".join(f"{num}: {value:.4f}" for num, value in report["found"].items()))
    return report


def _values(sums: Sums) -> dict[str, float]:
    return {name: float(above.sum() / below.sum()) for name, (above, below) in sums.items()}


if __name__ == "__main__":
    main()

"""Time of an update with features and without: `python -m tests.benchmarks.features FLAGS`, after prepare_data.

Adds 3 user, 2 context and 2 number features with random values to any prepared data, as declared: ids of 20, 100 and
1,000 values, an hour and a weekday, and two standardized numbers of users. Prints JSON. Both forms take turns.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time

import numpy as np

from din_dist.cli import entry
from din_dist.cli import flags as settings

settings.define_flags()
ROUNDS, STEPS, WARMUP = 25, 8, 25
WIDTH = 8


def main() -> None:
    config = settings.config_from_flags()
    entry.import_tensorflow()
    from din_dist.assembly import Assembly
    from din_dist.benchmark.step import StepBenchmark
    from din_dist.data.event_store import EventStore
    from din_dist.data.prepared import open_prepared
    from din_dist.distributed.runtime import Runtime
    from din_dist.features.encoding import Encoding, StoredFeature
    from din_dist.features.spec import FeatureSpec, Kind, Owner

    def with_features(store: EventStore) -> EventStore:
        random = np.random.default_rng(0)
        num_rows = {Owner.USER: store.facts.num_users, Owner.CONTEXT: store.facts.num_events}
        features = {}
        for name, owner, num_ids in (
            *(("age", Owner.USER, 20), ("town", Owner.USER, 100), ("shop", Owner.USER, 1000)),
            *(("hour", Owner.CONTEXT, 24), ("weekday", Owner.CONTEXT, 7)),
        ):
            encoding = Encoding(FeatureSpec(name, owner, Kind.CATEGORY, width=WIDTH), num_rows=num_ids + 1)
            features[name] = StoredFeature(encoding, random.integers(num_ids + 1, size=num_rows[owner], dtype=np.int32))
        for name in ("income", "size"):
            encoding = Encoding(FeatureSpec(name, Owner.USER, Kind.NUMBER))
            values = random.normal(size=num_rows[Owner.USER]).astype(np.float32)
            features[name] = StoredFeature(encoding, values)
        return dataclasses.replace(store, features=features)

    store = open_prepared(config.data)
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(output_dir=folder, metrics_port=-1)
        forms = {}
        for name, own in {"without": store, "with": with_features(store)}.items():
            job = Assembly(config, Runtime(), own)
            forms[name] = StepBenchmark(job.step, job.make_batches(0, 2**40), config.job.global_batch_size, None)
            forms[name].run(WARMUP)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
        for _ in range(ROUNDS):
            for name, form in forms.items():
                started = time.process_time()
                seconds = form.run(STEPS).seconds
                times[name].append((seconds / STEPS, (time.process_time() - started) / STEPS))
    found = {}
    for place, kind in enumerate(("wall", "cpu")):
        medians = {name: statistics.median(pair[place] for pair in pairs) for name, pairs in times.items()}
        pairs = zip(times["with"], times["without"], strict=True)
        ratio = statistics.median(slow[place] / fast[place] for slow, fast in pairs)
        found[kind] = {**medians, "ratio": ratio, "of_shortest": min_ratio(times, place)}
    print(json.dumps(found))


def min_ratio(times: dict[str, list[tuple[float, float]]], place: int) -> float:
    """Returns the ratio of the shortest times, which other processes disturb least."""
    return min(pair[place] for pair in times["with"]) / min(pair[place] for pair in times["without"])


if __name__ == "__main__":
    entry.run(main)

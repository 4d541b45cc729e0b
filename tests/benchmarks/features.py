"""Time of an update with features and without: `python -m tests.benchmarks.features FLAGS`, after prepare_data.

Adds 3 user, 2 context and 2 number features with random values to any prepared data, as declared: ids of 20, 100 and
1,000 values, an hour and a weekday, and two standardized numbers of users. Prints JSON. Both forms take turns.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile

import numpy as np

from din_dist.cli import entry
from din_dist.cli import flags as settings
from tests.benchmarks.in_turn import compare

settings.define_flags()
WIDTH = 8


def main() -> None:
    config = settings.config_from_flags()
    entry.import_tensorflow()
    from din_dist.assembly import Assembly
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
    stores = {"without": store, "with": with_features(store)}
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(output_dir=folder, metrics_port=-1)
        jobs = {name: Assembly(config, Runtime(), own) for name, own in stores.items()}
        print(json.dumps(compare(jobs, "without")))


if __name__ == "__main__":
    entry.run(main)

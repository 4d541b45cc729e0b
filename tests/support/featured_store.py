"""Adds features of every form and owner with random values to a store of events.

store = with_features(prepare(config.data))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from din_dist.data.event_store import EventStore
from din_dist.features.spec import Owner
from tests.support.reference.compare import RandomFeatures, random_value, stored_feature


def with_features(
    store: EventStore, owners: Sequence[Owner] = (Owner.USER, Owner.CONTEXT, Owner.ITEM), seed: int = 0
) -> EventStore:
    """Returns a store with one feature of every form for each of `owners`. A third of the values is missing."""
    num_rows = {
        Owner.USER: store.facts.num_users,
        Owner.CONTEXT: store.facts.num_events,
        Owner.CANDIDATE: store.facts.num_events,
        Owner.ITEM: store.facts.num_items + 1,
    }
    random = np.random.default_rng(seed)
    features = {
        name: stored_feature(
            encoding, [random_value(encoding, random, row) for row in range(num_rows[encoding.spec.owner])]
        )
        for name, encoding in RandomFeatures(owners).encodings.items()
    }
    return dataclasses.replace(store, features=features)

"""Adds features of every form and owner with random values to a store of events.

store = with_features(prepare(config.data))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from din_dist.data.event_store import EventStore
from din_dist.features.offers import Offers
from din_dist.features.spec import Owner
from tests.support.reference.compare import RandomFeatures, random_value, stored_feature


def with_features(
    store: EventStore,
    owners: Sequence[Owner] = (Owner.USER, Owner.CONTEXT, Owner.ITEM),
    seed: int = 0,
    *,
    by_offers: bool = False,
) -> EventStore:
    """Returns a store with one feature of every form for each of `owners`. A third of the values is missing.

    Args:
        store: the events.
        owners: of the features.
        seed: of the values.
        by_offers: candidates' features are looked up among offers, which two fifths of the items have at an event.
    """
    offers = _random_offers(store, seed) if by_offers else None
    num_rows = {
        Owner.USER: store.facts.num_users,
        Owner.CONTEXT: store.facts.num_events,
        Owner.CANDIDATE: offers.num_rows if offers else store.facts.num_events,
        Owner.ITEM: store.facts.num_items + 1,
    }
    random = np.random.default_rng(seed)
    features = {
        name: stored_feature(
            encoding, [random_value(encoding, random, row) for row in range(num_rows[encoding.spec.owner])]
        )
        for name, encoding in RandomFeatures(owners).encodings.items()
    }
    of_offers = {
        name: dataclasses.replace(feature, offers=offers)
        for name, feature in features.items()
        if feature.encoding.spec.owner is Owner.CANDIDATE
    }
    return dataclasses.replace(store, features=features | of_offers)


def _random_offers(store: EventStore, seed: int) -> Offers:
    """Returns offers under five kinds of circumstances."""
    random, num_items = np.random.default_rng(seed), store.facts.num_items
    pairs = np.arange(5 * (num_items + 1))
    keys = pairs[(random.random(len(pairs)) < 0.4) & (pairs % (num_items + 1) > 0)]
    return Offers(keys, np.arange(store.facts.num_events, dtype=np.int32) % 5, num_items)

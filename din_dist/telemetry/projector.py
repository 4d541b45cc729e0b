"""Writes item vectors for TensorBoard's embedding projector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from din_dist.data.event_store import ITEMS, EventStore, vocabulary_of
from din_dist.files import published, write_text
from din_dist.layers.local_lookup import LocalLookup
from din_dist.schema import feature_label


def write_projector(folder: Path, lookup: LocalLookup, store: EventStore, num_items: int) -> None:
    """Writes the vectors `[num_items, H]` of the most frequent items, with their ids and features as labels.

    Args:
        folder: for the files.
        lookup: gives the vectors.
        store: gives the ids and the features.
        num_items: the number of items to write.
    """
    counts = np.bincount(store.item_ids, minlength=store.facts.num_items + 1)
    chosen = np.argsort(-counts[1:], kind="stable")[:num_items] + 1
    vectors, _ = lookup(tf.constant(chosen, tf.int32))
    folder.mkdir(parents=True, exist_ok=True)
    with published(folder / "items.bytes") as stream:
        stream.write(vectors.numpy().astype("<f4").tobytes())
    columns = {"item": store.own_ids(ITEMS, chosen), "events": counts[chosen].astype(str).tolist()}
    for name, feature_of_item in store.item_features.items():
        own_ids = store.own_ids(vocabulary_of(name), feature_of_item[chosen], unknown="unknown")
        columns[feature_label(name)] = own_ids
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    text = "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows)
    write_text(folder / "items.tsv", text)
    write_text(
        folder / "projector_config.pbtxt",
        'embeddings {\n  tensor_name: "items"\n  tensor_path: "items.bytes"\n  metadata_path: "items.tsv"\n'
        f"  tensor_shape: {len(chosen)}\n  tensor_shape: {lookup.width}\n}}\n",
    )

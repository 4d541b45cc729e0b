"""Makes a padded batch of the reference what the library's models take: packed, ragged, padded left, right or anyhow.

model(inputs_of(padded_batch(RAGGED), "ragged"))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tests.support.reference.padded_din import PaddedBatch

FORMS = ("packed", "ragged", "right", "left", "holes", "no mask")


def inputs_of(batch: PaddedBatch, form: str, seed: int = 0) -> dict[str, Any]:
    """Returns the inputs in one of `FORMS`.

    What stands at padding is random. Without a mask it is 0, and the batch must have no unknown item.
    """
    ids, mask = batch.history_item_ids, batch.history_mask
    rows = [own[real] for own, real in zip(ids, mask, strict=True)]
    lengths = mask.sum(axis=1)
    inputs: dict[str, Any] = {"candidate_item_ids": batch.candidate_item_ids.astype(np.int32)}
    if form == "packed":
        flat = np.concatenate(rows).astype(np.int32)
        return {**inputs, "history_item_ids": flat, "history_lengths": lengths.astype(np.int32)}
    if form == "ragged":
        values = np.concatenate(rows).astype(np.int64)
        return {**inputs, "history_item_ids": tf.RaggedTensor.from_row_lengths(values, lengths)}
    if form == "no mask":
        return {**inputs, "history_item_ids": np.where(mask, ids, 0)}
    random = np.random.default_rng(seed)
    width = ids.shape[1] + 3
    padded = random.integers(0, 13, (len(rows), width))
    real = np.zeros(padded.shape, bool)
    for place, row in enumerate(rows):
        free = np.sort(random.permutation(width)[: len(row)])
        where = {"right": np.arange(len(row)), "left": np.arange(width - len(row), width), "holes": free}[form]
        padded[place, where], real[place, where] = row, True
    return {**inputs, "history_item_ids": padded, "history_mask": real}

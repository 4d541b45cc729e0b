"""Fills up the histories that `export` wrote, for peers whose inputs have a fixed width. Needs nothing but NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np


def padded_histories(columns: Mapping[str, np.ndarray], widths: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields the items of each history of E examples, int32 `[E, width]`, with 0 after its end.

    Args:
        columns: `train.npz` or `test.npz`.
        widths: of each history, at least its longest length.
    """
    lengths_of = np.split(columns["history_lengths"], len(widths))
    ends = np.cumsum([lengths.sum() for lengths in lengths_of])
    for width, lengths, item_ids in zip(
        widths, lengths_of, np.split(columns["history_item_ids"], ends[:-1]), strict=True
    ):
        history = np.zeros((len(lengths), width), np.int32)
        history[np.arange(width) < lengths[:, None]] = item_ids
        yield history

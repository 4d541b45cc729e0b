"""What every runner shares: the exported examples as rectangles, and a clock that saves vectors of users and items.

Each runner imports this in its own environment, so it needs nothing but Python and NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stopwatch import Stopwatch


class VectorStopwatch(Stopwatch):
    """A clock that saves vectors: `scores` returns those of the events that are asked, and of items.

    Those of events are `[E, H]` or `[E, K, H]`. Those of items are `[I + 1, H]`; row 0 is no item.
    """

    def save(self, scores: Any) -> None:
        """Writes what is judged: float32 `[E, K, H]` and `[I + 1, H]`."""
        users, items = (np.asarray(vectors, np.float32) for vectors in scores)
        np.savez(self._job["vectors"], users=users.reshape(len(users), -1, items.shape[1]), items=items)


def examples(job: dict[str, Any], split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the targets `[E]` of a split, the lengths of their histories `[E]`, and those `[E, L]`, padded by 0."""
    found = np.load(Path(job["data"], f"{split}.npz"))
    lengths = found["history_lengths"]
    histories = np.zeros((len(lengths), job["max_history_length"]), np.int32)
    histories[np.arange(job["max_history_length"]) < lengths[:, None]] = found["history_item_ids"]
    return found["targets"], lengths, histories


def parts(num_rows: int, size: int) -> Iterator[slice]:
    """Yields the rows in order, `size` at a time."""
    return (slice(first, first + size) for first in range(0, num_rows, size))

"""Scores the same histories and candidates by any signature of an export.

outputs = scored(bundle, "rank_histories")
"""

from __future__ import annotations

import numpy as np

from din_dist.serving.bundle import Bundle

HISTORIES = [["i1", "i2"], [], ["i3"], ["never seen", "i7", "i8"]]
CANDIDATES = ["i4", "i5", "i6", "i9"]  # one for each history


def scored(bundle: Bundle, signature: str) -> dict[str, np.ndarray]:
    """Returns the outputs of `score` or `rank_histories` by name."""
    flat, lengths = [item for history in HISTORIES for item in history], [len(history) for history in HISTORIES]
    inputs = {"history_item_ids": np.array(flat, object), "history_lengths": lengths, "candidate_item_ids": CANDIDATES}
    counts = {"candidate_counts": [1] * len(CANDIDATES)} if signature == "rank_histories" else {}
    return bundle.call(signature, {**inputs, **counts})

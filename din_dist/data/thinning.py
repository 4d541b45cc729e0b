"""Fewer examples to save time: whole users, evenly spaced, the same ones every time."""

from __future__ import annotations

import numpy as np

from din_dist.data.splits import Examples


def thin_out(examples: Examples, most: int) -> Examples:
    """At most `most` examples; at least one user."""
    return of_segments(examples, evenly_spaced(examples.rows_per_user() * examples.draws_per_row, most))


def evenly_spaced(sizes: np.ndarray, most: int) -> np.ndarray:
    """Evenly spaced places of `sizes` `[K]`, ascending, whose sizes add up to at most `most`; at least one of them."""
    stride = max(1, -(-int(sizes.sum()) // most))
    while True:
        places = np.arange(0, len(sizes), stride)
        if sizes[places].sum() <= most or len(places) <= 1:
            return places
        stride += max(1, stride // 10)  # the users that were met had more than their share


def of_segments(examples: Examples, segments: np.ndarray) -> Examples:
    """The examples of some users only; `segments`, ascending, are places in `examples.users`."""
    ends = examples.row_ends.astype(np.int64)
    rows = examples.rows_per_user()[segments]
    first_events = examples.event_bases[segments] + (ends[segments] - rows)
    new_ends = np.cumsum(rows)
    dtype = examples.row_ends.dtype
    return Examples(
        users=examples.users[segments],
        row_ends=new_ends.astype(dtype),
        event_bases=(first_events - (new_ends - rows)).astype(dtype),
        draws_per_row=examples.draws_per_row,
    )

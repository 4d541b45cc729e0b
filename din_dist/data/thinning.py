"""Keeps fewer examples to save time: whole users, evenly spaced, the same ones every time."""

from __future__ import annotations

import dataclasses

import numpy as np

from din_dist.data.splits import Examples


def thin_out(examples: Examples, most: int) -> Examples:
    """Returns at most `most` of the examples, but those of one user at least."""
    users, user_of = np.unique(examples.users, return_inverse=True)
    sizes = np.bincount(user_of, examples.rows_per_user(), len(users)).astype(np.int64)
    kept = evenly_spaced(sizes * examples.draws_per_row, most)
    return of_segments(examples, np.flatnonzero(np.isin(user_of, kept)))


def evenly_spaced(sizes: np.ndarray, most: int) -> np.ndarray:
    """Returns evenly spaced indices of `sizes` `[K]`, ascending, whose sizes sum to at most `most`; at least one."""
    stride = max(1, -(-int(sizes.sum()) // most))
    while True:
        places = np.arange(0, len(sizes), stride)
        if sizes[places].sum() <= most or len(places) <= 1:
            return places
        stride += max(1, stride // 10)  # the users at these indices had more than their share


def of_segments(examples: Examples, segments: np.ndarray) -> Examples:
    """Returns the examples of some runs alone.

    Args:
        examples: the examples of all runs `[K]`.
        segments: integers, ascending, the indices of the runs in `examples.users`.
    """
    rows = examples.rows_per_user()[segments]
    first_events = examples.runs()[0][segments]
    new_ends = np.cumsum(rows)
    dtype = examples.row_ends.dtype
    return dataclasses.replace(
        examples,
        users=examples.users[segments],
        row_ends=new_ends.astype(dtype),
        event_bases=(first_events - (new_ends - rows)).astype(dtype),
    )

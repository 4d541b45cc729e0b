"""Several histories of a user as callers give them: one list of behaviours, each with the name of its history.

A model has the histories of all users in the order of their names (see `schema.Batch`). Callers have them user by user.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NAMES = "history_names"  # of the input with each behaviour's history


class NamedBehaviours(NamedTuple):
    """Behaviours of several histories."""

    item_ids: Any  # [N]
    names: Any  # [N], the name of each one's history


def by_user(
    item_ids: np.ndarray, lengths: np.ndarray, histories: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns items, names and lengths `[B]` user by user, of histories in the order of their names.

    Args:
        item_ids: `[N]`, as of `schema.Batch.history_item_ids`.
        lengths: `[S * B]`, as of `schema.Batch.history_lengths`.
        histories: the S names.
    """
    of_histories = np.asarray(lengths).reshape(len(histories), -1)
    num_users = of_histories.shape[1]
    users = np.repeat(np.tile(np.arange(num_users), len(histories)), lengths)
    names = np.repeat(np.array(histories, object), of_histories.sum(axis=1))
    order = np.argsort(users, kind="stable")
    return np.asarray(item_ids)[order], names[order], of_histories.sum(axis=0)

"""Behaviours of users as callers give them: of several histories each with the name of its own, and with its features.

A model has the histories of all users in the order of their names (see `schema.Batch`). Callers have them user by user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NAMES = "history_names"  # of the input with each behaviour's history


class GivenBehaviours(NamedTuple):
    """Behaviours that have more than an item."""

    item_ids: Any  # [N]
    names: Any = None  # [N], the name of each one's history; None: there is one history
    features: Mapping[str, Any] = {}


class ByUser(NamedTuple):
    """The positions of several histories, user by user."""

    order: np.ndarray  # int64 [N], their places in a batch
    names: np.ndarray  # [N], the name of each one's history
    lengths: np.ndarray  # [B]


def by_user(lengths: np.ndarray, histories: Sequence[str]) -> ByUser:
    """Returns the positions of B users' histories, which a batch has in the order of their names.

    Args:
        lengths: `[S * B]`, as of `schema.Batch.history_lengths`.
        histories: the S names.
    """
    of_histories = np.asarray(lengths).reshape(len(histories), -1)
    num_users = of_histories.shape[1]
    users = np.repeat(np.tile(np.arange(num_users), len(histories)), lengths)
    names = np.repeat(np.array(histories, object), of_histories.sum(axis=1))
    order = np.argsort(users, kind="stable")
    return ByUser(order, names[order], of_histories.sum(axis=0))

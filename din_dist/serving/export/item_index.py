"""An approximate index of the vectors of items, made by Faiss. Only an export that asks for one imports Faiss.

Letters of shapes: I items that may be found, Q users, K vectors of a user, H their width, k items to find.
"""

from __future__ import annotations

import bisect
import enum
import functools
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from din_dist.errors import InputError
from din_dist.serving.manifest import ItemIndex
from din_dist.text import shown

INDEX_FILE = "index.faiss"
FEWEST_ITEMS = 1000  # of a catalogue whose index makes sense
MOST_USERS = 2000  # that the recall is measured on
_NUM_NEAREST = 100  # items of a user that the recall counts
_LISTS_PER_ROOT = 4  # lists for each unit of the square root of the number of items, as Faiss's guidelines say
_FEWEST_OF_A_LIST = 39  # items on average: with fewer, Faiss warns that it cannot place the centres of lists well
_MOST_OF_A_LIST = 256  # items on average that the centres are trained on
_SEED = 1
PRODUCTS_AT_ONCE = 1 << 24  # of users' vectors and items: 64 MiB


class IndexKind(enum.StrEnum):
    """Which approximate index an export has beside its vectors of items."""

    NONE = "none"
    IVF = "ivf"  # lists of items around centres; a search reads the lists of the nearest centres


def faiss() -> Any:
    """Imports Faiss.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise InputError(
            f"--index: ivf needs Faiss. Received: {shown(str(error))}. "
            "Run: pip install -c launch/constraints.txt faiss-cpu."
        ) from error


def check_catalogue(num_items: int) -> None:
    """Checks that a catalogue is large enough for an index.

    Raises:
        InputError: it is not.
    """
    if num_items < FEWEST_ITEMS:
        raise InputError(
            f"--index: is for {FEWEST_ITEMS:,} items or more. Received: {num_items:,}. Drop it: nearest, which is "
            "exact, is as fast."
        )


def write_index(vectors: np.ndarray, users: np.ndarray, least_recall: float, path: Path) -> ItemIndex:
    """Writes an index that finds the items with the largest products. Its ids are the rows of `vectors`.

    It reads the fewest lists that find enough of the exact best items of `users`.

    Args:
        vectors: float32 `[I, H]`, of the items.
        users: float32 `[Q, K, H]`, of the users that the recall is measured on.
        least_recall: above 0 and up to 1.
        path: of the file.

    Raises:
        InputError: half of the lists are too few, or Faiss is not installed.
        OSError: the file cannot be written.
    """
    index = _trained(vectors)
    exact, thresholds = exact_nearest(vectors, users, _NUM_NEAREST)

    @functools.cache
    def recall(num_probes: int) -> float:
        index.nprobe = num_probes
        found, products = search(index, users, _NUM_NEAREST)
        # An item that ties with the last of the best is as good as that.
        hits = (found[:, :, None] == exact[:, None, :]).any(axis=2) | (products >= thresholds[:, None])
        return float(hits.mean())

    most = index.nlist // 2
    num_probes = 1 + bisect.bisect_left(range(1, most + 1), True, key=lambda number: recall(number) >= least_recall)
    if num_probes > most:
        raise InputError(
            f"--index_recall: must be reached by reading half of the index's {index.nlist} lists. Received: "
            f"{least_recall:g}, and {recall(most):.4f} on {len(users):,} users. Give less, or drop --index: nearest "
            "is exact. Nothing was published."
        )
    index.nprobe = num_probes
    path.write_bytes(faiss().serialize_index(index).tobytes())  # Faiss's own writing does not raise OSError
    return ItemIndex(
        kind=IndexKind.IVF,
        faiss=faiss().__version__,
        num_lists=index.nlist,
        num_probes=num_probes,
        recall=recall(num_probes),
        k=_NUM_NEAREST,
        num_queries=len(users),
    )


def _trained(vectors: np.ndarray) -> Any:
    """Returns an index of `vectors` `[I, H]`, the same on each call."""
    library = faiss()
    num_items, width = vectors.shape
    num_lists = min(int(_LISTS_PER_ROOT * math.sqrt(num_items)), num_items // _FEWEST_OF_A_LIST)
    index = library.index_factory(width, f"IVF{num_lists},Flat", library.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.max_points_per_centroid = _SEED, _MOST_OF_A_LIST
    index.train(vectors)
    index.add(vectors)
    return index


def exact_nearest(vectors: np.ndarray, users: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of the best items of each user, int64 `[Q, k]` in any order, and the worst product of each.

    Args:
        vectors: float32 `[I, H]`, of the items.
        users: float32 `[Q, K, H]`. The largest product with one of the K vectors counts.
        k: at most I.
    """
    num_users, num_vectors, width = users.shape
    at_once = max(1, PRODUCTS_AT_ONCE // (num_vectors * len(vectors)))
    nearest, thresholds = np.empty((num_users, k), np.int64), np.empty(num_users, np.float32)
    for first in range(0, num_users, at_once):
        rows = slice(first, first + at_once)
        products = users[rows].reshape(-1, width) @ vectors.T
        best = products.reshape(-1, num_vectors, len(vectors)).max(axis=1)
        nearest[rows] = np.argpartition(best, -k, axis=1)[:, -k:]
        thresholds[rows] = np.take_along_axis(best, nearest[rows], axis=1).min(axis=1)
    return nearest, thresholds


def search(index: Any, users: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids `[Q, k]` that a Faiss index finds for each user, best first, and their products.

    Args:
        index: of inner products.
        users: float32 `[Q, K, H]`. Each of the K vectors is a query.
        k: items to find.
    """
    num_users, num_vectors, width = users.shape
    products, ids = index.search(users.reshape(-1, width), k)
    return merged(ids.reshape(num_users, num_vectors * k), products.reshape(num_users, num_vectors * k), k)


def merged(ids: np.ndarray, products: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best `k` ids of each user, `[Q, k]`, best first, and their products.

    A row with less is filled up with -1, and products of minus infinity.

    Args:
        ids: int64 `[Q, M]`, what the queries of each user found; -1 is nothing. Of an id found twice the largest
            product counts.
        products: float32 `[Q, M]`.
        k: items of a user.
    """
    best = np.full((len(ids), k), -1, np.int64), np.full((len(ids), k), -np.inf, np.float32)
    order = np.argsort(-products, axis=1, kind="stable")
    ids, products = np.take_along_axis(ids, order, axis=1), np.take_along_axis(products, order, axis=1)
    for user, of_user in enumerate(ids):
        distinct, firsts = np.unique(of_user, return_index=True)
        places = np.sort(firsts[distinct >= 0])[:k]
        best[0][user, : len(places)], best[1][user, : len(places)] = of_user[places], products[user, places]
    return best

"""The approximate index of items: merging, exact search beside it, and how it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from din_dist.serving.export import item_index
from din_dist.serving.export.item_index import INDEX_FILE, exact_nearest, merged, search, write_index
from tests.support.programs import imported

NOTHING = np.finfo(np.float32).min  # Faiss's product of an id of -1


@pytest.fixture(scope="module")
def faiss() -> Any:
    return imported("faiss", "faiss-cpu")


def test_interests_are_merged_by_the_largest_product() -> None:
    ids = np.array([[7, 3, 9, 3, 8, 7], [4, -1, -1, 4, 5, -1]])
    products = np.array([[5, 4, 1, 4.5, 4.2, 0.5], [2, NOTHING, NOTHING, 3, 2.5, NOTHING]], np.float32)
    found, best = merged(ids, products, 3)
    assert found.tolist() == [[7, 3, 8], [4, 5, -1]]
    assert best.tolist() == [[5, 4.5, pytest.approx(4.2)], [3, 2.5, -np.inf]]


def random_vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def test_all_lists_together_find_the_best_of_all(faiss: Any, tmp_path: Path) -> None:
    vectors, users = random_vectors(1500, 12), random_vectors(40, 2, 12)
    write_index(vectors, users, 0.1, tmp_path / INDEX_FILE)
    index = faiss.read_index(str(tmp_path / INDEX_FILE))
    index.nprobe = index.nlist
    found, products = search(index, users, 30)
    all_products = np.einsum("qkh,ih->qik", users.astype(np.float64), vectors).max(axis=2)
    expected = np.argsort(-all_products, axis=1)[:, :30]
    assert (found == expected).all()
    np.testing.assert_allclose(products, np.take_along_axis(all_products, expected, axis=1), rtol=1e-5)
    nearest, thresholds = exact_nearest(vectors, users, 30)
    assert (np.sort(nearest) == np.sort(expected)).all()
    np.testing.assert_allclose(thresholds, products[:, -1], rtol=1e-5)


def test_blocks_of_users_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, users = random_vectors(200, 6), random_vectors(11, 3, 6)
    whole, _ = exact_nearest(vectors, users, 20)
    monkeypatch.setattr(item_index, "PRODUCTS_AT_ONCE", 4 * 3 * 200)  # four users
    blocks, _ = exact_nearest(vectors, users, 20)
    assert (np.sort(whole) == np.sort(blocks)).all()


def test_an_index_is_made_the_same_again(faiss: Any, tmp_path: Path) -> None:
    vectors, users = random_vectors(1500, 12), random_vectors(40, 2, 12)
    found = [write_index(vectors, users, 0.8, tmp_path / name) for name in ("first", "second")]
    assert found[0] == found[1]
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_items_that_tie_are_as_good_as_each_other(faiss: Any, tmp_path: Path) -> None:
    """All items are as near as can be to a user whose vector is zero."""
    found = write_index(random_vectors(1500, 12), np.zeros((9, 1, 12), np.float32), 1.0, tmp_path / INDEX_FILE)
    assert found.recall == 1

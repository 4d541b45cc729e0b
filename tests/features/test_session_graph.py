"""Graphs of histories: by hand, and against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from din_dist.features.session_graph import session_graph
from din_dist.schema import SessionGraph
from tests.support.brute_graphs import assert_same_graph, graph_of


def found(histories: list[list[int]]) -> SessionGraph:
    items = [item for history in histories for item in history]
    return session_graph(tf.constant(items, tf.int32), tf.constant([*map(len, histories)], tf.int32))


def test_by_hand() -> None:
    """The walk 3, 1, 3, 1, 4 has the edges 3 > 1, 1 > 3 and 1 > 4. In the last history item 7 follows itself."""
    expected = SessionGraph(
        item_of=[3, 1, 4, 5, 0, 3, 7],
        node_of=[0, 1, 0, 1, 2, 3, 4, 5, 6, 6, 6],
        edge_from=[0, 1, 1, 4, 6],
        edge_to=[1, 0, 2, 5, 6],
        num_incoming=[1, 1, 1, 0, 0, 1, 1],
        num_outgoing=[1, 2, 0, 0, 1, 0, 1],
    )
    histories = [[], [3, 1, 3, 1, 4], [], [], [5], [0, 3], [7, 7, 7], []]
    assert_same_graph(found(histories), expected)
    assert graph_of(histories) == expected


@pytest.mark.parametrize("histories", [[], [[]], [[], []], [[0]], [[], [0]], [[5], [5]], [[2**31 - 2, 0]]], ids=str)
def test_the_smallest(histories: list[list[int]]) -> None:
    assert_same_graph(found(histories), graph_of(histories))


@pytest.mark.parametrize("num_items", [1, 2, 5, 10_000])
def test_against_plain_python(num_items: int) -> None:
    """Few items mean many that come again, and many edges that do."""
    random = np.random.default_rng(num_items)
    histories = [random.integers(0, num_items, length).tolist() for length in random.integers(0, 12, 60)]
    assert_same_graph(found(histories), graph_of(histories))

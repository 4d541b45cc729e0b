"""Graphs of histories, written out position by position."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.testing import assert_array_equal

from din_dist.schema import SessionGraph


def graph_of(histories: Sequence[Sequence[int]]) -> SessionGraph:
    """Returns the graphs of histories of items, whose nodes and edges are in the order of their first positions."""
    nodes: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], None] = {}
    node_of = []
    for place, history in enumerate(histories):
        own = [nodes.setdefault((place, item), len(nodes)) for item in history]
        edges |= dict.fromkeys(itertools.pairwise(own))
        node_of += own
    ends = [[edge[side] for edge in edges] for side in (0, 1)]
    counts = [[own.count(node) for node in range(len(nodes))] for own in (ends[1], ends[0])]
    return SessionGraph([item for _, item in nodes], node_of, *ends, *counts)


def assert_same_graph(found: SessionGraph, expected: SessionGraph) -> None:
    for name, own, other in zip(SessionGraph._fields, found, expected, strict=True):
        assert np.asarray(own).dtype == np.int32
        assert_array_equal(own, other, err_msg=name)

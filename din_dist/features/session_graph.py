"""The graph of each history: its distinct items are nodes, and an edge leads from each item to the one after it."""

from __future__ import annotations

import tensorflow as tf

from din_dist.execution import on_host
from din_dist.schema import SessionGraph


def session_graph(item_of: tf.Tensor, history_lengths: tf.Tensor) -> SessionGraph:
    """Returns the graphs of packed histories.

    Nodes and edges are in the order of their first positions.

    Args:
        item_of: int32 `[N]`, a number of the item at each position, at least 0.
        history_lengths: int32 `[B]`, sum N.
    """
    with on_host():
        # Not by `tf.repeat`, which would make a rectangle, [B, the longest].
        history_of = tf.searchsorted(tf.cumsum(history_lengths), tf.range(tf.size(item_of)), side="right")
        num_items = tf.reduce_max(tf.concat([item_of, [0]], axis=0)) + 1
        keys = tf.cast(history_of, tf.int64) * tf.cast(num_items, tf.int64) + tf.cast(item_of, tf.int64)
        nodes, node_of = tf.unique(keys)
        follows = history_of[1:] == history_of[:-1]
        edges_from, edges_to = tf.boolean_mask(node_of[:-1], follows), tf.boolean_mask(node_of[1:], follows)
        num_nodes = tf.size(nodes, tf.int64)
        edges, _ = tf.unique(tf.cast(edges_from, tf.int64) * num_nodes + tf.cast(edges_to, tf.int64))
        edge_from, edge_to = (
            tf.cast(ends, tf.int32) for ends in (edges // tf.maximum(num_nodes, 1), edges % tf.maximum(num_nodes, 1))
        )
        return SessionGraph(
            tf.cast(nodes % tf.cast(num_items, tf.int64), tf.int32),
            node_of,
            edge_from,
            edge_to,
            _times(edge_to, num_nodes),
            _times(edge_from, num_nodes),
        )


def _times(nodes: tf.Tensor, num_nodes: tf.Tensor) -> tf.Tensor:
    """Returns how often each of M nodes occurs in `nodes`, int32 `[M]`."""
    return tf.math.unsorted_segment_sum(tf.ones_like(nodes), nodes, num_nodes)

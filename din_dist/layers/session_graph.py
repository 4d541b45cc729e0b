"""The graph of each history: its distinct items are nodes, and an edge leads from each item to the one after it."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from din_dist.execution import on_host


class SessionGraph(NamedTuple):
    """The graphs of B histories with M nodes and E edges in all; no two edges are equal."""

    item_of: tf.Tensor  # int32 [M], the item of each node, as `session_graph` was given it
    node_of: tf.Tensor  # int32 [N], the node of each position
    edge_from: tf.Tensor  # int32 [E], the node that an edge leaves
    edge_to: tf.Tensor  # int32 [E], the node that it enters

    @property
    def num_nodes(self) -> tf.Tensor:
        """M, int32."""
        return tf.size(self.item_of)


def session_graph(item_of: tf.Tensor, history_of: tf.Tensor) -> SessionGraph:
    """Returns the graphs of packed histories.

    Args:
        item_of: int32 `[N]`, a number of the item at each position, at least 0.
        history_of: int32 `[N]`, ascending.
    """
    with on_host():
        num_items = tf.reduce_max(tf.concat([item_of, [0]], axis=0)) + 1
        keys = tf.cast(history_of, tf.int64) * tf.cast(num_items, tf.int64) + tf.cast(item_of, tf.int64)
        nodes, node_of = tf.unique(keys)
        follows = history_of[1:] == history_of[:-1]
        edges_from, edges_to = tf.boolean_mask(node_of[:-1], follows), tf.boolean_mask(node_of[1:], follows)
        num_nodes = tf.size(nodes, tf.int64)
        edges, _ = tf.unique(tf.cast(edges_from, tf.int64) * num_nodes + tf.cast(edges_to, tf.int64))
        return SessionGraph(
            tf.cast(nodes % tf.cast(num_items, tf.int64), tf.int32),
            node_of,
            tf.cast(edges // tf.maximum(num_nodes, 1), tf.int32),
            tf.cast(edges % tf.maximum(num_nodes, 1), tf.int32),
        )

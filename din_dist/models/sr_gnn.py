"""Session-based recommendation with a graph network (Wu et al. 2019, "Session-based Recommendation with Graph Neural
Networks"), from the authors' pytorch_code/.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from din_dist.config import ModelConfig, SessionQuery, SessionReadout
from din_dist.execution import Mode
from din_dist.features.session_graph import session_graph
from din_dist.layers.local_lookup import LocalLookup
from din_dist.layers.packed import segment_softmax, segment_sum
from din_dist.models.retrieval_model import PackedHistories, RetrievalModel
from din_dist.schema import SessionGraph


class SRGNN(RetrievalModel):
    """A history is a session: neighbours change each item's vector, and a readout pools the items to one vector.

    - Each node sums the messages of the nodes before it and after it, divided by their numbers, and a GRU cell with the
      node as its state takes them in.
    - Readout `gate`: alpha_i = q . sigmoid(W1 query + W2 h_i), which is no softmax, and user = W3 [sum of alpha_i h_i,
      last]. `attention` has softmax(query . h_i) in the place of alpha_i, `mean_last` the mean.

    Args:
        lookup: as of `RetrievalModel`, like the others.
        config: the readout and its query.
        training_mode: the mode of training passes.
    """

    def __init__(
        self, lookup: LocalLookup, config: ModelConfig, training_mode: Mode | None = None, **kwargs: Any
    ) -> None:
        super().__init__(lookup, config, training_mode, **kwargs)
        self._session_readout, self._query = config.session_readout, config.session_query
        width = lookup.width
        limit = 1 / math.sqrt(width)

        def dense(units: int, name: str, *, use_bias: bool = True) -> keras.layers.Dense:
            uniform = {
                f"{part}_initializer": keras.initializers.RandomUniform(-limit, limit) for part in ("kernel", "bias")
            }
            return keras.layers.Dense(units, use_bias=use_bias, name=name, **uniform)

        def vector(units: int, name: str) -> keras.Variable:
            return self.add_weight(
                shape=(units,), initializer=keras.initializers.RandomUniform(-limit, limit), name=name
            )

        self.of_incoming, self.of_outgoing = dense(width, "of_incoming"), dense(width, "of_outgoing")
        self.incoming_bias, self.outgoing_bias = vector(width, "incoming_bias"), vector(width, "outgoing_bias")
        self.gates_of_inputs, self.gates_of_state = (
            dense(3 * width, "gates_of_inputs"),
            dense(3 * width, "gates_of_state"),
        )
        self.output_projection = dense(width, "output_projection")
        if self._session_readout is SessionReadout.GATE:
            self.of_query, self.of_position = dense(width, "of_query"), dense(width, "of_position")
            self.to_weight = dense(1, "to_weight", use_bias=False)

    def interests(self, histories: PackedHistories, mode: Mode) -> tf.Tensor:
        # The input pipeline finds the graph while the update before runs. What serving is asked has none yet.
        graph = histories.graph or session_graph(histories.item_of, histories.lengths)
        nodes = self._step(tf.gather(histories.vectors, graph.item_of), graph)
        last = histories.last(nodes, graph.node_of)
        pooled = self._pooled(nodes, graph, last, histories)
        return self.output_projection(tf.concat([pooled, last], axis=1))[:, None]

    def _step(self, nodes: tf.Tensor, graph: SessionGraph) -> tf.Tensor:
        """Returns the nodes `[M, H]` after a step of the gated graph network."""
        incoming = _mean_of_neighbours(self.of_incoming(nodes), graph.edge_from, graph.edge_to, graph.num_incoming)
        outgoing = _mean_of_neighbours(self.of_outgoing(nodes), graph.edge_to, graph.edge_from, graph.num_outgoing)
        inputs = tf.concat([incoming + self.incoming_bias.value, outgoing + self.outgoing_bias.value], axis=1)
        of_inputs = tf.split(self.gates_of_inputs(inputs), 3, axis=1)
        of_state = tf.split(self.gates_of_state(nodes), 3, axis=1)
        reset, update = (tf.sigmoid(a + b) for a, b in zip(of_inputs[:2], of_state[:2], strict=True))
        new = tf.tanh(of_inputs[2] + reset * of_state[2])
        return new + update * (nodes - new)

    def _pooled(self, nodes: tf.Tensor, graph: SessionGraph, last: tf.Tensor, histories: PackedHistories) -> tf.Tensor:
        """Returns the pooled positions of each history, float32 `[B, H]`."""
        history_of, num_histories = histories.history_of, histories.num_histories
        rows = tf.gather(nodes, graph.node_of)
        counts = tf.cast(tf.maximum(histories.lengths, 1), tf.float32)[:, None]
        if self._session_readout is SessionReadout.MEAN_LAST:
            return segment_sum(rows, history_of, num_histories) / counts
        query = last
        if self._query is SessionQuery.MEAN:
            query = segment_sum(rows, history_of, num_histories) / counts
        if self._session_readout is SessionReadout.ATTENTION:
            scores = tf.reduce_sum(tf.gather(query, history_of) * rows, axis=1)
            weights = segment_softmax(scores, history_of, num_histories)[:, None]
        else:
            # Equal items of a session have equal rows, so the nodes go through the layer once.
            of_rows = tf.gather(self.of_position(nodes), graph.node_of)
            weights = self.to_weight(tf.sigmoid(tf.gather(self.of_query(query), history_of) + of_rows))
        return segment_sum(weights * rows, history_of, num_histories)


def _mean_of_neighbours(messages: tf.Tensor, edge_from: tf.Tensor, edge_to: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
    """Returns the mean of the messages that reach each node, float32 `[M, H]`; zeros if none does.

    Args:
        messages: float32 `[M, H]`, of each node.
        edge_from: int32 `[E]`, the node whose message an edge carries.
        edge_to: int32 `[E]`, the node that it reaches.
        counts: int32 `[M]`, the messages that reach each node.
    """
    sums = segment_sum(tf.gather(messages, edge_from), edge_to, tf.size(counts))
    return sums / tf.cast(tf.maximum(counts, 1), tf.float32)[:, None]

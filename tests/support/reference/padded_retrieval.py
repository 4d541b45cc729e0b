"""The models that find items, as their authors wrote them: padded, with masks and matrices, in float64 NumPy.

Formulas from THUDM/ComiRec src/model.py (DNN, SA, DR, MIND) and CRIPAC-DIG/SR-GNN pytorch_code/model.py and utils.py.

Letters of shapes: B users, T positions, K interests, H width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]  # by the last parts of their paths
ROUNDS = 3


def dense(weights: Weights, name: str, inputs: np.ndarray) -> np.ndarray:
    return inputs @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", 0.0)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    powers = np.exp(values - values.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def youtube_dnn(weights: Weights, rows: np.ndarray, mask: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
    """Returns `[B, 1, H]`, given the rows `[B, T, H]`, zeros in padding, and the mask `[B, T]`."""
    found = rows.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)[:, None]
    if context is not None:
        found = np.concatenate([found, context], axis=1)
    place = 0
    while f"tower_{place}/kernel" in weights:
        found = np.maximum(dense(weights, f"tower_{place}", found), 0)
        place += 1
    return dense(weights, "tower_output", found)[:, None]


def age_columns(ages: list[float]) -> np.ndarray:
    """Returns `[B, 3]`: each age, its square and its root, which stand behind the other inputs of the tower."""
    return np.array([[age, age * age, age**0.5] for age in ages])


def comirec_sa(weights: Weights, rows: np.ndarray, mask: np.ndarray, *, with_softmax: bool = True) -> np.ndarray:
    placed = rows
    if "positions" in weights:
        placed = rows + weights["positions"][None, : rows.shape[1]]
    scores = dense(weights, "attention_scores", np.tanh(dense(weights, "attention_hidden", placed)))  # [B, T, K]
    scores = np.swapaxes(scores, 1, 2)
    real = mask[:, None, :] > 0
    found = softmax(np.where(real, scores, -(2.0**32) + 1), axis=2) if with_softmax else np.where(real, scores, 0)
    return found @ rows  # the rows of padding are zeros, so a user without history gets zeros


def squashed(capsules: np.ndarray) -> np.ndarray:
    norm = np.square(capsules).sum(axis=-1, keepdims=True)
    return norm / (1 + norm) / np.sqrt(norm + 1e-9) * capsules


def routed(hats: np.ndarray, logits: np.ndarray, mask: np.ndarray, choices: list | None = None) -> np.ndarray:
    """Returns `[B, K, H]`, given `hats` `[B, K, T, H]` and `logits` `[B, K, T]`.

    Args:
        choices: those of the last round, to be taken instead of new ones; if it is empty, they are put into it. The
            authors stop gradients there.
    """
    for round_number in range(ROUNDS):
        found = np.where(mask[:, None, :] == 0, 0, softmax(logits, axis=1))
        if round_number == ROUNDS - 1 and choices is not None:
            if choices:
                (found,) = choices
            else:
                choices.append(found)
        capsules = squashed((found[:, :, None] @ hats)[:, :, 0])
        logits = logits + (hats @ capsules[..., None])[..., 0]
    return capsules


def comirec_dr(weights: Weights, rows: np.ndarray, mask: np.ndarray, choices: list | None = None) -> np.ndarray:
    num_users, length, width = rows.shape
    maps = weights["maps"][:length]  # [T, H, K * H]
    hats = np.einsum("bth,thc->btc", rows, maps).reshape(num_users, length, -1, width).transpose(0, 2, 1, 3)
    return routed(hats, np.zeros(hats.shape[:3]), mask, choices)


def mind(weights: Weights, rows: np.ndarray, mask: np.ndarray, choices: list | None = None) -> np.ndarray:
    logits = np.broadcast_to(
        weights["choices"][: rows.shape[1]].T, (len(rows), *weights["choices"][: rows.shape[1]].T.shape)
    )
    hats = np.broadcast_to((rows @ weights["map/kernel"])[:, None], (*logits.shape, rows.shape[2]))
    return np.maximum(dense(weights, "projection", routed(hats, logits, mask, choices)), 0)


def sr_gnn(
    weights: Weights, sessions: list[list[int]], table: np.ndarray, *, readout: str = "gate", query: str = "last"
) -> np.ndarray:
    """Returns `[B, 1, H]`, given each session's items and the vectors of all items; one session at a time."""
    width = table.shape[1]
    found = []
    for session in sessions:
        if not session:
            found.append(dense(weights, "output_projection", np.zeros(2 * width)))
            continue
        nodes, alias = np.unique(session, return_inverse=True)
        edges = np.zeros((len(nodes), len(nodes)))
        for u, v in itertools.pairwise(alias):
            edges[u, v] = 1
        into, out = edges.sum(axis=0), edges.sum(axis=1)
        into[into == 0], out[out == 0] = 1, 1
        hidden = step(weights, np.divide(edges, into).T, np.divide(edges.T, out).T, table[nodes])[alias]
        last = hidden[-1]
        q = last if query == "last" else hidden.mean(axis=0)
        match readout:
            case "gate":
                alpha = dense(
                    weights, "to_weight", sigmoid(dense(weights, "of_query", q) + dense(weights, "of_position", hidden))
                )
            case "attention":
                alpha = softmax(hidden @ q, axis=0)[:, None]
            case "mean_last":
                alpha = np.full((len(hidden), 1), 1 / len(hidden))
        pooled = (alpha * hidden).sum(axis=0)
        found.append(dense(weights, "output_projection", np.concatenate([pooled, last])))
    return np.stack(found)[:, None]


def step(weights: Weights, incoming: np.ndarray, outgoing: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Returns the nodes `[n, H]` after a step, given the matrices of edges `[n, n]`."""
    of_in = incoming @ dense(weights, "of_incoming", hidden) + weights["incoming_bias"]
    of_out = outgoing @ dense(weights, "of_outgoing", hidden) + weights["outgoing_bias"]
    gi = dense(weights, "gates_of_inputs", np.concatenate([of_in, of_out], axis=1))
    gh = dense(weights, "gates_of_state", hidden)
    (i_r, i_i, i_n), (h_r, h_i, h_n) = (np.split(gates, 3, axis=1) for gates in (gi, gh))
    new = np.tanh(i_n + sigmoid(i_r + h_r) * h_n)
    return new + sigmoid(i_i + h_i) * (hidden - new)


def read_out(interests: np.ndarray, query: np.ndarray, *, hard: bool) -> np.ndarray:
    """Returns `[B, H]`, given `[B, K, H]` and the targets `[B, H]`."""
    products = np.einsum("bkh,bh->bk", interests, query)
    if hard:
        return interests[np.arange(len(interests)), products.argmax(axis=1)]
    return np.einsum("bk,bkh->bh", softmax(products, axis=1), interests)

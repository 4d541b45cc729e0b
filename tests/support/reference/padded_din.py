"""Computes DIN and mean pooling in NumPy float64 and padded form: the judge of the packed model.

Written from the formulas in the docstrings of `din_dist/models/`: histories are rectangles with a mask,
the four inputs of the attention are concatenated, gradients are central differences. It shares no code with `din_dist`.

Letters: B examples, T positions of the longest history, H width of an item vector, W columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

EPSILON = 1e-3  # of batch normalization, as in tf.layers

Weights = Mapping[str, np.ndarray]  # by path, for example "model/head/dense_0/kernel"


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    candidate_item_ids: np.ndarray  # [B]
    history_item_ids: np.ndarray  # [B, T]; what stands where the mask is False must not matter
    history_mask: np.ndarray  # [B, T], True = real
    labels: np.ndarray  # [B], or [B, T] of T tasks
    features: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)  # name -> the value of each example
    other_histories: Sequence[tuple[np.ndarray, np.ndarray]] = ()  # item ids and mask of each but the first
    # Of each history: name -> the row of each behaviour [B, T], what stands where its mask is False must not matter.
    sides: Sequence[Mapping[str, np.ndarray]] = ()


@dataclasses.dataclass(frozen=True)
class Feature:
    """A declared feature, as the reference computes it; its values are Python's.

    Args:
        name: its name, which its weights bear.
        form: "ids": a row; "lists": a list of (row, weight); "number": a number or None; "vector": a list or None.
        owner: "item", or anything else for a feature of examples.
        of_items: the value of each item, if items own it.
        pool: of lists, "mean" or "sum", of weight times vector.
    """

    name: str
    form: str
    owner: str = "item"
    of_items: Sequence[Any] = ()
    pool: str = "mean"


@dataclasses.dataclass(frozen=True)
class PaddedModel:
    """The reference model.

    Args:
        item_features: for each feature by name, the id of each item.
        batch_statistics: True in training, unless batch normalization is frozen.
        row_of_item: the row of each item in the item's table; None gives each item its own. The id -i is item i in
            row 0.
        features: the declared features, in the order of their columns.
        num_tasks: T, the labels of an example.
        task_head: "shared", "mmoe" or "esmm".
        task_weights: the factor of each task's loss.
        other_histories: the names of all histories but the first.
        share_attention: all histories have the first one's attention.
        sides: the names of side information of behaviours, in the order of its columns.
    """

    item_features: Mapping[str, np.ndarray]
    model: str = "din"
    activation: str = "sigmoid"
    normalization: str = "softmax"
    batch_statistics: bool = False
    row_of_item: np.ndarray | None = None
    features: Sequence[Feature] = ()
    num_tasks: int = 1
    task_head: str = "shared"
    task_weights: Sequence[float] = (1.0,)
    other_histories: Sequence[str] = ()
    share_attention: bool = False
    sides: Sequence[str] = ()

    def loss(self, weights: Weights, batch: PaddedBatch) -> float:
        probability = sigmoid(self.logits(weights, batch))
        losses = -np.log(np.where(batch.labels == 1, probability, 1 - probability))
        return float(np.mean(losses.reshape(len(losses), -1) @ np.array(self.task_weights)))

    def logits(self, weights: Weights, batch: PaddedBatch) -> np.ndarray:
        """Returns the logits `[B]`, or `[B, T]` of several tasks."""
        candidate = self.embed(weights, batch.candidate_item_ids)  # [B, H]
        sides = batch.sides or [{}] * (1 + len(batch.other_histories))
        own = batch.history_item_ids, batch.history_mask, sides[0]
        interest = self.interest(weights, candidate, *own, "")
        features = [interest, candidate, interest * candidate] if self.model == "din" else [interest, candidate]
        for place, (name, history) in enumerate(zip(self.other_histories, batch.other_histories, strict=True), 1):
            interest = self.interest(weights, candidate, *history, sides[place], f"_{name}")
            features += [interest, interest * candidate] if self.model == "din" else [interest]
        for feature in self.features:
            if feature.owner != "item":
                features.append(columns_of(scope(weights, "features/"), feature, batch.features[feature.name]))
        features = np.concatenate(features, axis=1)
        features = batch_norm(scope(weights, "model/head_norm/"), features, self.batch_statistics)
        own, biases = scope(weights, "model/head/"), weights["lookup/item_bias"][self.rows(batch.candidate_item_ids)]
        if self.num_tasks == 1:
            return perceptron(own, features, self.activation, self.batch_statistics) + biases[:, 0]
        outputs = biases + towers(
            own, features, self.num_tasks, self.activation, self.batch_statistics, self.task_head == "mmoe"
        )
        if self.task_head != "esmm":
            return outputs
        probabilities = np.cumprod(sigmoid(outputs), axis=1)
        return np.log(probabilities) - np.log(1 - probabilities)

    def interest(
        self,
        weights: Weights,
        candidate: np.ndarray,
        item_ids: np.ndarray,
        mask: np.ndarray,
        side_rows: Mapping[str, np.ndarray],
        suffix: str,
    ) -> np.ndarray:
        """Returns the projected interest of candidates `[B, H]` in a history `[B, T]`, `[B, H]`.

        Args:
            side_rows: name -> the row of each behaviour, `[B, T]`.
            suffix: what the names of the history's layers end with.
        """
        keys = self.embed(weights, item_ids)  # [B, T, H]
        parts = [weights[f"sides/{name}"][side_rows[name]] for name in self.sides]
        sides = np.concatenate(parts, axis=-1) if parts else None  # [B, T, S]
        if self.model == "din":
            unit = scope(weights, f"model/attention{'' if self.share_attention else suffix}/")
            interest = attend(
                unit, candidate, keys, mask, self.activation, self.normalization, self.batch_statistics, sides
            )
        else:
            keys = keys if sides is None else np.concatenate([keys, sides], axis=-1)
            interest = np.where(mask[..., None], keys, 0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)[:, None]
        interest = batch_norm(scope(weights, f"model/interest_norm{suffix}/"), interest, self.batch_statistics)
        projection = scope(weights, f"model/interest_projection{suffix}/")
        return dense(projection, interest) if projection else interest

    def embed(self, weights: Weights, item_ids: np.ndarray) -> np.ndarray:
        """Returns the embeddings of items and of their features, concatenated: `[..., H]`."""
        items = np.abs(item_ids)
        parts = [weights["lookup/item"][self.rows(item_ids)]]
        parts += [weights[f"lookup/{name}"][feature[items]] for name, feature in self.item_features.items()]
        for feature in self.features:
            if feature.owner == "item":
                parts.append(columns_of(scope(weights, "lookup/features/"), feature, feature.of_items)[items])
        return np.concatenate(parts, axis=-1)

    def rows(self, item_ids: np.ndarray) -> np.ndarray:
        return item_ids if self.row_of_item is None else np.where(item_ids < 0, 0, self.row_of_item[np.abs(item_ids)])


def columns_of(weights: Weights, feature: Feature, values: Sequence[Any]) -> np.ndarray:
    """Returns the columns of one feature, computed value by value: `[n, D]`.

    A weight that is there is used: a projection, frequencies.
    """
    rows = [_columns_of_value(weights, feature, value) for value in values]
    width = len(
        _columns_of_value(weights, feature, [] if feature.form == "lists" else 0 if feature.form == "ids" else None)
    )
    columns = np.array(rows).reshape(len(values), width)
    own = scope(weights, f"{feature.name}/")
    return dense(own, columns) if "kernel" in own else columns


def _columns_of_value(weights: Weights, feature: Feature, value: Any) -> np.ndarray:
    if feature.form == "ids":
        return weights[feature.name][value]
    if feature.form == "lists":
        total = np.zeros(weights[feature.name].shape[1])
        for row, weight in value:
            total = total + weight * weights[feature.name][row]
        return total / len(value) if feature.pool == "mean" and value else total
    if feature.form == "vector":
        size = len(weights[f"{feature.name}/kernel"]) - 1
        return np.array([0.0] * size + [1.0] if value is None else [*value, 0.0])
    number = 0.0 if value is None else value
    found = [number]
    if f"{feature.name}.frequencies" in weights:
        angles = [2 * np.pi * frequency * number for frequency in weights[f"{feature.name}.frequencies"]]
        found = [np.sin(angle) for angle in angles] + [np.cos(angle) for angle in angles]
    return np.array([*found, float(value is None)])


def attend(
    weights: Weights,
    candidate: np.ndarray,
    keys: np.ndarray,
    mask: np.ndarray,
    activation: str,
    normalization: str,
    batch_statistics: bool,
    sides: np.ndarray | None = None,
) -> np.ndarray:
    """Pools `keys` `[B, T, H]` for `candidate` `[B, H]` into `[B, H]`; zeros where `mask` `[B, T]` is all False.

    With `sides` `[B, T, S]`, side information of each key, into `[B, H + S]`.
    """
    weights_of_keys = attention_weights(
        weights, candidate, keys, mask, activation, normalization, batch_statistics, sides
    )
    pooled = keys if sides is None else np.concatenate([keys, sides], axis=-1)
    return (weights_of_keys[..., None] * pooled).sum(axis=1)


def attention_weights(
    weights: Weights,
    candidate: np.ndarray,
    keys: np.ndarray,
    mask: np.ndarray,
    activation: str,
    normalization: str,
    batch_statistics: bool,
    sides: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the weight of each of `keys`, `[B, T]`; 0 where `mask` is False."""
    query = np.broadcast_to(candidate[:, None, :], keys.shape)
    pairs = np.concatenate([query, keys, query - keys, query * keys], axis=-1)  # [B, T, 4H]
    if sides is not None:
        pairs = np.concatenate([pairs, sides], axis=-1)  # [B, T, 4H + S]
    scores = perceptron(scope(weights, "scorer/"), pairs, activation, batch_statistics, mask)  # [B, T]
    if normalization == "softmax":
        scores = np.where(mask, scores / np.sqrt(candidate.shape[1]), -np.inf)
        largest = np.max(scores, axis=1, keepdims=True, initial=-1e300)
        exponentials = np.exp(scores - largest)  # 0 where masked
        sums = exponentials.sum(axis=1, keepdims=True)
        scores = exponentials / np.where(sums == 0, 1, sums)
    return np.where(mask, scores, 0)


def perceptron(
    weights: Weights, inputs: np.ndarray, activation: str, batch_statistics: bool, mask: np.ndarray | None = None
) -> np.ndarray:
    """Applies hidden layers and one output unit: `[..., W] -> [...]`. Batch statistics are over the rows in `mask`."""
    hidden = inputs
    for i in range(sum(name.endswith("kernel") for name in weights) - 1):
        hidden = dense(scope(weights, f"dense_{i}/"), hidden)
        hidden = activated(scope(weights, f"activation_{i}/"), hidden, activation, batch_statistics, mask)
    return dense(scope(weights, "output/"), hidden)[..., 0]


def activated(
    weights: Weights, x: np.ndarray, activation: str, batch_statistics: bool, mask: np.ndarray | None = None
) -> np.ndarray:
    if activation == "sigmoid":
        return sigmoid(x)
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "prelu":
        return np.where(x > 0, x, weights["alpha"] * x)
    return dice(weights, x, batch_statistics, mask)


def towers(
    weights: Weights, inputs: np.ndarray, num_tasks: int, activation: str, batch_statistics: bool, has_experts: bool
) -> np.ndarray:
    """Computes a tower for each of T tasks, one after the other: `[B, W] -> [B, T]`.

    With experts, each tower begins with its own mixture of them.
    """
    first = dense(scope(weights, "dense_0/"), inputs)
    num_dense = sum(name.startswith("task_0_dense") and name.endswith("kernel") for name in weights)
    layers = [*(f"dense_{i + 1}" for i in range(num_dense)), "output"]
    width = len(weights[f"task_0_{layers[0]}/kernel"])
    outputs = []
    for task in range(num_tasks):
        if has_experts:
            num_experts = first.shape[1] // (width + num_tasks)
            experts = activated(
                scope(weights, "experts_activation/"), first[:, : num_experts * width], activation, batch_statistics
            )
            gates = np.exp(first[:, num_experts * width + task * num_experts :][:, :num_experts])
            gates /= gates.sum(axis=1, keepdims=True)
            hidden = sum(gates[:, [e]] * experts[:, e * width : (e + 1) * width] for e in range(num_experts))
        else:
            hidden = first[:, task * width : (task + 1) * width]
        for i, layer in enumerate(layers):
            if i or not has_experts:
                own = scope(weights, f"task_{task}_{i}_activation/")
                hidden = activated(own, hidden, activation, batch_statistics)
            hidden = dense(scope(weights, f"task_{task}_{layer}/"), hidden)
        outputs.append(hidden[:, 0])
    return np.stack(outputs, axis=1)


def dice(weights: Weights, x: np.ndarray, batch_statistics: bool, mask: np.ndarray | None = None) -> np.ndarray:
    p = sigmoid(standardize(scope(weights, "standardize/"), x, batch_statistics, mask))
    return p * x + (1 - p) * weights["alpha"] * x


def batch_norm(weights: Weights, x: np.ndarray, batch_statistics: bool) -> np.ndarray:
    return standardize(scope(weights, "standardize/"), x, batch_statistics) * weights["gamma"] + weights["beta"]


def standardize(weights: Weights, x: np.ndarray, batch_statistics: bool, mask: np.ndarray | None = None) -> np.ndarray:
    mean, variance = weights["moving_mean"], weights["moving_variance"]
    rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
    if batch_statistics and len(rows):
        mean, variance = rows.mean(axis=0), rows.var(axis=0)
    return (x - mean) / np.sqrt(variance + EPSILON)


def dense(weights: Weights, x: np.ndarray) -> np.ndarray:
    return x @ weights["kernel"] + weights["bias"]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def scope(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    """Returns the weights whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def central_differences(
    function: Callable[[Weights], float], weights: Weights, names: list[str], step: float = 1e-5
) -> dict[str, np.ndarray]:
    """Returns the gradient of `function` with respect to every element of `weights[name]`, for each of `names`."""
    weights = {name: np.array(value, np.float64) for name, value in weights.items()}
    gradients = {}
    for name in names:
        gradients[name] = np.zeros_like(weights[name])
        for place in np.ndindex(weights[name].shape):
            middle = weights[name][place]
            weights[name][place] = middle + step
            above = function(weights)
            weights[name][place] = middle - step
            gradients[name][place] = (above - function(weights)) / (2 * step)
            weights[name][place] = middle
    return gradients

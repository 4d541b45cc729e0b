"""Makes small models and batches in two forms, the model's packed and the reference's padded, and compares gradients.

model, batch = small_model(activation="dice"), padded_batch(RAGGED)
logits, loss, gradients = loss_and_gradients(model, packed(batch), training=True)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from din_dist import schema
from din_dist.assembly import make_model
from din_dist.config import ModelConfig
from din_dist.execution import Execution, Mode
from din_dist.features.encoding import Encoding, Lists, StoredFeature
from din_dist.features.gathering import FeatureValues
from din_dist.features.sides import distinct_sides
from din_dist.features.spec import Encode, FeatureSpec, Form, Kind, Owner, Pooling
from din_dist.models.ranking_model import RankingModel
from din_dist.schema import Batch
from tests.support.owners import OWNERS
from tests.support.reference.padded_din import Feature, PaddedBatch

NUM_ITEMS = 12
CATEGORY_OF = np.array([0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], np.int32)
FACTS = schema.DatasetFacts(1, NUM_ITEMS, 1, False, {"category_id": 4}, 0, 0, "", {})
NUM_SIDES = 4
RAGGED = (3, 0, 1, 7, 2, 12, 0, 5)  # history lengths: empty ones, one of length one, a longest one

FORMS: dict[str, dict] = {  # of training: settings of `small_model`
    "plain": {},
    "compiled": {"compiled": True},
    "native": {"native": True},
    "native and compiled": {"compiled": True, "native": True},
}

FeatureIds = Mapping[str, np.ndarray]
ITEM_FEATURES: FeatureIds = {"category_id": CATEGORY_OF}


def small_model(
    seed: int = 0,
    sum_over_ranks=tf.identity,
    compiled: bool = False,
    row_of_item=None,
    native: bool = False,
    features: Mapping[str, StoredFeature] | None = None,
    num_tasks: int = 1,
    histories: Sequence[schema.NamedHistory] = (),
    **config,
) -> RankingModel:
    """Returns a model of embeddings 3 + 2 and hidden layers 5 and 4; every weight is random, as zeros hide mistakes."""
    tasks = tuple(f"task_{task}" for task in range(num_tasks)) if num_tasks > 1 else ()
    sizes = {"embedding_dim": (3, 2), "attention_hidden_units": (5, 4), "hidden_units": (5, 4)}
    model = make_model(
        ModelConfig(**{**sizes, **config}),
        dataclasses.replace(FACTS, tasks=tasks, histories=tuple(histories)),
        ITEM_FEATURES,
        seed=seed,
        row_of_item=row_of_item,
        training_mode=Mode(True, Execution(kernels=native, xla=compiled), sum_over_ranks),
        features=features,
    )
    randomise(model, seed)
    return model


def side_information(**widths: int) -> dict[str, StoredFeature]:
    """Returns features of behaviours by name, each with `NUM_SIDES` rows of a width, for a model."""
    specs = [FeatureSpec(name, Owner.HISTORY, Kind.CATEGORY, name, width=width) for name, width in widths.items()]
    return {spec.name: StoredFeature(Encoding(spec, NUM_SIDES), np.zeros(0, np.int32)) for spec in specs}


class RandomFeatures:
    """Features of every owner and form with random values, for a model and for the reference.

    Args:
        owners: of the features. Each owner has one of every form.
        seed: of the values of items.
    """

    def __init__(self, owners: Sequence[Owner] = OWNERS, seed: int = 0) -> None:
        specs = [
            dataclasses.replace(spec, name=f"{owner}_{spec.name}", owner=owner) for owner in owners for spec in _SPECS
        ]
        self.encodings = {spec.name: _encoding(spec) for spec in specs}
        random = np.random.default_rng(seed + 100)
        self.of_items = {
            name: [random_value(encoding, random, item) for item in range(NUM_ITEMS + 1)]
            for name, encoding in self.encodings.items()
            if encoding.spec.owner is Owner.ITEM
        }

    @property
    def stored(self) -> dict[str, StoredFeature]:
        """The features as a store has them. Those of examples have no values: batches have them."""
        return {
            name: stored_feature(encoding, self.of_items.get(name, [])) for name, encoding in self.encodings.items()
        }

    @property
    def of_reference(self) -> list[Feature]:
        """The features as the reference takes them."""
        forms = {Form.IDS: "ids", Form.LISTS: "lists", Form.NUMBERS: "number", Form.VECTORS: "vector"}
        return [
            Feature(name, forms[each.form], each.spec.owner, self.of_items.get(name, []), each.spec.pool)
            for name, each in self.encodings.items()
        ]

    def of_examples(self, num_examples: int, seed: int) -> dict[str, list]:
        """Returns random values of the features of examples."""
        random = np.random.default_rng(seed + 200)
        return {
            name: [random_value(encoding, random, row) for row in range(num_examples)]
            for name, encoding in self.encodings.items()
            if encoding.spec.owner is not Owner.ITEM
        }


_SPECS = (
    FeatureSpec("category", Owner.ITEM, Kind.CATEGORY, width=2),
    FeatureSpec("mean", Owner.ITEM, Kind.CATEGORIES),
    FeatureSpec("sum", Owner.ITEM, Kind.CATEGORIES, width=2, pool=Pooling.SUM),
    FeatureSpec("weighted", Owner.ITEM, Kind.CATEGORIES, width=1, pool=Pooling.WEIGHTED, weights="w"),
    FeatureSpec("number", Owner.ITEM, Kind.NUMBER),
    FeatureSpec("projected", Owner.ITEM, Kind.NUMBER, width=2),
    FeatureSpec("periodic", Owner.ITEM, Kind.NUMBER, encode=Encode.parse("periodic:2,0.3")),
    FeatureSpec("vector", Owner.ITEM, Kind.VECTOR, width=2),
    FeatureSpec("trained", Owner.ITEM, Kind.VECTOR, width=2, trained=True),
)
_NUM_ROWS, _DIMENSION = 4, 3


def _encoding(spec: FeatureSpec) -> Encoding:
    num_rows = _NUM_ROWS if spec.form in (Form.IDS, Form.LISTS) else 0
    return Encoding(spec, num_rows, _DIMENSION if spec.kind is Kind.VECTOR else 0)


def random_value(encoding: Encoding, random: np.random.Generator, row: int) -> Any:
    """Returns a random value of a feature in the reference's form. Each third one is missing."""
    missing = row % 3 == 2
    match encoding.form:
        case Form.IDS:
            return 0 if missing else int(random.integers(encoding.num_rows))
        case Form.LISTS:
            weighted = encoding.spec.pool is Pooling.WEIGHTED
            length = 0 if missing else random.integers(1, 5)
            return [
                (int(random.integers(encoding.num_rows)), float(np.float32(random.normal())) if weighted else 1.0)
                for _ in range(length)
            ]
        case Form.NUMBERS:
            return None if missing else float(np.float32(random.normal()))
        case Form.VECTORS:
            return None if missing else random.normal(size=encoding.dimension).astype(np.float16).tolist()


def stored_feature(encoding: Encoding, values: Sequence[Any]) -> StoredFeature:
    """Returns the stored form of values in the reference's form."""
    match encoding.form:
        case Form.IDS:
            return StoredFeature(encoding, np.array(values, np.int32))
        case Form.LISTS:
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
            flat = [pair for value in values for pair in value]
            weights = np.array([weight for _, weight in flat], np.float32)
            weighted = encoding.spec.pool is Pooling.WEIGHTED
            rows = np.array([row for row, _ in flat], np.int32)
            return StoredFeature(encoding, rows, offsets, weights if weighted else None)
        case Form.NUMBERS:
            return StoredFeature(
                encoding, np.array([np.nan if value is None else value for value in values], np.float32)
            )
        case Form.VECTORS:
            nothing = [np.nan] * encoding.dimension
            rows = np.array([nothing if value is None else value for value in values], np.float16)
            return StoredFeature(encoding, rows.reshape(len(values), encoding.dimension))


def randomise(layer: keras.layers.Layer, seed: int = 0) -> None:
    """Gives every weight of `layer` a random value; variances and gammas get a positive one."""
    random = np.random.default_rng(seed)
    for weight in layer.weights:
        values = random.normal(0.0, 0.6, weight.shape)
        weight.assign(0.5 + np.abs(values) if weight.path.endswith(("variance", "gamma")) else values)


def weights_of(layer: keras.layers.Layer, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the weights in float64, by path without `prefix`."""
    return {w.path.removeprefix(prefix): w.numpy().astype(np.float64) for w in layer.weights}


def padded_batch(
    lengths: Sequence[int],
    seed: int = 0,
    features: RandomFeatures | None = None,
    num_tasks: int = 1,
    other_lengths: Sequence[Sequence[int]] = (),
    sides: Sequence[str] = (),
) -> PaddedBatch:
    """Returns random candidates, labels, and histories of these lengths; their padding has random items too.

    Args:
        sides: the names of side information of behaviours.
    """
    random = np.random.default_rng(seed)
    lengths = np.array(lengths, np.int64)
    longest = max(lengths, default=0)
    others = [np.array(own, np.int64) for own in other_lengths]
    batch = PaddedBatch(
        candidate_item_ids=random.integers(1, NUM_ITEMS + 1, len(lengths)),
        history_item_ids=random.integers(0, NUM_ITEMS + 1, (len(lengths), longest)),
        history_mask=np.arange(longest) < lengths[:, None],
        labels=random.integers(0, 2, len(lengths) if num_tasks == 1 else (len(lengths), num_tasks)),
        features=features.of_examples(len(lengths), seed) if features else {},
        other_histories=[
            (random.integers(0, NUM_ITEMS + 1, (len(own), max(own))), np.arange(max(own)) < own[:, None])
            for own in others
        ],
    )
    masks = [batch.history_mask, *(mask for _, mask in batch.other_histories)]
    found = [{name: random.integers(0, NUM_SIDES, mask.shape) for name in sides} for mask in masks]
    return dataclasses.replace(batch, sides=found if sides else ())


def packed(batch: PaddedBatch, features: RandomFeatures | None = None) -> Batch:
    """Returns the same batch in the form that the model takes; `features`: of its examples."""
    num_examples = len(batch.labels)
    histories = [(batch.history_item_ids, batch.history_mask), *batch.other_histories]
    sides = {
        name: tf.constant(
            np.concatenate([own[name][mask] for own, (_, mask) in zip(batch.sides, histories, strict=True)]), tf.int32
        )
        for name in (batch.sides[0] if batch.sides else ())
    }
    values, index = distinct_sides(sides) if sides else ((), ())
    return Batch(
        candidate_item_ids=tf.constant(batch.candidate_item_ids, tf.int32),
        history_item_ids=tf.constant(np.concatenate([ids[mask] for ids, mask in histories]), tf.int32),
        history_lengths=tf.constant(np.concatenate([mask.sum(axis=1) for _, mask in histories]), tf.int32),
        dropout_seeds=tf.constant(np.random.default_rng(0).integers(0, 2**62, num_examples), tf.int64),
        labels=tf.constant(batch.labels, tf.float32),
        example_ids=tf.range(num_examples, dtype=tf.int64),
        features=values_of(batch, features) if features else (),
        sides=values,
        side_index=index,
    )


def values_of(batch: PaddedBatch, features: RandomFeatures) -> dict[str, Any]:
    """Returns the features of a batch's examples as the model takes them."""
    everything = tf.range(len(batch.labels))
    return {
        name: FeatureValues(stored_feature(features.encodings[name], values)).of(everything)
        for name, values in batch.features.items()
    }


def take(batch: Batch, examples: Sequence[int]) -> Batch:
    """Returns the packed batch of some examples of a packed batch, in this order."""
    ends = np.cumsum(batch.history_lengths)
    starts = ends - batch.history_lengths
    positions = np.concatenate([np.arange(starts[i], ends[i]) for i in examples] + [np.arange(0)]).astype(np.int32)
    rows = dict.fromkeys(Batch._fields, np.array(examples, np.int32))
    rows |= {"history_item_ids": positions, "side_index": positions}
    fields = {
        name: None if values is None else tf.gather(values, rows[name])
        for name, values in batch._asdict().items()
        if name not in ("features", "sides") and not isinstance(values, tuple)
    }
    if batch.features:
        fields["features"] = {name: take_values(values, examples) for name, values in batch.features.items()}
    return Batch(**fields, sides=batch.sides)


def take_values(values: Any, examples: Sequence[int]) -> Any:
    """Returns the values of a feature of some examples, in this order."""
    if not isinstance(values, Lists):
        return tf.gather(values, np.array(examples, np.int32))
    ends = np.cumsum(values.lengths)
    places = [place for i in examples for place in range(ends[i] - values.lengths[i], ends[i])]
    places = np.array(places, np.int32)
    weights = tf.gather(values.weights, places) if len(values.weights) else values.weights
    return Lists(tf.gather(values.values, places), tf.gather(values.lengths, np.array(examples, np.int32)), weights)


def loss_and_gradients(
    model: RankingModel,
    batch: Batch,
    training: bool,
    num_examples: int | None = None,
    task_weights: Sequence[float] | None = None,
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Returns logits, the sum of losses divided by `num_examples`, and dense gradients.

    Args:
        num_examples: the size of the whole batch, if `batch` is a share of it.
        task_weights: the factor of each task's loss, if there are several.
    """
    logits, loss, gradients = loss_and_gradients_in_graph(model, batch, training, num_examples, task_weights)
    return logits.numpy(), float(loss), {path: gradient.numpy() for path, gradient in gradients.items()}


def loss_and_gradients_in_graph(
    model: RankingModel,
    batch: Batch,
    training: bool,
    num_examples: int | None = None,
    task_weights: Sequence[float] | None = None,
) -> tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
    """Returns what `loss_and_gradients` does, as tensors: a graph can compute them too."""
    labels = batch.labels
    variables = {weight.path: weight.value for weight in model.trainable_weights}
    with tf.GradientTape() as tape:
        logits = model(batch, training=training)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
        if task_weights is not None:
            losses = tf.linalg.matvec(losses, tf.constant(task_weights, tf.float32))
        loss = tf.reduce_sum(losses) / tf.cast(
            tf.shape(labels)[0] if num_examples is None else num_examples, tf.float32
        )
    gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return logits, loss, {path: tf.convert_to_tensor(gradient) for path, gradient in gradients.items()}


def assert_same_gradients(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Asserts equality up to float32 rounding of the largest element: some are zero except for cancellation."""
    assert set(actual) == set(expected)
    largest = max(np.abs(gradient).max(initial=0.0) for gradient in expected.values())
    for path, gradient in expected.items():
        np.testing.assert_allclose(actual[path], gradient, rtol=1e-3, atol=2e-5 * largest + 1e-9, err_msg=path)

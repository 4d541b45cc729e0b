"""Makes small models and batches in two forms, the model's packed and the reference's padded, and compares gradients.

model, batch = small_model(activation="dice"), padded_batch(RAGGED)
logits, loss, gradients = loss_and_gradients(model, packed(batch), training=True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from din_dist import schema
from din_dist.assembly import make_model
from din_dist.config import ModelConfig
from din_dist.execution import Execution, Mode
from din_dist.models.ranking_model import RankingModel
from din_dist.schema import Batch
from tests.support.reference.padded_din import PaddedBatch

NUM_ITEMS = 12
CATEGORY_OF = np.array([0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], np.int32)
FACTS = schema.DatasetFacts(1, NUM_ITEMS, 1, False, {"category_id": 4}, 0, 0, "", {})
RAGGED = (3, 0, 1, 7, 2, 12, 0, 5)  # history lengths: empty ones, one of length one, a longest one

FeatureIds = Mapping[str, np.ndarray]
ITEM_FEATURES: FeatureIds = {"category_id": CATEGORY_OF}


def small_model(
    seed: int = 0,
    sum_over_ranks=tf.identity,
    compiled: bool = False,
    row_of_item=None,
    native: bool = False,
    **config,
) -> RankingModel:
    """Returns a model of embeddings 3 + 2 and hidden layers 5 and 4; every weight is random, as zeros hide mistakes."""
    sizes = {"embedding_dim": (3, 2), "attention_hidden_units": (5, 4), "hidden_units": (5, 4)}
    model = make_model(
        ModelConfig(**{**sizes, **config}),
        FACTS,
        ITEM_FEATURES,
        seed=seed,
        row_of_item=row_of_item,
        training_mode=Mode(True, Execution(kernels=native, xla=compiled), sum_over_ranks),
    )
    randomise(model, seed)
    return model


def randomise(layer: keras.layers.Layer, seed: int = 0) -> None:
    """Gives every weight of `layer` a random value; variances and gammas get a positive one."""
    random = np.random.default_rng(seed)
    for weight in layer.weights:
        values = random.normal(0.0, 0.6, weight.shape)
        weight.assign(0.5 + np.abs(values) if weight.path.endswith(("variance", "gamma")) else values)


def weights_of(layer: keras.layers.Layer, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the weights in float64, by path without `prefix`."""
    return {w.path.removeprefix(prefix): w.numpy().astype(np.float64) for w in layer.weights}


def padded_batch(lengths: Sequence[int], seed: int = 0) -> PaddedBatch:
    """Returns random candidates, labels, and histories of these lengths; their padding has random items too."""
    random = np.random.default_rng(seed)
    lengths = np.array(lengths, np.int64)
    longest = max(lengths, default=0)
    return PaddedBatch(
        candidate_item_ids=random.integers(1, NUM_ITEMS + 1, len(lengths)),
        history_item_ids=random.integers(0, NUM_ITEMS + 1, (len(lengths), longest)),
        history_mask=np.arange(longest) < lengths[:, None],
        labels=random.integers(0, 2, len(lengths)),
    )


def packed(batch: PaddedBatch) -> Batch:
    """Returns the same batch in the form that the model takes."""
    num_examples = len(batch.labels)
    return Batch(
        candidate_item_ids=tf.constant(batch.candidate_item_ids, tf.int32),
        history_item_ids=tf.constant(batch.history_item_ids[batch.history_mask], tf.int32),
        history_lengths=tf.constant(batch.history_mask.sum(axis=1), tf.int32),
        dropout_seeds=tf.constant(np.random.default_rng(0).integers(0, 2**62, num_examples), tf.int64),
        labels=tf.constant(batch.labels, tf.float32),
        example_ids=tf.range(num_examples, dtype=tf.int64),
    )


def take(batch: Batch, examples: Sequence[int]) -> Batch:
    """Returns the packed batch of some examples of a packed batch, in this order."""
    ends = np.cumsum(batch.history_lengths)
    starts = ends - batch.history_lengths
    positions = np.concatenate([np.arange(starts[i], ends[i]) for i in examples] + [np.arange(0)]).astype(np.int32)
    rows = dict.fromkeys(Batch._fields, np.array(examples, np.int32)) | {"history_item_ids": positions}
    return Batch(
        *(None if values is None else tf.gather(values, rows[name]) for name, values in batch._asdict().items())
    )


def loss_and_gradients(
    model: RankingModel, batch: Batch, training: bool, num_examples: int | None = None
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Returns logits, the sum of losses divided by `num_examples`, and dense gradients.

    Args:
        num_examples: the size of the whole batch, if `batch` is a share of it.
    """
    labels = batch.labels
    variables = {weight.path: weight.value for weight in model.trainable_weights}
    with tf.GradientTape() as tape:
        logits = model(batch, training=training)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
        loss = tf.reduce_sum(losses) / (len(labels) if num_examples is None else num_examples)
    gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return logits.numpy(), float(loss), {path: tf.convert_to_tensor(g).numpy() for path, g in gradients.items()}


def assert_same_gradients(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Asserts equality up to float32 rounding of the largest element: some are zero except for cancellation."""
    assert set(actual) == set(expected)
    largest = max(np.abs(gradient).max(initial=0.0) for gradient in expected.values())
    for path, gradient in expected.items():
        np.testing.assert_allclose(actual[path], gradient, rtol=1e-3, atol=2e-5 * largest + 1e-9, err_msg=path)

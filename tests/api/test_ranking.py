"""DIN and mean pooling as models of Keras: equal to the trainer's and to the float64 reference, in every form."""

from __future__ import annotations

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import din_dist
from din_dist.config import Activation, ModelKind
from tests.support.library_inputs import FORMS, inputs_of
from tests.support.reference.compare import (
    ITEM_FEATURES,
    NUM_ITEMS,
    RAGGED,
    assert_same_gradients,
    loss_and_gradients,
    packed,
    padded_batch,
    randomise,
    small_model,
    weights_of,
)
from tests.support.reference.padded_din import PaddedBatch, PaddedModel, attention_weights, scope

CLASSES = {ModelKind.DIN: "DIN", ModelKind.MEAN_POOLING: "MeanPooling"}


def library_model(kind: ModelKind = ModelKind.DIN, seed: int = 0, **settings) -> keras.Model:
    """Returns the model of the sizes and with the weights of `small_model`."""
    sizes = {"hidden_units": [5, 4], **({"attention_hidden_units": [5, 4]} if kind is ModelKind.DIN else {})}
    model = getattr(din_dist, CLASSES[kind])(NUM_ITEMS, ITEM_FEATURES, (3, 2), seed=seed, **(sizes | settings))
    randomise(model.core, seed)
    return model


@functools.cache
def known_batch() -> PaddedBatch:
    """A batch without unknown items, which have no place in a padded history without a mask."""
    batch = padded_batch(RAGGED)
    return dataclasses.replace(batch, history_item_ids=np.maximum(batch.history_item_ids, 1))


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("kind", CLASSES)
def test_the_model_is_that_of_the_trainer(kind: ModelKind, activation: Activation) -> None:
    ours = library_model(kind, activation=str(activation))
    trained = small_model(model=kind, activation=activation)
    for weight, other in zip(ours.core.weights, trained.weights, strict=True):
        assert weight.path == other.path
        assert_array_equal(weight, other)
    logits = trained(packed(known_batch()))
    assert_allclose(ours(inputs_of(known_batch(), "left")), logits, rtol=1e-6, atol=1e-6)


def test_the_first_weights_are_those_of_the_trainer() -> None:
    from din_dist.assembly import make_model
    from din_dist.config import ModelConfig
    from tests.support.reference.compare import FACTS

    ours = din_dist.DIN(NUM_ITEMS, ITEM_FEATURES, 8, seed=7)
    trained = make_model(ModelConfig(embedding_dim=(8,)), FACTS, ITEM_FEATURES, seed=7)
    assert [weight.path for weight in ours.core.weights] == [weight.path for weight in trained.weights]
    for weight, other in zip(ours.core.weights, trained.weights, strict=True):
        assert_array_equal(weight, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_form_has_the_logits_of_the_reference(kind: ModelKind, form: str) -> None:
    ours = library_model(kind, activation="dice")
    reference = PaddedModel(ITEM_FEATURES, kind, "dice")
    expected = reference.logits(weights_of(ours.core), known_batch())
    assert_allclose(ours(inputs_of(known_batch(), form)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_form_has_the_gradients_of_the_packed_one(kind: ModelKind, form: str) -> None:
    ours, trained = library_model(kind, activation="dice"), small_model(model=kind, activation="dice")
    ours.compile()
    logits, loss, expected = loss_and_gradients(trained, packed(known_batch()), training=True)
    inputs, labels = inputs_of(known_batch(), form), tf.constant(known_batch().labels, tf.float32)
    variables = {weight.path: weight.value for weight in ours.core.trainable_weights}
    with tf.GradientTape() as tape:
        found = ours(inputs, training=True)
        own_loss = ours.compute_loss(inputs, labels, found)
    gradients = tape.gradient(own_loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    assert_allclose(found, logits, rtol=1e-5, atol=1e-6)
    assert_allclose(own_loss, loss, rtol=1e-6)
    assert_same_gradients({path: tf.convert_to_tensor(g).numpy() for path, g in gradients.items()}, expected)


@pytest.mark.parametrize("form", ["packed", "ragged", "left"])
def test_a_batch_without_any_behaviour(form: str) -> None:
    batch = padded_batch((0, 0, 0))
    ours = library_model(activation="dice")
    expected = PaddedModel(ITEM_FEATURES, activation="dice").logits(weights_of(ours.core), batch)
    assert_allclose(ours(inputs_of(batch, form)), expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(ours(inputs_of(batch, form), training=True)).all()


@pytest.mark.parametrize("unknown", [NUM_ITEMS + 1, 10**12, -3])
def test_other_ids_are_unknown_items(unknown: int) -> None:
    ours = library_model()
    batch = known_batch()
    changed = {"candidate_item_ids": batch.candidate_item_ids.copy(), "history_item_ids": batch.history_item_ids.copy()}
    changed["candidate_item_ids"][:2] = unknown
    changed["history_item_ids"][:, 0] = unknown
    as_zero = {name: np.where(ids == unknown, 0, ids) for name, ids in changed.items()}
    inputs = {"history_mask": batch.history_mask}
    assert_array_equal(ours({**changed, **inputs}), ours({**as_zero, **inputs}))
    assert not np.array_equal(ours({**changed, **inputs}), ours(inputs_of(batch, "right")))


def test_attention_weights_are_those_of_the_reference() -> None:
    ours, batch = library_model(), known_batch()
    weights, reference = weights_of(ours.core), PaddedModel(ITEM_FEATURES)
    candidate, keys = (reference.embed(weights, ids) for ids in (batch.candidate_item_ids, batch.history_item_ids))
    unit, mask = scope(weights, "model/attention/"), batch.history_mask
    expected = attention_weights(unit, candidate, keys, mask, "sigmoid", "softmax", batch_statistics=False)
    found = ours.attention_weights(inputs_of(batch, "holes"))
    assert_array_equal(found.row_lengths(), mask.sum(axis=1))
    assert_allclose(found.values, expected[mask], rtol=1e-4, atol=1e-5)


FEATURES = {"hour": 24, "price": "number"}


def test_a_feature_that_is_not_there_is_missing_for_all() -> None:
    ours = din_dist.DIN(NUM_ITEMS, features=FEATURES, embedding_dim=4)
    randomise(ours.core)
    inputs = inputs_of(known_batch(), "right")
    num_examples = len(RAGGED)
    missing = {"hour": np.zeros(num_examples, np.int32), "price": np.full(num_examples, np.nan)}
    assert_array_equal(ours(inputs), ours({**inputs, "features": missing}))
    assert_array_equal(ours(inputs), ours({**inputs, "features": {"hour": np.full(num_examples, 25)}}))
    given = {"hour": np.arange(1, num_examples + 1), "price": np.ones(num_examples)}
    assert not np.isclose(ours(inputs), ours({**inputs, "features": given})).any()


def planted(num_examples: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns examples whose label says whether the candidate's category occurs in the history; padded left."""
    random = np.random.default_rng(seed)
    history = random.integers(1, 41, (num_examples, 5))
    history[np.arange(5) < random.integers(0, 4, (num_examples, 1))] = 0
    candidate = random.integers(1, 41, num_examples)
    labels = ((history % 4 == candidate[:, None] % 4) & (history > 0)).any(axis=1)
    return {"candidate_item_ids": candidate, "history_item_ids": history}, labels.astype(np.float32)


def test_fit_learns_what_was_planted() -> None:
    """Whether the category of the candidate occurs in the history: DIN finds it, the mean does so less well."""
    model = din_dist.DIN(40, {"category": np.arange(41) % 4 + 1}, 8, hidden_units=[16], attention_hidden_units=[16])
    metric = keras.metrics.AUC(from_logits=True, name="auc")
    model.compile(din_dist.LazyAdam(0.02), metrics=[metric])
    model.fit(*planted(4096, 0), batch_size=128, epochs=6, verbose=0)
    inputs, labels = planted(1024, 1)
    assert model.evaluate(inputs, labels, verbose=0, return_dict=True)["auc"] > 0.95
    logits = model.predict(inputs, verbose=0)
    chosen, others = logits[labels == 1], logits[labels == 0]
    assert (chosen[:, None] > others).mean() > 0.95, "AUC, counted pair by pair"


@pytest.mark.parametrize("form", ["packed", "ragged"])
def test_fit_takes_data_sets_of_every_form(form: str) -> None:
    """The weights after two epochs are those of padded arrays."""

    def batches() -> list[tuple]:
        return [(batch := padded_batch(RAGGED, seed), batch.labels.astype(np.float32)) for seed in range(3)]

    def data_set(of_form: str) -> tf.data.Dataset:
        made = [(inputs_of(batch, of_form), labels) for batch, labels in batches()]
        inputs, _ = made[0]
        free = {1: [None], 2: [None, None]}
        specs = {
            name: tf.RaggedTensorSpec([None, None], tf.int64)
            if isinstance(value, tf.RaggedTensor)
            else tf.TensorSpec(free[value.ndim], value.dtype)
            for name, value in inputs.items()
        }
        signature = (specs, tf.TensorSpec([None], tf.float32))
        return tf.data.Dataset.from_generator(lambda: iter(made), output_signature=signature)

    found = []
    for of_form in (form, "left"):
        model = library_model(activation="dice")
        model.compile(din_dist.LazyAdam(0.01))
        model.fit(data_set(of_form), epochs=2, verbose=0)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_dropout_is_drawn_anew() -> None:
    model = library_model(dropout=0.5)
    inputs = inputs_of(known_batch(), "left")
    assert_array_equal(model(inputs), library_model()(inputs))
    assert not np.array_equal(model(inputs, training=True), model(inputs, training=True))


GOOD = {"candidate_item_ids": np.array([1, 2]), "history_item_ids": np.array([[1, 2], [3, 0]])}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"candidate_item_ids": None}, "inputs: must have candidate_item_ids and history_item_ids. Received: ['"),
        ({"history": [1]}, "inputs: must be among candidate_item_ids, "),
        ({"candidate_item_ids": np.array([1.0, 2.0])}, "candidate_item_ids: must be integers. Received: 'float64'."),
        (
            {"candidate_item_ids": np.array([[1, 2]])},
            "candidate_item_ids: must have 1 axis, of examples. Received: [",
        ),
        ({"candidate_item_ids": np.array([1])}, "candidate_item_ids: must be as many as histories (2). Received: 1."),
        (
            {"history_item_ids": np.array([1, 2, 3])},
            "inputs: must have history_lengths, as history_item_ids has 1 axis",
        ),
        (
            {"history_item_ids": np.zeros([2, 1, 1], int)},
            "history_item_ids: must have 1 or 2 axes. Received: [2, 1, 1]",
        ),
        ({"history_item_ids": [[1], [2, 3]]}, "history_item_ids: must be an array of integers. Received: 'list'."),
        ({"history_mask": np.ones([2, 3])}, "history_mask: must have the shape of history_item_ids, [2, 2]. Received"),
        ({"history_lengths": np.array([1, 1])}, "history_lengths: belongs to history_item_ids of 1 axes, and not to r"),
        (
            {"history_item_ids": np.array([1, 2, 3]), "history_lengths": np.array([1, 1])},
            "history_lengths: must add up to the size of history_item_ids (3). Received: 2.",
        ),
        ({"features": {"age": [1, 2]}}, "features: must be among the model's: none. Received: ['age']."),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_wrong_inputs_get_one_line(changed: dict, message: str) -> None:
    model = din_dist.DIN(NUM_ITEMS, embedding_dim=2)
    inputs = {name: value for name, value in (GOOD | changed).items() if value is not None}
    with pytest.raises(din_dist.InputError) as error:
        model(inputs)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_wrong_inputs_of_fit_get_one_line_too() -> None:
    model = din_dist.DIN(NUM_ITEMS, embedding_dim=2)
    model.compile()
    with pytest.raises(din_dist.InputError, match=r"^candidate_item_ids: must be integers\. Received: 'float32'\."):
        model.fit({**GOOD, "candidate_item_ids": np.array([1.0, 2.0])}, np.array([0.0, 1.0]), verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_items": 0}, "num_items: must be a number above 0. Received: 0."),
        (
            {"item_features": {"brand": np.zeros(12, int)}},
            "item_features['brand']: must be an array of integers, ",
        ),
        (
            {"item_features": {"brand": np.zeros(13)}},
            "item_features['brand']: must be an array of integers, ",
        ),
        (
            {"item_features": {"brand": np.full(13, -1)}},
            "item_features['brand']: ids must be at least 0. Received: ",
        ),
        (
            {"features": {"hour": "number of it"}},
            "features['hour']: must be the number of its ids, or 'number'",
        ),
        ({"embedding_dim": (2, 2, 2)}, "embedding_dim: must be one width, or one for each of item. Received: '2,2,2'."),
        (
            {"activation": "tanh"},
            "activation: must be a choice it knows. Received: 'tanh'. Choose among sigmoid",
        ),
        ({"hidden_units": [0]}, "hidden_units: must be one or more positive numbers. Received: '0'."),
        ({"dropout": 1.0}, "dropout: must be below 1. Received: 1.0."),
        ({"tower_units": [8]}, "settings: must be among activation, attention, attention_hidden_units, attention_nor"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments_get_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(din_dist.InputError) as error:
        din_dist.DIN(**{"num_items": NUM_ITEMS, **arguments})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)

"""The models that find items, as models of Keras: equal to the trainer's, in every form, and able to learn."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import din_dist
from din_dist.assembly import make_model
from din_dist.config import ModelConfig, ModelKind
from tests.support.library_inputs import FORMS, inputs_of
from tests.support.model_kinds import RETRIEVAL
from tests.support.reference.compare import FACTS, ITEM_FEATURES, NUM_ITEMS, packed, padded_batch, randomise
from tests.support.reference.padded_din import PaddedBatch

CLASSES = {
    ModelKind.YOUTUBE_DNN: "YouTubeDNN",
    ModelKind.COMIREC_SA: "ComiRecSA",
    ModelKind.COMIREC_DR: "ComiRecDR",
    ModelKind.MIND: "MIND",
    ModelKind.SR_GNN: "SRGNN",
}
LENGTHS = (3, 0, 1, 7, 2, 5)


def library_model(kind: ModelKind, **settings: Any) -> keras.Model:
    """Returns a model of embeddings 3 + 2 whose weights are random."""
    model = getattr(din_dist, CLASSES[kind])(NUM_ITEMS, ITEM_FEATURES, (3, 2), **settings)
    randomise(model.core, 2)
    return model


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> PaddedBatch:
    """Returns a batch without unknown items."""
    batch = padded_batch(lengths)
    np.maximum(batch.history_item_ids, 1, out=batch.history_item_ids)
    return batch


def test_every_model_is_there() -> None:
    assert [*CLASSES] == [*RETRIEVAL]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_form_has_the_logits_of_the_trainer(kind: ModelKind, form: str) -> None:
    trained = make_model(ModelConfig(model=kind, embedding_dim=(3, 2)), FACTS, ITEM_FEATURES, seed=1)
    randomise(trained, 2)
    ours = library_model(kind)
    assert [weight.path for weight in ours.core.weights] == [weight.path for weight in trained.weights]
    assert_allclose(ours(inputs_of(batch_of(), form)), trained(packed(batch_of())), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_loss_of_a_full_softmax_by_hand(kind: ModelKind) -> None:
    """The readout of training is the vector with the largest product with the target."""
    ours, batch = library_model(kind, softmax="full"), batch_of()
    ours.compile()
    inputs, num_examples = inputs_of(batch, "left"), len(LENGTHS)
    vectors = ours.core.items(tf.range(1, NUM_ITEMS + 1)).numpy().astype(np.float64)
    users = ours.core.users(packed(batch)).numpy().astype(np.float64)  # [B, K, H]
    targets = batch.candidate_item_ids - 1
    products = np.einsum("bkh,mh->bkm", users, vectors)
    best = products[np.arange(num_examples), :, targets].argmax(axis=1)
    logits = products[np.arange(num_examples), best]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(num_examples), targets]
    assert_allclose(ours.compute_loss(inputs), losses.mean(), rtol=1e-5)
    weights = np.arange(num_examples, dtype=np.float32)
    assert_allclose(ours.compute_loss(inputs, sample_weight=weights), (losses * weights).mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_form_has_the_same_gradients(kind: ModelKind) -> None:
    ours = library_model(kind, num_sampled=5)
    ours.compile()
    found = []
    for form in FORMS:
        with tf.GradientTape() as tape:
            loss = ours.compute_loss(inputs_of(batch_of(), form))
        gradients = tape.gradient(loss, ours.trainable_weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        found.append([loss, *map(tf.convert_to_tensor, gradients)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def planted(num_examples: int, seed: int) -> dict[str, np.ndarray]:
    """Returns histories within one of five groups of four items; the target is of the same group. Padded left."""
    random = np.random.default_rng(seed)
    group, lengths = random.integers(0, 5, (num_examples, 1)), random.integers(1, 5, (num_examples, 1))
    items = 4 * group + random.integers(1, 5, (num_examples, 5))
    history = np.where(np.arange(4) >= 4 - lengths, items[:, :4], 0)
    return {"candidate_item_ids": items[:, 4], "history_item_ids": history}


@pytest.mark.parametrize("settings", [{"softmax": "full"}, {"num_sampled": 10}], ids=["full", "sampled"])
@pytest.mark.parametrize("kind", CLASSES)
def test_fit_finds_the_items_of_the_group(kind: ModelKind, settings: dict[str, Any]) -> None:
    """A guess would find 4 of 20."""
    model = getattr(din_dist, CLASSES[kind])(20, embedding_dim=16, **settings)
    model.compile(din_dist.LazyAdam(0.02))
    model.fit(planted(1024, 0), batch_size=64, epochs=6, verbose=0)
    asked = planted(200, 1)
    targets = asked.pop("candidate_item_ids")
    items, logits = model.recommend(asked, 4)
    assert (items.numpy() == targets[:, None]).any(axis=1).mean() > 0.9
    assert_array_equal(logits, np.sort(logits, axis=1)[:, ::-1])
    for place in range(4):
        found = model({**asked, "candidate_item_ids": items[:, place]})
        assert_allclose(logits[:, place], found, rtol=1e-4, atol=1e-5)


def test_items_are_drawn_anew_for_each_update_and_by_frequency() -> None:
    counts = np.array([0, 1000, *[1] * (NUM_ITEMS - 1)])
    model = din_dist.YouTubeDNN(NUM_ITEMS, embedding_dim=4, item_counts=counts, sampler="popularity", num_sampled=3)
    model.compile()
    inputs = {"candidate_item_ids": np.array([2]), "history_item_ids": np.array([[1, 3]])}
    first = float(model.compute_loss(inputs))
    assert float(model.compute_loss(inputs)) == first
    uniform = din_dist.YouTubeDNN(NUM_ITEMS, embedding_dim=4, num_sampled=3)
    uniform.compile()
    losses = set()
    for update in range(8):
        uniform.optimizer.iterations.assign(update)
        losses.add(float(uniform.compute_loss(inputs)))
    assert len(losses) > 4


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind.has_positions])
def test_the_newest_behaviours_are_read(kind: ModelKind) -> None:
    model = library_model(kind, num_positions=3)
    long, short = np.array([[5, 6, 1, 2, 3], [0, 0, 0, 4, 7]]), np.array([[1, 2, 3], [0, 4, 7]])
    candidates = {"candidate_item_ids": np.array([2, 9])}
    logits = [model({**candidates, "history_item_ids": history}) for history in (long, short)]
    assert_array_equal(*logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: din_dist.SRGNN(5, features={"hour": 3}),
            "features: sr_gnn reads those of item only. Received",
        ),
        (lambda: din_dist.MIND(1), "num_items: must be above 1, to choose among. Received: 1."),
        (
            lambda: din_dist.MIND(5, item_counts=[1] * 5),
            "item_counts: must be 6 numbers, of ids 0 to 5. Received",
        ),
        (lambda: din_dist.MIND(5).recommend({"history_item_ids": [[1]]}, 0), "count: must be at least 1. Received: 0."),
        (
            lambda: din_dist.MIND(5).compute_loss({}, y=[1]),
            "mind: takes no labels, as candidates are the targets. Received: 'labels'.",
        ),
    ],
)
def test_mistakes_get_one_line(make: Any, message: str) -> None:
    with pytest.raises(din_dist.InputError) as error:
        make()
    assert str(error.value).startswith(message)

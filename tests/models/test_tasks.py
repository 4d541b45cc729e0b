"""Models of several labels: against the float64 reference, over ranks, and by hand."""

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

from din_dist.config import Activation, ModelKind
from din_dist.data.pipeline import batch_signature
from din_dist.evaluation.retrieval import ModelScorer
from din_dist.features.gathering import missing_values
from din_dist.features.spec import Owner
from din_dist.layers.task_towers import TaskTowers, logits_of_chain, side_by_side
from din_dist.models.behaviour_model import items_of
from tests.support.model_kinds import RANKING
from tests.support.reference.compare import (
    FORMS,
    ITEM_FEATURES,
    NUM_ITEMS,
    RAGGED,
    RandomFeatures,
    assert_same_gradients,
    loss_and_gradients,
    loss_and_gradients_in_graph,
    packed,
    padded_batch,
    small_model,
    take,
    values_of,
    weights_of,
)
from tests.support.reference.padded_din import PaddedModel, central_differences
from tests.support.reference.ranks import ThreadedRanks

HEADS = {"shared": "shared", "mmoe": "mmoe:3", "esmm": "esmm"}
FACTORS = [0.5, 2.0, 1.0]


@functools.cache
def expected(kind, head, activation, hidden_units, training):
    """Returns what every form must give: weights, logits, loss, and the gradients by central differences."""
    batch = padded_batch(RAGGED, num_tasks=3)
    ours = built(kind, head, activation, hidden_units)
    weights = weights_of(ours)
    reference = PaddedModel(
        ITEM_FEATURES,
        kind,
        activation,
        batch_statistics=training,
        num_tasks=3,
        task_head=head,
        task_weights=FACTORS,
    )
    trainable = [weight.path for weight in ours.trainable_weights]
    gradients = central_differences(lambda changed: reference.loss(changed, batch), weights, trainable)
    return weights, reference.logits(weights, batch), reference.loss(weights, batch), gradients


def built(kind, head, activation, hidden_units, **settings):
    settings = {"model": kind, "activation": activation, "hidden_units": hidden_units, **settings}
    return small_model(seed=1, num_tasks=3, task_head=HEADS[head], **settings)


@pytest.mark.thorough(unless=lambda case: case["form"] == "native" or case["activation"] is Activation.DICE)
@pytest.mark.parametrize(("training", "form"), [*((True, form) for form in FORMS), (False, "plain")])
@pytest.mark.parametrize(
    ("activation", "hidden_units"), [(Activation.DICE, (4, 3)), (Activation.PRELU, (3,))], ids=["two", "one"]
)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_equals_the_reference(head, activation, hidden_units, training, form):
    settings = (ModelKind.DIN, head, activation, hidden_units)
    weights, *wanted = expected(*settings, training)
    ours = built(*settings, **FORMS[form])
    np.testing.assert_equal(weights_of(ours), weights)
    batch = packed(padded_batch(RAGGED, num_tasks=3))
    logits, loss, gradients = loss_and_gradients(ours, batch, training, task_weights=FACTORS)
    assert logits.shape == (len(RAGGED), 3)
    assert_allclose(logits, wanted[0], rtol=1e-4, atol=2e-5)
    assert_allclose(loss, wanted[1], rtol=1e-5)
    assert_same_gradients(gradients, wanted[2])


def test_mean_pooling_predicts_several_labels_too():
    settings = (ModelKind.MEAN_POOLING, "esmm", Activation.DICE, (3,))
    _, *wanted = expected(*settings, True)
    batch = packed(padded_batch(RAGGED, num_tasks=3))
    logits, _, gradients = loss_and_gradients(built(*settings, native=True), batch, True, task_weights=FACTORS)
    assert_allclose(logits, wanted[0], rtol=1e-4, atol=2e-5)
    assert_same_gradients(gradients, wanted[2])


@pytest.mark.thorough(unless=lambda case: case["native"] or case["head"] == "mmoe")
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_many_ranks_equal_one(head, native):
    """Logits, moving averages and summed gradients, with statistics of batches and dropout; one rank has nothing."""
    settings = {"num_tasks": 2, "task_head": HEADS[head], "activation": Activation.DICE, "dropout": 0.3}
    batch = packed(padded_batch(RAGGED, num_tasks=2))
    shares = ((0, 1, 2), (3, 4, 5, 6, 7), ())
    alone = small_model(native=native, **settings)
    logits, loss, gradients = loss_and_gradients(alone, batch, training=True, task_weights=[1.0, 3.0])
    ranks = ThreadedRanks(len(shares))
    models = [
        small_model(sum_over_ranks=ranks.sum_over_ranks(rank), native=native, **settings) for rank in range(len(shares))
    ]

    def work(rank):
        share = take(batch, shares[rank])
        return loss_and_gradients(models[rank], share, training=True, num_examples=8, task_weights=[1.0, 3.0])

    results = ranks.run(work)
    assert_allclose(np.concatenate([logits for logits, _, _ in results]), logits, rtol=1e-4, atol=1e-5)
    assert_allclose(sum(loss for _, loss, _ in results), loss, rtol=1e-5)
    assert_same_gradients({path: sum(found[path] for _, _, found in results) for path in gradients}, gradients)
    for model in models:
        for weight, wanted in zip(model.non_trainable_weights, alone.non_trainable_weights, strict=True):
            assert_allclose(weight, wanted, rtol=1e-5, atol=1e-6, err_msg=weight.path)


@pytest.mark.thorough(unless=lambda case: case["native"] or case["head"] == "mmoe")
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_graph_trains_as_without_one(head, native):
    """There, shapes must not get lost: dropout and the ranks' messages need them."""
    settings = {"num_tasks": 2, "task_head": HEADS[head], "activation": Activation.DICE, "dropout": 0.3}
    seen = []

    def sum_over_ranks(sums):
        seen.append(sums.shape.num_elements())
        return sums

    model = small_model(native=native, sum_over_ranks=sum_over_ranks, **settings)
    batch = packed(padded_batch(RAGGED, num_tasks=2))
    items, index = items_of(batch)
    batch = batch._replace(distinct_item_ids=items, item_index=index)
    *_, expected = loss_and_gradients(small_model(native=native, **settings), batch, training=True)

    def gradients(batch):
        return loss_and_gradients_in_graph(model, batch, training=True)[2]

    in_graph = tf.function(gradients, input_signature=[batch_signature(num_tasks=2)], autograph=False)
    seen.clear()
    found = {path: gradient.numpy() for path, gradient in in_graph(batch).items()}
    assert_same_gradients(found, expected)
    assert seen and None not in seen


@pytest.mark.thorough(unless=lambda case: case["kind"] is ModelKind.DIN and (case["owners"] or case["head"] == "mmoe"))
@pytest.mark.parametrize("owners", [(), (Owner.USER, Owner.CANDIDATE)], ids=["plain", "features"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", RANKING)
def test_all_candidates_of_a_history_score_as_one_by_one(kind, head, owners):
    """By `score_candidates` and by the catalogue."""
    features = RandomFeatures(owners) if owners else None
    stored = features.stored if features else None
    model = small_model(model=kind, num_tasks=2, task_head=HEADS[head], features=stored)
    history, candidates = [3, 1, 4, 1], list(range(1, NUM_ITEMS + 1))
    batch = padded_batch([len(history)] * NUM_ITEMS, num_tasks=2)
    histories = np.tile(history, (NUM_ITEMS, 1))
    batch = packed(dataclasses.replace(batch, candidate_item_ids=np.array(candidates), history_item_ids=histories))
    given = None
    if features:
        of_history = [encoding for encoding in model.encodings if encoding.spec.owner is not Owner.CANDIDATE]
        missing = missing_values(model.encodings, NUM_ITEMS)
        batch, given = batch._replace(features=missing), missing | missing_values(of_history, 1)
    one_by_one = model(batch).numpy()
    assert one_by_one.std(axis=0).min() > 0.1
    together = model.score_candidates(
        tf.constant(history), tf.constant([len(history)]), tf.constant(candidates), tf.constant([NUM_ITEMS]), given
    )
    assert_allclose(together, one_by_one, rtol=1e-5, atol=1e-5)
    for task in range(2):
        scorer = ModelScorer(model, NUM_ITEMS, task=task)
        found = scorer.of_all(np.array(history), np.array([len(history)]), lambda share: None)
        assert_allclose(found[0], one_by_one[:, task], rtol=1e-5, atol=1e-5)
        some = scorer.of_some(np.array(history), np.array([4]), np.array(candidates), np.array([NUM_ITEMS]))
        assert_allclose(some, one_by_one[:, task], rtol=1e-5, atol=1e-5)


def test_a_chain_by_hand():
    """p = 1/2, then 1/2 * 3/4; logits of 1/2 and of 3/8."""
    found = logits_of_chain(tf.constant([[0.0, np.log(3.0)]], tf.float32))
    assert_allclose(found, [[0.0, np.log(3 / 5)]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [30.0, 100.0, 1e4])
def test_chains_are_finite_however_sure(size):
    conditional = tf.constant([[size, size], [-size, -size], [size, -size], [-size, size]], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(conditional)
        logits = logits_of_chain(conditional)
        labels = tf.constant([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        loss = tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
    assert np.isfinite(logits).all()
    assert np.isfinite(tape.gradient(loss, conditional)).all()
    order = np.argsort(logits[:, 1].numpy())
    assert order[-1] == 0  # the surest


def test_chains_keep_the_digits_of_rare_labels():
    """p = 1e-6 * 1e-6: the logit is its logarithm."""
    rare = np.log(1e-6 / (1 - 1e-6))
    assert_allclose(logits_of_chain(tf.constant([[rare, rare]], tf.float32))[0, 1], np.log(1e-12), rtol=1e-6)


def test_a_tower_begins_as_a_head_of_its_own_would():
    """Kernels side by side are drawn each for its own width; Keras' Glorot of a wider one would be smaller."""
    kernel = side_by_side([50, 50])((30, 100), "float32").numpy()
    bound = np.sqrt(6 / (30 + 50))
    assert np.abs(kernel).max() <= bound
    assert np.abs(kernel).max() > 0.98 * bound
    assert np.abs(kernel[:, :50] - kernel[:, 50:]).max() > 0.1


def test_towers_can_be_saved():
    towers = TaskTowers([4, 3], "dice", 2, "mmoe", 5, dropout=0.1, name="towers")
    assert TaskTowers.from_config(towers.get_config()).get_config() == towers.get_config()


def test_values_of_examples_reach_every_tower():
    features = RandomFeatures((Owner.USER,))
    model = small_model(num_tasks=2, features=features.stored)
    batch = padded_batch(RAGGED, features=features, num_tasks=2)
    ours = packed(batch, features)
    changed = ours._replace(features={**values_of(batch, features), "user_number": tf.fill([len(RAGGED)], 3.0)})
    assert np.abs(model(ours) - model(changed)).min(axis=0).max() > 1e-3

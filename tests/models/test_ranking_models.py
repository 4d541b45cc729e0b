"""What both models promise beyond their formulas; each test runs on DIN and on mean pooling."""

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import schema
from din_dist.assembly import make_model
from din_dist.config import Activation, AttentionNormalization, BatchNorm, ModelConfig, ModelKind
from din_dist.data.pipeline import batch_signature
from din_dist.features.spec import Owner
from din_dist.models.behaviour_model import items_of
from din_dist.schema import Batch
from tests.support.model_kinds import RANKING
from tests.support.owners import OWNERS
from tests.support.reference.compare import (
    FACTS,
    ITEM_FEATURES,
    RAGGED,
    RandomFeatures,
    assert_same_gradients,
    loss_and_gradients,
    packed,
    padded_batch,
    small_model,
    take,
    take_values,
    values_of,
)
from tests.support.reference.ranks import ThreadedRanks

pytestmark = pytest.mark.parametrize("kind", RANKING)

HISTORIES = [[3, 1, 4], [], [5], [9, 2, 6, 5], []]
CANDIDATES = [[1, 3], [7, 7, 8], [], [5], []]  # some histories have none


def initial_weights(kind, seed):
    model = make_model(ModelConfig(model=kind, embedding_dim=(8,)), FACTS, ITEM_FEATURES, seed=seed)
    return {weight.path: weight.numpy() for weight in model.weights}


def score(model, histories, candidates, features=None):
    lengths, counts = ([len(row) for row in rows] for rows in (histories, candidates))
    flat = [tf.constant([item for row in rows for item in row], tf.int32) for rows in (histories, candidates)]
    lengths, counts = (tf.constant(numbers, tf.int32) for numbers in (lengths, counts))
    return model.score_candidates(flat[0], lengths, flat[1], counts, features)


@pytest.mark.parametrize("normalization", AttentionNormalization)
def test_score_candidates_equals_scoring_one_by_one(kind, normalization):
    model = small_model(model=kind, attention_normalization=normalization, activation=Activation.DICE)
    one_by_one = [
        model(
            Batch(
                candidate_item_ids=tf.constant([candidate]),
                history_item_ids=tf.constant(history, tf.int32),
                history_lengths=tf.constant([len(history)]),
            )
        )[0]
        for history, candidates in zip(HISTORIES, CANDIDATES, strict=True)
        for candidate in candidates
    ]
    assert len(set(np.round(one_by_one, 4))) == 5  # six candidates, one of them twice for the same history
    assert_allclose(score(model, HISTORIES, CANDIDATES), one_by_one, rtol=1e-5, atol=1e-6)


def score_with_features(model, features):
    """Returns the logits of all `CANDIDATES` together, and one by one."""
    examples = [row for row, candidates in enumerate(CANDIDATES) for _ in candidates]
    batch = padded_batch([1] * max(len(HISTORIES), len(examples)), features=features)
    values = values_of(batch, features)
    of_histories = {name: take_values(own, range(len(HISTORIES))) for name, own in values.items()}
    of_candidates = {name: take_values(own, range(len(examples))) for name, own in values.items()}
    owner = {name: encoding.spec.owner for name, encoding in features.encodings.items()}
    given = {name: (of_candidates if owner[name] is Owner.CANDIDATE else of_histories)[name] for name in values}
    flat = [item for row in CANDIDATES for item in row]
    one_by_one = [
        model(
            Batch(
                candidate_item_ids=tf.constant([candidate]),
                history_item_ids=tf.constant(HISTORIES[row], tf.int32),
                history_lengths=tf.constant([len(HISTORIES[row])]),
                features={
                    name: take_values(own, [place if owner[name] is Owner.CANDIDATE else row])
                    for name, own in values.items()
                },
            )
        )[0]
        for place, (row, candidate) in enumerate(zip(examples, flat, strict=True))
    ]
    return score(model, HISTORIES, CANDIDATES, given), one_by_one


@pytest.mark.thorough(unless=lambda case: case["kind"] is ModelKind.DIN or case["owners"] == OWNERS)
@pytest.mark.parametrize(
    "owners",
    [OWNERS, (Owner.USER,), (Owner.CONTEXT, Owner.ITEM), (Owner.CANDIDATE,), (Owner.ITEM,)],
    ids=["all", "user", "context, item", "candidate", "item"],
)
def test_the_split_head_equals_scoring_one_by_one(kind, owners):
    """User and context columns go through the head's first layer once a history."""
    features = RandomFeatures(owners)
    model = small_model(model=kind, activation=Activation.DICE, features=features.stored)
    together, one_by_one = score_with_features(model, features)
    assert np.std(one_by_one) > 0.1
    assert_allclose(together, one_by_one, rtol=1e-6, atol=2e-6 * np.abs(one_by_one).max())


def test_features_that_lack_are_named(kind):
    model = small_model(model=kind, features=RandomFeatures((Owner.USER,)).stored)
    with pytest.raises(ValueError, match="features: must have values of user_category"):
        score(model, HISTORIES, CANDIDATES)
    with pytest.raises(ValueError, match="features: must have values of user_category"):
        model(packed(padded_batch(RAGGED)))


def test_score_candidates_of_nothing(kind):
    model = small_model(model=kind)
    assert score(model, [], []).shape == (0,)
    assert score(model, HISTORIES, [[]] * len(HISTORIES)).shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_the_order_of_the_batch_does_not_matter(kind, training):
    model = small_model(model=kind, activation=Activation.DICE, dropout=0.5)
    batch = packed(padded_batch(RAGGED))
    order = np.random.default_rng(1).permutation(len(RAGGED))
    logits = model(batch, training=training).numpy()
    assert_allclose(model(take(batch, order), training=training), logits[order], rtol=1e-4, atol=1e-5)


def test_the_layers_are_created_once(kind):
    """However often and on whatever they are called; the parameters are those of the formulas (H = 3 + 2)."""
    model = small_model(model=kind, activation=Activation.PRELU)
    before = [id(weight) for weight in model.weights]
    tables = 13 * 3 + 5 * 2 + 13
    perceptron = {width: (width * 5 + 5 + 5) + (5 * 4 + 4 + 4) + (4 + 1) for width in (10, 15, 20)}
    interest = 2 * 5 + (5 * 5 + 5)
    head = 2 * 15 + perceptron[15] + perceptron[20] if kind is ModelKind.DIN else 2 * 10 + perceptron[10]
    assert sum(np.prod(weight.shape) for weight in model.trainable_weights) == tables + interest + head
    for lengths in ((1,), (2, 0), ()):
        model(packed(padded_batch(lengths)), training=True)
    score(model, HISTORIES, CANDIDATES)
    assert [id(weight) for weight in model.weights] == before
    assert len({weight.path for weight in model.weights}) == len(before)  # checkpoints keep weights by path


def test_a_graph_traced_once_takes_every_batch(kind):
    model = small_model(model=kind, activation=Activation.DICE, batch_norm=BatchNorm.FROZEN, dropout=0.2)
    in_graph = tf.function(
        lambda batch: model(batch, training=True), input_signature=[batch_signature(model.encodings)]
    )
    for lengths in (RAGGED, (0, 0), (1,), ()):
        batch = packed(padded_batch(lengths))
        items, index = items_of(batch)
        found = in_graph(batch._replace(distinct_item_ids=items, item_index=index))
        assert_allclose(found, model(batch, training=True), rtol=1e-5, atol=1e-6)
    assert in_graph.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("batch_norm", BatchNorm)
def test_a_batch_without_examples_gives_zero_gradients_and_moves_no_average(kind, batch_norm):
    """The share of a rank in the last, partial batch of an epoch."""
    model = small_model(model=kind, activation=Activation.DICE, batch_norm=batch_norm)
    averages = [weight.numpy() for weight in model.non_trainable_weights]
    logits, loss, gradients = loss_and_gradients(model, packed(padded_batch(())), training=True, num_examples=8)
    assert logits.shape == (0,)
    assert loss == 0
    for path, gradient in gradients.items():
        assert_array_equal(gradient, np.zeros_like(gradient), err_msg=path)
    for weight, before in zip(model.non_trainable_weights, averages, strict=True):
        assert_array_equal(weight, before, err_msg=weight.path)


@pytest.mark.thorough(
    unless=lambda case: not case["compiled"] or (case["kind"], len(case["shares"])) == (ModelKind.DIN, 3)
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shares", [((0, 1, 2), (3, 4, 5, 6, 7)), ((0, 1), (2, 3, 4, 5, 6, 7), ())], ids=["2", "3"])
def test_many_ranks_equal_one(kind, shares, compiled):
    """Logits, moving averages and summed gradients under synced batch norm, Dice and dropout; one rank has nothing."""
    settings = {"model": kind, "activation": Activation.DICE, "dropout": 0.3}
    batch = packed(padded_batch(RAGGED))
    alone = small_model(**settings)
    logits, loss, gradients = loss_and_gradients(alone, batch, training=True)

    ranks = ThreadedRanks(len(shares))
    models = [
        small_model(sum_over_ranks=ranks.sum_over_ranks(rank), compiled=compiled, **settings)
        for rank in range(len(shares))
    ]
    results = ranks.run(
        lambda rank: loss_and_gradients(models[rank], take(batch, shares[rank]), training=True, num_examples=8)
    )
    assert_allclose(np.concatenate([logits for logits, _, _ in results]), logits, rtol=1e-4, atol=1e-5)
    assert_allclose(sum(loss for _, loss, _ in results), loss, rtol=1e-5)
    assert_same_gradients({path: sum(found[path] for _, _, found in results) for path in gradients}, gradients)
    for model in models:
        for weight, expected in zip(model.non_trainable_weights, alone.non_trainable_weights, strict=True):
            assert_allclose(weight, expected, rtol=1e-5, atol=1e-6, err_msg=weight.path)


def test_dropout_acts_in_training_only_and_keeps_to_the_example(kind):
    model = small_model(model=kind, dropout=0.5, batch_norm=BatchNorm.FROZEN)
    without = small_model(model=kind, batch_norm=BatchNorm.FROZEN)
    batch = packed(padded_batch(RAGGED))
    assert_array_equal(model(batch), without(batch))
    together = model(batch, training=True)
    assert np.abs(together - without(batch, training=True)).max() > 0.01
    alone = tf.concat([model(take(batch, [i]), training=True) for i in range(len(RAGGED))], axis=0)
    assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_make_model_depends_on_the_seed_alone(kind):
    first = initial_weights(kind, seed=1)
    tf.random.uniform([3])  # what was drawn before changes nothing
    again, other = initial_weights(kind, seed=1), initial_weights(kind, seed=2)
    for path, values in first.items():
        assert_array_equal(again[path], values, err_msg=path)
        if values.std() > 0:  # was drawn
            assert np.abs(other[path] - values).max() > 1e-3, path


def test_no_two_weights_start_equal(kind):
    """Keras 3 repeats the values of an initializer: layers or tables of one shape must not share one."""
    facts = schema.DatasetFacts(1, 12, 1, False, {"category_id": 12, "brand": 12}, 0, 0, "", {})
    features = {name: np.arange(13, dtype=np.int32) for name in facts.item_features}
    config = ModelConfig(model=kind, embedding_dim=(4,), hidden_units=(12, 12, 12), attention_hidden_units=(12, 12, 12))
    model = make_model(config, facts, features, seed=0)
    drawn = [weight.numpy().ravel() for weight in model.weights if weight.numpy().std() > 0]
    assert len(drawn) >= 3 + 1 + 4
    assert len({tuple(np.sort(values)[:8]) for values in drawn}) == len(drawn)


@pytest.mark.parametrize("activation", Activation)
def test_logits_are_finite_however_far_the_weights_have_gone(kind, activation):
    model = small_model(model=kind, activation=activation)
    for weight in model.trainable_weights:
        weight.assign(1e3 * weight)
    batch = packed(padded_batch(RAGGED))
    for training in (True, False):
        logits, _, gradients = loss_and_gradients(model, batch, training)
        assert np.isfinite(logits).all()
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_weights_survive_saving_and_loading(kind, tmp_path):
    batch = packed(padded_batch(RAGGED))
    model = small_model(seed=1, model=kind, activation=Activation.DICE)
    model.save_weights(tmp_path / "model.weights.h5")
    other = small_model(seed=2, model=kind, activation=Activation.DICE)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_array_equal(other(batch), model(batch))

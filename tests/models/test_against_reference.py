"""The packed models against the padded float64 reference: logits, loss, and the gradient of every parameter."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from din_dist.config import Activation, AttentionNormalization, BatchNorm, ModelKind
from din_dist.features.spec import Owner
from tests.support.model_kinds import RANKING
from tests.support.owners import OWNERS
from tests.support.reference.compare import (
    FORMS,
    ITEM_FEATURES,
    RAGGED,
    RandomFeatures,
    assert_same_gradients,
    loss_and_gradients,
    packed,
    padded_batch,
    small_model,
    weights_of,
)
from tests.support.reference.padded_din import PaddedModel, attention_weights, central_differences, scope

VARIANTS = [
    *itertools.product([ModelKind.DIN], Activation, AttentionNormalization),
    *itertools.product([ModelKind.MEAN_POOLING], Activation, [AttentionNormalization.SOFTMAX]),
]


@functools.cache
def expected(lengths, model, activation, normalization, batch_norm, batch_statistics, seed):
    """Returns what every form must give: weights, logits, loss, and the gradients by central differences."""
    batch = padded_batch(lengths, seed)
    settings = {"model": model, "activation": activation}
    ours = small_model(seed, attention_normalization=normalization, batch_norm=batch_norm, **settings)
    reference = PaddedModel(ITEM_FEATURES, normalization=normalization, batch_statistics=batch_statistics, **settings)
    weights = weights_of(ours)
    trainable = [weight.path for weight in ours.trainable_weights]
    gradients = central_differences(lambda changed: reference.loss(changed, batch), weights, trainable)
    return weights, reference.logits(weights, batch), reference.loss(weights, batch), gradients


def compare(lengths, training, model, activation, normalization, batch_norm, seed=0, form="plain"):
    batch_statistics = training and batch_norm is BatchNorm.SYNCED
    weights, *wanted = expected(tuple(lengths), model, activation, normalization, batch_norm, batch_statistics, seed)
    ours = small_model(
        seed,
        model=model,
        activation=activation,
        attention_normalization=normalization,
        batch_norm=batch_norm,
        **FORMS[form],
    )
    np.testing.assert_equal(weights_of(ours), weights)
    logits, loss, gradients = loss_and_gradients(ours, packed(padded_batch(lengths, seed)), training)
    np.testing.assert_allclose(logits, wanted[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, wanted[1], rtol=1e-5)
    assert_same_gradients(gradients, wanted[2])


def all_forms_of_dice(case):
    return case["form"] == "native" or (
        case["activation"] is Activation.DICE and case["batch_norm"] is BatchNorm.SYNCED
    )


@pytest.mark.thorough(unless=all_forms_of_dice)
@pytest.mark.parametrize(("training", "form"), [*((True, form) for form in FORMS), (False, "plain")])
@pytest.mark.parametrize("batch_norm", BatchNorm)
@pytest.mark.parametrize(("model", "activation", "normalization"), VARIANTS)
def test_every_variant_equals_the_reference(model, activation, normalization, batch_norm, training, form):
    compare(RAGGED, training, model, activation, normalization, batch_norm, form=form)


def all_forms_of_nothing_and_of_full_histories(case):
    return case["form"] == "native" or (case["lengths"] in ((0,), (12, 12)) and case["batch_norm"] is BatchNorm.SYNCED)


@pytest.mark.thorough(unless=all_forms_of_nothing_and_of_full_histories)
@pytest.mark.parametrize(
    "lengths", [(0,), (1,), (12,), (0, 0, 0), (1, 1, 1), (12, 12), (0, 0, 1)], ids=lambda lengths: str(list(lengths))
)
@pytest.mark.parametrize("model", RANKING)
@pytest.mark.parametrize("batch_norm", BatchNorm)
@pytest.mark.parametrize("form", FORMS)
def test_batches_at_the_edges_equal_the_reference(form, model, batch_norm, lengths):
    """One example, no history anywhere, length one only, the longest only; Dice, for it takes statistics."""
    compare(lengths, True, model, Activation.DICE, AttentionNormalization.SOFTMAX, batch_norm, form=form)


NARROW = {"activation": Activation.DICE, "hidden_units": (3,), "attention_hidden_units": (3,)}


@functools.cache
def expected_with_features(lengths, model, owners):
    batch = padded_batch(lengths, features=RandomFeatures(owners))
    features = RandomFeatures(owners)
    ours = small_model(model=model, features=features.stored, **NARROW)
    reference = PaddedModel(ITEM_FEATURES, model, "dice", batch_statistics=True, features=features.of_reference)
    weights = weights_of(ours)
    trainable = [weight.path for weight in ours.trainable_weights]
    gradients = central_differences(lambda changed: reference.loss(changed, batch), weights, trainable)
    return reference.logits(weights, batch), reference.loss(weights, batch), gradients


@pytest.mark.thorough(
    unless=lambda case: case["form"] == "native" or (case["model"], case["owners"]) == (ModelKind.DIN, OWNERS)
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("owners", [OWNERS, (Owner.ITEM,), (Owner.USER,)], ids=["all", "item", "user"])
@pytest.mark.parametrize("model", RANKING)
def test_features_of_every_form_equal_the_reference(model, owners, form):
    """Lists of every pooling, numbers of every encoding, frozen and trained vectors; a third of all is missing."""
    wanted_logits, wanted_loss, wanted = expected_with_features(RAGGED, model, owners)
    features = RandomFeatures(owners)
    ours = small_model(model=model, features=features.stored, **NARROW, **FORMS[form])
    batch = packed(padded_batch(RAGGED, features=features), features)
    logits, loss, gradients = loss_and_gradients(ours, batch, training=True)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert_same_gradients(gradients, wanted)


@functools.cache
def expected_without_projection(model):
    batch = padded_batch(RAGGED)
    ours = small_model(model=model, interest_projection=False, **NARROW)
    reference = PaddedModel(ITEM_FEATURES, model, "dice", batch_statistics=True)
    weights = weights_of(ours)
    trainable = [weight.path for weight in ours.trainable_weights]
    assert not any("projection" in path for path in trainable)
    gradients = central_differences(lambda changed: reference.loss(changed, batch), weights, trainable)
    return reference.logits(weights, batch), reference.loss(weights, batch), gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", RANKING)
def test_interests_without_a_projection_equal_the_reference(model, form):
    wanted_logits, wanted_loss, wanted = expected_without_projection(model)
    ours = small_model(model=model, interest_projection=False, **NARROW, **FORMS[form])
    logits, loss, gradients = loss_and_gradients(ours, packed(padded_batch(RAGGED)), training=True)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert_same_gradients(gradients, wanted)


@pytest.mark.parametrize("seed", range(1, 4))
def test_random_ragged_batches_equal_the_reference(seed):
    lengths = np.random.default_rng(seed).integers(0, 13, 16)
    compare(lengths, True, ModelKind.DIN, Activation.DICE, AttentionNormalization.SOFTMAX, BatchNorm.SYNCED, seed)


@pytest.mark.parametrize("model", RANKING)
def test_items_told_by_their_features_alone_equal_the_reference(model):
    """Items 2, 5 and 9 have no row of their own, and a third of the others are hidden: row 0 and their features."""
    row_of_item = np.array([0, 1, 0, 3, 4, 0, 6, 7, 8, 0, 10, 11, 12], np.int32)
    batch = padded_batch(RAGGED)
    random = np.random.default_rng(3)
    hidden = {
        name: np.where(random.random(ids.shape) < 1 / 3, -ids, ids)
        for name in ("candidate_item_ids", "history_item_ids")
        for ids in [getattr(batch, name)]
    }
    batch = dataclasses.replace(batch, **hidden)
    batch.candidate_item_ids[:2] = [5, -3]
    ours = small_model(model=model, row_of_item=row_of_item, activation=Activation.DICE)
    reference = PaddedModel(ITEM_FEATURES, model, "dice", batch_statistics=True, row_of_item=row_of_item)
    weights = weights_of(ours)
    logits, _, gradients = loss_and_gradients(ours, packed(batch), training=True)
    np.testing.assert_allclose(logits, reference.logits(weights, batch), rtol=1e-4, atol=1e-5)
    trainable = [weight.path for weight in ours.trainable_weights]
    expected = central_differences(lambda changed: reference.loss(changed, batch), weights, trainable)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("normalization", AttentionNormalization)
@pytest.mark.parametrize("activation", Activation)
def test_attention_weights_equal_the_reference(activation, normalization):
    batch = padded_batch(RAGGED)
    ours = small_model(activation=activation, attention_normalization=normalization)
    reference, weights = PaddedModel(ITEM_FEATURES), weights_of(ours)
    candidate, keys = (reference.embed(weights, ids) for ids in (batch.candidate_item_ids, batch.history_item_ids))
    unit = scope(weights, "model/attention/")
    expected = attention_weights(
        unit, candidate, keys, batch.history_mask, activation, normalization, batch_statistics=False
    )
    found = ours.attention_weights(packed(batch)).numpy()
    np.testing.assert_allclose(found, expected[batch.history_mask], rtol=1e-4, atol=1e-5)
    if normalization is AttentionNormalization.SOFTMAX:
        sums = np.bincount(np.nonzero(batch.history_mask)[0], found, len(RAGGED))
        np.testing.assert_allclose(sums, np.array(RAGGED) > 0, rtol=1e-5)


def test_mean_pooling_looks_at_nothing_in_particular():
    assert small_model(model=ModelKind.MEAN_POOLING).attention_weights(packed(padded_batch(RAGGED))) is None

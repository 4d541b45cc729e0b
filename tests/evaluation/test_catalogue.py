"""All items at once have the logits that they have one by one."""

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

import din_dist.evaluation.catalogue
from din_dist.config import Activation, AttentionKind, AttentionNormalization, BatchNorm, ModelKind
from din_dist.evaluation.catalogue import CatalogueScorer, VectorCatalogue, catalogue_of
from din_dist.features.gathering import missing_values
from din_dist.features.spec import Owner
from tests.support.model_kinds import RANKING, RETRIEVAL
from tests.support.reference.compare import RandomFeatures, padded_batch, small_model, take_values, values_of

NUM_ITEMS = 12
HISTORIES = [[3, 1, 4], [], [5], [9, 2, 6, 5], [3, 3, 3], [], [12, 1]]


def one_by_one(model, histories, features=None):
    lengths = [len(history) for history in histories]
    flat = tf.constant([item for history in histories for item in history], tf.int32)
    candidates = tf.tile(tf.range(1, NUM_ITEMS + 1), [len(histories)])
    counts = tf.fill([len(histories)], NUM_ITEMS)
    logits = model.score_candidates(flat, tf.constant(lengths, tf.int32), candidates, counts, features)
    return logits.numpy().reshape(len(histories), NUM_ITEMS)


def at_once(model, histories, features=None):
    flat = np.array([item for history in histories for item in history], np.int32)
    lengths = np.array([len(history) for history in histories])
    return CatalogueScorer(model, NUM_ITEMS).logits(flat, lengths, features=features)


def vectors_at_once(model, histories, features=None):
    flat = np.array([item for history in histories for item in history], np.int32)
    lengths = np.array([len(history) for history in histories])
    catalogue = catalogue_of(model, NUM_ITEMS)
    assert isinstance(catalogue, VectorCatalogue)
    told = []
    found = catalogue.logits(flat, lengths, told.append, features)
    assert told[-1] == 1
    return found


@pytest.mark.parametrize("bytes_at_once", [2**28, 200])
@pytest.mark.parametrize("kind", RETRIEVAL)
def test_models_that_find_items_score_all_by_their_vectors(kind, bytes_at_once, monkeypatch):
    """In blocks of items and of users of any size."""
    monkeypatch.setattr(din_dist.evaluation.catalogue, "SCORES_BYTES", bytes_at_once)
    monkeypatch.setattr(din_dist.evaluation.catalogue, "ITEMS_AT_ONCE", 5)
    model = small_model(model=kind, temperature=0.5)
    expected = one_by_one(model, HISTORIES)
    assert expected.std() > 0.05
    assert_allclose(vectors_at_once(model, HISTORIES), expected, rtol=1e-4, atol=1e-5)


def test_features_of_users_count_in_their_vectors():
    features = RandomFeatures((Owner.USER, Owner.CONTEXT, Owner.ITEM))
    model = small_model(model=ModelKind.YOUTUBE_DNN, features=features.stored)
    values = values_of(padded_batch([1] * len(HISTORIES), features=features), features)
    expected = one_by_one(model, HISTORIES, values)
    assert_allclose(vectors_at_once(model, HISTORIES, values), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    others = {name: take_values(own, [1, 0, 2, 3, 4, 5, 6]) for name, own in values.items()}
    assert np.abs(vectors_at_once(model, HISTORIES, others)[:2] - expected[:2]).max(axis=1).min() > 0.01


def far_from_the_start(model):
    """Weights, moving averages and item biases that all matter."""
    random = np.random.default_rng(5)
    for weight in model.weights:
        noise = random.uniform(0.3, 1.0, weight.shape)
        weight.assign(noise if "variance" in weight.path else weight + noise - 0.6)
    return model


@pytest.mark.parametrize("rows", [16_384, 5])
@pytest.mark.parametrize("normalization", AttentionNormalization)
@pytest.mark.parametrize("kind", [ModelKind.DIN, ModelKind.MEAN_POOLING])
def test_logits_are_those_of_one_by_one(kind, normalization, rows, monkeypatch):
    """In blocks of any size; also of empty histories and of repeated items."""
    monkeypatch.setattr(din_dist.evaluation.catalogue, "PAIRS_AT_ONCE", rows)
    model = far_from_the_start(
        small_model(model=kind, attention_normalization=normalization, activation=Activation.DICE)
    )
    expected = one_by_one(model, HISTORIES)
    assert expected.std() > 0.1
    assert_allclose(at_once(model, HISTORIES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough(unless=lambda case: case["activation"] in (Activation.DICE, Activation.SIGMOID))
@pytest.mark.parametrize("activation", Activation)
def test_any_activation_and_frozen_statistics(activation):
    model = far_from_the_start(small_model(activation=activation, batch_norm=BatchNorm.FROZEN))
    assert_allclose(at_once(model, HISTORIES), one_by_one(model, HISTORIES), rtol=1e-4, atol=1e-5)


def test_attention_by_products():
    model = far_from_the_start(small_model(attention=AttentionKind.DOT))
    expected = one_by_one(model, HISTORIES)
    assert expected.std() > 0.1
    assert_allclose(at_once(model, HISTORIES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RANKING)
def test_interests_without_a_projection(kind):
    model = far_from_the_start(small_model(model=kind, interest_projection=False))
    expected = one_by_one(model, HISTORIES)
    assert expected.std() > 0.1
    assert_allclose(at_once(model, HISTORIES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RANKING)
def test_features_of_the_event_count_for_every_candidate(kind):
    """Of users, contexts and items."""
    features = RandomFeatures((Owner.USER, Owner.CONTEXT, Owner.ITEM))
    model = far_from_the_start(small_model(model=kind, features=features.stored))
    values = values_of(padded_batch([1] * len(HISTORIES), features=features), features)
    expected = one_by_one(model, HISTORIES, values)
    found = at_once(model, HISTORIES, values)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    others = {name: take_values(own, [1, 0, 2, 3, 4, 5, 6]) for name, own in values.items()}
    assert np.abs(at_once(model, HISTORIES, others)[:2] - found[:2]).max(axis=1).min() > 0.01


def test_items_that_no_event_has_shown_lack_the_candidates_own_features():
    features = RandomFeatures()
    model = far_from_the_start(small_model(features=features.stored))
    values = values_of(padded_batch([1] * len(HISTORIES), features=features), features)
    own = [encoding for encoding in model.encodings if encoding.spec.owner is Owner.CANDIDATE]
    values |= missing_values(own, len(HISTORIES) * NUM_ITEMS)
    expected = one_by_one(model, HISTORIES, values)
    found = at_once(model, HISTORIES, values)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_large_blocks_are_cut_by_their_memory(monkeypatch):
    monkeypatch.setattr(din_dist.evaluation.catalogue, "SCORES_BYTES", 100)  # ten keys: two candidates at once
    model = far_from_the_start(small_model())
    assert_allclose(at_once(model, HISTORIES), one_by_one(model, HISTORIES), rtol=1e-4, atol=1e-5)


def test_nobody_asks():
    assert at_once(small_model(), []).shape == (0, NUM_ITEMS)
    assert at_once(small_model(), [[]]).shape == (1, NUM_ITEMS)

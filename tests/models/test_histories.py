"""Several histories of an example, each with its own attention or a shared one, against the float64 reference."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf

from din_dist.config import Activation, AttentionNormalization, ModelKind
from din_dist.data.pipeline import batch_signature
from din_dist.models.behaviour_model import items_of
from din_dist.schema import Batch, NamedHistory
from tests.support.reference.compare import (
    FORMS,
    ITEM_FEATURES,
    RAGGED,
    assert_same_gradients,
    loss_and_gradients,
    loss_and_gradients_in_graph,
    packed,
    padded_batch,
    small_model,
    weights_of,
)
from tests.support.reference.padded_din import PaddedBatch, PaddedModel, central_differences
from tests.support.reference.ranks import ThreadedRanks

NAMES = ("click", "buy", "skipped")
HISTORIES = [NamedHistory(name, 20) for name in NAMES]
OTHERS = [(0, 2, 0, 4, 1, 0, 3, 1), (5, 0, 0, 1, 0, 2, 0, 6)]  # their lengths, beside RAGGED
CASES = {
    "own": {},
    "shared": {"share_attention": True},
    "paper": {"attention_normalization": AttentionNormalization.NONE, "activation": Activation.DICE},
    "mean": {"model": ModelKind.MEAN_POOLING},
}


def batch_of(seed: int = 0) -> PaddedBatch:
    return padded_batch(RAGGED, seed=seed, other_lengths=OTHERS)


def reference_of(batch_statistics: bool, **config) -> PaddedModel:
    return PaddedModel(
        ITEM_FEATURES,
        str(config.get("model", "din")),
        str(config.get("activation", "sigmoid")),
        str(config.get("attention_normalization", "softmax")),
        batch_statistics,
        other_histories=NAMES[1:],
        share_attention=config.get("share_attention", False),
    )


@functools.cache
def expected(case: str):
    """Returns what every form must give: logits, loss, and the gradients by central differences."""
    reference, batch = reference_of(True, **CASES[case]), batch_of()
    model = small_model(histories=HISTORIES, **CASES[case])
    weights = weights_of(model)
    names = [weight.path for weight in model.trainable_weights]
    gradients = central_differences(lambda changed: reference.loss(changed, batch), weights, names)
    return reference.logits(weights, batch), reference.loss(weights, batch), gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_training_is_the_reference(case, form):
    model = small_model(histories=HISTORIES, **CASES[case], **FORMS[form])
    logits, loss, gradients = loss_and_gradients(model, packed(batch_of()), training=True)
    wanted_logits, wanted_loss, wanted_gradients = expected(case)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_same_gradients(gradients, wanted_gradients)


@pytest.mark.parametrize("case", CASES)
def test_inference_is_the_reference(case):
    model, batch = small_model(histories=HISTORIES, **CASES[case]), batch_of(seed=1)
    weights, reference = weights_of(model), reference_of(False, **CASES[case])
    np.testing.assert_allclose(model(packed(batch)), reference.logits(weights, batch), rtol=1e-4, atol=1e-5)
    own = packed(batch)
    found = model.score_candidates(
        own.history_item_ids, own.history_lengths, own.candidate_item_ids, tf.ones(len(RAGGED), tf.int32)
    )
    np.testing.assert_allclose(found, reference.logits(weights, batch), rtol=1e-4, atol=1e-5)


def test_many_candidates_share_the_histories_of_a_user():
    model, batch = small_model(histories=HISTORIES), batch_of(seed=2)
    own, counts = packed(batch), np.array([2, 0, 1, 3, 1, 0, 1, 2])
    candidates = np.random.default_rng(0).integers(1, 13, counts.sum())
    rows = np.repeat(np.arange(len(counts)), counts)
    repeated = dataclasses.replace(
        batch,
        candidate_item_ids=candidates,
        history_item_ids=batch.history_item_ids[rows],
        history_mask=batch.history_mask[rows],
        labels=np.zeros(len(rows)),
        other_histories=[(ids[rows], mask[rows]) for ids, mask in batch.other_histories],
    )
    found = model.score_candidates(
        own.history_item_ids,
        own.history_lengths,
        tf.constant(candidates, tf.int32),
        tf.constant(counts, tf.int32),
    )
    wanted = reference_of(False).logits(weights_of(model), repeated)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("native", [False, True])
def test_a_graph_trains_as_without_one(native):
    """With Dice and dropout, from a batch as the pipeline makes it."""
    settings = {"histories": HISTORIES, "activation": Activation.DICE, "dropout": 0.3}
    batch = packed(batch_of())
    items, index = items_of(batch)
    batch = batch._replace(distinct_item_ids=items, item_index=index)
    *_, wanted = loss_and_gradients(small_model(**settings), batch, training=True)
    model = small_model(native=native, **settings)

    def gradients(batch):
        return loss_and_gradients_in_graph(model, batch, training=True)[2]

    in_graph = tf.function(gradients, input_signature=[batch_signature()], autograph=False)
    found = {path: gradient.numpy() for path, gradient in in_graph(batch).items()}
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("native", [False, True])
def test_two_ranks_are_one(native):
    """Each history has batch statistics of its own, which the ranks sum."""
    whole = batch_of()
    *_, wanted = loss_and_gradients(small_model(histories=HISTORIES, native=native), packed(whole), training=True)
    parts = [slice(0, 3), slice(3, len(RAGGED))]

    ranks = ThreadedRanks(2)

    def train(rank: int):
        own = parts[rank]
        batch = dataclasses.replace(
            whole,
            candidate_item_ids=whole.candidate_item_ids[own],
            history_item_ids=whole.history_item_ids[own],
            history_mask=whole.history_mask[own],
            labels=whole.labels[own],
            other_histories=[(ids[own], mask[own]) for ids, mask in whole.other_histories],
        )
        model = small_model(histories=HISTORIES, native=native, sum_over_ranks=ranks.sum_over_ranks(rank))
        return loss_and_gradients(model, packed(batch), training=True, num_examples=len(RAGGED))[2]

    of_ranks = ranks.run(train)
    summed = {path: sum(gradients[path] for gradients in of_ranks) for path in wanted}
    assert_same_gradients(summed, wanted)


def test_the_attention_of_each_history_is_its_own():
    """The weights of positions, history after history; each sums to 1 over a history."""
    model, batch = small_model(histories=HISTORIES), packed(batch_of())
    weights, lengths = model.attention_weights(batch).numpy(), batch.history_lengths.numpy()
    sums = [own.sum() for own in np.split(weights, np.cumsum(lengths)[:-1])]
    np.testing.assert_allclose(sums, lengths > 0, atol=1e-5)


def test_one_history_with_a_name_is_the_model_without():
    batch = packed(padded_batch(RAGGED))
    named, unnamed = small_model(histories=[NamedHistory("all", 20)]), small_model()
    assert [weight.path for weight in named.weights] == [weight.path for weight in unnamed.weights]
    assert np.array_equal(named(batch), unnamed(batch))


def test_a_candidate_reads_the_newest_of_its_own_category():
    """By `score_candidates`, which gets all behaviours, as by batches that have each candidate's own."""
    longest = 3
    model = small_model(histories=[NamedHistory("all", 20), NamedHistory("long", longest, "category_id")])
    random, lengths, long_lengths = np.random.default_rng(0), [3, 0, 5], [40, 9, 0]
    recent = [random.integers(1, 13, length) for length in lengths]
    everything = [random.integers(1, 13, length) for length in long_lengths]
    category_of = ITEM_FEATURES["category_id"]
    counts = np.array([7, 3, 2])
    users = np.repeat(np.arange(3), counts)
    candidates = random.integers(1, 13, counts.sum())
    found = model.score_candidates(
        tf.constant(np.concatenate([*recent, *everything]), tf.int32),
        tf.constant([*lengths, *long_lengths], tf.int32),
        tf.constant(candidates, tf.int32),
        tf.constant(counts, tf.int32),
    )
    own = []
    for user, candidate in zip(users, candidates, strict=True):
        items = everything[user]
        own.append(items[category_of[items] == category_of[candidate]][-longest:])
    of_examples = [recent[user] for user in users]
    batch = Batch(
        candidate_item_ids=tf.constant(candidates, tf.int32),
        history_item_ids=tf.constant(np.concatenate([*of_examples, *own]), tf.int32),
        history_lengths=tf.constant([*map(len, of_examples), *map(len, own)], tf.int32),
    )
    np.testing.assert_allclose(found, model(batch), rtol=1e-5, atol=1e-6)
    assert {*map(len, own)} == {0, 1, 2, 3} or max(map(len, own)) == longest

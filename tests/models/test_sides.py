"""Side information of behaviours: beside the key in the attention and in what is pooled, against the reference."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from din_dist.config import Activation, AttentionNormalization, ModelKind
from din_dist.errors import InputError
from din_dist.features.sides import distinct_sides
from din_dist.models.behaviour_model import Sides, items_of
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
    side_information,
    small_model,
    take,
    weights_of,
)
from tests.support.reference.padded_din import PaddedBatch, PaddedModel, central_differences
from tests.support.reference.ranks import ThreadedRanks

SIDES = {"action": 2, "age": 3}  # their widths
OTHERS = [(0, 2, 0, 4, 1, 0, 3, 1)]
CASES: dict[str, dict] = {
    "own": {},
    "paper": {"attention_normalization": AttentionNormalization.NONE, "activation": Activation.DICE},
    "mean": {"model": ModelKind.MEAN_POOLING},
    "two histories": {"histories": [NamedHistory("click", 20), NamedHistory("buy", 20)]},
    "shared": {"histories": [NamedHistory("click", 20), NamedHistory("buy", 20)], "share_attention": True},
}


def model_of(case: str, **settings):
    return small_model(features=side_information(**SIDES), **CASES[case], **settings)


def batch_of(case: str, seed: int = 0) -> PaddedBatch:
    return padded_batch(RAGGED, seed, other_lengths=OTHERS if "histories" in CASES[case] else (), sides=tuple(SIDES))


def reference_of(case: str, batch_statistics: bool) -> PaddedModel:
    config = CASES[case]
    return PaddedModel(
        ITEM_FEATURES,
        str(config.get("model", "din")),
        str(config.get("activation", "sigmoid")),
        str(config.get("attention_normalization", "softmax")),
        batch_statistics,
        other_histories=("buy",) if "histories" in config else (),
        share_attention=config.get("share_attention", False),
        sides=tuple(SIDES),
    )


@pytest.mark.parametrize("case", ["own", "mean"])
def test_an_interest_of_behaviours_with_features_needs_its_projection(case: str):
    with pytest.raises(InputError) as caught:
        model_of(case, interest_projection=False)
    assert str(caught.value) == (
        "--interest_projection: must stay where behaviours have features of their own, because it brings interests to "
        "the item's width. Received: 'no'. Drop --nointerest_projection, or those features."
    )


@functools.cache
def expected(case: str):
    """Returns what every form must give: logits, loss, and the gradients by central differences."""
    reference, batch, model = reference_of(case, True), batch_of(case), model_of(case)
    weights = weights_of(model)
    names = [weight.path for weight in model.trainable_weights]
    gradients = central_differences(lambda changed: reference.loss(changed, batch), weights, names)
    return reference.logits(weights, batch), reference.loss(weights, batch), gradients


@pytest.mark.parametrize(
    ("case", "form"), [(case, form) for case in CASES for form in FORMS if case == "own" or "compiled" not in form]
)
def test_training_is_the_reference(case, form):
    logits, loss, gradients = loss_and_gradients(model_of(case, **FORMS[form]), packed(batch_of(case)), training=True)
    wanted_logits, wanted_loss, wanted_gradients = expected(case)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_same_gradients(gradients, wanted_gradients)
    assert np.abs(gradients["sides/action"]).max() > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_inference_is_the_reference(case):
    model, batch = model_of(case), batch_of(case, seed=1)
    wanted = reference_of(case, False).logits(weights_of(model), batch)
    own = packed(batch)
    np.testing.assert_allclose(model(own), wanted, rtol=1e-4, atol=1e-5)
    ones = tf.ones(len(RAGGED), tf.int32)
    given = own.history_item_ids, own.history_lengths, own.candidate_item_ids, ones
    found = model.score_candidates(*given, sides=Sides(own.sides, own.side_index))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("native", [False, True])
def test_a_graph_trains_as_without_one(native):
    """With Dice and dropout, where static shapes are not known."""
    settings = {"activation": Activation.DICE, "dropout": 0.3}
    batch = packed(batch_of("two histories"))
    items, index = items_of(batch)
    batch = batch._replace(distinct_item_ids=items, item_index=index)
    *_, wanted = loss_and_gradients(model_of("two histories", **settings), batch, training=True)
    model = model_of("two histories", native=native, **settings)
    unknown = tf.nest.map_structure(lambda values: tf.TensorSpec([None] * values.shape.rank, values.dtype), batch)

    def gradients(batch: Batch):
        return loss_and_gradients_in_graph(model, batch, training=True)[2]

    in_graph = tf.function(gradients, input_signature=[unknown], autograph=False)
    found = {path: gradient.numpy() for path, gradient in in_graph(batch).items()}
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("native", [False, True])
def test_two_ranks_are_one(native):
    whole = packed(batch_of("own"))
    *_, wanted = loss_and_gradients(model_of("own", native=native), whole, training=True)
    ranks, parts = ThreadedRanks(2), [[*range(3)], [*range(3, len(RAGGED))]]

    def train(rank: int):
        model = model_of("own", native=native, sum_over_ranks=ranks.sum_over_ranks(rank))
        return loss_and_gradients(model, take(whole, parts[rank]), training=True, num_examples=len(RAGGED))[2]

    of_ranks = ranks.run(train)
    assert_same_gradients({path: sum(gradients[path] for gradients in of_ranks) for path in wanted}, wanted)


def test_the_attention_of_the_report_is_that_of_the_pass():
    """The weights of a softmax sum to 1 for each candidate with a history."""
    model, batch = model_of("own"), packed(batch_of("own"))
    weights = model.attention_weights(batch).numpy()
    ends = np.cumsum(batch.history_lengths)
    sums = [weights[end - length : end].sum() for end, length in zip(ends, batch.history_lengths, strict=True)]
    np.testing.assert_allclose(sums, np.minimum(batch.history_lengths, 1), rtol=1e-5)


def test_shares_of_unknown_ids_count_positions():
    model, batch = model_of("own"), packed(batch_of("own"))
    batch = batch._replace(distinct_item_ids=tf.unique(batch.history_item_ids)[0])
    index = tf.zeros([len(RAGGED) + len(batch.history_item_ids)], tf.int32)
    shares = model.unknown_ids(batch._replace(item_index=index)).numpy()
    names = [spec.name for spec in model.specs_of_ids]
    rows = tf.gather(batch.sides["age"], batch.side_index).numpy()
    assert shares[names.index("age")] == pytest.approx(np.mean(rows == 0))


def test_each_combination_stands_once():
    random = np.random.default_rng(0)
    values = {name: random.integers(0, most, 200).astype(np.int32) for name, most in (("a", 3), ("b", 5), ("c", 2))}
    found, index = distinct_sides({name: tf.constant(own) for name, own in values.items()})
    for name, own in values.items():
        np.testing.assert_array_equal(tf.gather(found[name], index), own)
    assert len({*zip(*(own.tolist() for own in values.values()), strict=True)}) == len(found["a"])


def test_no_positions_have_no_combinations():
    found, index = distinct_sides({"a": tf.zeros([0], tf.int32), "b": tf.zeros([0], tf.int32)})
    assert (len(found["a"]), len(found["b"]), len(index)) == (0, 0, 0)

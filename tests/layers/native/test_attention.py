"""The attention's own kernels against the float64 reference, and against the same unit by TensorFlow's operations."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import kernels
from din_dist.config import Activation, AttentionNormalization
from din_dist.execution import TRAINING
from din_dist.layers.packed import segment_ids
from din_dist.layers.pairs import Pairs
from tests.support.native_layers import (
    KERNELS,
    assert_units_agree,
    built,
    large_inputs,
    large_sides,
    run,
    with_padding,
)
from tests.support.processor import need_instructions
from tests.support.reference import padded_din
from tests.support.reference.compare import assert_same_gradients, weights_of

SOFTMAX, NONE = AttentionNormalization
OLDER = {"avx2": "avx2", "plain": "fpu"}  # instructions, and what /proc/cpuinfo calls them


@pytest.mark.parametrize("normalization", AttentionNormalization)
@pytest.mark.parametrize(
    ("activation", "frozen"), [*((activation, False) for activation in Activation), (Activation.DICE, True)]
)
@pytest.mark.parametrize("hidden_units", [[3], [5, 4], [4, 3, 2]], ids=str)
@pytest.mark.parametrize("side_width", [0, 2])
def test_interest_and_gradients_equal_the_reference(side_width, hidden_units, activation, frozen, normalization):
    lengths = np.array([3, 0, 1, 6, 2])
    random = np.random.default_rng(1)
    mask = np.arange(6) < lengths[:, None]
    candidate, keys = random.normal(0, 1, (5, 3)), random.normal(0, 1, (5, 6, 3))
    sides, side_of = random.normal(0, 1, (4, side_width)), random.integers(0, 4, (5, 6))
    direction = random.normal(0, 1, (5, 3 + side_width))
    unit = built(3, hidden_units, activation, normalization, frozen=frozen, side_width=side_width)
    weights = {**weights_of(unit, "attention/"), "candidate": candidate, "keys": keys, "sides": sides}

    def reference(weights):
        own = weights["sides"][side_of] if side_width else None
        return padded_din.attend(
            weights, weights["candidate"], weights["keys"], mask, activation, normalization, not frozen, own
        )

    expected_interest = reference(weights)
    packed = tf.constant(keys[mask], tf.float32)
    interest, gradients = run(
        unit,
        tf.constant(candidate, tf.float32),
        packed,
        segment_ids(tf.constant(lengths, tf.int32)),
        tf.range(len(packed)),
        tf.constant(direction, tf.float32),
        sides=tf.constant(sides, tf.float32) if side_width else None,
        side_of=tf.constant(side_of[mask], tf.int32) if side_width else None,
    )
    assert_allclose(interest, expected_interest, rtol=1e-4, atol=1e-5)
    expected = padded_din.central_differences(
        lambda changed: np.sum(reference(changed) * direction), weights, list(gradients)
    )
    expected["keys"] = expected["keys"][mask]
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("activation", "normalization"), [*itertools.product(Activation, AttentionNormalization)])
def test_it_equals_the_unit_of_tensorflows_operations(activation, normalization, frozen, num_threads, monkeypatch):
    """Widths that are no multiple of anything, and those of the paper."""
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    for width, hidden_units in ((19, [20, 17, 9]), (128, [80, 40]), (33, [97])):
        assert_units_agree(large_inputs(width, width), hidden_units, activation, normalization, frozen=frozen)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("activation", "normalization"), [*itertools.product(Activation, AttentionNormalization)])
def test_sides_equal_the_unit_of_tensorflows_operations(activation, normalization, num_threads, monkeypatch):
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    for width, side_width, hidden_units in ((19, 5, [20, 17, 9]), (32, 16, [80, 40]), (33, 50, [97])):
        inputs = large_inputs(width, width)[:-1]
        sides, side_of, direction = large_sides(width, side_width, item_width=width)
        assert_units_agree((*inputs, direction), hidden_units, activation, normalization, sides=sides, side_of=side_of)


@pytest.mark.parametrize("mode", [TRAINING, KERNELS], ids=["plain", "kernels"])
def test_one_side_of_zeros_changes_no_bit(mode):
    inputs = large_inputs(3, 16)
    plain, unit = built(16, [20, 9]), built(16, [20, 9], side_width=3)
    for own, other in zip(unit.weights, plain.weights, strict=True):
        own.assign(other if own.shape == other.shape else tf.concat([other, tf.ones([3, 20])], axis=0))
    wanted, gradients = run(plain, *inputs, mode=mode)
    wider = tf.pad(inputs[-1], [[0, 0], [0, 3]])
    found, own_gradients = run(unit, *inputs[:-1], wider, mode, tf.zeros([1, 3]), tf.zeros_like(inputs[2]))
    assert_array_equal(found[:, :16], wanted)
    for name, gradient in gradients.items():
        assert_array_equal(own_gradients[name][: len(gradient)], gradient, err_msg=name)


@pytest.mark.parametrize("mode", [TRAINING, KERNELS], ids=["plain", "kernels"])
def test_no_pair_has_a_side(mode):
    unit = built(3, [4], side_width=2)
    none, sides = tf.zeros([0], tf.int32), tf.ones([5, 2])
    direction = tf.ones([4, 5])
    interest, gradients = run(unit, tf.ones([4, 3]), tf.ones([6, 3]), none, none, direction, mode, sides, none)
    assert_array_equal(interest, np.zeros((4, 5)))
    for gradient in gradients.values():
        assert_array_equal(gradient, np.zeros(gradient.shape))


def test_sides_that_do_not_exist_are_refused():
    unit = built(3, [4], side_width=2)
    pairs = Pairs(tf.constant([0]), tf.constant([0]), side_of=tf.constant([5]))
    with pytest.raises(tf.errors.OpError, match="pairs must name sides"):
        unit(tf.ones([1, 3]), tf.ones([1, 3]), pairs, mode=KERNELS, sides=tf.ones([5, 2]))


@pytest.mark.parametrize("instructions", OLDER)
def test_older_instructions(instructions):
    need_instructions(OLDER[instructions])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "equals_the_unit and 3 and softmax or last_places",
        ],
        env={**os.environ, "DIN_DIST_INSTRUCTIONS": instructions},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout


def test_instructions_that_do_not_exist():
    program = "from tests.support import native_layers as t; t.assert_units_agree(t.large_inputs(0, 4), [3])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DIN_DIST_INSTRUCTIONS": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DIN_DIST_INSTRUCTIONS must be avx512, avx2, plain, amx or avx512_bf16" in done.stderr


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_one_candidate_with_all_pairs(num_candidates):
    """No shard splits it."""
    candidate, keys, candidate_of, key_of, direction = large_inputs(2, 6, num_candidates)
    last = tf.fill(tf.shape(candidate_of), num_candidates - 1)
    assert_units_agree((candidate, keys, last, key_of, direction), [5, 4])


@pytest.mark.parametrize("num_candidates", [0, 1, 3])
@pytest.mark.parametrize("normalization", AttentionNormalization)
@pytest.mark.parametrize("activation", Activation)
def test_no_behaviour_anywhere_gives_zeros_and_zero_gradients(activation, normalization, num_candidates):
    unit = built(3, [5, 4], activation, normalization)
    before = [weight.numpy() for weight in unit.non_trainable_weights]
    nothing = tf.zeros([0], tf.int32)
    interest, gradients = run(unit, tf.ones([num_candidates, 3]), tf.zeros([0, 3]), nothing, nothing, 1.0)
    assert_array_equal(interest, np.zeros((num_candidates, 3)))
    for gradient in gradients.values():
        assert_array_equal(gradient, np.zeros(gradient.shape))
    for weight, value in zip(unit.non_trainable_weights, before, strict=True):
        assert_array_equal(weight, value)


@pytest.mark.parametrize("activation", Activation)
def test_nan_and_infinity_show(activation):
    """A trainer stops at them, and so must hear of them."""
    candidate, keys, *rest = large_inputs(3, 6)
    for value in (np.nan, np.inf):
        bad = tf.tensor_scatter_nd_update(keys, [[0, 0]], [value])
        unit = built(6, [5, 4], activation)
        interest, gradients = run(unit, candidate, bad, *rest)
        assert not np.isfinite(interest).all()
        assert not np.isfinite(gradients["candidate"]).all()
    unit.scorer.dense_layers[0].kernel.assign(tf.fill([24, 5], np.nan))  # with every key as it should be
    assert np.isnan(run(unit, candidate, keys, *rest)[0]).any()


def test_sigmoid_to_the_last_places():
    """Against float64. A product with log2 e is exact to half a unit, which counts the more the larger it is."""
    x = np.float32(np.concatenate([np.linspace(-87, 87, 100_001), np.linspace(-1, 1, 10_001)]))
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(sigmoid(x) - exact) <= (5e-7 + 1.2e-7 * np.abs(x)) * exact).all()
    assert_allclose(sigmoid([np.inf, 1e30, 200, 0, -200, -1e30, -np.inf]), [1, 1, 1, 0.5, 0, 0, 0], rtol=0, atol=2e-38)
    assert np.isnan(sigmoid([np.nan])).all()


def sigmoid(values):
    """By the kernel, which has it between two layers: here `[N, 1]` and the identity."""
    one, zero = tf.ones([1]), tf.zeros([1])
    outputs, _ = kernels.library().din_dist_dense(
        with_padding(np.float32(values)[:, None]),
        tf.ones([1, 1]),
        *(zero, zero, zero, one, zero, zero, tf.zeros([0])),
        activation="sigmoid",
        in_bfloat16=False,
        num_threads=1,
    )
    return outputs.numpy()[:, 0]


def test_gates_far_from_zero():
    """Where e^x has no float32: 1 and 0, not NaN."""
    candidate, keys, *rest = large_inputs(3, 6)
    assert_units_agree((1e3 * candidate, 1e2 * keys, *rest), [5, 4], Activation.SIGMOID, NONE)


def test_scores_far_apart():
    """Score = relu(key): e^1000 has no float32, but the weights are 1 and 0, and 1/2 each of two that are equal."""
    unit = built(1, [1], Activation.RELU)
    unit.scorer.dense_layers[0].kernel.assign([[0.0], [1.0], [0.0], [0.0]])
    unit.scorer.output_layer.kernel.assign([[1.0]])
    for weight in (unit.scorer.dense_layers[0].bias, unit.scorer.output_layer.bias):
        weight.assign([0.0])
    keys = tf.constant([[3.0], [1000.0], [2000.0]])
    pairs = tf.constant([0, 0, 1, 1, 1, 2]), tf.constant([0, 1, 2, 0, 2, 0])
    interest, gradients = run(unit, tf.zeros([3, 1]), keys, *pairs, tf.ones([3, 1]))
    assert_array_equal(interest, [[1000.0], [2000.0], [3.0]])
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("candidate_of", "key_of"), [([0, 2], [0, 0]), ([1, 0], [0, 0]), ([-1, 0], [0, 0]), ([0, 1], [0, 3]), ([0], [-1])]
)
def test_pairs_that_cannot_be(candidate_of, key_of):
    """Two candidates and three keys."""
    unit = built(3, [5, 4])
    with pytest.raises(tf.errors.InvalidArgumentError, match="pairs must name candidates that ascend, and keys"):
        unit(tf.ones([2, 3]), tf.ones([3, 3]), Pairs(tf.constant(candidate_of), tf.constant(key_of)), mode=KERNELS)


def test_pairs_of_no_candidate():
    unit, first = built(3, [5, 4]), tf.constant([0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="pairs must name candidates that ascend, and keys"):
        unit(tf.ones([0, 3]), tf.ones([3, 3]), Pairs(first, first), mode=KERNELS)

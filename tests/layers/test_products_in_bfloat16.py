"""`--compute_dtype=bfloat16`: the factors of matrix products are rounded, and nothing else is.

Inputs are whole numbers that float32 holds exactly and bfloat16, with 8 bits, does not, so that what NumPy rounds and
what the kernels round are the same numbers.
"""

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import kernels
from din_dist.config import Activation, AttentionNormalization
from din_dist.execution import Execution, Mode
from tests.support.native_layers import Head, built, large_inputs, run, with_padding
from tests.support.processor import need_bfloat16

pytestmark = pytest.mark.usefixtures("processor")


@pytest.fixture(scope="module")
def processor():
    need_bfloat16()


def rounded(values):
    return tf.cast(tf.cast(tf.constant(values, tf.float32), tf.bfloat16), tf.float64).numpy()


class Numbers:
    """Whole numbers of up to 10 bits, which bfloat16 rounds."""

    def __init__(self, seed):
        self._random = np.random.default_rng(seed)

    def __call__(self, *shape):
        return self._random.integers(-1000, 1000, shape).astype(np.float64)

    def places(self, most, size):
        return self._random.integers(0, most, size).astype(np.int32)


def float32(*arrays):
    return [tf.constant(array, tf.float32) for array in arrays]


def assert_product(found, expected, factors):
    """Up to float32's rounding of sums; `factors` is what the product would be of factors that are not rounded."""
    largest = np.abs(expected).max(initial=1.0)
    assert_allclose(found, expected, rtol=0, atol=2e-6 * largest)
    if expected.size > 100:
        assert np.abs(expected - factors).max() > 2e-4 * largest


SHAPES = [(1, 1, 1), (2, 3, 5), (63, 17, 16), (64, 33, 40), (65, 80, 40), (300, 128, 80), (131, 48, 144)]


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("num_rows", "width", "units"), SHAPES, ids=str)
def test_dense_and_its_gradient(num_rows, width, units, num_threads):
    numbers = Numbers(num_rows)
    x, kernel, bias, up = numbers(num_rows, width), numbers(width, units), numbers(units), numbers(num_rows, units)
    ops, settings = kernels.library(), {"in_bfloat16": True, "num_threads": num_threads}
    gate = float32(np.zeros(width), np.ones(width), np.ones(width))  # mean, scale and alpha
    nothing = tf.zeros([0])

    found, _ = ops.din_dist_dense(
        *float32(with_padding(x), kernel, bias, np.zeros(units)),
        *gate,
        tf.zeros([width]),
        nothing,
        activation="scaled",
        **settings,
    )
    assert_product(found[:, :units], rounded(x) @ rounded(kernel) + bias, x @ kernel + bias)
    assert not np.any(found[:, units:])  # the padding

    statistics = float32(np.zeros(units), np.ones(units), np.zeros(2 * units), [1.0])
    held, of_kernel, of_bias, *_ = ops.din_dist_dense_gradient(
        *float32(with_padding(x), with_padding(found[:, :units].numpy()), kernel),
        *gate,
        tf.zeros([width]),
        nothing,
        *statistics,
        *float32(with_padding(up)),
        activation="scaled",
        **settings,
    )
    assert_product(held[:, :width], rounded(up) @ rounded(kernel).T, up @ kernel.T)
    assert not np.any(held[:, width:])
    assert_product(of_kernel, rounded(x).T @ rounded(up), x.T @ up)
    assert_array_equal(of_bias, up.sum(axis=0))  # nothing to multiply, nothing to round


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("num_pairs", "width", "units"), SHAPES, ids=str)
def test_the_first_layer_of_pairs_and_its_gradient(num_pairs, width, units, num_threads):
    numbers = Numbers(num_pairs)
    num_candidates, num_keys = 1 + num_pairs // 4, 1 + num_pairs // 3
    q, k = numbers(num_candidates, width), numbers(num_keys, width)
    of_q, of_k, of_product = numbers(width, units), numbers(width, units), numbers(width, units)
    bias, up = numbers(units), numbers(num_pairs, units)
    candidate_of = np.sort(numbers.places(num_candidates, num_pairs))
    key_of = numbers.places(num_keys, num_pairs)
    num_sides, side_width = 7, 5
    sides, of_s, side_of = (
        numbers(num_sides, side_width),
        numbers(side_width, units),
        numbers.places(num_sides, num_pairs),
    )
    products = q[candidate_of] * k[key_of]
    ops, settings = kernels.library(), {"in_bfloat16": True, "num_threads": num_threads}

    def first(as_is):
        return (
            as_is(products) @ as_is(of_product)
            + (as_is(q) @ as_is(of_q))[candidate_of]
            + (as_is(k) @ as_is(of_k))[key_of]
            + (as_is(sides) @ as_is(of_s))[side_of]
            + bias
        )

    found, _ = ops.din_dist_first(
        *float32(q, k, of_q, of_k, of_product, bias, np.zeros(units)),
        candidate_of,
        key_of,
        *float32(sides, of_s),
        side_of,
        **settings,
    )
    assert_product(found[:, :units], first(rounded), first(np.asarray))
    assert not np.any(found[:, units:])  # the padding

    weights, of_interest = numbers(num_pairs), numbers(num_candidates, width + side_width)
    statistics = float32(np.zeros(units), np.ones(units), np.zeros(2 * units), [1.0])
    results = ops.din_dist_first_gradient(
        *float32(q, k, of_q, of_k, of_product, with_padding(found[:, :units].numpy())),
        *statistics,
        *float32(with_padding(up), weights, of_interest),
        candidate_of,
        key_of,
        *float32(sides, of_s),
        side_of,
        **settings,
    )

    def gradient(as_is):
        by_candidate, by_key = np.zeros((num_candidates, units)), np.zeros((num_keys, units))
        by_side, pooled = np.zeros((num_sides, units)), weights[:, None] * of_interest[candidate_of]
        np.add.at(by_side, side_of, up)
        np.add.at(by_candidate, candidate_of, up)
        np.add.at(by_key, key_of, up)
        of_products = as_is(up) @ as_is(of_product).T
        of_candidates, of_keys = as_is(by_candidate) @ as_is(of_q).T, as_is(by_key) @ as_is(of_k).T
        np.add.at(of_candidates, candidate_of, of_products * k[key_of])
        np.add.at(of_keys, key_of, of_products * q[candidate_of] + pooled[:, :width])
        of_sides = as_is(by_side) @ as_is(of_s).T
        np.add.at(of_sides, side_of, pooled[:, width:])
        of_kernels = [as_is(a).T @ as_is(b) for a, b in ((q, by_candidate), (k, by_key), (products, up))]
        return [of_candidates, of_keys, *of_kernels, of_sides, as_is(sides).T @ as_is(by_side)]

    *of_products, of_bias, of_sides, of_side_kernel = results
    found = [*of_products, of_sides, of_side_kernel]
    for one, expected, factors in zip(found, gradient(rounded), gradient(np.asarray), strict=True):
        assert_product(one, expected, factors)
    assert_array_equal(of_bias, up.sum(axis=0))


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_every_product_is_asked_for(in_bfloat16, monkeypatch):
    """Forward and backward, of attention and head, each with two layers."""
    asked = {}

    class Recording:
        def __getattr__(self, name):
            def call(*args, **settings):
                if "in_bfloat16" in settings:
                    asked.setdefault(name, []).append(settings["in_bfloat16"])
                return getattr(library, name)(*args, **settings)

            return call

    library = kernels.library()
    monkeypatch.setattr(kernels, "library", Recording)
    run(built(8, [5, 4]), *large_inputs(3, 8), mode=Mode(True, Execution(kernels=True, bfloat16=in_bfloat16)))
    assert {name: len(calls) for name, calls in asked.items()} == {
        "din_dist_first": 1,
        "din_dist_dense": 1,
        "din_dist_first_gradient": 1,
        "din_dist_dense_gradient": 1,
    }
    Head(8, [5, 4], native=True, in_bfloat16=in_bfloat16).run(tf.ones([9, 8]), tf.ones([9]))
    assert [len(asked[name]) for name in ("din_dist_dense", "din_dist_dense_gradient")] == [4, 4]
    assert {one for calls in asked.values() for one in calls} == {in_bfloat16}


@pytest.mark.parametrize("normalization", AttentionNormalization)
def test_attention_is_near_that_in_float32(normalization):
    inputs = large_inputs(3, 40)
    (interest, gradients), (near, near_gradients) = (
        run(
            built(40, [20, 10], Activation.DICE, normalization),
            *inputs,
            mode=Mode(True, Execution(kernels=True, bfloat16=in_bfloat16)),
        )
        for in_bfloat16 in (False, True)
    )
    assert_near(near, interest)
    assert_all_near(near_gradients, gradients)


def test_head_is_near_that_in_float32():
    random = np.random.default_rng(0)
    inputs = tf.constant(random.normal(0, 1, (300, 40)), tf.float32)
    direction = tf.constant(random.normal(0, 1, 300), tf.float32)
    outputs, gradients = Head(40, [20, 10], native=True).run(inputs, direction)
    near, near_gradients = Head(40, [20, 10], native=True, in_bfloat16=True).run(inputs, direction)
    assert_near(near, outputs)
    assert_all_near(near_gradients, gradients)


def assert_all_near(found, expected):
    for name, gradient in expected.items():
        if not name.endswith("output/bias"):  # in the head it depends on no product; softmax cancels it
            assert_near(found[name], gradient)


def assert_near(found, expected):
    """But not equal."""
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-5 < difference < 0.03

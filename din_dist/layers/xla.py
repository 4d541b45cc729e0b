"""Chains of cheap operations as one kernel.

Between its matrix products a ranking model does many cheap things to large arrays: gathers, products, gates, sums. Run
one by one they read and write memory at every step, which takes longer than the products. XLA makes one loop of each
chain. The products stay outside: there the vendors' libraries are at least as good.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with one keyword more: `compiled`, to run it (and its gradient) through XLA.

    It must be pure and take tensors (or None, or other constants, which must not change) in order. Where it gives one
    tensor it has a gradient; compiled, that keeps nothing but the inputs and computes the rest again, which costs less
    than reading it from memory.

    XLA compiles anew for every shape, so callers round lengths that vary (`round_up`).
    """
    run = tf.function(function, jit_compile=True, autograph=False)

    @tf.function(jit_compile=True, autograph=False)
    def gradients(upstream: tf.Tensor, *inputs: Any) -> list[tf.Tensor]:
        sources = [value for value in inputs if _has_gradient(value)]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            output = function(*inputs)
        found = tape.gradient(output, sources, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [tf.convert_to_tensor(gradient) for gradient in found]  # gathers: summed by row

    def run_compiled(*inputs: Any) -> tf.Tensor:
        inputs = tf.nest.map_structure(_as_tensor, inputs)
        sources = [value for value in inputs if _has_gradient(value)]

        @tf.custom_gradient
        def differentiable(*_: tf.Tensor) -> Any:
            return run(*inputs), lambda upstream: gradients(upstream, *inputs)

        return differentiable(*sources) if sources else run(*inputs)

    @functools.wraps(function)
    def call(*inputs: Any, compiled: bool = False) -> tf.Tensor:
        return run_compiled(*inputs) if compiled else function(*inputs)

    return call


def on_host() -> contextlib.AbstractContextManager[None]:
    """For what is done to ids and single numbers: on a GPU each operation would cost the start of a kernel."""
    return tf.device("CPU:0")


def round_up(length: tf.Tensor, steps: int, smallest: int = 512) -> tf.Tensor:
    """The next of few lengths: `steps` between a power of two and the next, and multiples of `smallest`."""
    with on_host():
        halvings = tf.math.floor(tf.math.log(tf.cast(tf.maximum(length, 1), tf.float32)) / tf.math.log(2.0))
        unit = tf.maximum(tf.bitwise.left_shift(1, tf.cast(halvings, tf.int32)) // steps, smallest)
        return (length + unit - 1) // unit * unit


def _as_tensor(value: Any) -> Any:
    return tf.convert_to_tensor(value) if tf.is_tensor(value) else value  # of variables, what they hold now


def _has_gradient(value: Any) -> bool:
    return tf.is_tensor(value) and value.dtype.is_floating

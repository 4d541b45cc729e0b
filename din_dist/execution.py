"""Chooses how an update is computed: TensorFlow's operations, chains of them compiled by XLA, or our own kernels.

Between its matrix products a ranking model does many cheap things to large arrays: gathers, products, gates, sums. Run
one by one they read and write memory at every step, which takes longer than the products. XLA makes one loop of each
chain. The products stay outside: there the vendors' libraries are at least as good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

SumOverRanks = Callable[[tf.Tensor], tf.Tensor]  # sums a tensor over all ranks


@dataclasses.dataclass(frozen=True)
class Execution:
    """The way in which a process computes its updates, chosen once. Whatever has no kernel goes to TensorFlow or XLA.

    Attributes:
        kernels: our own C++ kernels compute what they can. They run on CPUs.
        xla: XLA compiles the chains of cheap operations that `fused` is given.
        bfloat16: kernels round the factors of matrix products to bfloat16.
    """

    kernels: bool = False
    xla: bool = False
    bfloat16: bool = False

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function`, compiled if this execution compiles; see `compiled`."""
        return compiled(function) if self.xla else function


@dataclasses.dataclass(frozen=True)
class Mode:
    """A forward pass, apart from its inputs. Equal modes are equal keys: a new one causes no new trace.

    Attributes:
        training: whether gradients and batch statistics are wanted. Otherwise TensorFlow's operations compute all.
        execution: how an update is computed.
        sum_over_ranks: sums statistics over the ranks of the job; the identity for a rank without peers.
    """

    training: bool = False
    execution: Execution = dataclasses.field(default_factory=Execution)
    sum_over_ranks: SumOverRanks = tf.identity

    @property
    def kernels(self) -> bool:
        """True if our own kernels compute this pass."""
        return self.training and self.execution.kernels

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function`, compiled if this pass trains and the execution compiles."""
        return self.execution.fused(function) if self.training else function


INFERENCE, TRAINING = Mode(), Mode(training=True)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function`, run through XLA with its gradient.

    XLA compiles anew for every shape, so callers round lengths that vary (`round_up`).

    Args:
        function: pure. It takes tensors, None or other constants, in order. If it returns one tensor, that has a
            gradient, which keeps only the inputs and computes the rest again: that costs less than to read it back.
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

    @functools.wraps(function)
    def call(*inputs: Any) -> tf.Tensor:
        inputs = tf.nest.map_structure(_as_tensor, inputs)
        sources = [value for value in inputs if _has_gradient(value)]

        @tf.custom_gradient
        def differentiable(*_: tf.Tensor) -> Any:
            return run(*inputs), lambda upstream: gradients(upstream, *inputs)

        return differentiable(*sources) if sources else run(*inputs)

    return call


def on_host() -> contextlib.AbstractContextManager[None]:
    """Places operations on ids and single numbers on the CPU: a GPU would start a kernel for each of them."""
    return tf.device("CPU:0")


def round_up(length: tf.Tensor, steps: int, smallest: int = 512) -> tf.Tensor:
    """Returns the next of few lengths, int32.

    Args:
        length: int32, a number of rows.
        steps: how many lengths there are between a power of two and the next.
        smallest: every length is a multiple of it.
    """
    with on_host():
        halvings = tf.math.floor(tf.math.log(tf.cast(tf.maximum(length, 1), tf.float32)) / tf.math.log(2.0))
        unit = tf.maximum(tf.bitwise.left_shift(1, tf.cast(halvings, tf.int32)) // steps, smallest)
        return (length + unit - 1) // unit * unit


def _as_tensor(value: Any) -> Any:
    return tf.convert_to_tensor(value) if tf.is_tensor(value) else value  # a variable's present value


def _has_gradient(value: Any) -> bool:
    return tf.is_tensor(value) and value.dtype.is_floating

"""Dense layers one after the other, each behind a gate and a dropout."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from din_dist.execution import Mode
from din_dist.layers.keyed_dropout import KeyedDropout


class Stage(NamedTuple):
    """A Dense layer, the gate (activation or normalization) before it, and the dropout between them; None for none."""

    gate: keras.layers.Layer | None
    dense: keras.layers.Dense
    dropout: KeyedDropout | None = None


def run_by_operations(
    stages: Sequence[Stage],
    inputs: tf.Tensor,
    seeds: tf.Tensor | None,
    mode: Mode,
    num_rows: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns the last Dense's results `[M, units]`, computed by TensorFlow's operations.

    Args:
        stages: one after the other.
        inputs: float32 `[M, W]`.
        seeds: int64 `[M]`, for dropout.
        mode: of the pass.
        num_rows: int32, how many of the M rows count, the first ones; None: all.
    """
    for stage in stages:
        if stage.gate is not None:
            inputs = activated(stage.gate, inputs, mode, num_rows)
        if stage.dropout is not None:
            inputs = stage.dropout(inputs, seeds, mode=mode)
        inputs = stage.dense(inputs)
    return inputs


def activated(gate: keras.layers.Layer, inputs: tf.Tensor, mode: Mode, num_rows: tf.Tensor | None = None) -> tf.Tensor:
    """Returns what a gate makes of `inputs` `[M, W]`. A gate gets of mode, rows and training what it asks for."""
    asked = inspect.signature(gate.call).parameters
    given: dict[str, Any] = {"mode": mode, "num_rows": num_rows, "training": mode.training}
    return gate(inputs, **{name: value for name, value in given.items() if name in asked})

"""The forms that we compare speed with compute what ours computes, gradients included."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from din_dist.benchmark.attention_forms import PaddedActivationUnit, UnfactoredActivationUnit
from din_dist.config import Activation, AttentionNormalization
from din_dist.execution import Execution, Mode
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.packed import segment_ids
from din_dist.layers.pairs import Pairs


@pytest.mark.parametrize("kind", [PaddedActivationUnit, UnfactoredActivationUnit])
@pytest.mark.parametrize("normalization", list(AttentionNormalization))
def test_same_function(kind: type[LocalActivationUnit], normalization: AttentionNormalization) -> None:
    random = np.random.default_rng(0)
    lengths = [3, 0, 1, 7]
    candidate = tf.constant(random.normal(size=(4, 6)), tf.float32)
    keys = tf.constant(random.normal(size=(5, 6)), tf.float32)
    key_of = tf.constant(random.integers(5, size=sum(lengths)), tf.int32)
    ours = LocalActivationUnit((8, 4), Activation.SIGMOID, normalization)
    theirs = kind((8, 4), Activation.SIGMOID, normalization)
    results = []
    mode = Mode(True, Execution(kernels=True))  # which the other forms leave alone
    for unit in (ours, theirs):
        unit.build((None, 6))
        unit.set_weights([np.sin(np.arange(w.size)).reshape(w.shape) for w in ours.get_weights()])
        with tf.GradientTape() as tape:
            tape.watch([candidate, keys])
            interest = unit(candidate, keys, Pairs(segment_ids(tf.constant(lengths)), key_of), mode=mode)
            loss = tf.reduce_sum(tf.sin(interest))
        sources = [candidate, keys, *(weight.value for weight in unit.trainable_weights)]
        gradients = tape.gradient(loss, sources)
        results.append([interest, *(tf.convert_to_tensor(gradient) for gradient in gradients)])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

"""The library of `din_dist/kernels`, where `launch/setup.sh` has compiled it."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import tensorflow as tf

ACTIVATIONS = ("dice", "prelu", "sigmoid", "relu", "scaled")  # in the order of `Activation` in kernels/attention.h
LANES = 16  # what rows of a layer's inputs are padded to a multiple of, as `kLane` there
PATH = Path(sys.prefix, "lib", "din_dist", "kernels.so")


@functools.cache
def library() -> Any:
    """The operations, as functions."""
    return tf.load_op_library(str(PATH))


def multiplies_bfloat16() -> bool:
    """Whether the kernels have, on this processor, instructions for `--compute_dtype=bfloat16`."""
    library()
    return bool(ctypes.CDLL(str(PATH)).din_dist_multiplies_bfloat16())


def num_threads() -> int:
    """As many as TensorFlow's own kernels use."""
    return tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))

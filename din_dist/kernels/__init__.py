"""Loads the library of C++ kernels that `launch/setup.sh` compiles from this folder."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import tensorflow as tf

ACTIVATIONS = ("dice", "prelu", "sigmoid", "relu", "scaled")  # in the order of `Activation` in kernels/attention.h
LANES = 16  # rows of a layer's inputs are padded to a multiple of it, like `kLane` there
PATH = Path(sys.prefix, "lib", "din_dist", "kernels.so")


@functools.cache
def library() -> Any:
    """Returns the operations of the library, as functions."""
    return tf.load_op_library(str(PATH))


def multiplies_bfloat16() -> bool:
    """Tells if this processor has the instructions that the kernels need for `--compute_dtype=bfloat16`."""
    library()
    return bool(ctypes.CDLL(str(PATH)).din_dist_multiplies_bfloat16())


def num_threads() -> int:
    """Returns the number of threads that TensorFlow's own kernels use."""
    return tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))

"""Loads the library of C++ kernels that `launch/build_kernels.sh` compiles from this folder."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import tensorflow as tf

from din_dist.errors import InputError

LANES = 16  # rows of a layer's inputs are padded to a multiple of it, like `kLane` in attention.h
_IN_WHEEL = Path(__file__).with_name("kernels.so")
PATH = _IN_WHEEL if _IN_WHEEL.exists() else Path(sys.prefix, "lib", "din_dist", "kernels.so")


@functools.cache
def library() -> Any:
    """Returns the operations of the library, as functions.

    Raises:
        InputError: this machine cannot load it, such as that of a wheel from a machine with a newer libc.
    """
    try:
        return tf.load_op_library(str(PATH))
    except tf.errors.NotFoundError as error:
        raise InputError(
            f"--native: takes kernels that this machine can load. Received: {error.message!r}. Run launch/setup.sh, "
            "which compiles them here, or add --nonative."
        ) from error


def form_in_bfloat16() -> str:
    """Returns the instructions for `--compute_dtype=bfloat16`: amx or avx512_bf16, or "" if there are none here."""
    function = _functions().din_dist_form_in_bfloat16
    function.restype = ctypes.c_char_p
    return str(function().decode())


def multiplies_bfloat16() -> bool:
    """Tells if this processor has the instructions that the kernels need for `--compute_dtype=bfloat16`."""
    return bool(form_in_bfloat16())


def gains_by_bfloat16() -> bool:
    """Tells if they are faster than float32 here. Intel's are where there are AMX tiles.

    Whoever names a form in `DIN_DIST_INSTRUCTIONS` gets it.
    """
    return bool(_functions().din_dist_gains_by_bfloat16())


def has_rule(name: str) -> bool:
    """Tells if there is a kernel for the optimizer rule of this name."""
    return bool(_functions().din_dist_has_rule(name.encode()))


def has_activation(name: str) -> bool:
    """Tells if the kernels know the activation of this name."""
    return bool(_functions().din_dist_has_activation(name.encode()))


def num_threads() -> int:
    """Returns the number of threads that TensorFlow's own kernels use."""
    return tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))


@functools.cache
def _functions() -> ctypes.CDLL:
    """Returns what the library offers besides operations."""
    library()
    return ctypes.CDLL(str(PATH))

"""How the workers of one machine speak within an update: through memory that they share.

A step waits for a sum at each synchronised layer, forward and backward, and then for the gradients of all. As a message
of Horovod's each takes most of a millisecond, however small: threads are woken on both sides and speak through sockets.
Here each worker writes its values where the others see them, and waits until all have.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from din_dist.distributed.runtime import InGraph, Runtime
from din_dist.layers import kernels

FOLDER = Path("/dev/shm")  # of which containers have 64 MiB in all
BUFFER_BYTES = 1 << 20
_LINE = 64  # bytes, as in kernels/neighbours.cc


def neighbours(runtime: Runtime) -> InGraph:
    """What to speak through in an update; all ranks must call this together.

    Shared memory, where all ranks are on this machine for as long as the job runs; where they are not, or such memory
    cannot be had by one of them, `runtime`.
    """
    if runtime.elastic or not 1 < runtime.world_size == runtime.local_size:
        return runtime
    file = _shared_file(runtime)
    return runtime if file is None else Neighbours(runtime, file)


class Neighbours(InGraph):
    """Speaks through `file`, as `_shared_file` makes it.

    An operation holds a thread of TensorFlow's while it waits, and all use the same memory: so they run one after the
    other, in the order of the calls.
    """

    has_peers = True
    travels = False

    def __init__(self, runtime: Runtime, file: int) -> None:
        self._place = {
            "fd": file,
            "buffer": BUFFER_BYTES,
            "rank": runtime.rank,
            "num_ranks": runtime.world_size,
        }
        self._last: tf.Tensor | None = None

    def sum_in_graph(self, tensors: Sequence[tf.Tensor], name: str | None = None) -> list[tf.Tensor]:
        """As of `InGraph`, of float32 tensors of known shapes."""
        flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
        with self._in_order():
            self._last = kernels.library().din_dist_neighbours_sum(flat, **self._place)
        parts = tf.split(self._last, [tensor.shape.num_elements() for tensor in tensors])
        return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather_in_graph(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """As of `InGraph`, of tensors that are all float32 or all int32."""
        with self._in_order():
            gathered = kernels.library().din_dist_neighbours_gather(tensors, **self._place)
        self._last = gathered[0]
        for rows, tensor in zip(gathered, tensors, strict=True):
            rows.set_shape([None, *tensor.shape[1:]])
        return gathered

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        last = self._last
        known = last is not None and not tf.executing_eagerly() and last.graph is tf.compat.v1.get_default_graph()
        with tf.control_dependencies([last] if known else []):
            yield


def _shared_file(runtime: Runtime) -> int | None:
    """Zeros but for the ranks' process ids, open on all ranks and without a name; None where one of them cannot."""
    path, file = "", None
    try:
        if runtime.is_chief:
            file, path = tempfile.mkstemp(prefix="din_dist-", dir=FOLDER)
            # What is not there would only be missed when it is written to, which ends the process.
            os.posix_fallocate(file, 0, 2 * runtime.world_size * (_LINE + BUFFER_BYTES))
    except OSError:
        if path:
            Path(path).unlink()
        path = ""
    path = runtime.broadcast_object(path)
    opened = bool(path)
    try:
        if path:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC) if file is None else file
            os.pwrite(file, os.getpid().to_bytes(8, "little"), runtime.rank * _LINE)
    except OSError:
        opened = False
    # Process ids mean the same to all only where all are in one container, or in none.
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    told = runtime.gather(np.array([namespace if opened else 0], np.int64))
    everywhere = bool(told.all()) and len(set(told)) == 1
    if runtime.is_chief and path:
        Path(path).unlink()
    if file is not None and not everywhere:
        os.close(file)
        file = None
    return file

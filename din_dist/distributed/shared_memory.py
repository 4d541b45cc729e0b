"""How the workers of one machine speak within an update: through memory that they share.

A step waits for a sum at each synchronised layer, forward and backward, and then for the gradients of all. As a message
of Horovod's each takes most of a millisecond, however small: threads are woken on both sides and speak through sockets.
Here each worker writes its values where the others see them, and waits until all have. The workers also share one copy
of the tables in such memory. Each updates a part of the rows, and therefore sums the gradients of these rows alone.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from din_dist.distributed.collectives import Collectives, after
from din_dist.distributed.runtime import Runtime
from din_dist.errors import FailedElsewhere, InputError
from din_dist.kernels import operations

BUFFER_BYTES = 1 << 20
_LINE = 64  # bytes, as in kernels/neighbours.cc


def share_memory(runtime: Runtime) -> Collectives:
    """Returns what the ranks communicate through in an update; all must call this together.

    Shared memory, where all ranks are on this machine for as long as the job runs; where they are not, or such memory
    cannot be had by one of them, `runtime`.
    """
    if runtime.elastic or not 1 < runtime.world_size == runtime.local_size:
        return runtime
    # Process ids mean the same to all only where all are in one container, or in none.
    told = runtime.gather(np.array([Path("/proc/self/ns/pid").stat().st_ino], np.int64))
    files = None
    if len(set(told.tolist())) == 1:
        files = _common_files(runtime, "messages", [2 * runtime.world_size * (_LINE + BUFFER_BYTES)])
    if files is None:
        if runtime.is_chief:
            warnings.warn(
                "The workers of this machine can have no memory in common, so that updates wait for Horovod.",
                stacklevel=2,
            )
        return runtime
    os.pwrite(files[0], os.getpid().to_bytes(8, "little"), runtime.rank * _LINE)
    runtime.barrier()
    return SharedMemory(runtime, files[0])


class SharedMemory(Collectives):
    """Speaks through `file`, which begins with the ranks' process ids (see kernels/neighbours.cc).

    An operation holds a thread of TensorFlow's while it waits, and all use the same memory: so they run one after the
    other, in the order of the calls.
    """

    has_peers = True
    travels = False

    def __init__(self, runtime: Runtime, file: int) -> None:
        self._runtime = runtime
        self.world_size = runtime.world_size
        self._place = {
            "fd": file,
            "buffer": BUFFER_BYTES,
            "rank": runtime.rank,
            "num_ranks": runtime.world_size,
        }
        self._last: tf.Tensor | None = None

    def all_reduce(self, tensors: Sequence[tf.Tensor], name: str | None = None) -> list[tf.Tensor]:
        """Sums float32 tensors of known shapes over the ranks."""
        flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
        with self._in_order():
            self._last = operations.shared_sum(flat, self._place)
        parts = tf.split(self._last, [tensor.shape.num_elements() for tensor in tensors])
        return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def all_gather(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Joins the rows of tensors that are all float32 or all int32."""
        with self._in_order():
            gathered = operations.shared_gather(tensors, self._place)
        self._last = gathered[0]
        return gathered

    def share(self, variables: Sequence[tf.Variable]) -> bool:
        sizes = [variable.dtype.size * variable.shape.num_elements() for variable in variables]
        files = _common_files(self._runtime, "tables", sizes, fill=False)
        if files is None:
            return False
        # The others' copies go before there are new ones: at no time does it take more memory than before.
        if not all(self._move(variables, files, chief) for chief in (False, True)):
            if not self._runtime.is_chief:
                raise FailedElsewhere
            raise InputError(
                "Workers of one machine need memory for one copy of their tables. Received: no room for "
                f"{sum(sizes):,} bytes. Free some, or use smaller tables."
            )
        for file in files:
            os.close(file)
        return True

    def _move(self, variables: Sequence[tf.Variable], files: Sequence[int], chief: bool) -> bool:
        """Puts the variables of the chief, or of the others, into `files`; whether that went well on all ranks."""
        moved = True
        if chief == self._runtime.is_chief:
            try:
                for variable, file in zip(variables, files, strict=True):
                    if chief:
                        os.posix_fallocate(file, 0, os.fstat(file).st_size)
                    operations.share(variable, file, fill=chief)
            except (OSError, tf.errors.OpError):
                moved = False
        return bool(self._runtime.gather(np.array([moved])).all())

    def reduce_scatter_rows(
        self, row_ids: Sequence[tf.Tensor], rows: Sequence[tf.Tensor]
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
        with self._in_order():
            summed_ids, sums, self._last = operations.shared_reduce_rows(row_ids, rows, self._place)
        return summed_ids, sums, tf.unstack(tf.ensure_shape(self._last, [len(rows)]))

    def fence(self, variables: Sequence[tf.Variable]) -> None:
        with self._in_order():
            operations.shared_fence(variables, self._place)

    def _in_order(self) -> contextlib.AbstractContextManager[None]:
        return after(self._last)


def _common_files(runtime: Runtime, name: str, sizes: Sequence[int], fill: bool = True) -> list[int] | None:
    """Opens zeros in memory, `sizes` bytes of them, on all ranks; returns None where one of them cannot.

    Args:
        name: for who lists a process' memory.
        fill: takes the memory at once: what is not there when it is written to ends the process.
    """
    files: list[int] = []
    paths: list[str] | None = []
    try:
        if runtime.is_chief:
            for size in sizes:
                files.append(os.memfd_create(f"din_dist-{name}"))
                os.ftruncate(files[-1], size)
                if fill:
                    os.posix_fallocate(files[-1], 0, size)
            paths = [f"/proc/{os.getpid()}/fd/{file}" for file in files]
    except (OSError, AttributeError):  # some Pythons are built for systems without
        paths = None
    paths = runtime.broadcast_object(paths)
    opened = paths is not None
    try:
        for path in [] if runtime.is_chief else paths or []:
            files.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        opened = False
    if runtime.gather(np.array([opened])).all():
        return files
    for file in files:
        os.close(file)
    return None

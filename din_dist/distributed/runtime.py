"""The ranks of a job: Horovod, or a process alone.

This is the only module that imports Horovod.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from din_dist import progress
from din_dist.distributed.collectives import Collectives, after
from din_dist.errors import CannotJoin, FailedElsewhere, InputError, Left, LostPeer
from din_dist.place import Place, is_dismissed
from din_dist.versions import require_horovod

_JOIN_AGAIN_SECONDS = 0.2
_MOST_FAILED_JOINS = 10  # in a row, each within `_AT_ONCE_SECONDS`: what is wrong is not that others come and go
_AT_ONCE_SECONDS = 2.0


@contextlib.contextmanager
def raise_lost_peer() -> Iterator[None]:
    """Raises `LostPeer` when a collective of the block fails because a rank went away. Notes on the error are kept.

    It stands around every call of Horovod: the eager ones of `HorovodRuntime`, and the graphs that hold collectives.
    """
    try:
        yield
    except Exception as error:
        if not _is_lost_peer(error):
            raise
        lost = LostPeer(str(error))
        for note in getattr(error, "__notes__", []):
            lost.add_note(note)
        raise lost from error


def _is_lost_peer(error: Exception) -> bool:
    """Returns True for Horovod's error, and for TensorFlow's with a node of Horovod's or its words."""
    if isinstance(error, tf.errors.OpError):
        return "horovod" in str(error).lower()
    return type(error).__name__ == "HorovodInternalError"


class Runtime(Collectives):
    """A process on its own: every sum is its own value. Also the interface of `HorovodRuntime`."""

    rank = 0
    local_rank = 0
    local_size = 1
    elastic = False  # whether the set of workers may change

    @property
    def is_chief(self) -> bool:
        return self.rank == 0

    @property
    def has_peers(self) -> bool:
        return self.elastic or self.world_size > 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sums an array over the ranks."""
        return np.asarray(values)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Joins an array's rows from all ranks, in the order of the ranks."""
        return np.asarray(values)

    def broadcast_variables(self, variables: Sequence[tf.Variable], root: int = 0) -> None:
        """Gives every rank the values that rank `root` has."""

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Returns the `value` of rank `root` on every rank. It is sent as JSON, so tuples become lists."""
        return value

    def barrier(self) -> None:
        """Returns when every rank has come here."""

    @contextlib.contextmanager
    def timeline(self, path: Path) -> Iterator[None]:
        """Notes each message of the block in a file for Chrome's about:tracing; nothing when alone."""
        yield

    def shutdown(self) -> None:
        """Leaves the job."""

    def workers_changed(self) -> bool:
        """Tells whether workers are to join or leave, as far as this rank knows."""
        return False

    def reset(self) -> None:
        """Joins the job anew, with the ranks that there are now."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Runs a block that may fail on some ranks only. Afterwards all ranks continue, or none does.

        Raises:
            InputError: on the first rank whose block raised one.
            FailedElsewhere: on the others.
        """
        problem = None
        try:
            yield
        except InputError as error:
            problem = error
        refused = np.flatnonzero(self.gather(np.array([problem is not None], np.int32)))
        if len(refused):
            if problem and refused[0] == self.rank:
                raise problem
            raise FailedElsewhere


class HorovodRuntime(Runtime):
    """The processes that `horovodrun` started."""

    def __init__(self) -> None:
        # Milliseconds between two looks at what a message waits for. A step waits for some twenty messages; where none
        # is under way our build does not look (see launch/horovod/).
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        os.environ.setdefault("HOROVOD_TIMELINE", "DYNAMIC")  # lets `timeline` begin one later
        require_horovod()
        self._hvd = importlib.import_module("horovod.tensorflow")
        self._last_sum: tf.Tensor | None = None
        self._join()

    def _join(self) -> None:
        """Joins the other workers.

        Raises:
            CannotJoin: the other workers were not reached.
        """
        try:
            with progress.pollers():
                self._hvd.init()
        except ValueError as error:  # as it says that init failed
            problem = str(error).removeprefix("Horovod initialization failed: ")
            raise CannotJoin(re.sub(r"^\[[^\]]*\] *", "", problem)) from error  # which names a line of C++
        self.rank, self.world_size = self._hvd.rank(), self._hvd.size()
        self.local_rank, self.local_size = self._hvd.local_rank(), self._hvd.local_size()

    def all_reduce(self, tensors: Sequence[tf.Tensor], name: str | None = None) -> list[tf.Tensor]:
        if len(tensors) == 1:
            summed = [self._hvd.allreduce(tensors[0], op=self._hvd.Sum, name=name)]
        else:
            summed = self._hvd.grouped_allreduce(list(tensors), op=self._hvd.Sum, name=name)
        self._last_sum = summed[0]
        return summed

    def after_sums(self) -> contextlib.AbstractContextManager[None]:
        return after(self._last_sum)

    def all_gather(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        return self._hvd.grouped_allgather(list(tensors), name=name)

    def num_ranks(self) -> tf.Tensor:
        return self._hvd.size_op()

    def all_to_all_parts(self, message: tf.Tensor, lengths: tf.Tensor, name: str) -> tuple[tf.Tensor, tf.Tensor]:
        received, received_lengths = self._hvd.alltoall(message, splits=lengths, name=name)
        return received, received_lengths

    @raise_lost_peer()
    def sum(self, values: np.ndarray) -> np.ndarray:
        return self._hvd.allreduce(tf.constant(values), op=self._hvd.Sum, name="host_sum").numpy()

    @raise_lost_peer()
    def gather(self, values: np.ndarray) -> np.ndarray:
        return self._hvd.allgather(tf.constant(values), name="host_gather").numpy()

    @raise_lost_peer()
    def broadcast_variables(self, variables: Sequence[tf.Variable], root: int = 0) -> None:
        for place, variable in enumerate(variables):
            variable.assign(self._hvd.broadcast(variable, root_rank=root, name=f"initial_{place}"))

    @raise_lost_peer()
    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        # Not Horovod's own function of that name, which unpickles what comes.
        text = np.frombuffer(json.dumps(value).encode() if self.rank == root else b"", np.uint8)
        size = self._hvd.broadcast(tf.constant([len(text)]), root_rank=root, name="host_object_size").numpy()[0]
        text = text if self.rank == root else np.zeros(size, np.uint8)
        told = self._hvd.broadcast(tf.constant(text), root_rank=root, name="host_object").numpy()
        return json.loads(told.tobytes())

    def barrier(self) -> None:
        self.sum(np.zeros(1, np.float32))

    @contextlib.contextmanager
    def timeline(self, path: Path) -> Iterator[None]:
        self._hvd.start_timeline(str(path))
        try:
            yield
        finally:
            self._hvd.stop_timeline()

    def shutdown(self) -> None:
        self._hvd.shutdown()


class ElasticRuntime(HorovodRuntime):
    """The processes that `horovodrun` started with `--min-np`: they come and go."""

    elastic = True

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Event()
        notifications = importlib.import_module("horovod.common.elastic").notification_manager
        notifications.init()
        notifications.register_listener(self)

    def on_hosts_updated(self, timestamp: float, result: object) -> None:
        """Notes that the hosts have changed. Horovod calls it, on the chief only."""
        self._changed.set()

    def workers_changed(self) -> bool:
        return self._changed.is_set()

    def _join(self) -> None:
        """Tries again when a worker is lost while all join: that fails on every rank."""
        failed_joins = 0
        while True:
            started = time.monotonic()
            try:
                super()._join()
            except CannotJoin as error:
                self._hvd.shutdown()
                if is_dismissed():
                    raise Left("because its host was taken from the job") from error
                failed_joins = failed_joins + 1 if time.monotonic() - started < _AT_ONCE_SECONDS else 0
                if failed_joins > _MOST_FAILED_JOINS:
                    raise
                time.sleep(_JOIN_AGAIN_SECONDS)
            else:
                os.environ["HOROVOD_RANK"] = str(self.rank)  # which Horovod sets at the start only
                return

    def reset(self) -> None:
        self._hvd.shutdown()
        self._changed.clear()
        self._join()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        # A worker that is taken in finds the others at work already: it may be refused alone.
        yield


def open_runtime() -> Runtime:
    """Joins the job that `horovodrun` started this process for, or stands alone, which takes no Horovod.

    Raises:
        InputError: there are other workers, and Horovod is not installed.
    """
    place = Place.from_environment()
    if place.elastic:
        return ElasticRuntime()
    return Runtime() if place.alone else HorovodRuntime()

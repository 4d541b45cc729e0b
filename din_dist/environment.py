"""What libraries read from the environment: set or checked once, before they are imported."""

from __future__ import annotations

import os
import signal

from din_dist.errors import InputError

# Of other projects of the same shell or user, and never meant for this one.
_SET = {
    "KERAS_BACKEND": "tensorflow",
    "KERAS_HOME": "/dev/null/keras",  # no keras.json there: its floatx and backend are not read
}
SEVERAL_ON_A_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"  # of NCCL itself, which else refuses ranks that share a GPU
_REMOVED = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir", "TF_USE_LEGACY_KERAS")
# What horovodrun gives a worker; all of these, or none.
_PLACE = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
_MEETING = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_OF_WORKERS = (*_PLACE, *_MEETING, "HOROVOD_ELASTIC", "HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE", "HOROVOD_HOSTNAME")


def settle() -> None:
    """Gives libraries the environment that this package is made for.

    Raises:
        InputError: variables that horovodrun sets for its workers are there in part, or make no sense.
    """
    os.environ.update(_SET)
    for name in _REMOVED:
        os.environ.pop(name, None)
    if not any(name in os.environ for name in (*_PLACE, "HOROVOD_ELASTIC")):
        return
    for name in (*_PLACE, *_MEETING):
        if name not in os.environ:
            raise _left_over(f"no {name}")
    numbers = {name: _number(name) for name in (*_PLACE, _MEETING[1])}
    rank, size, local_rank, local_size = (numbers[name] for name in _PLACE)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise _left_over(", ".join(f"{name}={os.environ[name]}" for name in _PLACE))


def forget_place() -> None:
    """Removes what horovodrun gives its workers, so that those which are started from here do not inherit it."""
    for name in _OF_WORKERS:
        os.environ.pop(name, None)


def ending_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that ask this process to end.

    SIGHUP, by which a terminal says that it closes, is one of them unless it was ignored at the start, as under nohup.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if is_ignored else (signal.SIGHUP,)))


def rank() -> int:
    """Returns the number of this process among all workers, 0 where there are no others; for lines of a log."""
    text = os.environ.get("HOROVOD_RANK", "0")
    return int(text) if text.isdecimal() else 0


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise _left_over(f"{name}={text!r}")
    return int(text)


def _left_over(received: str) -> InputError:
    there = [name for name in _OF_WORKERS if name in os.environ]
    return InputError(
        f"HOROVOD_*: horovodrun gives its workers all of these variables. Received: {received}, beside "
        f"{', '.join(there)}: left over from another job. Run: unset {' '.join(there)}"
    )

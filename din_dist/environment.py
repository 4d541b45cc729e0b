"""Sets and checks what libraries read from the environment, once, before they are imported."""

from __future__ import annotations

import os
import signal

from din_dist import place
from din_dist.errors import InputError

# Other projects of the same shell or user may set these; nobody means them for this one.
_BACKEND = "KERAS_BACKEND"
SET = {
    _BACKEND: "tensorflow",
    "KERAS_HOME": "/dev/null/keras",  # no keras.json there: its floatx and backend are not read
}
SEVERAL_ON_A_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL's own; it refuses ranks that share a GPU otherwise
_REMOVED = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir", "TF_USE_LEGACY_KERAS")


def settle() -> None:
    """Gives libraries the environment that this package is made for.

    Raises:
        InputError: Keras is to run on something other than TensorFlow. Or only some of the variables that horovodrun
            gives its workers are set, or they make no sense.
    """
    if os.environ.get(_BACKEND, "") not in ("", SET[_BACKEND]):
        raise InputError(
            f"{_BACKEND}: must be tensorflow, on which din_dist is built. Received: {os.environ[_BACKEND]!r}. Run: "
            f"unset {_BACKEND}"
        )
    os.environ.update(SET)
    for name in _REMOVED:
        os.environ.pop(name, None)
    place.check_variables()


def ending_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that ask this process to end.

    A terminal sends SIGHUP when it closes. It is one of them unless it was ignored at the start, as under nohup.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if is_ignored else (signal.SIGHUP,)))

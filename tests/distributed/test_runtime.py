"""Who gets which device, decided without the device."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import tensorflow as tf

from din_dist.distributed.devices import claim_devices
from din_dist.distributed.runtime import Runtime, open_runtime, raise_lost_peer
from din_dist.errors import InputError, LostPeer
from tests.support.patience import PATIENCE


def worker(local_rank: int, local_size: int) -> Runtime:
    runtime = Runtime()
    runtime.local_rank, runtime.local_size = local_rank, local_size
    return runtime


@pytest.fixture
def settings():
    """Device settings that are noted, not made."""
    with (
        mock.patch.object(tf.config.threading, "set_intra_op_parallelism_threads") as intra,
        mock.patch.object(tf.config.threading, "set_inter_op_parallelism_threads"),
        mock.patch.object(tf.config, "set_visible_devices") as visible,
        mock.patch.object(tf.config.experimental, "set_memory_growth") as growth,
    ):
        yield SimpleNamespace(intra=intra, visible=visible, growth=growth)


def test_a_worker_has_a_thread_for_each_of_its_cores(settings) -> None:
    claim_devices(worker(0, 2), 3, gpus=[])
    settings.intra.assert_called_once_with(3)


def test_each_worker_pins_the_gpu_of_its_local_rank(settings) -> None:
    gpus = ["gpu:0", "gpu:1", "gpu:2"]
    claim_devices(worker(1, 2), 1, gpus)
    settings.visible.assert_called_once_with("gpu:1", "GPU")
    settings.growth.assert_called_once_with("gpu:1", True)


def test_fewer_gpus_than_workers_is_an_error(settings) -> None:
    with pytest.raises(InputError, match=r"GPU of its own. Received: 2 workers and 1 GPU\(s\)"):
        claim_devices(worker(0, 2), 1, ["gpu:0"])


def test_workers_share_gpus_where_nccl_was_told_to_bear_it(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    claim_devices(worker(3, 4), 1, ["gpu:0", "gpu:1"])
    settings.visible.assert_called_once_with("gpu:1", "GPU")


def test_alone_horovod_is_not_even_imported() -> None:
    code = (
        "import sys; from din_dist.distributed.runtime import open_runtime; r = open_runtime(); "
        "assert r.is_chief and r.world_size == 1 and 'horovod' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
    assert type(open_runtime()) is Runtime


class HorovodInternalError(RuntimeError):
    """Stands for Horovod's own, which these tests do not import."""


@pytest.mark.parametrize(
    "error",
    [
        HorovodInternalError("connection reset"),
        tf.errors.UnknownError(None, None, "Horovod has been shut down"),
        tf.errors.UnavailableError(None, None, "the Horovod worker of rank 1 ended in the middle of an update"),
    ],
)
def test_a_lost_peer_is_raised_with_the_notes_and_the_cause(error: Exception) -> None:
    error.add_note("step 3")
    with pytest.raises(LostPeer) as lost, raise_lost_peer():
        raise error
    assert (lost.value.__notes__, lost.value.__cause__) == (["step 3"], error)


@pytest.mark.parametrize(
    "error", [tf.errors.UnknownError(None, None, "No space left"), ValueError("Horovod"), LostPeer("once")]
)
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as same, raise_lost_peer():
        raise error
    assert same.value is error

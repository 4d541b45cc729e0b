"""Who gets which device, decided without the device."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import tensorflow as tf

from din_dist.distributed import runtime as runtime_module
from din_dist.distributed.runtime import Runtime, claim_devices, open_runtime


def worker(local_rank: int, local_size: int) -> Runtime:
    runtime = Runtime()
    runtime.local_rank, runtime.local_size = local_rank, local_size
    return runtime


@pytest.fixture
def machine():
    """A machine of 8 cores on which nothing is really changed."""
    with (
        mock.patch.object(runtime_module.os, "sched_getaffinity", return_value=set(range(8))),
        mock.patch.object(runtime_module.os, "sched_setaffinity") as confine,
        mock.patch.object(tf.config.threading, "set_intra_op_parallelism_threads") as intra,
        mock.patch.object(tf.config.threading, "set_inter_op_parallelism_threads"),
        mock.patch.object(tf.config, "set_visible_devices") as visible,
        mock.patch.object(tf.config.experimental, "set_memory_growth") as growth,
    ):
        yield SimpleNamespace(confine=confine, intra=intra, visible=visible, growth=growth)


def test_cores_are_shared_out_fairly(machine) -> None:
    shares = [claim_devices(worker(rank, 3), gpus=[]) for rank in range(3)]
    assert sorted(core for share in shares for core in share) == list(range(8))
    assert [len(share) for share in shares] == [2, 3, 3]
    assert [call.args[1] for call in machine.confine.call_args_list] == shares
    assert [call.args[0] for call in machine.intra.call_args_list] == [2, 3, 3]


def test_a_process_alone_keeps_all_cores(machine) -> None:
    assert claim_devices(worker(0, 1), gpus=[]) == list(range(8))
    machine.confine.assert_not_called()


def test_more_workers_than_cores_get_one_each(machine) -> None:
    shares = [claim_devices(worker(rank, 20), gpus=[]) for rank in range(20)]
    assert all(len(share) == 1 for share in shares)
    machine.confine.assert_not_called()


def test_each_worker_pins_the_gpu_of_its_local_rank(machine) -> None:
    gpus = ["gpu:0", "gpu:1", "gpu:2"]
    claim_devices(worker(1, 2), gpus)
    machine.visible.assert_called_once_with("gpu:1", "GPU")
    machine.growth.assert_called_once_with("gpu:1", True)


def test_fewer_gpus_than_workers_is_an_error(machine) -> None:
    with pytest.raises(RuntimeError, match=r"GPU of its own. Received: 2 workers and 1 GPU\(s\)"):
        claim_devices(worker(0, 2), ["gpu:0"])


def test_alone_horovod_is_not_even_imported() -> None:
    code = (
        "import sys; from din_dist.distributed.runtime import open_runtime; r = open_runtime(); "
        "assert r.is_chief and r.world_size == 1 and 'horovod' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert type(open_runtime()) is Runtime

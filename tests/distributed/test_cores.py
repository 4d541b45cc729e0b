"""How the workers of a machine share its cores."""

import os
import subprocess
import sys
from unittest import mock

from din_dist.distributed.cores import claim_cores


def shares(num_cores: int, local_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """What each worker of a machine is told, and what it confines itself to."""
    told = []
    with (
        mock.patch.object(os, "sched_getaffinity", return_value=set(range(num_cores))),
        mock.patch.object(os, "sched_setaffinity") as confine,
    ):
        for rank in range(local_size):
            env = {"HOROVOD_LOCAL_RANK": str(rank), "HOROVOD_LOCAL_SIZE": str(local_size)}
            with mock.patch.dict(os.environ, env):
                told.append(claim_cores())
    return told, [call.args[1] for call in confine.call_args_list]


def test_cores_are_shared_out_fairly() -> None:
    told, confined = shares(8, 3)
    assert told == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert confined == told


def test_a_process_alone_keeps_all_cores() -> None:
    assert shares(8, 1) == ([list(range(8))], [])


def test_more_workers_than_cores_get_one_each() -> None:
    assert shares(2, 5) == ([[0], [1], [0], [1], [0]], [])


def test_every_thread_of_a_real_worker_is_confined() -> None:
    """Those of TensorFlow and Horovod too: they start after it."""
    code = (
        "from din_dist.distributed.cores import claim_cores; cores = claim_cores()\n"
        "import os, tensorflow as tf; tf.matmul(tf.ones([512, 512]), tf.ones([512, 512]))\n"
        "threads = os.listdir('/proc/self/task'); assert len(threads) > 2\n"
        "assert all(os.sched_getaffinity(int(thread)) == set(cores) for thread in threads)\n"
        "assert cores == sorted(cores) and len(cores) == int(os.environ['EXPECTED'])"
    )
    expected = len(os.sched_getaffinity(0)) - len(os.sched_getaffinity(0)) // 2
    env = os.environ | {"HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2", "EXPECTED": str(expected)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)

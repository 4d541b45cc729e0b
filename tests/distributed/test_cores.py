"""How the workers of a machine share its cores."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from din_dist.distributed.cores import claim_cores, cores_near_gpus
from tests.support.patience import PATIENCE


def shares(
    num_cores: int, local_size: int, near_gpus: Sequence[set[int]] = ()
) -> tuple[list[list[int]], list[list[int]]]:
    """What each worker of a machine is told, and what it confines itself to."""
    told = []
    with (
        mock.patch.object(os, "sched_getaffinity", return_value=set(range(num_cores))),
        mock.patch.object(os, "sched_setaffinity") as confine,
    ):
        for rank in range(local_size):
            env = {"HOROVOD_LOCAL_RANK": str(rank), "HOROVOD_LOCAL_SIZE": str(local_size)}
            with mock.patch.dict(os.environ, env):
                told.append(claim_cores(near_gpus))
    return told, [call.args[1] for call in confine.call_args_list]


def test_cores_are_shared_out_fairly() -> None:
    told, confined = shares(8, 3)
    assert told == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert confined == told


def test_a_process_alone_keeps_all_cores() -> None:
    assert shares(8, 1) == ([list(range(8))], [])


def test_more_workers_than_cores_get_one_each() -> None:
    assert shares(2, 5) == ([[0], [1], [0], [1], [0]], [])


def test_cores_near_the_workers_gpu() -> None:
    """Four GPUs, of which the first and the third hang on the second socket."""
    first, second = {0, 1, 2, 3, 8, 9}, {4, 5, 6, 7}
    told, confined = shares(10, 4, [second, first, second, first])
    assert told == confined == [[4, 5], [0, 1, 2], [6, 7], [3, 8, 9]]


def test_cores_that_this_process_may_not_use_are_nobodys() -> None:
    assert shares(4, 2, [{0, 1, 8, 9}, {2, 3, 10}])[0] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "near_gpus", [[{0, 1}], [{8, 9}, {0, 1}], [set(), set()]], ids=["one GPU", "none of its cores is ours", "no cores"]
)
def test_where_not_every_worker_has_cores_near_a_gpu_they_are_shared_as_without(near_gpus: list[set[int]]) -> None:
    assert shares(4, 2, near_gpus)[0][0] == [0, 1]


@pytest.fixture
def node(tmp_path: Path) -> dict[str, Path]:
    """What the kernel shows of a machine with three GPUs, of which this container has two."""
    for address, cores in (("0000:3b:00.0", "0-3,16-19"), ("0000:86:00.0", "4-7"), ("0000:af:00.0", "4-7")):
        folder = tmp_path / "pci" / address
        folder.mkdir(parents=True)
        (folder / "local_cpulist").write_text(f"{cores}\n")
    for address in ("0000:86:00.0", "0000:3B:00.0"):
        (tmp_path / "driver" / address).mkdir(parents=True)
    return {"driver": tmp_path / "driver", "pci": tmp_path / "pci"}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [{0, 1, 2, 3, 16, 17, 18, 19}, {4, 5, 6, 7}]),
        ("1,0", [{4, 5, 6, 7}, {0, 1, 2, 3, 16, 17, 18, 19}]),
        ("1", [{4, 5, 6, 7}]),
        ("", []),
        ("2", []),
        ("GPU-8932f937", []),
    ],
)
def test_which_cores_are_near_which_gpu(
    node: dict[str, Path], monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[set[int]]
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cores_near_gpus(**node) == expected


def test_no_gpu_and_a_kernel_that_does_not_tell(node: dict[str, Path], tmp_path: Path) -> None:
    assert cores_near_gpus(tmp_path / "none", node["pci"]) == []
    (node["pci"] / "0000:86:00.0" / "local_cpulist").unlink()
    assert cores_near_gpus(**node) == []


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
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=PATIENCE)

"""Jobs on a real GPU: weights against those of a CPU, workers over NCCL against one, and the default job.

    PYTHONPATH=. .venv/bin/python -m tests.gpu.smoke [weights] [nccl] [train]        (default: all)

By hand, after `launch/setup.sh --gpu`, on a machine with an NVIDIA GPU. One is enough: its workers share it, which NCCL
bears when told to (NCCL_MULTI_RANK_GPU_ENABLE=1; 2.32 does, in older ones it may be missing).

- `weights`: 60 updates of each optimizer on the GPU, without TF32, and on the CPU in our own kernels: the same losses,
  weights and metrics.
- `nccl`: two workers that exchange through NCCL, and that Horovod did so: their messages, then the same as `weights`.
  Workers that share a GPU wait for each other at every message, so it takes minutes there.
- `train`: `launch/train.sh`, and its test GAUC.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from tests.support.jobs import assert_same_training, records, start, train
from tests.support.repository import ROOT
from tests.support.train_cases import CASES, prepare_data

EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # TF32 keeps 10 bits of a factor's mantissa
ON_CPU = {"CUDA_VISIBLE_DEVICES": "-1"}
QUICK_GAUC = 0.875  # what launch/flags/quick.flags reach


def weights(folder: Path) -> None:
    """A GPU against our kernels."""
    train(folder, "one", 1, variables=ON_CPU)
    train(folder, "gpu", 1, variables=EXACT)
    compare(folder, "gpu")


def nccl(folder: Path) -> None:
    """Two workers against one."""
    if not (folder / "one").exists():
        train(folder, "one", 1, variables=ON_CPU)
    told = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/nccl.%p"}
    try:
        print(start(2, "tests.gpu.messages", variables=told), end="", flush=True)
        train(folder, "nccl", 2, variables=EXACT | told)
    except AssertionError:
        print(*(line for path in folder.glob("nccl.*") for line in path.open() if "WARN" in line), sep="")
        raise
    compare(folder, "nccl")
    logs = [path.read_text() for path in folder.glob("nccl.*")]
    assert len(logs) == 4 and all("Init COMPLETE" in log for log in logs), "NCCL was not used"


def compare(folder: Path, run: str) -> None:
    for case in CASES:
        by_wire = case == "bfloat16" and run == "nccl"  # 8 bits of mantissa
        assert_same_training(folder, run, "one", case, loose=50 if by_wire else 1)
        (found,), (expected,) = (records(folder, name, case, "test") for name in (run, "one"))
        print(f"{run:5} {case:10} log loss {found['log_loss']:.5f}, on the CPU {expected['log_loss']:.5f}", flush=True)
        assert abs(found["log_loss"] - expected["log_loss"]) < (0.02 if by_wire else 1e-3)


def train_quick(folder: Path) -> None:
    """The README's first command."""
    started = time.monotonic()
    output_dir = folder / "train" / "quick"
    command = [ROOT / "launch" / "train.sh", "--flagfile=launch/flags/quick.flags", f"--output_dir={output_dir}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DIN_DIST_DEVICE": "gpu"}, check=True)
    gauc = records(folder, "train", "quick", "test")[-1]["gauc"]
    print(f"train test GAUC {gauc:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    assert gauc > QUICK_GAUC - 0.005


PARTS: dict[str, Callable[[Path], None]] = {"weights": weights, "nccl": nccl, "train": train_quick}


def main(names: list[str]) -> None:
    unknown = set(names) - PARTS.keys()
    if unknown:
        sys.exit(f"There is no part {', '.join(sorted(unknown))}. Parts: {', '.join(PARTS)}.")
    if not shutil.which("nvidia-smi") or "GPU 0" not in subprocess.check_output(["nvidia-smi", "-L"], text=True):
        sys.exit("nvidia-smi -L lists no GPU: this takes one.")
    tf.config.set_visible_devices([], "GPU")  # all of its memory is for the jobs
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare_data(folder)
        for name in names or PARTS:
            PARTS[name](folder)
            print(f"{name}: passed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

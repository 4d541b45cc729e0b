"""Compares two checkouts bit by bit: losses and weights of 60 updates of each optimizer, by 1 to 3 workers.

    python -m tests.benchmarks.same_numbers OTHER_CHECKOUT

Each checkout trains by its own environment (`launch/setup.sh --test` makes it), in kernels and in TensorFlow alone. For
changes that must not change any number. Exit code 1: some number differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.support.repository import ROOT

STEPS = 60
OPTIMIZERS = {
    "sgd": ["--learning_rate=0.3", "--clip_norm=1", "--batch_norm=frozen"],
    "adagrad": ["--learning_rate=0.05", "--adagrad_row_wise", "--attention_normalization=none", "--l2=0.01"],
    "lazy_adam": [
        *("--activation=dice", "--dropout=0.2", "--embedding_l2=0.01", "--mini_batch_aware_l2=0.1"),
        *("--resample_negatives", "--unknown_item=features", "--learning_rate=0.01"),
    ],
}
DATA = [
    *("--dataset=synthetic", "--synthetic_num_users=300", "--synthetic_num_items=400", "--synthetic_num_categories=20"),
    *("--embedding_dim=16", "--hidden_units=16,8", "--attention_hidden_units=12", "--global_batch_size=96"),
    *("--max_history_length=20", f"--max_steps={STEPS}", "--log_every_steps=1", "--metrics_port=-1", "--epochs=100"),
]


def train(checkout: Path, folder: Path, optimizer: str, num_workers: int, native: bool) -> dict[str, np.ndarray]:
    """Returns the losses and the weights after the last update, by name."""
    python = checkout / ".venv" / "bin" / "python"
    output = folder / f"{optimizer}-{num_workers}-{native}"
    flags = [*DATA, f"--optimizer={optimizer}", *OPTIMIZERS[optimizer], f"--data_dir={folder / 'data'}"]
    flags += [f"--output_dir={output}", "--native" if native else "--nonative"]
    launch = [] if num_workers == 1 else [str(python.with_name("horovodrun")), "--gloo", "-np", str(num_workers)]
    for command in (
        [str(python), "-m", "din_dist.cli.prepare_data", *flags],
        [*launch, str(python), "-m", "din_dist.cli.train", *flags],
    ):
        environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{checkout}: {' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    (checkpoint,) = (output / "checkpoints").glob(f"step-{STEPS:012d}")
    weights = {path.name: np.load(path) for path in checkpoint.glob("*.npy")}
    return {"losses": np.array(losses), **weights}


def difference(ours: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> str:
    """Returns what differs; empty where every bit is the same."""
    if ours.keys() != others.keys():
        return f"other weights: {sorted(ours.keys() ^ others.keys())}"
    differing = [name for name in ours if ours[name].tobytes() != others[name].tobytes()]
    return ", ".join(f"{name} by {np.abs(ours[name] - others[name]).max():.2g}" for name in differing)


def main(other: Path) -> None:
    num_different = 0
    with tempfile.TemporaryDirectory() as folder:
        for optimizer in OPTIMIZERS:
            for num_workers in (1, 2, 3):
                for native in (True, False):
                    ours, others = (
                        train(checkout, Path(folder, name), optimizer, num_workers, native)
                        for checkout, name in ((ROOT, "ours"), (other, "others"))
                    )
                    found = difference(ours, others)
                    num_different += bool(found)
                    form = "kernels" if native else "TensorFlow"
                    print(f"{optimizer}, {num_workers} workers, {form}: {found or 'the same bits'}", flush=True)
    sys.exit(num_different > 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

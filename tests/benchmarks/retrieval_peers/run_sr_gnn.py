"""Trains SR-GNN with its authors' own code, `pytorch_code/` of a checkout.

The loop is that of their `train_test`, which cannot be stopped, with their `Data`, their `forward` and their schedule.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import stopwatch
import vectors


def train(job: dict[str, Any], channel: Any) -> None:
    sys.path.insert(0, str(Path(job["code"], "pytorch_code")))
    import torch
    from model import SessionGraph, forward
    from utils import Data

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    np.random.seed(job["seed"])  # noqa: NPY002 - theirs shuffles by it
    given, asked = (Data(_sequences(job, split), shuffle=split == "train") for split in ("train", "asked"))
    num_items = len(np.load(Path(job["data"], "items.npz"))["counts"]) - 1
    options = types.SimpleNamespace(
        hiddenSize=job["embedding_dim"],
        batchSize=job["batch_size"],
        nonhybrid=False,
        step=1,
        lr=job["learning_rate"],
        l2=job["weight_decay"],
        lr_dc_step=job["epochs_between_decays"],
        lr_dc=job["learning_rate_decay"],
    )
    model = SessionGraph(options, num_items + 1)
    kept: list[Any] = []  # a user's vector comes out of this layer, and is multiplied by those of the items
    model.linear_transform.register_forward_hook(lambda layer, inputs, output: kept.append(output.detach()))

    def found() -> tuple[np.ndarray, np.ndarray]:
        model.eval()
        users = []
        with torch.no_grad():
            for rows in asked.generate_batch(model.batch_size):
                kept.clear()
                forward(model, rows, asked)
                users.append(kept[0].numpy())
        model.train()
        return np.concatenate(users), model.embedding.weight.detach().numpy()

    def batches() -> Iterator[np.ndarray]:
        while True:
            yield from given.generate_batch(model.batch_size)
            model.scheduler.step()

    watch = vectors.VectorStopwatch(job, channel, found, "torch")
    model.train()
    with watch.running():
        for rows in batches():
            kept.clear()
            model.optimizer.zero_grad()
            targets, scores = forward(model, rows, given)
            loss = model.loss_function(scores, torch.Tensor(targets).long() - 1)
            loss.backward()
            model.optimizer.step()
            watch.after_step(len(rows))


def _sequences(job: dict[str, Any], split: str) -> tuple[list[list[int]], list[int]]:
    """Returns the histories and the targets of a split, as their preprocessing writes them."""
    targets, lengths, histories = vectors.examples(job, split)
    return [row[:length].tolist() for row, length in zip(histories, lengths, strict=True)], targets.tolist()


if __name__ == "__main__":
    job, channel = stopwatch.start()
    if job["mode"] != "prepare":  # theirs are Python's lists
        train(job, channel)
    stopwatch.leave()

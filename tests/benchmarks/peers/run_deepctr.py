"""Trains DeepCTR's DIN as its documentation does (examples/run_din.py): padded arrays, `model.fit`.

The histories are filled up at the end to the longest that is allowed: the input's width is a constant of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import stopwatch
from padding import padded_histories

FORM = "deepctr"  # folder of its own form of the data: it has no file format, so arrays as `fit` wants them


def prepare(job: dict[str, Any]) -> None:
    source, folder = Path(job["data"]), Path(job["data"], FORM)
    folder.mkdir(exist_ok=True)
    category_of = np.load(source / "items.npz")["category_ids"]
    for split in ("train", "test"):
        columns = np.load(source / f"{split}.npz")
        (history,) = padded_histories(columns, [job["max_history_length"]])
        candidates = columns["candidate_item_ids"]
        np.savez(
            folder / f"{split}.npz",
            item_id=candidates,
            cate_id=category_of[candidates],
            hist_item_id=history,
            hist_cate_id=category_of[history],
            seq_length=columns["history_lengths"],
            label=columns["labels"].astype(np.int32),
        )


def train(job: dict[str, Any], channel: Any) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(job["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(max(2, job["threads"]))  # as ours
    tf.keras.utils.set_random_seed(job["seed"])
    from deepctr.feature_column import SparseFeat, VarLenSparseFeat
    from deepctr.models import DIN

    category_of = np.load(Path(job["data"], "items.npz"))["category_ids"]
    sizes = {"item_id": len(category_of), "cate_id": int(category_of.max()) + 1}
    width = job["embedding_dim"]
    columns = [SparseFeat(name, size, embedding_dim=width) for name, size in sizes.items()]
    columns += [
        VarLenSparseFeat(
            SparseFeat(f"hist_{name}", size, embedding_dim=width, embedding_name=name),
            maxlen=job["max_history_length"],
            length_name="seq_length",
        )
        for name, size in sizes.items()
    ]
    model = DIN(
        columns,
        list(sizes),
        dnn_hidden_units=job["hidden_units"],
        dnn_activation="sigmoid",
        att_hidden_size=job["attention_hidden_units"],
        att_activation="sigmoid",
        att_weight_normalization=True,
        l2_reg_embedding=0,
        seed=job["seed"],
    )
    model.compile(tf.keras.optimizers.Adam(job["learning_rate"]), "binary_crossentropy")
    inputs, labels = _load(job, "train")

    # The test inputs are read when first needed: memory is that of training.
    watch = stopwatch.Stopwatch(
        job,
        channel,
        lambda: model.predict(_load(job, "test")[0], batch_size=job["batch_size"], verbose=0),
        "deepctr,tensorflow-cpu,keras",
    )

    class AfterStep(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            first = batch * job["batch_size"]
            watch.after_step(min(job["batch_size"], len(labels) - first))

    with watch.running():
        model.fit(inputs, labels, batch_size=job["batch_size"], epochs=10**6, verbose=0, callbacks=[AfterStep()])


def _load(job: dict[str, Any], split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    columns = dict(np.load(Path(job["data"], FORM, f"{split}.npz")))
    return columns, columns.pop("label")


if __name__ == "__main__":
    job, channel = stopwatch.start()
    if job["mode"] == "prepare":
        prepare(job)
    else:
        train(job, channel)
    stopwatch.leave()

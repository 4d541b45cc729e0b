"""Trains the models of ComiRec's authors with their own code, `src/model.py` of a checkout, on TensorFlow 2.

Their code is for TensorFlow 1. It finds `tf.compat.v1` under the names that it imports. It gets our examples in an
order of our own, from arrays, which is faster than their iterator. Items are numbered by falling frequency, as their
preprocessing does, because their sampler supposes it.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import stopwatch
import vectors

FORM = "comirec"  # folder of its own form of the data
EVENTS_AT_ONCE = 256  # their capsules take 1.3 MB an event


def prepare(job: dict[str, Any]) -> None:
    folder = Path(job["data"], FORM)
    folder.mkdir(exist_ok=True)
    counts = np.load(Path(job["data"], "items.npz"))["counts"]
    number_of = np.zeros(len(counts), np.int32)  # 0 is padding in theirs too
    number_of[1 + np.argsort(-counts[1:], kind="stable")] = np.arange(1, len(counts))
    np.save(folder / "number_of.npy", number_of)
    for split in ("train", "asked"):
        targets, lengths, histories = vectors.examples(job, split)
        mask = (np.arange(histories.shape[1]) < lengths[:, None]).astype(np.float32)
        np.savez(folder / f"{split}.npz", targets=number_of[targets], histories=number_of[histories], mask=mask)


def train(job: dict[str, Any], channel: Any) -> None:
    tf, models = _their_models(Path(job["code"]))
    folder = Path(job["data"], FORM)
    number_of = np.load(folder / "number_of.npy")
    given, asked = (dict(np.load(folder / f"{split}.npz")) for split in ("train", "asked"))
    threads = {"intra_op_parallelism_threads": job["threads"], "inter_op_parallelism_threads": job["threads"]}
    tf.set_random_seed(job["seed"])
    with tf.Session(config=tf.ConfigProto(**threads)) as session:
        model = _make(models, job, len(number_of))
        session.run(tf.global_variables_initializer())

        def found() -> tuple[np.ndarray, np.ndarray]:
            users = [
                model.output_user(session, [asked["histories"][part], asked["mask"][part]])
                for part in vectors.parts(len(asked["mask"]), EVENTS_AT_ONCE)
            ]
            return np.concatenate(users), model.output_item(session)[number_of]

        watch = vectors.VectorStopwatch(job, channel, found, "tensorflow,tf-keras")
        with watch.running():
            for rows in _batches(len(given["targets"]), job):
                inputs = [given[name][rows] for name in ("targets", "histories", "mask")]
                model.train(session, [rows, *inputs, job["learning_rate"]])  # they feed users, and read them nowhere
                watch.after_step(len(rows))


def _batches(num_examples: int, job: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yields the rows of each batch, each epoch in another order."""
    random = np.random.default_rng(job["seed"])
    while True:
        order = random.permutation(num_examples)
        yield from (order[part] for part in vectors.parts(num_examples, job["batch_size"]))


def _make(models: Any, job: dict[str, Any], num_items: int) -> Any:
    """Returns one of their models, with the arguments that their `src/train.py` has for Amazon's data."""
    sizes = (num_items, job["embedding_dim"], job["embedding_dim"], job["batch_size"])
    interests, length = job["num_interests"], job["max_history_length"]
    match job["model"]:
        case "youtube_dnn":
            return models.Model_DNN(*sizes, length)
        case "comirec_sa":
            return models.Model_ComiRec_SA(*sizes, interests, length)
        case "comirec_dr":
            return models.Model_ComiRec_DR(*sizes, interests, length)
        case "mind":
            return models.Model_MIND(*sizes, interests, length, relu_layer=True)
        case other:
            raise ValueError(other)


def _their_models(code: Path) -> tuple[Any, Any]:
    """Returns `tf.compat.v1` and their module, imported while `tensorflow` means the former."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # tf.layers
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    named = types.ModuleType("tensorflow")
    named.__getattr__ = lambda name: getattr(tf, name)  # type: ignore[method-assign]
    named.contrib = types.ModuleType("tensorflow.contrib")  # type: ignore[attr-defined]
    named.contrib.slim = types.ModuleType("tensorflow.contrib.slim")  # type: ignore[attr-defined]  # which they do not use
    meant = {
        "tensorflow": named,
        "tensorflow.nn": tf.nn,
        "tensorflow.nn.rnn_cell": tf.nn.rnn_cell,
        "tensorflow.contrib": named.contrib,
        "tensorflow.contrib.slim": named.contrib.slim,
    }
    before = {name: sys.modules.get(name) for name in meant}
    sys.modules.update(meant)
    sys.path.insert(0, str(code / "src"))
    import model

    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    return tf, model


if __name__ == "__main__":
    job, channel = stopwatch.start()
    if job["mode"] == "prepare":
        prepare(job)
    else:
        train(job, channel)
    stopwatch.leave()

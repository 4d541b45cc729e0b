"""Trains a model of din_dist that finds items: FLAGS of the trainer and --job, as `stopwatch` describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import vectors

from din_dist.cli import entry
from tests.benchmarks.peers import run_ours

if TYPE_CHECKING:
    from din_dist.assembly import Assembly

EVENTS_AT_ONCE = 4096


def _watch(ours: Assembly, job: dict[str, Any], channel: TextIO) -> vectors.VectorStopwatch:
    """Returns a clock that saves vectors."""
    import tensorflow as tf

    _, lengths, histories = vectors.examples(job, "asked")
    ids = tf.TensorSpec([None], tf.int32)
    users_of = tf.function(ours.model.users_of, input_signature=[ids, ids], autograph=False)

    def found() -> tuple[np.ndarray, np.ndarray]:
        users = []
        for part in vectors.parts(len(lengths), EVENTS_AT_ONCE):
            rectangle = histories[part]
            packed = rectangle[np.arange(rectangle.shape[1]) < lengths[part, None]]
            users.append(users_of(packed, lengths[part].astype(np.int32)).numpy())
        return np.concatenate(users), ours.model.items(tf.range(ours.store.facts.num_candidates + 1)).numpy()

    return vectors.VectorStopwatch(job, channel, found, "tensorflow-cpu,keras")


if __name__ == "__main__":
    entry.run(lambda: run_ours.main(_watch))

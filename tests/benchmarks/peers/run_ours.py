"""Trains din_dist for its quality: FLAGS of the trainer and --job, as `stopwatch` describes it.

Its speed is measured by `din_dist.cli.benchmark`. Here the loop is that of `benchmark/step.py` at the real rate.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import stopwatch
from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.config import Config

if TYPE_CHECKING:
    from din_dist.assembly import Assembly

settings.define_flags()
flags.DEFINE_string("job", None, "JSON.", required=True)


def main(watch_of: Callable[[Assembly, dict[str, Any], TextIO], stopwatch.Stopwatch]) -> None:
    """Trains the job of the flags. `watch_of` makes the clock of --job, given the parts, that job and its channel."""
    config = settings.config_from_flags()
    sys.argv[1:] = [flags.FLAGS.job]
    entry.import_tensorflow()
    with tempfile.TemporaryDirectory() as folder:
        _train(config.replace(output_dir=folder), watch_of)


def _train(config: Config, watch_of: Callable[[Assembly, dict[str, Any], TextIO], stopwatch.Stopwatch]) -> None:
    from din_dist import assembly
    from din_dist.data.prepared import open_prepared
    from din_dist.distributed.devices import claim_devices
    from din_dist.distributed.runtime import Runtime
    from din_dist.training.schedules import learning_rate, num_updates

    job, channel = stopwatch.start()
    runtime = Runtime()
    num_threads = len(os.sched_getaffinity(0))
    claim_devices(runtime, num_threads)
    ours = assembly.Assembly(config, runtime, open_prepared(config.data), num_threads=num_threads)
    num_steps = num_updates(config, ours.splits["train"].num_examples)
    watch = watch_of(ours, job, channel)
    with watch.running():
        for place, batch in enumerate(ours.make_batches(0, 2**40)):
            num_examples = len(batch.labels)
            rate = learning_rate(config.optimizer, place + 1, num_steps)
            result = ours.step(batch, rate, place + 1, num_examples)
            float(result.loss)  # training reads it too
            watch.after_step(num_examples)


def _watch(ours: Assembly, job: dict[str, Any], channel: TextIO) -> stopwatch.Stopwatch:
    """Returns a clock that saves the logits of the test examples."""
    import tensorflow as tf

    from din_dist.data.pipeline import batch_signature, evaluation_batches

    config, store = ours.config, ours.store
    test = evaluation_batches(
        store,
        ours.splits["test"],
        config.data,
        seed=config.job.seed,
        batch_size=config.evaluation.evaluation_batch_size,
    )
    logits_of = tf.function(
        lambda batch: ours.model(batch, training=False),
        input_signature=[batch_signature(ours.model.encodings)],
        autograph=False,
    )
    return stopwatch.Stopwatch(
        job, channel, lambda: np.concatenate([logits_of(batch).numpy() for batch in test]), "tensorflow-cpu,keras"
    )


if __name__ == "__main__":
    entry.run(lambda: main(_watch))

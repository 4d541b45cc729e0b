"""Trains din_dist for its quality: FLAGS of the trainer and --job, as `stopwatch` describes it.

Its speed is measured by `din_dist.cli.benchmark`. Here the loop is that of `benchmark/step.py` at the real rate.
"""

from __future__ import annotations

import os
import sys
import tempfile

import numpy as np
import stopwatch
from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.config import Config

settings.define_flags()
flags.DEFINE_string("job", None, "JSON.", required=True)


def main() -> None:
    config = settings.config_from_flags()
    sys.argv[1:] = [flags.FLAGS.job]
    entry.import_tensorflow()
    with tempfile.TemporaryDirectory() as folder:
        _train(config.replace(output_dir=folder))


def _train(config: Config) -> None:
    import tensorflow as tf

    from din_dist import assembly
    from din_dist.data.pipeline import batch_signature, evaluation_batches
    from din_dist.data.prepared import open_prepared
    from din_dist.data.splits import split_examples
    from din_dist.distributed.devices import claim_devices
    from din_dist.distributed.runtime import Runtime

    job, channel = stopwatch.start()
    runtime = Runtime()
    num_threads = len(os.sched_getaffinity(0))
    claim_devices(runtime, num_threads)
    store = open_prepared(config.data)
    ours = assembly.Assembly(config, runtime, store, num_threads=num_threads)
    test = evaluation_batches(
        store,
        split_examples(store, config.data)["test"],
        config.data,
        seed=config.job.seed,
        batch_size=config.evaluation.evaluation_batch_size,
        shard_index=0,
        num_shards=1,
    )
    logits_of = tf.function(
        lambda batch: ours.model(batch, training=False),
        input_signature=[batch_signature(ours.model.encodings)],
        autograph=False,
    )
    watch = stopwatch.Stopwatch(
        job, channel, lambda: np.concatenate([logits_of(batch).numpy() for batch in test]), "tensorflow-cpu,keras"
    )
    with watch.running():
        for place, batch in enumerate(ours.make_batches(0, 2**40)):
            num_examples = len(batch.labels)
            result = ours.step(batch, config.optimizer.learning_rate, place + 1, num_examples)
            float(result.loss)  # training reads it too
            watch.after_step(num_examples)


if __name__ == "__main__":
    entry.run(main)

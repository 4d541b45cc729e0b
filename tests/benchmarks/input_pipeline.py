"""Speed of the input pipeline alone: `python -m tests.benchmarks.input_pipeline FLAGS`, after prepare_data.

Takes the trainer's flags and prints examples and history positions a second as JSON.
"""

from __future__ import annotations

import json
import time

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.data.pipeline import BatchMaker
from din_dist.execution import Execution

settings.define_flags()


def main() -> None:
    config = settings.config_from_flags()
    entry.import_tensorflow()
    from din_dist.data.pipeline import num_steps_per_epoch, training_batches
    from din_dist.data.prepared import open_prepared
    from din_dist.data.splits import split_examples
    from din_dist.data.trained_items import trained_items

    store = open_prepared(config.data)
    splits = split_examples(store, config.data)
    examples = splits["train"]
    steps = num_steps_per_epoch(examples.num_examples, config.job.global_batch_size) * config.job.epochs
    batches = iter(
        training_batches(
            BatchMaker.for_training(
                store,
                examples,
                config.data,
                config.job.seed,
                trained_items(store, config.data, splits),
                Execution(kernels=config.execution.native),
            ),
            config.data,
            global_batch_size=config.job.global_batch_size,
            steps=range(steps),
        )
    )
    next(batches)  # tracing
    num_examples = num_positions = 0
    started = time.perf_counter()
    for batch in batches:
        num_examples += len(batch.labels)
        num_positions += len(batch.history_item_ids)
    seconds = time.perf_counter() - started
    print(json.dumps({"examples_per_second": num_examples / seconds, "positions_per_second": num_positions / seconds}))


if __name__ == "__main__":
    entry.run(main)

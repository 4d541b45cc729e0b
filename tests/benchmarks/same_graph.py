"""Compares what two checkouts compute: `python -m tests.benchmarks.same_graph OTHER_CHECKOUT FLAGS`.

Counts the operations of each type in the graphs of a training pass and of a batch, for the job of FLAGS, whose data are
prepared. Each checkout has an environment (`launch/setup.sh --test`). A change that must cost nothing leaves the counts
as they are, which no noise of a machine hides. Exit code 1: they differ.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def compare(other: Path, flags: Sequence[str]) -> bool:
    """Prints the counts of both checkouts, and tells whether they are the same."""
    found = [_counts_in(checkout, flags) for checkout in (Path(__file__).parents[2], other)]
    for name in found[0]:
        here, there = (collections.Counter(counts[name]) for counts in found)
        print(f"{name}: {here.total():,} operations here, {there.total():,} there", end="")
        print("" if here == there else f"; more here {dict(here - there)}, more there {dict(there - here)}")
    return found[0] == found[1]


def _counts_in(checkout: Path, flags: Sequence[str]) -> dict[str, dict[str, int]]:
    command = [str(checkout / ".venv" / "bin" / "python"), __file__, *flags]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def count() -> None:
    """Prints the counts of the checkout that Python imports from."""
    from din_dist.cli import entry
    from din_dist.cli import flags as settings

    settings.define_flags()

    def main() -> None:
        config = settings.config_from_flags()
        entry.import_tensorflow()
        import tensorflow as tf

        from din_dist.assembly import Assembly, choose_execution
        from din_dist.data.pipeline import BatchMaker, batch_signature
        from din_dist.data.prepared import open_prepared
        from din_dist.data.splits import split_examples
        from din_dist.distributed.runtime import Runtime

        store = open_prepared(config.data)
        train = split_examples(store, config.data)["train"]
        maker = BatchMaker.for_training(store, train, config.data, config.job.seed, execution=choose_execution(config))
        ids, epoch = tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int64)
        with tempfile.TemporaryDirectory() as folder:
            model = Assembly(config.replace(output_dir=folder, metrics_port=-1), Runtime(), store).model
        graphs = {
            "training pass": ([batch_signature()], lambda batch: model(batch, training=True)),
            "batch": ([ids, epoch], maker.batch),
            "lengths": ([ids], maker.history_lengths),
        }
        counts = {}
        for name, (signature, function) in graphs.items():
            traced = tf.function(function, input_signature=signature, autograph=False).get_concrete_function()
            counts[name] = collections.Counter(operation.type for operation in traced.graph.get_operations())
        print(json.dumps(counts))

    entry.run(main)


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        count()
    else:
        sys.exit(not compare(Path(sys.argv[1]).resolve(), sys.argv[2:]))

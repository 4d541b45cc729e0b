"""Prepares a data set for training and prints its statistics: `python -m din_dist.cli.prepare_data`.

It takes every flag of the trainer and checks all of them. So a wrong flag is found before any worker starts.
"""

from __future__ import annotations

import time

from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.text import printable

settings.define_flags()


def main() -> None:
    """Prepares the data set and prints its statistics."""
    started = time.perf_counter()
    config = settings.config_from_flags()
    entry.import_tensorflow()  # takes seconds, so wrong flags are reported before
    from din_dist.assembly import require_memory_for_tables
    from din_dist.data.prepared import describe_sources, prepare
    from din_dist.data.splits import HISTORY, SPLITS, split_examples
    from din_dist.data.statistics import describe
    from din_dist.data.trained_items import trained_items
    from din_dist.schema import DatasetFacts
    from din_dist.training.checkpoint import check_resumable

    def check(facts: DatasetFacts | None) -> None:
        """Refuses data with which the job could not resume, before the data of its training is replaced."""
        if facts:
            require_memory_for_tables(config, facts)
        # Only where the user names the folder, because the default one may hold an unrelated job.
        if flags.FLAGS["output_dir"].present:
            check_resumable(config, facts.fingerprint if facts else None)

    check(None)
    store = prepare(config.data, flags.FLAGS.overwrite_prepared, check, lambda line: print(printable(line), flush=True))
    check(store.facts)
    for line in (*describe_sources(config.data, store.facts), *describe(store, config.data.max_history_length)):
        print(printable(line).replace("\n", " "))
    splits = split_examples(store, config.data)
    print(f"examples ({config.data.split}): {', '.join(f'{name} {splits[name].num_examples:,}' for name in SPLITS)}")
    if HISTORY in splits:
        print(f"events that are held out, but only make histories: {splits[HISTORY].num_rows:,}")
    if trained := trained_items(store, config.data, splits):
        num_new = store.facts.num_items - len(trained.ids) + 1
        print(f"items that training never sees: {num_new:,} of {store.facts.num_items:,}")
    print(f"prepared in {time.perf_counter() - started:.1f} s: {store.folder}")


if __name__ == "__main__":
    entry.run(main)

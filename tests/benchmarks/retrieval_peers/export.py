"""Writes our prepared data's examples as plain arrays, for the peers: FLAGS of the trainer and --export_dir.

`train.npz` and `asked.npz`, one row an event, user by user; what is asked are some validation events, then the test
events, as of `judge.asked`: `targets`, `history_lengths` and, end to end,
`history_item_ids`, oldest first. `users.npz`: `item_ids` of all events and `offsets`. `items.npz`: `counts`, how often
training has each item, item 0 first. Prints their numbers as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings

settings.define_flags()
flags.DEFINE_string("export_dir", None, "Where the arrays go.", required=True)


def main() -> None:
    config = settings.config_from_flags()
    entry.import_tensorflow()
    from din_dist.data.prepared import prepare
    from din_dist.data.splits import item_counts, split_examples
    from din_dist.data.walks import windows
    from din_dist.evaluation.retrieval import queries_of
    from tests.benchmarks.retrieval_peers.judge import asked

    folder = Path(flags.FLAGS.export_dir)
    folder.mkdir(parents=True, exist_ok=True)
    store = prepare(config.data)
    splits = split_examples(store, config.data)
    longest = config.data.max_history_length
    train = queries_of(store, splits["train"], longest, splits["train"].num_rows)
    for name, parts in (("train", [train]), ("asked", [*asked(store, splits, longest).values()])):
        starts, ends, targets = (
            np.concatenate([getattr(part, field) for part in parts])
            for field in ("history_starts", "history_ends", "targets")
        )
        histories = store.history_item_ids[windows(starts, ends - starts)]
        np.savez(folder / f"{name}.npz", targets=targets, history_lengths=ends - starts, history_item_ids=histories)
    np.savez(folder / "users.npz", item_ids=store.item_ids, offsets=store.user_offsets)
    np.savez(folder / "items.npz", counts=item_counts(store, splits))
    print(json.dumps({"num_train": splits["train"].num_rows, "num_items": store.facts.num_candidates}))


if __name__ == "__main__":
    entry.run(main)

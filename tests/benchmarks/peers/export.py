"""Writes our prepared data's examples as plain arrays, for the peers: FLAGS of the trainer and --export_dir.

`train.npz` and `test.npz`, one row an example: `candidate_item_ids`, `labels`, `users` (from 0), `history_ends` (how
many events the user has before the example), `history_lengths` (the same, cut at --max_history_length) and, end to end,
`history_item_ids`. `items.npz`: `category_ids` of each item, 0 for item 0. `users.npz`: `item_ids` of all events and
`offsets`. `features.json`: the declared features, each with its owner, the rows of its table and its width; their ids
are in `items.npz`, and those of the examples in `train.npz` and `test.npz`, each by the feature's name. The negatives
are those that our trainer draws with the same --seed. Prints the size of our form as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.data.pipeline import BatchMaker
from din_dist.errors import InputError
from din_dist.features.spec import Form, Owner
from din_dist.schema import Batch

settings.define_flags()
flags.DEFINE_string("export_dir", None, "Where the arrays go.", required=True)


def main() -> None:
    config = settings.config_from_flags()
    entry.import_tensorflow()
    from din_dist.data.pipeline import evaluation_batches, num_steps_per_epoch, training_batches
    from din_dist.data.prepared import prepare
    from din_dist.data.splits import split_examples

    folder = Path(flags.FLAGS.export_dir)
    folder.mkdir(parents=True, exist_ok=True)
    store = prepare(config.data)
    if store.facts.has_labels:
        raise InputError(
            "--data_path: the log must have no labels, as the peers' histories are all events before. "
            f"Received: {config.data.data_path!r}, with column {config.data.label_column!r}. Give one without."
        )
    declared = [feature.encoding for feature in store.features.values()]
    if others := [encoding.spec.name for encoding in declared if encoding.form is not Form.IDS]:
        raise InputError(
            f"--features: the peers are given ids. Received: {', '.join(others)}, of another kind. Declare categories."
        )
    splits = split_examples(store, config.data)
    size, seed = config.job.global_batch_size, config.job.seed
    training = training_batches(
        BatchMaker.for_training(store, splits["train"], config.data, seed),
        config.data,
        global_batch_size=size,
        steps=range(num_steps_per_epoch(splits["train"].num_examples, size)),
    )
    test = evaluation_batches(
        store, splits["test"], config.data, seed=seed, batch_size=size, shard_index=0, num_shards=1
    )
    for name, batches in (("train", training), ("test", test)):
        examples = splits[name]
        columns = _in_order(batches)
        users = examples.user_of_example()
        ends = np.repeat(examples.events(), examples.draws_per_row) - store.user_offsets[users]
        if not np.array_equal(np.minimum(ends, config.data.max_history_length), columns["history_lengths"]):
            raise RuntimeError(f"{name}: the histories are not the users' own events.")
        np.savez(folder / f"{name}.npz", allow_pickle=False, users=users, history_ends=ends, **columns)
    of_items = {
        name: feature.values for name, feature in store.features.items() if feature.encoding.spec.owner is Owner.ITEM
    }
    np.savez(folder / "items.npz", allow_pickle=False, category_ids=store.item_features["category_id"], **of_items)
    described = [
        {
            "name": encoding.spec.name,
            "owner": encoding.spec.owner,
            "rows": encoding.num_rows,
            "width": encoding.width(config.model.embedding_dim[0]),
        }
        for encoding in declared
    ]
    (folder / "features.json").write_text(json.dumps(described))
    np.savez(folder / "users.npz", item_ids=store.item_ids, offsets=store.user_offsets)
    print(json.dumps({"bytes": sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())}))


def _in_order(batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """The examples of packed batches, sorted by their ids."""
    names = ("example_ids", "candidate_item_ids", "labels", "history_lengths", "history_item_ids")
    parts = [
        {name: getattr(batch, name).numpy() for name in names}
        | {name: ids.numpy() for name, ids in dict(batch.features).items()}
        for batch in batches
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths, histories = columns.pop("history_lengths"), columns.pop("history_item_ids")
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(columns.pop("example_ids"))
    lengths = lengths[order]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return {
        **{name: values[order] for name, values in columns.items()},
        "history_lengths": lengths,
        "history_item_ids": histories[np.repeat(starts[order], lengths) + within],
    }


if __name__ == "__main__":
    entry.run(main)

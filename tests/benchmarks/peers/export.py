"""Writes our prepared data's examples as plain arrays, for the peers: FLAGS of the trainer and --export_dir.

`train.npz` and `test.npz`, one row an example: `candidate_item_ids`, `labels`, `users` (from 0) and `history_ends` (how
many events the user has before the example). There too: `history_lengths` and, end to end, `history_item_ids`. Of
several --histories all lengths and items of the first come before those of the second. `items.npz`: `category_ids` of
each item, 0 for item 0. `users.npz`: `item_ids` of all events and `offsets`. `features.json`: the declared features,
each with its owner, the rows of its table and its width; their ids are in `items.npz`, and those of the examples in
`train.npz` and `test.npz`, each by the feature's name. The negatives are those that our trainer draws with the same
--seed. Each history is compared with the log. Prints the size of our form as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.config import ALL_BEHAVIOURS
from din_dist.data.event_store import EventStore
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
    test = evaluation_batches(store, splits["test"], config.data, seed=seed, batch_size=size)
    for name, batches in (("train", training), ("test", test)):
        examples = splits[name]
        columns, histories = _in_order(batches, store.facts.num_histories)
        users, events = examples.user_of_example(), np.repeat(examples.events(), examples.draws_per_row)
        _check(name, store, config.data.max_history_length, events, histories)
        np.savez(
            folder / f"{name}.npz",
            allow_pickle=False,
            users=users,
            history_ends=events - store.user_offsets[users],
            history_lengths=np.concatenate([history.lengths for history in histories]),
            history_item_ids=np.concatenate([history.item_ids for history in histories]),
            **columns,
        )
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


class _History(NamedTuple):
    """One history of E examples."""

    lengths: np.ndarray  # int32 [E]
    item_ids: np.ndarray  # int32, end to end


def _in_order(batches: Iterable[Batch], num_histories: int) -> tuple[dict[str, np.ndarray], list[_History]]:
    """The examples of packed batches, sorted by their ids, and each of their histories."""
    from din_dist.layers.packed import split_histories

    names = ("example_ids", "candidate_item_ids", "labels")
    parts: list[dict[str, np.ndarray]] = []
    histories: list[list[_History]] = [[] for _ in range(num_histories)]
    for batch in batches:
        parts.append(
            {name: getattr(batch, name).numpy() for name in names}
            | {name: ids.numpy() for name, ids in dict(batch.features).items()}
        )
        found = split_histories(num_histories, batch.history_lengths, batch.history_item_ids)
        for own, (lengths, item_ids) in zip(histories, found, strict=True):
            own.append(_History(lengths.numpy(), item_ids.numpy()))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns.pop("example_ids"))
    in_order = []
    for own in histories:
        lengths, item_ids = (np.concatenate(values) for values in zip(*own, strict=True))
        starts = np.cumsum(lengths) - lengths
        in_order.append(_History(lengths[order], item_ids[_places(starts[order], lengths[order])]))
    return {name: values[order] for name, values in columns.items()}, in_order


def _check(split: str, store: EventStore, longest: int, events: np.ndarray, histories: Sequence[_History]) -> None:
    """Compares each history with the newest events before the example that have its action, straight from the log.

    Args:
        split: the name of the examples, for the error.
        store: the log.
        longest: the most items of a history without a name.
        events: int64 `[E]`, the event of each example.
        histories: those of the examples.

    Raises:
        RuntimeError: an item differs.
    """
    users = np.searchsorted(store.user_offsets, events, side="right") - 1
    for described, history in zip(store.histories(longest), histories, strict=True):
        chosen = np.ones(len(store.item_ids), bool)
        if described.name not in ("", ALL_BEHAVIOURS):
            chosen = store.actions == 1 + store.facts.actions.index(described.name)
        num_before = np.concatenate([[0], np.cumsum(chosen)])
        ends = num_before[events]
        lengths = np.minimum(ends - num_before[store.user_offsets[users]], described.longest)
        item_ids = store.item_ids[chosen][_places(ends - lengths, lengths)]
        if not (np.array_equal(lengths, history.lengths) and np.array_equal(item_ids, history.item_ids)):
            raise RuntimeError(f"{split}: the histories are not the users' own events.")


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places from each start on, as many as its length, end to end."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


if __name__ == "__main__":
    entry.run(main)

"""What `--unknown_item=features` brings for new items: `python -m tests.benchmarks.cold_start FLAGS`, run by hand.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.cold_start --flagfile=launch/flags/recommended.flags \
        --data_path=LOG.parquet --epochs=2

Takes the trainer's flags. Of a log without labels a random share of the items (--new_items) is made new: all their
events are taken out but those that are a user's last. So they are in the vocabulary, and candidates of the test, and
nothing else. `--split` is leave_one_out. With --before_last each user's last event is taken out first: what is tested
then is the event before it, by which to choose settings. --new_items=0 with --split=temporal takes a log as it is: new
are the items that training never sees.

Each variant is trained by `din_dist.cli.train`, one after the other, and scores the same test events, each with
--evaluation_negatives_per_positive items that the user never touched. Of those events whose item is new, and of the
others: the positive against all these negatives (`among all`), and against those of its own kind only. Three variants
are told apart:

- `untrained`: the new items have rows of their own, which training has met as negatives only. So it is for items that
  the log has, but not in the training events.
- `untrained, not in the log`: the same weights, but the items score by the reserved row: so it is for items that come
  after the job. Nothing was learned about that row.
- `features`, one for each of --rates: both kinds score by the reserved row, which was trained.

Floors: popularity, which is 0 for new items, and the repeats of a candidate's features in the history. The last line is
the table as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.cli.saved_job import config_of, trained_model
from din_dist.config import DataConfig, Split, UnknownItem, require

if TYPE_CHECKING:
    from din_dist.report.scoring import Scored

settings.define_flags()
flags.DEFINE_float("new_items", 0.1, "Share of the items that is made new. 0: the log as it is.")
flags.DEFINE_integer("new_items_seed", 1, "Of their choice.")
flags.DEFINE_boolean("before_last", False, "Test each user's last event but one, as if the last had not happened yet.")
flags.DEFINE_list("rates", ["0.1"], "Values of --unknown_item_rate to train with.")
flags.DEFINE_string("work_dir", "", "Where the log, prepared data and jobs go. Default: a temporary folder.")
FLAGS = flags.FLAGS

UNTRAINED, NOT_IN_THE_LOG = "untrained", "untrained, not in the log"
_Rows = dict[str, dict[str, Any]]


def main() -> None:
    config = settings.config_from_flags()
    require(0 <= FLAGS.new_items < 1, "must be in [0, 1)", "new_items", FLAGS.new_items, "For example 0.1.")
    entry.import_tensorflow()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(FLAGS.work_dir or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        data = [f"--data_dir={folder / 'prepared'}"]
        if FLAGS.new_items:
            log = folder / "log.parquet"
            write_log(config.data, log, FLAGS.new_items, FLAGS.new_items_seed, FLAGS.before_last)
            data += ["--dataset=event_log", f"--data_path={log}", f"--split={Split.LEAVE_ONE_OUT}"]
        given = [*settings.to_flagfile().splitlines(), *data, "--metrics_port=-1"]
        _run("prepare_data", given)
        variants = {UNTRAINED: [f"--unknown_item={UnknownItem.UNTRAINED}"]}
        variants |= {
            f"features, rate {rate}": [f"--unknown_item={UnknownItem.FEATURES}", f"--unknown_item_rate={rate}"]
            for rate in FLAGS.rates
        }
        found: _Rows = {}
        for number, (name, own) in enumerate(variants.items()):
            output_dir = folder / f"job-{number}"
            _run("train", [*given, *own, f"--output_dir={output_dir}"])
            found |= evaluate(output_dir, name, with_floors=number == len(variants) - 1)
            entry.say(_table(found))
    print(json.dumps(found))


def write_log(config: DataConfig, path: Path, share: float, seed: int, before_last: bool) -> None:
    """The log of `config`, with a share of its items new."""
    table = pq.read_table(config.data_path)
    columns = [config.user_column, config.item_column, config.timestamp_column]
    users, items = (np.unique(table[name].to_numpy(), return_inverse=True)[1] for name in columns[:2])
    order = np.lexsort((np.arange(len(users)), table[config.timestamp_column].to_numpy(), users))
    if before_last:
        order = order[~_is_last(users[order])]
    num_items = int(items.max()) + 1
    is_new = np.zeros(num_items, bool)
    is_new[np.random.default_rng(seed).choice(num_items, round(share * num_items), replace=False)] = True
    kept = ~is_new[items[order]] | _is_last(users[order])
    pq.write_table(table.take(pa.array(np.sort(order[kept]))), path)
    entry.say(
        f"{is_new.sum():,} of {num_items:,} items are new: {len(order) - kept.sum():,} of {len(order):,} events out"
    )


def _is_last(users: np.ndarray) -> np.ndarray:
    """Bool `[E]`: which of events `[E]`, user after user, are the last of theirs."""
    return np.append(users[1:] != users[:-1], True)


def _run(command: str, arguments: list[str]) -> None:
    words = [sys.executable, "-m", f"din_dist.cli.{command}", *arguments]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False)  # what it says for people is for those here
    if done.returncode:
        sys.exit(done.returncode)


def evaluate(output_dir: Path, name: str, with_floors: bool) -> _Rows:
    """By the name of a ranking, by the kind of events: `gauc`, `auc`, `events`."""
    from din_dist.data.prepared import open_prepared
    from din_dist.data.splits import split_examples
    from din_dist.data.trained_items import trained_items
    from din_dist.distributed.runtime import Runtime
    from din_dist.evaluation.evaluator import Evaluator
    from din_dist.report.scoring import MODEL, score

    config = config_of(output_dir)
    features = config.data.unknown_item is UnknownItem.FEATURES
    store = open_prepared(config.data)
    splits = split_examples(store, config.data)
    model, _ = trained_model(config, store)
    trained = trained_items(store, dataclasses.replace(config.data, unknown_item=UnknownItem.FEATURES), splits)
    assert trained
    evaluator = Evaluator(config, store, splits, Runtime())
    scored = score(evaluator, "test", splits["test"], model)
    found = {name: by_kind(scored, scored.rankings[MODEL], trained.occur)}
    if not features:
        model.lookup.row_of_item = trained.row_of_item
        again = score(evaluator, "test", splits["test"], model)
        found[NOT_IN_THE_LOG] = by_kind(again, again.rankings[MODEL], trained.occur)
    if with_floors:
        floors = ["popularity", *(f"{feature}_repeat" for feature in store.item_features)]
        found |= {floor: by_kind(scored, scored.rankings[floor], trained.occur) for floor in floors}
    return found


def by_kind(scored: Scored, scores: np.ndarray, occur: np.ndarray) -> dict[str, Any]:
    """`occur`: bool `[num_items + 1]`, the items that training sees."""
    from din_dist.metrics.ranking import auc, gauc

    is_new = ~occur[scored.candidates]
    of_new = scored.by_row(is_new)  # the negatives of an event go with it
    kinds = {
        "new, among new": of_new & is_new,
        "new, among all": of_new,
        "others, among others": ~of_new & ~is_new,
        "others, among all": ~of_new,
    }
    found = {}
    for kind, here in kinds.items():
        labels = scored.labels[here]
        by_user = gauc(scores[here], labels, scored.users[here])
        found[kind] = {"gauc": by_user.gauc, "auc": auc(scores[here], labels), "events": int(labels.sum())}
    return found


def _table(found: _Rows) -> str:
    kinds = next(iter(found.values()))
    heads = [f"{kind} ({row['events']:,})" for kind, row in kinds.items()]
    lines = [f"| test GAUC / AUC | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name, rows in found.items():
        cells = [f"{row['gauc']:.4f} / {row['auc']:.4f}" for row in rows.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)

"""Scores what a job learned: `python -m din_dist.cli.evaluate --output_dir DIR`, alone or under `horovodrun`.

Or an export, with --export_dir. The trainer's metrics of any split, and how near the top of a whole catalogue the
chosen items stand; all with 95 % intervals. Nothing is written but --evaluation_path. Prints a table to stderr and, as
the last line on stdout, the same numbers as JSON.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from din_dist.cli import entry
from din_dist.cli.evaluation_table import table
from din_dist.cli.trained import config_from_text, config_of, trained_model
from din_dist.config import Config, DataConfig, JobConfig, differences, require
from din_dist.distributed.cores import claim_cores
from din_dist.errors import InputError
from din_dist.training.terminal import duration

if TYPE_CHECKING:
    import tensorflow as tf

    from din_dist.data.event_store import EventStore
    from din_dist.data.splits import Examples
    from din_dist.distributed.runtime import Runtime
    from din_dist.serving.bundle import Bundle
    from din_dist.training.evaluator import Evaluator
    from din_dist.training.retrieval import CandidateScorer, Queries

ALL, NONE, AUTO = "all", "none", "auto"
_AUTO_CANDIDATES = 30_000_000  # candidates that --max_events=auto scores in all
_OVERRIDES = {
    DataConfig: ("data_path", "data_dir", "evaluation_negatives_per_positive"),
    JobConfig: ("evaluation_batch_size",),
}

flags.DEFINE_string("output_dir", "", "The job's --output_dir. Default: runs/latest, or none with --export_dir.")
flags.DEFINE_string("export_dir", "", "Evaluate this export in place of a checkpoint, on its own job's data.")
flags.DEFINE_integer(
    "checkpoint_step", 0, "The update whose weights are evaluated. Default: the best by validation, or the newest."
)
flags.DEFINE_enum("evaluation_split", "test", ("test", "validation", "train"), "The examples to score.")
flags.DEFINE_string(
    "rank_against",
    ALL,
    "What each chosen item is ranked against: all (items of the catalogue), a number of items that the user never "
    "touched, drawn by (seed, event), or none (leave retrieval metrics out). Figures are comparable only at the same "
    "value.",
)
flags.DEFINE_boolean(
    "exclude_history",
    True,
    "With --rank_against=all: leave out what the user had before the event, as papers do on logs without repeats. The "
    "chosen item always stays. Turn it off where users come back to the same items.",
)
flags.DEFINE_list("ks", ["1", "5", "10", "20"], "Lengths of the lists whose recall, NDCG, ... are told.")
flags.DEFINE_string(
    "max_events",
    AUTO,
    "Most events to rank, whole users evenly spaced: a number, all, or auto, as many as have 30 million candidates in "
    "all.",
)
flags.DEFINE_integer(
    "bootstrap_samples", 1000, "Samples of users that the 95 % intervals are drawn from; 0: no intervals."
)
flags.DEFINE_string("evaluation_path", "", "Write the JSON to this file as well.")
for _kind, _names in _OVERRIDES.items():
    for _field in dataclasses.fields(_kind):
        if _field.name in _names:
            _define = flags.DEFINE_string if isinstance(_field.default, str) else flags.DEFINE_integer
            _define(_field.name, None, f"{_field.metadata['help']} Default: as in training.")


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The flags, checked. `against`: how many negatives; 0: all items; None: no retrieval metrics."""

    against: int | None
    ks: tuple[int, ...]
    max_events: int | None  # None: auto

    @classmethod
    def by_flags(cls) -> _Asked:
        values = flags.FLAGS
        ks = tuple(_whole_number(text, 1, "ks", "For example 1,5,10,20.") for text in values.ks)
        require(bool(ks), "must name a length", "ks", "", "For example 1,5,10,20.")
        for name in ("checkpoint_step", "bootstrap_samples"):
            value: int = getattr(values, name)
            require(value >= 0, "must be at least 0", name, value, "For example 1000.")
        against: int | None = {ALL: 0, NONE: None}.get(values.rank_against, -1)
        if against == -1:
            remedy = f"Give {ALL}, {NONE} or a number of items, for example 100."
            against = _whole_number(values.rank_against, 1, "rank_against", remedy)
        most: int | None = {ALL: 2**62, AUTO: None}.get(values.max_events, -1)
        if most == -1:
            most = _whole_number(values.max_events, 1, "max_events", f"Give {ALL}, {AUTO} or a number, as 1000.")
        require(
            not (values.export_dir and values.checkpoint_step),
            "an export has the weights of one update",
            "checkpoint_step",
            values.checkpoint_step,
            "Drop it, or --export_dir.",
        )
        return cls(against, tuple(sorted(set(ks))), most)


def _whole_number(text: str, least: int, name: str, remedy: str) -> int:
    number = int(text) if text.strip().isdecimal() else least - 1
    require(number >= least, f"must be at least {least}", name, text, remedy)
    return number


def main() -> None:
    started = time.perf_counter()
    asked, values = _Asked.by_flags(), flags.FLAGS
    output_dir = values.output_dir or ("" if values.export_dir else "runs/latest")
    config = _overridden(config_of(Path(output_dir))) if output_dir else None
    cores = claim_cores()
    entry.import_tensorflow()  # takes seconds: wrong flags are answered before
    from din_dist.data.prepared import open_prepared
    from din_dist.data.splits import split_examples
    from din_dist.distributed.runtime import claim_devices, open_runtime
    from din_dist.training.evaluator import Evaluator
    from din_dist.training.output_dir import to_json, write_text_atomically

    runtime = open_runtime()
    claim_devices(runtime, len(cores))
    split = values.evaluation_split
    with runtime.together():
        bundle, config = _open_export(Path(values.export_dir), config) if values.export_dir else (None, config)
        assert config is not None
        store = open_prepared(config.data)
        splits = split_examples(store, config.data)
        _check(asked, config, store, splits, split, bundle)
    evaluator = Evaluator(config, store, splits, runtime)
    logits_of, candidates_of, step = _what_scores(config, store, runtime, bundle)
    say: Callable[[str], None] = entry.say if runtime.is_chief else lambda text: None
    say(f"scoring {splits[split].num_examples:,} examples of the {split} split with the weights of update {step:,}")
    seconds = {"start": time.perf_counter() - started}
    found: dict[str, Any] = {
        "output_dir": output_dir,
        "export_dir": values.export_dir,
        "step": step,
        "split": split,
        "seed": config.job.seed,
        "world_size": runtime.world_size,
    }
    found |= _scores(evaluator, config, store, splits[split], logits_of, runtime)
    seconds["scores"] = time.perf_counter() - started - sum(seconds.values())
    if asked.against is not None:
        found["retrieval"] = _retrieval(asked, config, store, splits, candidates_of(), runtime, say)
        seconds["retrieval"] = time.perf_counter() - started - sum(seconds.values())
    seconds["total"] = time.perf_counter() - started
    found["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    with runtime.together():
        if runtime.is_chief:
            entry.say(table(found))
            text = to_json(found)
            if path := values.evaluation_path:
                _write(Path(path), text + "\n", write_text_atomically)
            print(text, flush=True)
    runtime.shutdown()


def _overridden(config: Config) -> Config:
    """With what may be said anew: where the data lies, and how evaluation goes about it."""
    given = {kind: {name: flags.FLAGS[name].value for name in names} for kind, names in _OVERRIDES.items()}
    rooms = {kind: {name: value for name, value in named.items() if value is not None} for kind, named in given.items()}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **rooms[DataConfig]),
        job=dataclasses.replace(config.job, **rooms[JobConfig]),
    )


def _open_export(folder: Path, config: Config | None) -> tuple[Bundle, Config]:
    """And the settings of its job, which are `config` if that is given.

    Raises:
        InputError: there is none, or it is of another job.
    """
    from din_dist.serving.bundle import Bundle

    bundle = Bundle.open(folder)
    if config is None:
        return bundle, _overridden(config_from_text(bundle.manifest.flags, folder))
    if found := differences(dict(bundle.manifest.settings), config.to_json()):
        raise InputError(
            f"--export_dir: an export is evaluated as its own job was. Received: {folder}, and in --output_dir other "
            f"settings: {'; '.join(found)}. Drop --output_dir, or name that of its job."
        )
    return bundle, config


def _check(
    asked: _Asked, config: Config, store: EventStore, splits: Mapping[str, Examples], split: str, bundle: Bundle | None
) -> None:
    if bundle and bundle.manifest.data_fingerprint != store.facts.fingerprint:
        raise InputError(
            f"--export_dir: an export is evaluated on the data of its job. Received: {flags.FLAGS.export_dir}, made "
            f"from other data than lies in {store.folder}. Name its data by --data_path and --data_dir."
        )
    if not splits[split].num_examples:
        there = [name for name, examples in splits.items() if examples.num_examples]
        raise InputError(
            f"--evaluation_split: must have examples. Received: {split}, which has none with --split="
            f"{config.data.split}. Choose among {', '.join(there)}."
        )
    num_items = store.facts.num_items
    require(
        (asked.against or 0) < num_items,
        f"must be fewer than the {num_items} items",
        "rank_against",
        asked.against,
        f"Give {ALL}, or a smaller number.",
    )
    most = 1 + asked.against if asked.against else num_items
    require(
        asked.against is None or asked.ks[-1] <= most,
        f"must be at most the number of candidates, {most}",
        "ks",
        asked.ks[-1],
        "Give shorter lists.",
    )


def _what_scores(
    config: Config, store: EventStore, runtime: Runtime, bundle: Bundle | None
) -> tuple[Callable[[Mapping[str, tf.Tensor]], tf.Tensor], Callable[[], CandidateScorer], int]:
    """What gives the logits of a batch, what makes a scorer of candidates, and the update whose weights they have."""
    import tensorflow as tf

    from din_dist.data.pipeline import BATCH_SIGNATURE
    from din_dist.serving.scorer import ExportScorer
    from din_dist.training.retrieval import ModelScorer

    if bundle:
        scorer = ExportScorer(bundle, store)
        return scorer.of_batch, lambda: scorer, bundle.manifest.step
    step = flags.FLAGS.checkpoint_step or None
    with runtime.together():  # all ranks read the step that the chief finds: a job at work may publish another
        if runtime.is_chief:
            model, step = trained_model(config, store, step)
    step = runtime.broadcast_object(step)
    with runtime.together():
        if not runtime.is_chief:
            model, step = trained_model(config, store, step)
    logits_of = tf.function(
        lambda batch: model(batch, training=False), input_signature=[BATCH_SIGNATURE], autograph=False
    )
    return logits_of, lambda: ModelScorer(model, store.facts.num_items), step


def _scores(
    evaluator: Evaluator,
    config: Config,
    store: EventStore,
    examples: Examples,
    logits_of: Callable[[Mapping[str, tf.Tensor]], tf.Tensor],
    runtime: Runtime,
) -> dict[str, Any]:
    """The trainer's own metrics of a split and the floors; on the chief, their intervals."""
    from din_dist.training.confidence import affordable_samples, intervals_of_scores

    split = flags.FLAGS.evaluation_split
    logits = evaluator.scores(split, logits_of)
    found: dict[str, Any] = dict(evaluator.metrics_of(split, logits))
    found["floors"] = evaluator.floors(split)
    num_samples = affordable_samples(flags.FLAGS.bootstrap_samples, len(logits) + len(examples.users))
    found["bootstrap_samples"] = num_samples
    if num_samples and runtime.is_chief:
        draws = None if store.facts.has_labels else examples.draws_per_row
        labels, users = evaluator.labels(split), examples.user_of_example()
        found["intervals"] = intervals_of_scores(logits, labels, users, draws, num_samples, config.job.seed)
    return found


def _retrieval(
    asked: _Asked,
    config: Config,
    store: EventStore,
    splits: Mapping[str, Examples],
    scorer: CandidateScorer,
    runtime: Runtime,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Retrieval metrics of the model and of the popularity floor; on the chief, the model's intervals."""
    from din_dist.data.splits import item_counts
    from din_dist.training.confidence import affordable_samples, intervals_of_sums
    from din_dist.training.retrieval import PopularityScorer, Task, by_user, coverages, queries_of, rank

    assert asked.against is not None
    exclude = asked.against == 0 and flags.FLAGS.exclude_history
    task = Task(asked.against, exclude, config.job.seed)
    num_items = store.facts.num_items
    num_candidates = 1 + asked.against if asked.against else num_items
    most = asked.max_events or max(1, _AUTO_CANDIDATES // num_candidates)
    queries = queries_of(store, splits[flags.FLAGS.evaluation_split], config.data.max_history_length, most)
    if not len(queries):
        return {"num_events": 0}
    ranked = f"{len(queries):,} of {queries.num_in_split:,} events"
    thinned = len(queries) < queries.num_in_split
    say(f"ranking {ranked}" + (" (whole users, evenly spaced; --max_events=all ranks all)" if thinned else ""))
    started = time.perf_counter()
    mine = -(-len(queries) // runtime.world_size)

    def progress(done: int, taken: float) -> None:
        if done < mine:
            say(f"ranked {done:,} of {mine:,} events of this worker, {duration(taken / done * (mine - done))} left")

    popularity = item_counts(store, splits)
    places = rank(store, queries, task, scorer, asked.ks[-1], runtime, progress)
    taken = time.perf_counter() - started
    parts = by_user(queries, places, popularity, asked.ks)
    floor = rank(store, queries, task, PopularityScorer(popularity), asked.ks[-1], runtime)
    found: dict[str, Any] = {
        "ranked_against": f"{asked.against} items that the user never touched" if asked.against else "all items",
        "rank_against": asked.against or ALL,
        "exclude_history": exclude,
        "comparable_only_with": "figures that rank against the same number of candidates, chosen in the same way",
        "num_events": len(queries),
        "num_events_in_split": queries.num_in_split,
        "num_events_without_history": int((queries.history_ends == queries.history_starts).sum()),
        "num_events_of_repeats": _num_repeats(store, queries),
        "num_users": len(next(iter(parts.values()))[0]),
        "mean_num_candidates": float(places.num_candidates.mean()),
        "num_events_tied": int((places.tied > 0).sum()),
        "ks": list(asked.ks),
        "events_per_second": len(queries) / taken,
        "seconds_for_all_events": taken / len(queries) * queries.num_in_split,
        "metrics": _ratios(parts) | coverages(places, num_items, asked.ks),
        "floors": {
            "popularity": _ratios(by_user(queries, floor, popularity, asked.ks)) | coverages(floor, num_items, asked.ks)
        },
    }
    num_samples = affordable_samples(flags.FLAGS.bootstrap_samples, found["num_users"])
    if num_samples and runtime.is_chief:
        found["intervals"] = intervals_of_sums(parts, num_samples, config.job.seed)
    return found


def _ratios(parts: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    return {
        name: float(above.sum() / below.sum()) if below.sum() else float("nan")
        for name, (above, below) in parts.items()
    }


def _num_repeats(store: EventStore, queries: Queries) -> int:
    """Events of an item that their user had before."""
    windows = zip(queries.targets, queries.seen_starts, queries.history_ends, strict=True)
    return sum(int((store.history_item_ids[start:end] == target).any()) for target, start, end in windows)


def _write(path: Path, text: str, write: Callable[[Path, str], None]) -> None:
    try:
        write(path, text)
    except OSError as error:
        raise InputError(
            f"--evaluation_path: must be a file that can be written. Received: {path}, {error.strerror}. Name another "
            "one."
        ) from error


if __name__ == "__main__":
    entry.run(main)

"""Evaluates a trained model: `python -m din_dist.cli.evaluate --output_dir DIR`, alone or under `horovodrun`.

With --export_dir it evaluates an export instead. It computes the trainer's metrics of any split. Retrieval metrics tell
how near the top of the whole catalogue the chosen items stand. All of them come with 95 % intervals. It prints a table
to stderr and, as the last line on stdout, the same numbers as JSON. It writes no file except --evaluation_path.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from din_dist.cli import entry
from din_dist.cli.flags import define_overrides, define_path, overridden
from din_dist.cli.help import theme
from din_dist.cli.saved_job import WHERE_DATA_LIES, config_from_text, config_of, model_on_other_data, trained_model
from din_dist.config import FORGETTING, Config, Split, differences, require
from din_dist.distributed.cores import claim_cores
from din_dist.errors import InputError
from din_dist.evaluation.request import ALL, AUTO, EVENTS, HITS, NONE, TARGETS, USERS, EvaluationRequest
from din_dist.evaluation.table import table
from din_dist.files import source_path, write_text
from din_dist.schema import Batch
from din_dist.serving.asked import NUM_RETRIEVED
from din_dist.serving.manifest import DIGEST_HELP
from din_dist.serving.store_exports import local_export

if TYPE_CHECKING:
    import tensorflow as tf

    from din_dist.data.event_store import EventStore
    from din_dist.data.splits import Examples
    from din_dist.distributed.runtime import Runtime
    from din_dist.evaluation.retrieval import CandidateScorer
    from din_dist.serving.bundle import Bundle

_KS = "must be whole numbers, comma-separated"
_OVERRIDES = (*WHERE_DATA_LIES, "extend", *FORGETTING, "evaluation_negatives_per_positive", "evaluation_batch_size")
_TIMES = -(2**63), 2**63 - 1

with theme("what to evaluate"):
    define_path("output_dir", "", "The job's --output_dir. Default: runs/latest, or none with --export_dir.")
    flags.DEFINE_integer(
        "checkpoint_step", 0, "The update whose weights are evaluated. Default: the best by validation, or the newest."
    )
    define_path(
        "export_dir",
        "",
        "Evaluate this export, on this machine or in a store, instead of a checkpoint, on its own job's data. Default: "
        "none.",
        parse=source_path,
    )
    flags.DEFINE_string("expect_digest", "", DIGEST_HELP)
    flags.DEFINE_enum("evaluation_split", "test", ("test", "validation", "train"), "The examples to score.")
    flags.DEFINE_integer(
        "evaluation_from",
        None,
        "Evaluate the job on newer data than it has: on all events from this timestamp on, with the events before as "
        "history. --data_path, --extend and --data_dir name the prepared data. Rows of embeddings are found by the "
        "log's own ids, and new ids count as unknown. Default: the job's own data.",
    )
    flags.DEFINE_list(
        "slice_by",
        [],
        "Features, comma-separated: the metrics on the examples of each of their values, or of ranges of numbers. "
        "Default: none.",
    )
with theme("retrieval metrics"):
    flags.DEFINE_string(
        "rank_against",
        ALL,
        "What each chosen item is ranked against. all: the items of the catalogue. A number: so many items that the "
        "user never touched, drawn by (seed, event). none: leave retrieval metrics out. Compare figures only at the "
        "same value.",
    )
    flags.DEFINE_boolean(
        "exclude_history",
        True,
        "With --rank_against=all: leave out what the user had before the event, as papers do on logs without repeats. "
        "The chosen item always stays. Turn it off where users come back to the same items.",
    )
    flags.DEFINE_integer(
        "num_retrieved",
        NUM_RETRIEVED,
        "For an export that has one inside which finds items: how many the other one ranks.",
    )
    flags.DEFINE_enum(
        "queries",
        EVENTS,
        (EVENTS, USERS),
        "What is asked. events: each chosen item, given the history before it. users: each user once, given the "
        "history before the first event of the split; all items chosen in the split are sought at once.",
    )
    flags.DEFINE_enum(
        "ndcg_ideal",
        TARGETS,
        (TARGETS, HITS),
        "For --queries=users: the best list that NDCG compares with. targets: all sought items stand first. hits: "
        "those that were found stand first, as in ComiRec's code. Compare figures only at the same value.",
    )
    flags.DEFINE_float(
        "diversity_weight",
        0.0,
        "For models that find items, with --rank_against=all: re-rank the first places, as ComiRec does, so that items "
        "differ in their first --item_features. Each place takes the item whose logit, and this weight for each item "
        "above it of another category, is the highest. The weight is in the unit of the logits; 0: no re-ranking. The "
        "longest of --ks is re-ranked, from the best four times as many.",
    )
    flags.DEFINE_list("ks", ["1", "5", "10", "20"], "Lengths of the lists for recall, NDCG and the other metrics.")
    flags.DEFINE_string(
        "max_events",
        AUTO,
        "Most events (or users, with --queries=users) to rank, as whole users that are evenly spaced: a number, all, "
        "or auto. auto ranks as many as have 30 million candidates in all.",
    )
with theme("result"):
    flags.DEFINE_integer(
        "bootstrap_samples", 1000, "Samples of users from which the 95 % intervals are computed; 0: no intervals."
    )
    define_path("evaluation_path", "", "Write the JSON to this file as well. Default: none.")
define_overrides(_OVERRIDES)


def main() -> None:
    started = time.perf_counter()
    asked, values = _asked(), flags.FLAGS
    output_dir = values.output_dir or ("" if values.export_dir else "runs/latest")
    _check_path(values.evaluation_path)
    given = _from_time(overridden(config_of(Path(output_dir)), _OVERRIDES)) if output_dir else None
    cores = claim_cores()
    entry.import_tensorflow()  # takes seconds: wrong flags are answered before
    from din_dist.data.prepared import open_prepared
    from din_dist.data.splits import split_examples
    from din_dist.distributed.devices import claim_devices
    from din_dist.distributed.runtime import open_runtime

    runtime = open_runtime()
    claim_devices(runtime, len(cores))
    with runtime.together():
        config, bundle = _settings(given, _export_dir())
        store = open_prepared(config.data)
        splits = split_examples(store, config.data)
        _check_data(bundle, store)
        asked = asked.fitted(config, store, splits)
        if bundle and bundle.manifest.retriever and asked.rank_against == 0:
            rule, number = "must be at least the longest of --ks", values.num_retrieved
            require(number >= asked.ks[-1], rule, "num_retrieved", number, f"Give {asked.ks[-1]} or more.")
    job = _Job(config, store, splits, bundle, output_dir)
    found = _evaluate(job, asked, runtime, started)
    with runtime.together():
        if runtime.is_chief:
            _publish(found)
    runtime.shutdown()


class _Job(NamedTuple):
    """A trained job, opened again.

    Attributes:
        bundle: the export to score; None: a checkpoint is scored.
        output_dir: as the flag gives it; empty if only the export is known.
    """

    config: Config
    store: EventStore
    splits: Mapping[str, Examples]
    bundle: Bundle | None
    output_dir: str


def _evaluate(job: _Job, asked: EvaluationRequest, runtime: Runtime, started: float) -> dict[str, Any]:
    """Scores the split and, if asked for, ranks its chosen items. Returns the report."""
    from din_dist.evaluation.evaluator import Evaluator
    from din_dist.evaluation.summary import rank_split, score_split
    from din_dist.versions import build_info

    config, store, splits = job.config, job.store, job.splits
    examples = splits[asked.evaluation_split]
    logits_of, candidates_of, step = _scorers(config, store, examples, runtime, job.bundle)
    say: Callable[[str], None] = entry.say if runtime.is_chief else lambda text: None
    say(
        f"scoring {examples.num_examples:,} examples of the {asked.evaluation_split} split with the weights of update "
        f"{step:,}"
    )
    seconds = {"start": time.perf_counter() - started}
    found = {
        "output_dir": job.output_dir,
        "export_dir": flags.FLAGS.export_dir,
        "step": step,
        "split": asked.evaluation_split,
        "seed": config.job.seed,
        "world_size": runtime.world_size,
        **score_split(asked, Evaluator(config, store, splits, runtime), config, store, examples, logits_of, runtime),
    }
    seconds["scores"] = time.perf_counter() - started - sum(seconds.values())
    if asked.rank_against is not None:
        scorer = candidates_of()
        found["retrieval"] = rank_split(asked, config, store, splits, scorer, runtime, say)
        if job.bundle and asked.rank_against == 0:
            found |= _stages(
                job.bundle, scorer, lambda own: rank_split(asked, config, store, splits, own, runtime, say)
            )
        seconds["retrieval"] = time.perf_counter() - started - sum(seconds.values())
    seconds["total"] = time.perf_counter() - started
    found["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    found["versions"] = build_info()
    return found


def _stages(
    bundle: Bundle, scorer: CandidateScorer, rank: Callable[[CandidateScorer], dict[str, Any]]
) -> dict[str, Any]:
    """Returns the retrieval metrics of both stages of an export together, and of the first alone.

    Args:
        bundle: the export. Without another one inside, nothing is returned.
        scorer: of the model that ranks.
        rank: returns the metrics of a scorer.
    """
    from din_dist.serving.asked import Recommend
    from din_dist.serving.scorer import ExportScorer, FoundScorer

    if bundle.manifest.retriever is None:
        return {}
    assert isinstance(scorer, ExportScorer)
    num, exclude = flags.FLAGS.num_retrieved, flags.FLAGS.exclude_history
    asked = Recommend(num, num, exclude)
    scorers = {"found": bundle.nearest, "found_and_ranked": bundle.recommend}
    return {
        "num_retrieved": num,
        "stages": {name: rank(FoundScorer(find, asked, scorer)) for name, find in scorers.items()},
    }


def _publish(found: dict[str, Any]) -> None:
    """Prints the report, and writes it to --evaluation_path if that is given."""
    from din_dist.text import to_json

    entry.say(table(found))
    text = to_json(found)
    print(text, flush=True)
    _write(flags.FLAGS.evaluation_path, text)


def _asked() -> EvaluationRequest:
    """Returns the request that the flags make, checked."""
    values = flags.FLAGS
    against: int | None = {ALL: 0, NONE: None}.get(values.rank_against, -1)
    if against == -1:
        remedy = f"Give {ALL}, {NONE} or a number of items, for example 100."
        against = _whole_number(values.rank_against, "rank_against", f"must be {ALL}, {NONE} or a whole number", remedy)
    most: int | None = {ALL: 2**62, AUTO: None}.get(values.max_events, -1)
    if most == -1:
        rule = f"must be {ALL}, {AUTO} or a whole number"
        most = _whole_number(
            values.max_events, "max_events", rule, f"Give {ALL}, {AUTO} or a number, for example 1000."
        )
    step: int = values.checkpoint_step
    require(step >= 0, "must be at least 0", "checkpoint_step", step, "For example 1000.")
    alone = not (values.export_dir and step)
    time_, name = values.evaluation_from, "evaluation_from"
    if time_ is not None:
        require(not values.export_dir, "is for a job", name, time_, "Give --output_dir in place of --export_dir.")
        require(not step, "takes the weights that an export would", name, time_, "Drop --checkpoint_step.")
        rule, split = "makes a test split of all events from then on", values.evaluation_split
        require(split == "test", rule, name, time_, f"Drop --evaluation_split={split}.")
        require(_TIMES[0] <= time_ <= _TIMES[1] and time_ != 0, "must be a timestamp", name, time_, "For example 1.")
    digest = values.expect_digest
    require(bool(values.export_dir) or not digest, "is for an export", "expect_digest", digest, "Give --export_dir.")
    require(alone, "an export has the weights of one update", "checkpoint_step", step, "Drop it, or --export_dir.")
    return EvaluationRequest(
        evaluation_split=values.evaluation_split,
        rank_against=against,
        exclude_history=values.exclude_history,
        ks=tuple(sorted({_whole_number(text, "ks", _KS, "For example 1,5,10,20.") for text in values.ks})),
        max_events=most,
        bootstrap_samples=values.bootstrap_samples,
        by_default=not values["ks"].present,
        slice_by=tuple(dict.fromkeys(values.slice_by)),
        queries=values.queries,
        ndcg_ideal=values.ndcg_ideal,
        diversity_weight=values.diversity_weight,
    )


def _from_time(config: Config) -> Config:
    """Returns the settings with a test split of all events from --evaluation_from on, if it is given."""
    time_ = flags.FLAGS.evaluation_from
    if time_ is None:
        return config
    return config.replace(split=Split.TEMPORAL, validation_from=time_, test_from=time_, train_from=0)


def _whole_number(text: str, name: str, rule: str, remedy: str) -> int:
    is_number = re.fullmatch(r"\s*-?\d+\s*", text) is not None
    require(is_number, rule, name, text, remedy)
    number = int(text)
    require(number >= 1, "must be at least 1", name, text, remedy)
    return number


def _settings(given: Config | None, export_dir: Path | None) -> tuple[Config, Bundle | None]:
    """Returns the settings of --output_dir (`given`), otherwise the export's, and the export if there is one.

    Raises:
        InputError: there is no such export, or it is of another job.
    """
    if export_dir is None:
        assert given is not None
        return given, None
    from din_dist.serving.bundle import Bundle

    bundle = Bundle.open(export_dir, flags.FLAGS.expect_digest)
    if given is None:
        return overridden(config_from_text(bundle.manifest.flags, export_dir), _OVERRIDES), bundle
    if found := differences(dict(bundle.manifest.settings), given.to_json()):
        raise InputError(
            f"--export_dir: an export is evaluated as its own job was. Received: {export_dir}, and in --output_dir "
            f"other settings: {'; '.join(found)}. Drop --output_dir, or name that of its job."
        )
    return given, bundle


def _export_dir() -> Path | None:
    """Returns the folder of the export on this machine; None without --export_dir."""
    source, digest = flags.FLAGS.export_dir, flags.FLAGS.expect_digest
    return local_export(source, digest) if source else None


def _check_data(bundle: Bundle | None, store: EventStore) -> None:
    if bundle and bundle.manifest.data_fingerprint != store.facts.fingerprint:
        raise InputError(
            f"--export_dir: an export is evaluated on the data of its job. Received: {flags.FLAGS.export_dir}, made "
            f"from other data than lies in {store.folder}. Name its data by --data_path and --data_dir."
        )


def _scorers(
    config: Config, store: EventStore, examples: Examples, runtime: Runtime, bundle: Bundle | None
) -> tuple[Callable[[Batch], tf.Tensor], Callable[[], CandidateScorer], int]:
    """Returns a function from a batch to logits, a maker of a scorer of candidates, and the update of their weights."""
    from din_dist.evaluation.evaluator import logits_of
    from din_dist.evaluation.retrieval import ModelScorer
    from din_dist.serving.scorer import ExportScorer

    if bundle:
        scorer = ExportScorer(bundle, store, examples, config.main_task)
        return scorer.of_batch, lambda: scorer, bundle.manifest.step
    if flags.FLAGS.evaluation_from is not None:
        with runtime.together():
            model, found, line = model_on_other_data(config, store)
            if runtime.is_chief:
                entry.say(line)
        return logits_of(model), lambda: ModelScorer(model, store.facts.num_candidates, store, config.main_task), found
    step = flags.FLAGS.checkpoint_step or None
    with runtime.together():  # all ranks read the step that the chief finds: a job at work may publish another
        if runtime.is_chief:
            model, step = trained_model(config, store, step)
    step = runtime.broadcast_object(step)
    with runtime.together():
        if not runtime.is_chief:
            model, step = trained_model(config, store, step)
    return logits_of(model), lambda: ModelScorer(model, store.facts.num_candidates, store, config.main_task), step


def _check_path(path: str) -> None:
    """Checks that --evaluation_path can be written, as far as this can be known before the work is done."""
    if Path(path).is_dir() and path:
        raise _cannot_write(path, "a folder")
    if path and not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise _cannot_write(path, "whose folder is not there, or cannot be written")


def _write(path: str, text: str) -> None:
    if not path:
        return
    try:
        write_text(Path(path), text + "\n")
    except OSError as error:
        raise _cannot_write(path, error.strerror) from error


def _cannot_write(path: str, why: str | None) -> InputError:
    return InputError(
        f"--evaluation_path: must be a file that can be written. Received: {path}, {why}. Name another one."
    )


if __name__ == "__main__":
    entry.run(main)

"""Describes a job on one HTML page: `python -m din_dist.cli.report --output_dir DIR`.

The job may be finished, running or interrupted. The command uses no GPU, and changes nothing in the job's folder
but the report. The last line on stdout is the report's path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from din_dist.cli import entry
from din_dist.cli.flags import define_overrides, define_path, overridden
from din_dist.cli.help import theme
from din_dist.cli.saved_job import WHERE_DATA_LIES, config_of, trained_model
from din_dist.config import require
from din_dist.errors import InputError
from din_dist.files import source_path, write_text
from din_dist.report.comparison import Comparison
from din_dist.report.job import JobRecord, Status, read_job
from din_dist.tables.storage import RemoteFile, file_of, write
from din_dist.tracking.tracked_job import add_to_run

if TYPE_CHECKING:
    import numpy as np

    from din_dist.config import Config
    from din_dist.data.event_store import EventStore
    from din_dist.data.splits import Examples
    from din_dist.models.behaviour_model import BehaviourModel
    from din_dist.report.gain import Gain
    from din_dist.report.page import Findings
    from din_dist.report.scoring import ScoredExamples

with theme("report"):
    OUTPUT_DIR = define_path("output_dir", "runs/latest", "The job's --output_dir.")
    REPORT_PATH = define_path(
        "report_path",
        "",
        "File of the report, on this machine or in a store (s3://, gs://, abfs://, hdfs://). Default: report.html in "
        "--output_dir.",
        parse=source_path,
    )
    COMPARE = define_path("compare", "", "The --output_dir of another job to compare with, on the same examples.")
    MAX_EXAMPLES = flags.DEFINE_integer(
        "report_max_examples",
        200_000,
        "Most examples to score. A larger split is reduced to whole users that are evenly spaced, the same ones every "
        "time.",
    )
define_overrides(WHERE_DATA_LIES)


def main() -> None:
    """Writes the report and prints its path."""
    most = MAX_EXAMPLES.value
    require(most >= 1, "must be at least 1", "report_max_examples", most, "For example 200000.")
    folder = Path(OUTPUT_DIR.value)
    record = read_job(folder)
    other = read_job(Path(COMPARE.value), "compare") if COMPARE.value else None
    entry.import_tensorflow()  # takes seconds, so a wrong folder is reported before
    from din_dist.report.page import render

    path = file_of(REPORT_PATH.value or str(folder / "report.html"))
    page = render(_find(record, most, other))
    try:
        if isinstance(path, RemoteFile):
            write(path, page.encode("utf-8", errors="surrogateescape"))
        else:
            write_text(path, page)
    except OSError as error:
        raise InputError(
            f"--report_path: must be a file that can be written. Received: {path}, {error.strerror}. Name another one."
        ) from error
    if not isinstance(path, RemoteFile):
        add_to_run(folder, path, entry.say)
    print(path, flush=True)


def _find(record: JobRecord, most: int, other: JobRecord | None) -> Findings:
    """Collects all findings that the job's files allow; the report itself lists those that are missing."""
    import tensorflow as tf

    from din_dist.data.prepared import open_prepared
    from din_dist.data.splits import SPLITS, item_counts, split_examples
    from din_dist.data.thinning import thin_out
    from din_dist.distributed.runtime import Runtime
    from din_dist.evaluation.evaluator import Evaluator
    from din_dist.evaluation.retrieval import ModelScorer
    from din_dist.report import attention, retrieval, scoring
    from din_dist.report.page import Findings
    from din_dist.report.settings_table import Data

    tf.config.set_visible_devices([], "GPU")  # the job itself may fill them
    found = Findings(record, comparison=Comparison(other, problem="It was not scored.") if other else None)
    try:
        config = found.config = overridden(config_of(record.folder), WHERE_DATA_LIES)
        store = open_prepared(config.data)
        splits = split_examples(store, config.data)
        found.data = Data(store.facts, {name: splits[name].num_examples for name in SPLITS})
        model, found.step = trained_model(config, store)
        split = _split_to_score(record, splits)
        entry.say(f"scoring the {split} split with the weights of update {found.step}")
        examples = thin_out(splits[split], most)
        evaluator = Evaluator(config, store, {**splits, "scored": examples}, Runtime())
        scored = scoring.score(evaluator, "scored", examples, model)
        popularity, num_in_split = item_counts(store, splits), splits[split].num_examples
        found.evaluation = scoring.evaluate(
            scored, store, config.data, popularity, split, num_in_split, config.job.seed
        )
        entry.say("finding each chosen item among all")
        scorer = ModelScorer(model, store.facts.num_candidates, store, config.main_task)
        found.retrieval = retrieval.find(store, splits[split], config, popularity, scorer)
        if other:
            entry.say(f"scoring {other.folder}")
            found.comparison = _compare(config, store, examples, scored, other)
        if store.features:
            entry.say("finding what each feature is worth")
            found.gains = _gains(config, store, examples, found.step, model)
        entry.say("reading attention weights")
        found.shown = attention.show(model, config, store, examples, attention.choose(scored))
        found.averages = attention.averages(model, config, store, examples)
    except InputError as error:
        found.problems.append(str(error))
        entry.say(f"left out: {error}")
    return found


def _compare(
    config: Config, store: EventStore, examples: Examples, scored: ScoredExamples, other: JobRecord
) -> Comparison:
    """Scores the examples with the model of another job, if that has the same data."""
    from din_dist.data.prepared import open_prepared
    from din_dist.distributed.runtime import Runtime
    from din_dist.evaluation.evaluator import Evaluator, logits_of
    from din_dist.report.gain import difference
    from din_dist.report.scoring import MODEL

    try:
        theirs = config_of(other.folder)
        if open_prepared(theirs.data).facts.fingerprint != store.facts.fingerprint:
            raise InputError(
                "--compare: must be a job on the same prepared data. Received: another log or other features. "
                "Train both on the same ones."
            )
        model, step = trained_model(theirs, store)
        same = {"seed": config.job.seed}
        same["evaluation_negatives_per_positive"] = config.data.evaluation_negatives_per_positive
        evaluator = Evaluator(theirs.replace(**same), store, {"scored": examples}, Runtime())
        logits = evaluator.of_main_task(evaluator.scores("scored", logits_of(model)))
    except InputError as error:
        entry.say(f"left out: {error}")
        return Comparison(other, problem=str(error))
    gain = difference(scored.rankings[MODEL], logits, scored.labels, scored.users, config.job.seed)
    return Comparison(other, step, gain)


def _gains(config: Config, store: EventStore, examples: Examples, step: int, model: BehaviourModel) -> list[Gain]:
    """Returns the gain of each feature. For one of items the model is opened again, because it holds their values."""
    from din_dist.distributed.runtime import Runtime
    from din_dist.evaluation import evaluator as evaluation
    from din_dist.evaluation.evaluator import Evaluator
    from din_dist.features.spec import Owner
    from din_dist.report import gain

    def evaluator_of(data: EventStore) -> Evaluator:
        return Evaluator(config, data, {"scored": examples}, Runtime())

    own_logits = evaluation.logits_of(model)

    def logits_with(data: EventStore, owner: Owner) -> np.ndarray:
        logits_of = own_logits
        if owner is Owner.ITEM:
            logits_of = evaluation.logits_of(trained_model(config, data, step)[0])
        own = evaluator_of(data)
        return own.of_main_task(own.scores("scored", logits_of))

    evaluator = evaluator_of(store)
    logits = evaluator.of_main_task(evaluator.scores("scored", own_logits))
    return list(gain.gains(store, examples, evaluator.labels("scored"), logits, logits_with, config.job.seed))


def _split_to_score(record: JobRecord, splits: Mapping[str, Examples]) -> str:
    """Chooses the test split for a finished job and validation for any other, if it has examples.

    A job that may still change must not be judged by test results.

    Raises:
        InputError: neither split has examples.
    """
    order = ("test", "validation") if record.status is Status.FINISHED else ("validation", "test")
    for split in order:
        if splits[split].num_examples:
            return split
    raise InputError("--split: there must be examples to score. Received: none to validate or test. Use another split.")


if __name__ == "__main__":
    entry.run(main)

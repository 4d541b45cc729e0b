"""Exports a job's model as a SavedModel: `python -m din_dist.cli.export --output_dir DIR --export_dir DIR2`.

The SavedModel takes the log's own ids and loads without this package. din_dist/serving/README.md names its signatures.
The job's prepared data must be there. The last line on stdout describes the export as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from din_dist.cli import entry
from din_dist.cli.flags import define_overrides, define_path, overridden
from din_dist.cli.help import theme
from din_dist.cli.saved_job import WHERE_DATA_LIES, config_of, trained_model
from din_dist.config import Config, require
from din_dist.errors import InputError
from din_dist.files import is_remote, read_record, source_path
from din_dist.serving.calibrator import Calibrate, Calibrator, fit
from din_dist.serving.export import item_index
from din_dist.serving.export.item_index import IndexKind
from din_dist.serving.manifest import DIGEST_HELP, MANIFEST, Manifest, read_manifest
from din_dist.serving.store_exports import local_export
from din_dist.tables.storage import File, RemoteFile, file_of, states
from din_dist.text import parse_json
from din_dist.tracking.tracked_job import add_to_run

if TYPE_CHECKING:
    from din_dist.evaluation.evaluator import Evaluator
    from din_dist.models.behaviour_model import BehaviourModel
    from din_dist.serving.export.retriever import Retriever
    from din_dist.serving.export.writer import TrainedModel

_SAVED_MODEL, _ONNX = "savedmodel", "onnx"
with theme("what to export"):
    OUTPUT_DIR = define_path("output_dir", "runs/latest", "The job's --output_dir.")
    CHECKPOINT_STEP = flags.DEFINE_integer(
        "checkpoint_step", 0, "The update whose weights are exported. Default: the best by validation, or the newest."
    )
    CALIBRATE = flags.DEFINE_enum(
        "calibrate",
        Calibrate.NONE,
        list(Calibrate),
        "How click_probability is calibrated, fitted on the validation split. Logits stay as they are. platt: a line "
        "through the logits; isotonic: any function that does not fall, for many validation examples.",
    )
    NEGATIVE_RATE = flags.DEFINE_float(
        "negative_rate",
        1.0,
        "For logs with labels that were thinned: the share of the negatives that the log kept, above 0 and up to 1. "
        "click_probability is that of the log before.",
    )
    FORMAT = flags.DEFINE_enum(
        "format",
        _SAVED_MODEL,
        [_SAVED_MODEL, _ONNX],
        "savedmodel: all signatures, for our commands and TensorFlow. onnx: the scoring part of a model that ranks, "
        "over dense ids, with the vocabulary of items as Parquet.",
    )
with theme("finding items"):
    RETRIEVER_EXPORT_DIR = define_path(
        "retriever_export_dir",
        "",
        "For jobs of models that rank: an export of a model that finds items, which becomes part of this one. It then "
        "has a signature that recommends: what the one finds, the other ranks. Default: none.",
        parse=source_path,
    )
    RETRIEVER_DIGEST = flags.DEFINE_string("retriever_digest", "", DIGEST_HELP)
    RETRIEVER_HISTORY = flags.DEFINE_string(
        "retriever_history",
        "",
        "With several --histories: the name of the one that the model reads which finds items. Default: the first.",
    )
    INDEX = flags.DEFINE_enum(
        "index",
        IndexKind.NONE,
        list(IndexKind),
        "For jobs of models that find items: an approximate index of the items' vectors beside them, made by Faiss. "
        "ivf: lists of items, of which a search reads a few. The signatures stay exact.",
    )
    INDEX_RECALL = flags.DEFINE_float(
        "index_recall",
        0.95,
        "The least share of the exact best 100 items that the index must find, above 0 and up to 1. It reads the "
        "fewest lists that do so.",
    )
with theme("result"):
    EXPORT_DIR = define_path(
        "export_dir",
        "",
        "Where the SavedModel goes: a new folder, on this machine or in a store (s3://, gs://, abfs://, hdfs://). "
        "Required.",
        parse=source_path,
    )
    OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace the export that is in --export_dir.")
define_overrides(WHERE_DATA_LIES)

_MAX_COMPARED = 10_000  # examples


def main() -> None:
    """Exports the model and prints a summary."""
    require(bool(EXPORT_DIR.value), "must name a folder", "export_dir", EXPORT_DIR.value, "For example exports/first.")
    require(
        CHECKPOINT_STEP.value >= 0,
        "must be an update, or 0",
        "checkpoint_step",
        CHECKPOINT_STEP.value,
        "For example 1000.",
    )
    require(
        0 < NEGATIVE_RATE.value <= 1,
        "must be above 0 and at most 1",
        "negative_rate",
        NEGATIVE_RATE.value,
        "For example 0.1, if a tenth of the negatives was kept.",
    )
    config = overridden(config_of(Path(OUTPUT_DIR.value)), WHERE_DATA_LIES)
    _check_format()
    _check_retriever(config)
    _check_index(config)
    require(
        not config.data.label_columns or NEGATIVE_RATE.value == 1,
        "is for logs of one label: which negatives of several were kept is not known",
        "negative_rate",
        NEGATIVE_RATE.value,
        "Drop it.",
    )
    entry.import_tensorflow()  # takes seconds, so a wrong folder is reported before
    place = file_of(EXPORT_DIR.value)
    print(json.dumps(_export(config, place.absolute() if isinstance(place, Path) else place)), flush=True)


def _check_format() -> None:
    """Checks what only a SavedModel can have."""
    if FORMAT.value != _ONNX:
        return
    for flag, default in ((RETRIEVER_EXPORT_DIR, ""), (INDEX, IndexKind.NONE)):
        rule = "is for --format=savedmodel"
        require(flag.value == default, rule, flag.name, flag.value, "Drop it, or drop --format=onnx.")
    rule, where = "must be a folder on this machine with --format=onnx", EXPORT_DIR.value
    require(not is_remote(where), rule, EXPORT_DIR.name, where, "Export to a folder, and copy that.")


def _check_retriever(config: Config) -> None:
    """Checks the flags of the export inside this one."""
    for flag in (RETRIEVER_DIGEST, RETRIEVER_HISTORY):
        alone = bool(flag.value) and not RETRIEVER_EXPORT_DIR.value
        require(not alone, "is for an export inside this one", flag.name, flag.value, "Give --retriever_export_dir.")
    if not RETRIEVER_EXPORT_DIR.value:
        return
    kind = config.model.model
    require(
        not kind.retrieves,
        f"is for jobs of models that rank, and --model={kind} finds items itself",
        RETRIEVER_EXPORT_DIR.name,
        RETRIEVER_EXPORT_DIR.value,
        "Drop it, or give the --output_dir of a job with --model=din.",
    )
    read_manifest(
        local_export(RETRIEVER_EXPORT_DIR.value, RETRIEVER_DIGEST.value), RETRIEVER_DIGEST.value
    )  # a wrong folder is refused at once


def _check_index(config: Config) -> None:
    """Checks the flags of the approximate index, and that its library is there."""
    recall = INDEX_RECALL.value
    if INDEX.value == IndexKind.NONE:
        require(not INDEX_RECALL.present, "is for an index", INDEX_RECALL.name, recall, "Give --index=ivf, or drop it.")
        return
    require(0 < recall <= 1, "must be above 0 and at most 1", INDEX_RECALL.name, recall, "For example 0.95.")
    kind = config.model.model
    require(
        kind.retrieves,
        f"is for jobs of models that find items, and --model={kind} ranks given ones",
        INDEX.name,
        INDEX.value,
        "Drop it, or give the --output_dir of a job with --model=comirec_sa.",
    )
    item_index.faiss()


def _export(config: Config, folder: File) -> dict[str, Any]:
    import tensorflow as tf

    from din_dist.data.prepared import open_prepared
    from din_dist.data.splits import split_examples
    from din_dist.data.thinning import thin_out
    from din_dist.distributed.runtime import Runtime
    from din_dist.evaluation.evaluator import Evaluator
    from din_dist.serving.export.writer import TrainedModel, check_target, export

    as_onnx = FORMAT.value == _ONNX
    if as_onnx:
        from din_dist.serving.export import onnx_writer

        assert isinstance(folder, Path)
        onnx_writer.onnx_tools()
        onnx_writer.check_target(folder, OVERWRITE.value)
    else:
        check_target(folder, OVERWRITE.value)  # before the slow part
    tf.config.set_visible_devices([], "GPU")  # the job itself may fill them
    store = open_prepared(config.data)
    with_index = INDEX.value != IndexKind.NONE
    if with_index:
        item_index.check_catalogue(store.facts.num_candidates)
    splits = split_examples(store, config.data)
    model, step = trained_model(config, store, CHECKPOINT_STEP.value or None)
    split = next(name for name in ("test", "validation", "train") if splits[name].num_examples)
    examples = thin_out(splits[split], _MAX_COMPARED)
    job_dir = Path(config.job.output_dir)
    flags_of_job, summary = read_record(job_dir / "flags.txt", errors="replace"), _summary_of(job_dir / "summary.json")
    trained = TrainedModel(model, store, config, step, flags_of_job, summary)
    if RETRIEVER_EXPORT_DIR.value:
        trained = dataclasses.replace(trained, retriever=_retriever(trained))
    entry.say(f"exporting the weights of update {step}; comparing on {examples.num_examples} examples of {split}")
    trained = dataclasses.replace(trained, calibrators=_calibrators(Evaluator(config, store, splits, Runtime()), model))
    evaluator = Evaluator(config, store, {**splits, split: examples}, Runtime())
    if isinstance(folder, Path) and as_onnx:
        described = onnx_writer.export_onnx(trained, evaluator, split, folder, overwrite=OVERWRITE.value)
        add_to_run(job_dir, folder / onnx_writer.DESCRIPTION, entry.say)
        return {"export_dir": str(folder), "format": _ONNX, **described}
    recall = INDEX_RECALL.value if with_index else None
    manifest = export(trained, evaluator, split, folder, overwrite=OVERWRITE.value, index_recall=recall)
    if isinstance(folder, Path):
        add_to_run(job_dir, folder / MANIFEST, entry.say)
    return {
        "export_dir": folder.uri if isinstance(folder, RemoteFile) else str(folder),
        "step": manifest.step,
        "max_difference": manifest.max_difference,
        "compared_split": manifest.compared_split,
        "num_compared": manifest.num_compared,
        "bytes": _size_of(folder, manifest),
        "digest": manifest.digest,
        **({"index": dataclasses.asdict(manifest.index)} if manifest.index else {}),
    }


def _size_of(folder: File, manifest: Manifest) -> int:
    """Returns the bytes of an export."""
    if isinstance(folder, RemoteFile):
        files = [folder.below(name) for name in (*manifest.files, MANIFEST.as_posix())]
        return sum(state.st_size for state in states(files).values())
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _retriever(trained: TrainedModel) -> Retriever:
    from din_dist.serving.bundle import Bundle
    from din_dist.serving.export.retriever import retriever_of
    from din_dist.serving.export.writer import described_features, item_id_type

    export_dir = local_export(RETRIEVER_EXPORT_DIR.value, RETRIEVER_DIGEST.value)
    bundle = Bundle.open(export_dir, RETRIEVER_DIGEST.value)
    return retriever_of(
        bundle,
        item_id_type(trained.store),
        described_features(trained.store),
        trained.store.facts.histories,
        RETRIEVER_HISTORY.value,
    )


def _calibrators(evaluator: Evaluator, model: BehaviourModel) -> dict[str, Calibrator]:
    """Returns what the flags say, by task, fitted on all examples of the validation split."""
    kind = Calibrate(CALIBRATE.value)
    if kind is Calibrate.NONE:
        return {"": Calibrator(negative_rate=NEGATIVE_RATE.value)}
    if not evaluator.examples("validation").num_examples:
        raise InputError(
            f"--calibrate: {kind} is fitted on the validation split. Received: a job whose --split has none. Train "
            "with --split=temporal or leave_two_out, or drop it."
        )
    entry.say(f"calibrating on {evaluator.examples('validation').num_examples:,} examples of validation")
    logits = evaluator.scores("validation", model)
    if not evaluator.tasks:
        return {"": fit(kind, logits, evaluator.labels("validation"), NEGATIVE_RATE.value)}
    return {
        task: fit(kind, logits[:, place], evaluator.labels("validation", place))
        for place, task in enumerate(evaluator.tasks)
    }


def _summary_of(path: Path) -> dict[str, Any] | None:
    """Reads the job's summary; None where it is missing or unreadable, because the export does not depend on it."""
    try:
        summary = parse_json(read_record(path))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


if __name__ == "__main__":
    entry.run(main)

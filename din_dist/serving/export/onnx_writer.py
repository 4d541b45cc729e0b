"""Writes the scoring part of a model as ONNX, over dense ids, with the vocabulary of items as Parquet beside it.

Only an export that asks for it imports the packages. Letters of shapes: B histories, N positions in all, I items.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from din_dist.data.event_store import ITEMS
from din_dist.errors import InputError
from din_dist.evaluation.evaluator import Evaluator
from din_dist.files import published_folder, write_text
from din_dist.models.ranking_model import LookedUp, RankingModel
from din_dist.schema import Batch
from din_dist.serving.calibrator import Calibrate
from din_dist.serving.export.signatures import CANDIDATES, HISTORY, LENGTHS, calibrated
from din_dist.serving.export.writer import LARGEST_DIFFERENCE, TrainedModel
from din_dist.serving.manifest import digest_of_file
from din_dist.text import shown, to_json
from din_dist.versions import build_info

MODEL_FILE, ITEMS_FILE, DESCRIPTION = "model.onnx", "items.parquet", "onnx.json"
OPSET = 18
_MOST_BYTES = 2**31 - 2**24  # of item vectors: a model of ONNX is one message of at most 2 GB


def onnx_tools() -> tuple[Any, Any]:
    """Imports tf2onnx and ONNX Runtime.

    Raises:
        InputError: one of them is not installed.
    """
    try:
        return importlib.import_module("tf2onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError(
            f"--format: onnx needs tf2onnx and ONNX Runtime. Received: {shown(str(error))}. "
            "Run: pip install -c launch/constraints.txt onnx onnxruntime tf2onnx."
        ) from error


def check_target(folder: Path, overwrite: bool) -> None:
    """Checks that an ONNX export may be written to `folder`.

    Raises:
        InputError: the folder is in use and may not be replaced.
    """
    if not folder.exists() or (overwrite and (folder / DESCRIPTION).is_file()):
        return
    if not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(
            f"--export_dir: must be a new folder, or an ONNX export with --overwrite. Received: {folder}. Name another "
            "one."
        )


def check_model(trained: TrainedModel) -> None:
    """Checks that ONNX can have the whole model.

    Raises:
        InputError: it finds items, or reads more than the ids of one history and a candidate.
    """
    model, histories = trained.model, trained.store.facts.histories
    own = [encoding.spec.name for encoding in (*model.encodings, *model.side_encodings)]
    refused = {
        "a model that finds items": not isinstance(model, RankingModel),
        f"features of users, contexts, candidates or behaviours ({', '.join(own)})": bool(own),
        f"several histories ({', '.join(history.name for history in histories)})": len(histories) > 1,
        "--calibrate=isotonic": any(c.kind is Calibrate.ISOTONIC for c in trained.calibrators.values()),
    }
    for what, found in refused.items():
        if found:
            raise InputError(
                "--format: onnx has the ids of one history and a candidate, and features of items. Received: "
                f"{what}. Use --format=savedmodel."
            )


def export_onnx(
    trained: TrainedModel, evaluator: Evaluator, split: str, folder: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Publishes the model as ONNX in `folder`; returns what `onnx.json` there holds.

    Args:
        trained: the model.
        evaluator: has the examples of `split`.
        split: on which ONNX Runtime is compared with the trainer.
        folder: of the export.
        overwrite: replace an ONNX export that is there.

    Raises:
        InputError: the folder or the model is refused.
        FloatingPointError: the logits differ too much; nothing was published.
    """
    check_target(folder, overwrite)
    check_model(trained)
    content = _converted(trained)
    largest, num_compared = _largest_difference(trained, content, evaluator, split)
    predictions = trained.predictions
    try:
        with published_folder(folder) as aside:
            (aside / MODEL_FILE).write_bytes(content)
            ids = trained.store.vocabulary(ITEMS)
            dense = pa.array(np.arange(1, len(ids) + 1, dtype=np.int32))
            pq.write_table(pa.table({"item_id": ids, "dense_id": dense}), aside / ITEMS_FILE)
            description = {
                "inputs": [HISTORY, LENGTHS, CANDIDATES],
                "outputs": [name for label in predictions.labels for name in (label.logits, label.probability)],
                "max_history_length": trained.config.data.max_history_length,
                "num_items": trained.store.facts.num_items,
                "opset": OPSET,
                "step": trained.step,
                "data_fingerprint": trained.store.facts.fingerprint,
                "compared_split": split,
                "num_compared": num_compared,
                "max_difference": largest,
                "versions": build_info(),
                "files": {name: digest_of_file(aside / name) for name in (MODEL_FILE, ITEMS_FILE)},
            }
            write_text(aside / DESCRIPTION, to_json(description) + "\n")
    except OSError as error:
        raise InputError(
            f"--export_dir: must be a folder that can be written. Received: {folder}, {error.strerror}. Name another "
            "one."
        ) from error
    return description


def _converted(trained: TrainedModel) -> bytes:
    """Returns the model as ONNX.

    The vectors of all items are one table in it: item features, their columns and rows are applied beforehand.

    Raises:
        InputError: the table is too large for ONNX.
    """
    model = trained.model
    assert isinstance(model, RankingModel)
    num_items = trained.store.facts.num_items
    size = 4 * (num_items + 1) * (model.lookup.width + model.num_tasks)
    if size > _MOST_BYTES:
        raise InputError(
            f"--format: onnx holds up to {_MOST_BYTES:,} bytes of item vectors. Received: {size:,}. Use "
            "--format=savedmodel, or a smaller --embedding_dim."
        )
    vectors, biases = map(tf.Variable, model.lookup(tf.range(num_items + 1)))
    specs = [tf.TensorSpec([None], tf.int32, name) for name in (HISTORY, LENGTHS, CANDIDATES)]

    @tf.function(input_signature=specs, autograph=False)
    def score(history: tf.Tensor, lengths: tf.Tensor, candidates: tf.Tensor) -> dict[str, tf.Tensor]:
        items = LookedUp(tf.gather(vectors, candidates), tf.gather(biases, candidates), tf.gather(vectors, history))
        logits = model.logits(items, model.pairs(lengths, tf.range(tf.size(history))))
        outputs: dict[str, tf.Tensor] = {}
        for label, own in trained.predictions.columns(logits):
            outputs |= {label.logits: own, label.probability: tf.sigmoid(calibrated(own, label.calibrator))}
        return outputs

    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for the result
        proto, _ = onnx_tools()[0].convert.from_function(score, input_signature=specs, opset=OPSET)
    return bytes(proto.SerializeToString())


def scorer_of(content: bytes) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Opens a model in ONNX Runtime; returns a function from inputs to outputs by name."""
    session = onnx_tools()[1].InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _largest_difference(trained: TrainedModel, content: bytes, evaluator: Evaluator, split: str) -> tuple[float, int]:
    """Compares the trainer's logits with ONNX Runtime's on all examples of `split`; returns as `largest_difference`."""
    score = scorer_of(content)

    def found(batch: Batch) -> tf.Tensor:
        ids = batch.history_item_ids, batch.history_lengths, batch.candidate_item_ids
        outputs = score(dict(zip((HISTORY, LENGTHS, CANDIDATES), (part.numpy() for part in ids), strict=True)))
        return trained.predictions.stacked({name: tf.constant(value) for name, value in outputs.items()}, tf.stack)

    expected = evaluator.scores(split, lambda batch: trained.model(batch)).astype(np.float64)
    differences = np.abs(evaluator.scores(split, found) - expected)
    if not np.all(differences <= LARGEST_DIFFERENCE * np.maximum(1, np.abs(expected))):  # false for NaN
        raise FloatingPointError(
            f"--format: onnx must have the trainer's logits, within {LARGEST_DIFFERENCE:g}. Received: a difference of "
            f"{differences.max():.3g} on {len(expected)} examples of the {split} split. Nothing was published."
        )
    return float(differences.max(initial=0.0)), len(expected)

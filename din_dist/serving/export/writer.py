"""Writes an export to a temporary folder, compares its logits with the trainer's, and publishes it by one rename."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf

from din_dist.config import Config
from din_dist.data.event_store import ITEMS, EventStore, vocabulary_of
from din_dist.data.pipeline import batch_signature
from din_dist.data.row_ids import write_rows
from din_dist.data.splits import Examples
from din_dist.errors import InputError
from din_dist.evaluation.evaluator import Evaluator
from din_dist.features.gathering import missing_values
from din_dist.features.spec import OF_EXAMPLES, Kind, Owner
from din_dist.files import folder_aside, locked, make_folder, publish_folder, repair_publishing, write_text
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.models.ranking_model import RankingModel
from din_dist.models.retrieval_model import RetrievalModel
from din_dist.schema import Batch, NamedHistory
from din_dist.serving.asked import NEAREST
from din_dist.serving.bundle import as_tensor, inputs_of
from din_dist.serving.calibrator import Calibrator
from din_dist.serving.export.features import Declared, inputs_in_manifest
from din_dist.serving.export.item_index import INDEX_FILE, MOST_USERS, write_index
from din_dist.serving.export.parent import EXPORTED_ROWS
from din_dist.serving.export.ranking_signatures import RankingSignatures
from din_dist.serving.export.retrieval_signatures import RetrievalSignatures, vectors_of_items
from din_dist.serving.export.retriever import Retriever
from din_dist.serving.export.signatures import Signatures, names_of_inputs
from din_dist.serving.given_behaviours import NAMES, by_user
from din_dist.serving.manifest import MANIFEST, FeatureInputs, Manifest, digest_of_file, read_manifest
from din_dist.serving.own_values import OwnBehaviours, OwnValues
from din_dist.serving.predictions import Predictions
from din_dist.serving.store_exports import check_free, upload
from din_dist.tables.storage import File, RemoteFile
from din_dist.text import to_json
from din_dist.training.warm_start import kept_rows
from din_dist.versions import build_info

LARGEST_DIFFERENCE = 1e-5  # absolute, or relative for logits above 1
ITEMS_FILE = "items.parquet"
_NUM_NEAREST = 20  # items of a user that are compared
_ROWS_PER_GROUP = 65_536  # of `ITEMS_FILE`
_PRODUCTS_AT_ONCE = 1 << 24  # of vectors, in the comparison of the best items


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model with its data and settings, ready for export.

    Attributes:
        model: with the weights to export.
        store: the prepared data, for the vocabularies.
        config: the job's settings.
        step: the number of the update that gave these weights.
        flags: the job's settings as a flagfile.
        summary: the job's `summary.json`; None if the job was not finished.
        calibrators: task, or empty for one click -> what turns its logits into probabilities.
        retriever: finds the items that the model ranks; None: nothing does.
    """

    model: BehaviourModel
    store: EventStore
    config: Config
    step: int
    flags: str
    summary: Mapping[str, Any] | None
    calibrators: Mapping[str, Calibrator] = dataclasses.field(default_factory=dict)
    retriever: Retriever | None = None

    @property
    def predictions(self) -> Predictions:
        """The labels that are predicted."""
        return Predictions.of(self.store.facts.tasks, self.config.main_task, self.calibrators)


def check_target(folder: File, overwrite: bool) -> None:
    """Checks that an export may be written to `folder`.

    Raises:
        InputError: the folder is in use and may not be replaced.
    """
    if isinstance(folder, RemoteFile):
        check_free(folder, overwrite)
        return
    if not folder.exists() and not folder.is_symlink():
        return
    try:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            return
    except OSError as error:
        raise InputError(
            f"--export_dir: must be a folder that can be read. Received: {folder}, {error.strerror}. Name another one."
        ) from error
    if not (folder / MANIFEST).is_file() or folder.is_symlink():
        raise InputError(
            f"--export_dir: must be a new folder, or an export with --overwrite. Received: {folder}, which exists "
            "and is no export. Name another one."
        )
    if not overwrite:
        raise InputError(
            f"--export_dir: must be a new folder, or an export with --overwrite. Received: {folder}, which holds an "
            "export. Add --overwrite to replace it, or name another one."
        )


def export(
    trained: TrainedModel,
    evaluator: Evaluator,
    split: str,
    folder: File,
    *,
    overwrite: bool = False,
    index_recall: float | None = None,
) -> Manifest:
    """Publishes an export of `trained` in `folder`.

    Args:
        trained: the model.
        evaluator: has the examples of `split`.
        split: on which the logits of export and trainer are compared.
        folder: of the export, on this machine or in a store.
        overwrite: replace an export that is there.
        index_recall: the least recall of an approximate index of items, see `write_index`. None: there is no index.

    Raises:
        InputError: the folder is in use or cannot be written, or no index has this recall.
        FloatingPointError: the logits differ too much; nothing was published.
    """
    check_target(folder, overwrite)
    with _temporary_folder(folder) as temporary:
        with _writing(folder):
            write_saved_model(trained, temporary)
        largest, num_compared = largest_difference(trained, temporary, evaluator, split)
        with _writing(folder):
            index = None
            if isinstance(trained.model, RetrievalModel):
                vectors = vectors_of_items(trained.model, trained.store.facts.num_candidates)
                write_items(vectors, trained.store, temporary / ITEMS_FILE)
                if index_recall is not None:
                    users = _vectors_of_users(trained.model, evaluator, split)
                    index = write_index(vectors, users, index_recall, temporary / INDEX_FILE)
            manifest = dataclasses.replace(_manifest(trained, temporary, split, largest, num_compared), index=index)
            manifest = _written(manifest, temporary)
            check_target(folder, overwrite)  # again, because the comparison took a while
            if isinstance(folder, RemoteFile):
                upload(temporary, folder)
            else:
                publish_folder(temporary, folder)
    return manifest


def largest_difference(trained: TrainedModel, folder: Path, evaluator: Evaluator, split: str) -> tuple[float, int]:
    """Compares the trainer's logits with those of the SavedModel in `folder` on all examples of `split`.

    Declared features of users, contexts and candidates are given as the log has them, and once more as all missing.

    Returns:
        The largest difference and the number of examples.

    Raises:
        FloatingPointError: the difference is too large.
    """
    exported = _Exported(trained, folder, evaluator.examples(split))
    encodings = trained.model.encodings
    batches = batch_signature(trained.model.batch_encodings, trained.model.extras, trained.model.num_tasks)
    trace = functools.partial(tf.function, input_signature=[batches], autograph=False)

    def without_features(batch: Batch) -> Batch:
        return batch._replace(features=missing_values(encodings, tf.size(batch.candidate_item_ids)))

    scorers = [(trace(lambda batch: trained.model(batch, training=False)), False)]
    if encodings:
        scorers.append((trace(lambda batch: trained.model(without_features(batch), training=False)), True))
    largest, num_compared = 0.0, 0
    for trainer, missing in scorers:
        expected = evaluator.scores(split, trainer).astype(np.float64)
        num_compared = len(expected)
        for signature in ("score", "rank_histories"):
            found = evaluator.scores(split, functools.partial(exported.logits, signature=signature, missing=missing))
            differences = np.abs(found - expected)
            if not np.all(differences <= LARGEST_DIFFERENCE * np.maximum(1, np.abs(expected))):  # false for NaN
                what = " with all features missing" if missing else ""
                raise FloatingPointError(
                    f"{folder}: an export must have the trainer's logits, within {LARGEST_DIFFERENCE:g}. Received: a "
                    f"difference of {differences.max():.3g} on {len(expected)} examples of the {split} split{what}. "
                    "Nothing was published."
                )
            largest = max(largest, float(differences.max(initial=0.0)))
    if isinstance(trained.model, RetrievalModel):
        exported.check_nearest(trained.model, next(iter(evaluator.batches(split))))
    return largest, num_compared


class _Exported:
    """A SavedModel that is called with the log's own ids and values.

    Args:
        trained: the model that it was made of.
        folder: of the SavedModel.
        examples: those that batches are made of.
    """

    def __init__(self, trained: TrainedModel, folder: Path, examples: Examples) -> None:
        self._loaded, self._folder = tf.saved_model.load(str(folder)), folder
        self._num_candidates = trained.store.facts.num_candidates
        self._vocabulary = trained.store.vocabulary(ITEMS).combine_chunks()
        self._features, self._predictions = described_features(trained.store), trained.predictions
        self._examples, self._values = examples, OwnValues(trained.store)
        self._histories = [history.name for history in trained.store.facts.histories]
        self._behaviours = OwnBehaviours(trained.store, self._values, trained.config.data.max_history_length)

    def logits(self, batch: Batch, *, signature: str, missing: bool) -> tf.Tensor:
        """Returns the logits, `[B]` or `[B, T]`, of a packed batch.

        Args:
            batch: its features are left aside.
            signature: `score` or `rank_histories`.
            missing: give all features of examples as missing.
        """
        history, lengths, inputs = self._inputs(signature, batch, missing)
        if signature == "rank_histories":
            inputs["candidate_counts"] = tf.ones_like(batch.candidate_item_ids, tf.int64)
        outputs = self._loaded.signatures[signature](
            history_item_ids=history,
            history_lengths=lengths,
            candidate_item_ids=self._own_ids(batch.candidate_item_ids),
            **inputs,
        )
        return self._predictions.stacked(outputs, tf.stack)

    def check_nearest(self, model: RetrievalModel, batch: Batch) -> None:
        """Compares the best of all items for each example of a packed batch with the trainer's.

        Raises:
            FloatingPointError: they differ too much.
        """
        users, vectors = model.users(batch), vectors_of_items(model, self._num_candidates)
        history, lengths, inputs = self._inputs(NEAREST, batch, missing=False)
        num = min(_NUM_NEAREST, self._num_candidates)
        found = self._loaded.signatures[NEAREST](
            history_item_ids=history,
            history_lengths=lengths,
            k=tf.constant(num, tf.int64),
            exclude_history=tf.constant(False),
            **inputs,
        )
        ids, logits = found["item_ids"].numpy(), found["logits"].numpy()
        own_ids = pa.array(ids.ravel().tolist(), self._vocabulary.type)
        places = pc.index_in(own_ids, self._vocabulary).to_numpy().reshape(ids.shape)
        at_once = max(1, _PRODUCTS_AT_ONCE // (users.shape[1] * len(vectors)))
        for first in range(
            0, len(ids), at_once
        ):  # some users at a time, because their products with all items are many
            rows = slice(first, first + at_once)
            products = tf.einsum("bkh,ih->bik", users[rows], vectors)
            expected = model.best(products).numpy().astype(np.float64)
            best = np.sort(np.partition(expected, -num, axis=1)[:, -num:], axis=1)[:, ::-1]
            for wanted in (best, np.take_along_axis(expected, places[rows], axis=1)):
                self._check_near(logits[rows], wanted)

    def _check_near(self, logits: np.ndarray, wanted: np.ndarray) -> None:
        differences = np.abs(logits - wanted)
        if not np.all(differences <= LARGEST_DIFFERENCE * np.maximum(1, np.abs(wanted))):  # false for NaN
            raise FloatingPointError(
                f"{self._folder}: an export must find the trainer's best items, with logits within "
                f"{LARGEST_DIFFERENCE:g}. Received: a difference of {differences.max():.3g}. Nothing was published."
            )

    def _inputs(self, signature: str, batch: Batch, missing: bool) -> tuple[tf.Tensor, tf.Tensor, dict[str, Any]]:
        """Returns the own ids of the histories of a packed batch, their lengths, and the other inputs."""
        given: Mapping[Owner, Mapping[str, Any]] = {}
        if not missing:
            users, events = self._examples.users_and_events(batch.example_ids.numpy())
            given = self._values.of(users, events, batch.candidate_item_ids.numpy())
        inputs: dict[str, Any] = {}
        for feature in self._features:
            if feature.owner in OF_EXAMPLES:
                values = given.get(Owner(feature.owner), {}).get(feature.name)
                inputs |= inputs_of(feature, values, len(batch.candidate_item_ids))
        function = self._loaded.signatures[signature]
        specs = function.structured_input_signature[1]
        inputs = {name: as_tensor(value, specs[name].dtype, name) for name, value in inputs.items()}
        history, lengths = batch.history_item_ids.numpy(), batch.history_lengths.numpy()
        order = np.arange(len(history))
        if len(self._histories) > 1:
            order, names, lengths = by_user(lengths, self._histories)
            inputs[NAMES] = tf.constant(names, tf.string)
        of_behaviours = self._behaviours.of(self._examples, batch)
        for feature in self._features:
            if feature.owner == Owner.HISTORY:
                values = of_behaviours[feature.name][order]
                inputs |= {feature.inputs[0]: as_tensor(values, specs[feature.inputs[0]].dtype, feature.name)}
        return self._own_ids(history[order]), tf.cast(lengths, tf.int64), inputs

    def _own_ids(self, dense_ids: tf.Tensor | np.ndarray) -> tf.Tensor:
        ids = self._vocabulary.take(pa.array(np.asarray(dense_ids) - 1)).to_numpy(zero_copy_only=False)
        return tf.constant(ids, tf.int64 if pa.types.is_integer(self._vocabulary.type) else tf.string)


def write_saved_model(trained: TrainedModel, folder: Path) -> None:
    store = trained.store
    model = trained.model
    with tempfile.TemporaryDirectory(dir=folder) as vocabularies:
        vocabulary_arguments = (
            store.vocabulary(ITEMS),
            {name: store.vocabulary(vocabulary_of(name)) for name in store.item_features},
            store.facts.histories or (NamedHistory("", _longest(trained)),),
            Path(vocabularies),
            _declared(store),
            trained.predictions,
        )
        signatures: Signatures
        if isinstance(model, RetrievalModel):
            signatures = RetrievalSignatures(model, *vocabulary_arguments, num_candidates=store.facts.num_candidates)
        else:
            assert isinstance(model, RankingModel)
            signatures = RankingSignatures(model, *vocabulary_arguments, retriever=trained.retriever)
        signatures.save(folder)
        rows = kept_rows(model, store)._replace(variables=signatures.saved_variables)
        write_rows(folder / EXPORTED_ROWS, rows)


def write_items(vectors: np.ndarray, store: EventStore, path: Path) -> None:
    """Writes the vectors of all items that may be found to a Parquet file, for any index of vectors.

    Its columns are `item_id`, as in the log, and `embedding`, float32 `[H]` each.

    Args:
        vectors: float32 `[I, H]`.
        store: has the log's ids.
        path: of the file.
    """
    columns = {
        "item_id": store.vocabulary(ITEMS)[: len(vectors)],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
    }
    pq.write_table(pa.table(columns), path, row_group_size=_ROWS_PER_GROUP)


def _vectors_of_users(model: RetrievalModel, evaluator: Evaluator, split: str) -> np.ndarray:
    """Returns the vectors of users at the events of a split, float32 `[Q, K, H]`; of many, evenly chosen ones."""
    examples = evaluator.examples(split)
    found = np.concatenate([model.users(batch).numpy() for batch in evaluator.batches(split)])
    _, events = examples.users_and_events(np.arange(examples.num_examples))
    firsts = np.sort(np.unique(events, return_index=True)[1])  # a positive and its negatives have one user
    chosen = np.linspace(0, len(firsts) - 1, min(len(firsts), MOST_USERS)).astype(np.int64)
    return found[firsts[chosen]]


def _declared(store: EventStore) -> dict[str, Declared]:
    """Returns the declared features with their own ids. Only items' categories and features of examples need those."""
    found = {}
    for name, stored in store.features.items():
        spec = stored.encoding.spec
        needed = spec.owner is not Owner.ITEM or spec.kind is Kind.CATEGORY
        found[name] = Declared(stored, store.feature_vocabulary(name) if needed else pa.array([], pa.large_string()))
    return found


def described_features(store: EventStore) -> list[FeatureInputs]:
    """Returns the declared features as a manifest describes them."""
    declared = _declared(store)
    return inputs_in_manifest(declared.values(), names_of_inputs(list(store.item_features), declared))


def _manifest(trained: TrainedModel, folder: Path, split: str, largest: float, num_compared: int) -> Manifest:
    store = trained.store
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    features = described_features(store)
    item_features = {name: _kind(store.vocabulary(vocabulary_of(name))) for name in store.item_features}
    item_features |= {feature.name: feature.type for feature in features if feature.owner == "item" and feature.inputs}
    names = names_of_inputs(list(store.item_features), store.features)
    return Manifest(
        item_id_type=item_id_type(store),
        item_features=item_features,
        feature_inputs={name: names[name] for name in item_features},
        max_history_length=_longest(trained),
        num_items=store.facts.num_items,
        embedding_width=trained.model.lookup.width,
        step=trained.step,
        flags=trained.flags,
        settings=trained.config.to_json(),
        data_fingerprint=store.facts.fingerprint,
        summary=trained.summary,
        compared_split=split,
        num_compared=num_compared,
        max_difference=largest,
        versions=build_info(),
        files={path.relative_to(folder).as_posix(): digest_of_file(path) for path in files},
        features=tuple(features),
        calibration=_calibration(trained.predictions),
        tasks=trained.predictions.tasks,
        main_task=trained.predictions.labels[trained.predictions.main].task,
        histories=_histories(trained),
        long_history=next((history.feature for history in store.sets if history.feature), ""),
        finds_items=isinstance(trained.model, RetrievalModel),
        retriever=trained.retriever.described if trained.retriever else None,
    )


def _written(manifest: Manifest, folder: Path) -> Manifest:
    """Writes the manifest of the export in `folder`; returns it with its digest."""
    path = folder / MANIFEST
    path.parent.mkdir(exist_ok=True)
    write_text(path, to_json(manifest.to_json()) + "\n")
    return read_manifest(folder)


def _histories(trained: TrainedModel) -> dict[str, int]:
    """Returns the longest length of each history by name; nothing if there is one."""
    sets = trained.store.sets
    return {history.name: history.longest for history in sets} if len(sets) > 1 else {}


def _longest(trained: TrainedModel) -> int:
    """Returns the longest length of all histories."""
    return max(history.longest for history in trained.store.histories(trained.config.data.max_history_length))


def _calibration(predictions: Predictions) -> dict[str, Any] | None:
    """Returns the calibrators as a manifest keeps them; None if none of them changes anything."""
    found = {label.task: label.calibrator for label in predictions.labels if not label.calibrator.changes_nothing}
    as_json = {task: calibrator.to_json() for task, calibrator in found.items()}
    return (as_json if predictions.tasks else as_json[""]) if as_json else None


def item_id_type(store: EventStore) -> str:
    """Returns "string" or "integer", the type of the log's own ids of items."""
    return _kind(store.vocabulary(ITEMS))


def _kind(ids: pa.ChunkedArray) -> str:
    return "integer" if pa.types.is_integer(ids.type) else "string"


@contextlib.contextmanager
def _writing(folder: File) -> Iterator[None]:
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise InputError(
            f"--export_dir: must be a folder that can be written, with room for the model. Received: "
            f"{folder if isinstance(folder, Path) else tempfile.gettempdir()}, {reason}. Make room or give rights "
            "there, or name another one."
        ) from error


@contextlib.contextmanager
def _temporary_folder(folder: File) -> Iterator[Path]:
    """Makes a new folder beside `folder` and removes it at the end of the block, unless it was renamed.

    A lock on it shows other exports that it is in use. Folders that killed exports left are removed. For an export in a
    store, the folder is among this machine's temporary files.
    """
    if isinstance(folder, RemoteFile):
        with tempfile.TemporaryDirectory(prefix="din_dist-export-") as aside:
            yield Path(aside)
        return
    prefix = f".{folder.name}.exporting-"
    with _writing(folder):
        make_folder(folder.parent)
        repair_publishing(folder)
        for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
            with contextlib.suppress(OSError), locked(left):
                shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        with _writing(folder):
            temporary = stack.enter_context(folder_aside(folder.parent, prefix))
        with contextlib.suppress(OSError):  # some disks have no locks; then nothing is removed there either
            stack.enter_context(locked(temporary))
        yield temporary

"""The manifest of an export: reading, checking and writing it, without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

import numpy as np

from din_dist.config import require
from din_dist.errors import InputError
from din_dist.files import open_regular, read_bounded
from din_dist.serving.calibrator import Calibrator
from din_dist.serving.predictions import Predictions
from din_dist.tables.storage import File
from din_dist.text import is_count, parse_json, reason, shown

MANIFEST = Path("assets.extra") / "manifest.json"  # the folder that TensorFlow reserves for files of others
FORMAT_VERSION = 1
DIGEST_HELP = (
    "SHA-256 of the export's assets.extra/manifest.json: the digest that cli.export prints. Any other export is "
    "refused before it is loaded. Default: none, every export is taken."
)
MOST_BYTES = 4 << 20  # largest manifest
_FOLDERS = ("variables", "assets", "debug")  # folders of a SavedModel
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("item_features", "feature_inputs", "settings", "versions", "files", "histories"), dict),
    **dict.fromkeys(("item_id_type", "flags", "data_fingerprint", "compared_split", "long_history"), str),
    **dict.fromkeys(("max_history_length", "num_items", "embedding_width", "step", "num_compared"), int),
    "max_difference": (int, float),
    "summary": (dict, NoneType),
    "finds_items": bool,
}


@dataclasses.dataclass(frozen=True)
class FeatureInputs:
    """A declared feature of an export.

    Attributes:
        name: of the feature.
        owner: "user", "context", "candidate", "item" or "history", of behaviours.
        kind: as declared, for example "category".
        type: of its values, "string", "integer" or "number".
        inputs: the names of its inputs: the values, then the lengths of lists, then the weights. An item's category has
            two, for histories and for candidates; its other features have none, because items are looked up.
        missing: what stands for a missing value: "", the smallest int64, "NaN", or [] for a list of length 0.
        dimension: numbers of a vector; 0 for other kinds.
        column: the column of the log that it was read from; empty for times.
        weights: the column of the weights.
        separator: separates the values of a list that the log writes as text.
        unit: of the timestamps that it is made from.
    """

    name: str
    owner: str
    kind: str
    type: str
    inputs: list[str]
    missing: str | int | list
    dimension: int = 0
    column: str = ""
    weights: str = ""
    separator: str = ""
    unit: str = ""

    @property
    def is_list(self) -> bool:
        """True for lists, which have inputs for values and for lengths."""
        return self.missing == []


@dataclasses.dataclass(frozen=True)
class InnerExport:
    """The export inside another one that finds the items to rank.

    Attributes:
        digest: of its manifest.
        step: the number of the update that gave its weights.
        model: as of `--model`.
        num_items: of its vocabulary.
        history: the name of the history that it reads; empty if there is one.
    """

    digest: str
    step: int
    model: str
    num_items: int
    history: str


@dataclasses.dataclass(frozen=True)
class ItemIndex:
    """The approximate index of the items' vectors that lies beside them.

    Attributes:
        kind: "ivf".
        faiss: the version of the library that made it.
        num_lists: that the items are in.
        num_probes: the number of lists that a search reads; the file says so, too.
        recall: the share of the exact best k items that it finds, on average over users.
        k: items of a user that the recall counts.
        num_queries: the number of users, of the split that was compared, on which the recall was measured.
    """

    kind: str
    faiss: str
    num_lists: int
    num_probes: int
    recall: float
    k: int
    num_queries: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a SavedModel, written beside it as JSON.

    Attributes:
        item_id_type: "string" or "integer", as in the log.
        item_features: name of an item feature -> type of its values, "string" or "integer".
        feature_inputs: name of an item feature -> its NAME in the names of inputs, such as `history_NAME`.
        max_history_length: the number of newest behaviours that the model reads.
        num_items: items of the vocabulary.
        embedding_width: H, the width of the vectors of `embed_items`.
        step: the number of the update that gave these weights.
        flags: the job's settings as a flagfile.
        settings: all of the job's settings.
        data_fingerprint: of the prepared data.
        summary: the job's `summary.json`; None if the job was not finished.
        compared_split: the split on which export and trainer were compared before publishing.
        num_compared: the number of examples that were compared.
        max_difference: the largest difference between the logits of export and trainer.
        versions: of the software that wrote the export.
        files: path -> SHA-256 of each file of the export except this one.
        format_version: of the manifest.
        features: those that were declared. Without them the file has no such entry.
        calibration: a `Calibrator` as JSON, of several tasks one for each by name. None, and no such entry in the file:
            probabilities are sigmoids of logits.
        tasks: the labels that are predicted, if there are several. Else the file has no such entry, nor the next.
        main_task: the one that items are ranked by.
        histories: by name, the number of newest behaviours that the model reads of each history, if there are several.
            Else the file has no such entry.
        long_history: the item feature that behaviours of the last history share with the candidate, if there is such a
            history. It takes all behaviours. Else the file has no such entry.
        finds_items: the model finds items among all, and has the signatures `embed_users` and `nearest`. Else the file
            has no such entry.
        retriever: the export inside this one that finds the items which `recommend` ranks. None, and no such entry in
            the file: there is none.
        index: the approximate index of the items' vectors. None, and no such entry in the file: there is none.
        digest: SHA-256 of this file, and thereby of the whole export; empty until the file is written.
    """

    item_id_type: str
    item_features: Mapping[str, str]
    feature_inputs: Mapping[str, str]
    max_history_length: int
    num_items: int
    embedding_width: int
    step: int
    flags: str
    settings: Mapping[str, Any]
    data_fingerprint: str
    summary: Mapping[str, Any] | None
    compared_split: str
    num_compared: int
    max_difference: float
    versions: Mapping[str, str]
    files: Mapping[str, str]
    format_version: int = FORMAT_VERSION
    features: tuple[FeatureInputs, ...] = ()
    calibration: Mapping[str, Any] | None = None
    tasks: tuple[str, ...] = ()
    main_task: str = ""
    histories: Mapping[str, int] = dataclasses.field(default_factory=dict)
    long_history: str = ""
    finds_items: bool = False
    retriever: InnerExport | None = None
    index: ItemIndex | None = None
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["digest"]
        if not self.features:
            del fields["features"]
        if self.calibration is None:
            del fields["calibration"]
        if not self.tasks:
            del fields["tasks"], fields["main_task"]
        if not self.histories:
            del fields["histories"]
        if not self.long_history:
            del fields["long_history"]
        if not self.finds_items:
            del fields["finds_items"]
        if self.retriever is None:
            del fields["retriever"]
        if self.index is None:
            del fields["index"]
        return fields

    @functools.cached_property
    def predictions(self) -> Predictions:
        """The labels that are predicted, with their calibrators."""
        if not self.tasks:
            of_click = {"": Calibrator.from_json(self.calibration)} if self.calibration is not None else {}
            return Predictions.of((), 0, of_click)
        calibrators = {task: Calibrator.from_json(fields) for task, fields in (self.calibration or {}).items()}
        if not calibrators.keys() <= {*self.tasks}:
            raise ValueError("other tasks")
        return Predictions.of(self.tasks, self.tasks.index(self.main_task), calibrators)

    @property
    def model(self) -> str:
        """The job's `--model`; empty if its settings do not say so."""
        return str(self._setting("model", ""))

    @property
    def temperature(self) -> float:
        """The number that products of vectors are divided by, in a model that finds items."""
        return float(self._setting("temperature", 1.0))

    def _setting(self, name: str, default: Any) -> Any:
        """Returns a setting of the model."""
        settings = self.settings.get("model")
        return settings.get(name, default) if isinstance(settings, dict) else default

    @property
    def recommends(self) -> bool:
        """True if the export finds items, by its own model or by the one inside."""
        return self.finds_items or self.retriever is not None

    def features_of(self, owner: str) -> list[FeatureInputs]:
        """Returns the features of an owner."""
        return [feature for feature in self.features if feature.owner == owner]


def check_digest(digest: str) -> None:
    """Checks the form of a digest that the user gave.

    Raises:
        InputError: it is not a SHA-256.
    """
    require(
        not digest or re.fullmatch("[0-9a-fA-F]{64}", digest) is not None,
        "must be the SHA-256 of a manifest, 64 hexadecimal digits",
        "expect_digest",
        digest,
        "cli.export prints it; so does sha256sum EXPORT_DIR/assets.extra/manifest.json.",
    )


def read_manifest(folder: Path, expect_digest: str = "") -> Manifest:
    """Returns the manifest of the export in `folder`, without checking the files that it lists.

    Args:
        folder: of the export.
        expect_digest: the SHA-256 that the manifest must have; empty: any.

    Raises:
        InputError: there is no export, or it has another version or digest, or its manifest is damaged.
    """
    check_digest(expect_digest)
    path = folder / MANIFEST
    try:
        content = read_bounded(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: must be an export. Received: a folder without {MANIFEST}. "
            "Make one by python -m din_dist.cli.export."
            if folder.is_dir()
            else f"{folder}: must be an export. Received: no such folder. Make one by python -m din_dist.cli.export."
        ) from error
    except OSError as error:
        raise _changed(path, reason(error)) from error
    return parse_manifest(content, path, expect_digest)


def parse_manifest(content: bytes, path: File, expect_digest: str = "") -> Manifest:
    """Returns the manifest that a file holds.

    Args:
        content: of the file.
        path: of the file, for the texts of errors.
        expect_digest: the SHA-256 that the content must have; empty: any.

    Raises:
        InputError: it has another version or digest, or is damaged.
    """
    digest = hashlib.sha256(content).hexdigest()
    if expect_digest and digest != expect_digest.lower():
        raise InputError(
            f"--expect_digest: must be the SHA-256 of {path}. Received: {expect_digest}, and a manifest with "
            f"{digest}. Name the export that is meant, or its digest."
        )
    try:
        fields = parse_json(content)
        version = fields["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise _changed(path, reason(error)) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: must be an export of version {FORMAT_VERSION}. Received: version {shown(version)}. {_AGAIN}"
        )
    try:
        features = tuple(FeatureInputs(**feature) for feature in fields.pop("features", ()))
        tasks = tuple(fields.pop("tasks", ()))
        inner, found = fields.pop("retriever", None), fields.pop("index", None)
        retriever = None if inner is None else InnerExport(**inner)
        index = None if found is None else ItemIndex(**found)
        manifest = Manifest(**fields, features=features, tasks=tasks, retriever=retriever, index=index, digest=digest)
    except TypeError as error:
        raise _changed(path, reason(error)) from error
    if wrong := _wrong(manifest):
        raise _changed(path, wrong)
    return manifest


def _wrong(manifest: Manifest) -> str:
    """Returns the first impossible entry of a manifest, in words; empty if there is none."""
    for name, kinds in _KINDS.items():
        if not isinstance(getattr(manifest, name), kinds):
            return f"another kind of {name}"
    for name in ("max_history_length", "num_items", "embedding_width", "step", "num_compared"):
        if not is_count(getattr(manifest, name)):
            return f"{name} of {shown(getattr(manifest, name))}"
    for kind in (manifest.item_id_type, *manifest.item_features.values()):
        if kind not in ("string", "integer"):
            return f"ids of type {shown(kind)}"
    if not all(isinstance(task, str) and task.isidentifier() for task in manifest.tasks):
        return "tasks of another form"
    if manifest.main_task not in (manifest.tasks or ("",)):
        return f"a main_task of {shown(manifest.main_task)}"
    try:
        for label in manifest.predictions.labels:
            label.calibrator.of_logits(np.zeros(1))
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        return f"a calibration that cannot be ({reason(error)})"
    if len(manifest.histories) == 1 or not all(map(is_count, manifest.histories.values())):
        return f"histories of {shown(dict(manifest.histories))}"
    if manifest.retriever and not _is_whole(manifest.retriever):
        return "a retriever of another form"
    if manifest.index and not _is_measured(manifest.index):
        return "an index of another form"
    if manifest.feature_inputs.keys() != manifest.item_features.keys():
        return "other features among feature_inputs than among item_features"
    for feature in manifest.features:
        if wrong := _wrong_feature(feature):
            return wrong
    for name, digest in manifest.files.items():
        path = PurePosixPath(name)
        leads_out = path.is_absolute() or ".." in path.parts or name != path.as_posix() or name == "."
        if leads_out or not name.isprintable():
            return f"a file named {shown(name)}"
        if not isinstance(digest, str):
            return f"no digest of {name}"
    return ""


def _is_whole(inner: InnerExport) -> bool:
    texts = (inner.digest, inner.model, inner.history)
    return all(isinstance(text, str) for text in texts) and is_count(inner.step) and is_count(inner.num_items)


def _is_measured(index: ItemIndex) -> bool:
    counts = (index.num_lists, index.num_probes, index.k, index.num_queries)
    texts = isinstance(index.kind, str) and isinstance(index.faiss, str)
    return texts and all(map(is_count, counts)) and isinstance(index.recall, (int, float)) and 0 <= index.recall <= 1


def _wrong_feature(feature: FeatureInputs) -> str:
    """Returns the first impossible entry of a feature, in words; empty if there is none."""
    texts = (feature.name, feature.kind, feature.column, feature.weights, feature.separator, feature.unit)
    if not all(isinstance(text, str) for text in texts) or not is_count(feature.dimension):
        return "a feature of another form"
    if feature.owner not in ("user", "context", "candidate", "item", "history"):
        return f"a feature of {shown(feature.owner)}"
    if feature.type not in ("string", "integer", "number"):
        return f"a feature of type {shown(feature.type)}"
    inputs = feature.inputs
    if not isinstance(inputs, list) or not all(isinstance(name, str) for name in inputs):
        return f"a feature with inputs {shown(inputs)}"
    least = 0 if feature.owner == "item" else 2 if feature.is_list else 1
    return "" if len(inputs) >= least else f"a feature with {len(inputs)} inputs"


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares all files that TensorFlow may read with the manifest.

    Raises:
        InputError: a file is missing, has changed, or was added.
    """
    for name, digest in manifest.files.items():
        path = folder / name
        try:
            found = digest_of_file(path)
        except OSError as error:
            raise _changed(path, reason(error)) from error
        if found != digest:
            raise _changed(path, "other content")
    try:
        added = next(_unlisted(folder, manifest), None)
    except OSError as error:
        raise _changed(folder, reason(error)) from error
    if added:
        raise InputError(
            f"{folder}: must have no files for TensorFlow but those that its manifest names. "
            f"Received: {shown(added)}. Remove it, or copy the export again."
        )


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yields paths that the manifest does not list, in the places where TensorFlow looks for files."""
    files = {PurePosixPath(name) for name in manifest.files}
    folders = {parent for file in files for parent in file.parents} | {PurePosixPath(name) for name in _FOLDERS}
    for inside in sorted(folders):
        if inside.parts[:1] == MANIFEST.parts[:1]:
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / inside) as entries:
            for entry in entries:
                path = inside / entry.name
                if path not in files and path not in folders and (inside.parts or _is_read(entry.name)):
                    yield str(path)


def _is_read(name: str) -> bool:
    """Tells if TensorFlow or Keras would read a file of this name in the export's top folder."""
    return name.startswith("saved_model.") or name in ("fingerprint.pb", "keras_metadata.pb")


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a regular file, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_AGAIN = "Copy or export it again."


def _changed(path: File, received: str) -> InputError:
    return InputError(f"{path}: must be as it was published. Received: {received}. {_AGAIN}")

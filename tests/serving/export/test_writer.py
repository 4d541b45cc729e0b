"""Exports: compared before they are published, published whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

from din_dist import files
from din_dist.data.event_store import ITEMS
from din_dist.data.splits import split_examples
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.evaluation.evaluator import Evaluator
from din_dist.files import locked
from din_dist.schema import Batch
from din_dist.serving.bundle import Bundle
from din_dist.serving.export import writer as exporting
from din_dist.serving.export.signatures import Signatures
from din_dist.serving.export.writer import TrainedModel, export
from din_dist.serving.manifest import MANIFEST, Manifest
from tests.support.patience import PATIENCE
from tests.support.small_log import small_config
from tests.support.trained_job import histories_of_tests, write_job

# Loads an export where neither this package nor what it is made with can be imported, and scores.
ALONE = """
import json, sys

class Refuse:
    names = {"din_dist", "horovod", "tensorflow_datasets", "pyarrow"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())
import tensorflow as tf

Refuse.names |= {"keras", "tf_keras"}  # TensorFlow's own import takes Keras along where it is there
for name in [name for name in sys.modules if name.split(".")[0] in Refuse.names]:
    del sys.modules[name]

loaded = tf.saved_model.load(sys.argv[1])
outputs = loaded.signatures["serving_default"](
    history_item_ids=tf.constant(["i3", "i7", "nobody has seen this", "i3"]),
    history_lengths=tf.constant([3, 0, 1], tf.int64),
    candidate_item_ids=tf.constant(["i1", "i2", "nor this"]),
)
print(json.dumps([outputs["logits"].numpy().tolist(), sorted(loaded.signatures)]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    config = small_config(tmp_path_factory.mktemp("job"))
    model, store = write_job(config)
    return TrainedModel(model, store, config, 7, "--flag=value\n", {"test_gauc": 0.75, "nothing": float("nan")})


@pytest.fixture(scope="module")
def evaluator(trained: TrainedModel) -> Evaluator:
    return Evaluator(trained.config, trained.store, split_examples(trained.store, trained.config.data), Runtime())


@pytest.fixture(scope="module")
def published(
    trained: TrainedModel, evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("exports") / "deep" / "first"
    return folder, export(trained, evaluator, "test", folder)


@pytest.fixture
def copy(published: tuple[Path, Manifest], tmp_path: Path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "copy"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes one file in place of a SavedModel, and compares nothing."""

    def write(trained: TrainedModel, folder: Path) -> None:
        (folder / "saved_model.pb").write_text(str(trained.step))

    monkeypatch.setattr(exporting, "write_saved_model", write)
    monkeypatch.setattr(exporting, "largest_difference", lambda *_: (0.0, 1))


def test_an_export_scores_what_the_log_holds(
    trained: TrainedModel, evaluator: Evaluator, published: tuple[Path, Manifest]
) -> None:
    """By ids that this test reads from the log, as the trainer does by its own."""
    folder, manifest = published
    histories, candidates = histories_of_tests(Path(trained.config.data.data_path), longest=8)
    bundle = Bundle.open(folder)
    flat = [item for history in histories for item in history]
    found = bundle.score(flat, list(map(len, histories)), candidates)
    logits = evaluator.scores("test", lambda batch: trained.model(batch))[::2]  # the others are drawn negatives
    assert_allclose(np.sort(found), np.sort(logits), atol=1e-5)
    assert np.unique(np.round(found, 4)).size > 20
    assert bundle.manifest == manifest


def test_it_needs_nothing_but_tensorflow(
    trained: TrainedModel, published: tuple[Path, Manifest], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(published[0])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits, names = json.loads(done.stdout.splitlines()[-1])
    ids = {own_id: place for place, own_id in enumerate(trained.store.vocabulary(ITEMS).to_pylist(), start=1)}
    batch = Batch(
        candidate_item_ids=tf.constant([ids["i1"], ids["i2"], 0]),
        history_item_ids=tf.constant([ids["i3"], ids["i7"], 0, ids["i3"]]),
        history_lengths=tf.constant([3, 0, 1]),
    )
    assert_allclose(logits, trained.model(batch), atol=1e-5)
    assert len(set(logits)) == 3
    assert {"score", "score_padded", "rank", "rank_histories", "embed_items", "rank_with_features"} < set(names)


def test_the_manifest_says_what_it_is(trained: TrainedModel, published: tuple[Path, Manifest]) -> None:
    folder, manifest = published
    assert manifest.item_id_type == "string"
    assert manifest.item_features == {"category_id": "string"}
    assert (manifest.max_history_length, manifest.num_items, manifest.embedding_width) == (8, 30, 10)
    assert (manifest.step, manifest.flags, manifest.data_fingerprint) == (
        *(7, "--flag=value\n"),
        trained.store.facts.fingerprint,
    )
    assert manifest.summary == {"test_gauc": 0.75, "nothing": None}
    assert manifest.settings == json.loads(json.dumps(trained.config.to_json()))
    assert (manifest.compared_split, manifest.num_compared) == ("test", 80)
    assert 0 <= manifest.max_difference <= 1e-5
    assert manifest.versions["tensorflow"] == tf.__version__
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert {Path(name) for name in manifest.files} == files - {MANIFEST}
    for name, digest in manifest.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert manifest.digest == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def test_it_holds_the_weights_and_nothing_of_the_optimizer(
    trained: TrainedModel, published: tuple[Path, Manifest]
) -> None:
    folder, _ = published
    reader = tf.train.load_checkpoint(str(folder / "variables" / "variables"))
    sizes = [
        np.prod(shape, dtype=int) for name, shape in reader.get_variable_to_shape_map().items() if "OBJECT" not in name
    ]
    assert sum(sizes) == trained.model.count_params() + len(trained.store.item_features["category_id"])
    assert folder.stat().st_mode & 0o777 == 0o755
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("wrong", [2e-5, np.nan], ids=["off", "nan"])
def test_other_logits_than_the_trainers_are_not_published(
    trained: TrainedModel,
    evaluator: Evaluator,
    published: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: float,
) -> None:
    """The bias of the head's output has moved by a little since the SavedModel was written."""

    def write_as_before(_: TrainedModel, folder: Path) -> None:
        shutil.copytree(published[0], folder, dirs_exist_ok=True)

    monkeypatch.setattr(exporting, "write_saved_model", write_as_before)
    bias = trained.model.head.output_layer.bias
    before = bias.numpy()
    bias.assign(before + wrong)
    try:
        with pytest.raises(FloatingPointError, match="must have the trainer's logits, within 1e-05. Received: a"):
            export(trained, evaluator, "test", tmp_path / "export")
    finally:
        bias.assign(before)
    assert not list(tmp_path.iterdir())


def content(folder: Path) -> str:
    return (folder / "saved_model.pb").read_text()


def test_what_is_there_is_not_lost(quick: None, trained: TrainedModel, evaluator: Evaluator, tmp_path: Path) -> None:
    other, file, link = tmp_path / "other", tmp_path / "file", tmp_path / "link"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for path in (other, file, link):
        for overwrite in (False, True):
            with pytest.raises(InputError, match="which exists and is no export. Name another one."):
                export(trained, evaluator, "test", path, overwrite=overwrite)
    assert (other / "mine.txt").read_text() == file.read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_export_is_replaced_when_asked(
    quick: None,
    trained: TrainedModel,
    evaluator: Evaluator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    can_exchange: bool,
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    folder = tmp_path / "export"
    folder.mkdir()  # empty: as good as none
    export(trained, evaluator, "test", folder)
    later = TrainedModel(trained.model, trained.store, trained.config, 9, "", None)
    with pytest.raises(InputError, match="which holds an export. Add --overwrite to replace it"):
        export(later, evaluator, "test", folder)
    assert content(folder) == "7"
    assert export(later, evaluator, "test", folder, overwrite=True).step == 9
    assert content(folder) == "9"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("moment", range(4))
def test_broken_off_at_any_moment_it_leaves_an_export(
    quick: None,
    trained: TrainedModel,
    evaluator: Evaluator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
) -> None:
    """A process that dies at each of the steps of a replacement, on a disk that cannot exchange; then the next one."""
    folder = tmp_path / "export"
    export(trained, evaluator, "test", folder)
    left = moment

    def die_when_it_is_time(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange", lambda *_: False)
        patch.setattr(Path, "rename", lambda path, target: (die_when_it_is_time(), rename(path, target))[1])
        patch.setattr(shutil, "rmtree", lambda *_, **__: die_when_it_is_time())  # the dead clear nothing up
        later = TrainedModel(trained.model, trained.store, trained.config, 9, "", None)
        with pytest.raises(KeyboardInterrupt):
            export(later, evaluator, "test", folder, overwrite=True)
    assert len(list(tmp_path.iterdir())) > 1
    with monkeypatch.context() as patch:  # the next one fails early, but brings things in order
        patch.setattr(
            exporting, "write_saved_model", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space"))
        )
        with pytest.raises(InputError, match="with room for the model. Received: .*/export, No space. Make room"):
            export(trained, evaluator, "test", folder, overwrite=True)
    assert content(folder) == ("7" if moment < 3 else "9")
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_left_aside_is_swept_unless_in_use(
    quick: None, trained: TrainedModel, evaluator: Evaluator, tmp_path: Path
) -> None:
    left, used, of_another = (
        tmp_path / f".{name}" for name in ("a[1].exporting-1", "a[1].exporting-2", "a1.exporting-1")
    )
    for folder in (left, used, of_another):
        folder.mkdir()
        (folder / "file").touch()
    with locked(used):
        export(trained, evaluator, "test", tmp_path / "a[1]")
    assert {path.name for path in tmp_path.iterdir()} == {"a[1]", used.name, of_another.name}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), tf.errors.ResourceExhaustedError(None, None, "disk full")],
)
def test_a_full_disk_is_one_line(
    trained: TrainedModel, evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Signatures, "save", fail)
    with pytest.raises(
        InputError, match="--export_dir: must be a folder that can be written, with room for the model."
    ):
        export(trained, evaluator, "test", tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file(quick: None, trained: TrainedModel, evaluator: Evaluator, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--export_dir: must be a folder that can be"):
        export(trained, evaluator, "test", tmp_path / "file" / "export")


def test_an_export_that_is_not_as_it_was_published(copy: Path) -> None:
    for name in ("assets/item_ids.txt", "variables/variables.data-00000-of-00001", "saved_model.pb"):
        path = copy / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{name}: must be as it was published. Received: other content."):
            Bundle.open(copy)
        path.unlink()
        with pytest.raises(InputError, match=f"{name}: must be as it was published. Received: No such file"):
            Bundle.open(copy)
        path.write_bytes(whole)
    manifest = copy / MANIFEST
    text = manifest.read_text()
    for wrong, message in (
        (text[:-20], "must be as it was published"),
        ("[]", "must be as it was published"),
        (
            text.replace('"format_version": 1', '"format_version": 2'),
            "must be an export of version 1. Received: version 2",
        ),
        (text.replace('"step"', '"steps"'), "must be as it was published. Received: .*steps"),
    ):
        manifest.write_text(wrong)
        with pytest.raises(InputError, match=message) as caught:
            Bundle.open(copy)
        assert len(str(caught.value).splitlines()) == 1
    manifest.unlink()
    with pytest.raises(InputError, match=f"{copy}: must be an export. Received: a folder without"):
        Bundle.open(copy)
    with pytest.raises(InputError, match="must be an export. Received: no such folder"):
        Bundle.open(copy / os.devnull.strip("/"))

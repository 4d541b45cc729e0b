"""What is read of an export before it is trusted: bounded, and nothing that TensorFlow reads goes unchecked."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import select
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from din_dist.errors import InputError
from din_dist.serving.manifest import MANIFEST, Manifest, check_digest, check_files, read_manifest
from tests.support.changed_manifest import write_manifest

FILES = ("saved_model.pb", "fingerprint.pb", "variables/variables.index", "assets/ids.txt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SavedModel with a table and a variable, and its manifest."""
    tmp_path = tmp_path_factory.mktemp("saved")
    module = tf.Module()
    vocabulary = tmp_path / "ids.txt"
    vocabulary.write_text("a\nb\n")
    table = tf.lookup.TextFileInitializer(
        str(vocabulary), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
    )
    module.table = tf.lookup.StaticHashTable(table, -1)
    module.weight = tf.Variable(1.0)
    folder = tmp_path / "export"
    tf.saved_model.save(module, str(folder))
    write_manifest(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "export"))


def checked(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return manifest


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        checked(folder)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 700
    return text


def test_one_that_is_as_it_was_published(folder: Path) -> None:
    manifest = checked(folder)
    assert set(FILES) < set(manifest.files)
    assert manifest.digest == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"item_id_type": "float"}, "Received: ids of type 'float'."),
        ({"item_features": {"category_id": "\x1b[31m"}}, r"Received: ids of type '\x1b[31m'."),
        ({"item_features": []}, "Received: another kind of item_features."),
        ({"feature_inputs": {}}, "Received: other features among feature_inputs than among item_features."),
        ({"max_history_length": "10"}, "Received: another kind of max_history_length."),
        *(
            ({name: value}, f"Received: {name} of {value}"[:60])
            for name in ("max_history_length", "num_items", "embedding_width", "step", "num_compared")
            for value in (-1, 10**400, True)
        ),
        ({"summary": []}, "Received: another kind of summary."),
        ({"files": ["saved_model.pb"]}, "Received: another kind of files."),
        ({"files": {"saved_model.pb": 1}}, "Received: no digest of saved_model.pb."),
        ({"files": {"../saved_model.pb": ""}}, "Received: a file named '../saved_model.pb'."),
        ({"files": {"/etc/passwd": ""}}, "Received: a file named '/etc/passwd'."),
        ({"files": {"variables/../../x": ""}}, "Received: a file named 'variables/../../x'."),
        ({"files": {"./saved_model.pb": ""}}, "Received: a file named './saved_model.pb'."),
        ({"files": {"": ""}}, "Received: a file named ''."),
        ({"files": {"a\x1b[2Jb": ""}}, r"Received: a file named 'a\x1b[2Jb'."),
        ({"files": {"a\x00b": ""}}, "Received: a file named "),
        ({"format_version": "\x1b]0;owned\x07" * 50}, "must be an export of version 1. Received: version "),
        ({"\x1b[31mextra": 1}, r"unexpected keyword argument '\x1b[31mextra'."),
        ({"files": {}}, "must have no files for TensorFlow but those that its manifest names. Received: "),
    ],
)
def test_what_a_manifest_may_not_say(folder: Path, changes: dict[str, Any], told: str) -> None:
    write_manifest(folder, **changes)
    assert told in refused(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"format_version": ' + b"[" * 100_000, "Received: lists or objects nested too deeply."),
        (b'{"a":' * 100_000, "Received: lists or objects nested too deeply."),
        (b" " * (5 << 20), "Received: more than 4194304 bytes."),
        (b"\xff\xfe\x00", "must be as it was published. Received: "),
        (b"9" * 5000, "must be as it was published. Received: "),
        (b"[]", "must be as it was published. Received: "),
    ],
)
def test_what_is_no_manifest(folder: Path, content: bytes, told: str) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert told in refused(folder)


@pytest.mark.parametrize("name", [str(MANIFEST), *FILES])
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "socket", "folder"])
def test_what_is_no_file_is_not_waited_for(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o600 | 0o140000)
    else:
        path.symlink_to("/dev/zero")
    assert f"{name}: must be as it was published. Received: not a regular file." in refused(folder)


def test_a_link_to_the_same_content_is_a_file(folder: Path, tmp_path: Path) -> None:
    """Tools that keep each content once make such links."""
    path = folder / "saved_model.pb"
    path.rename(tmp_path / "content")
    path.symlink_to(tmp_path / "content")
    checked(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("saved_model.pbtxt", "saved_model.cpb", "keras_metadata.pb", "debug/saved_model_debug_info.pb"),
        *("assets/evil.so", "assets/deep/evil.so", "variables/variables.data-00001-of-00002", "variables/checkpoint"),
        "assets/\x1b[31m.txt",
    ],
)
def test_files_that_were_added_are_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    shown = "assets/deep" if "deep" in name else name.replace("\x1b", r"\x1b")
    assert f"Received: '{shown}'. Remove it, or copy the export again." in refused(folder)


def test_a_file_that_takes_the_place_of_a_listed_one(folder: Path) -> None:
    """TensorFlow takes the text where the binary form is gone; a manifest without either names neither."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "saved_model.pb").rename(folder / "saved_model.pbtxt")
    del manifest["files"]["saved_model.pb"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "Received: 'saved_model.pbtxt'. Remove it" in refused(folder)


@pytest.mark.parametrize(
    "name", ["README.md", "_SUCCESS", "assets.extra/tf_serving_warmup_requests", "notes/a.txt", "debug"]
)
def test_files_that_tensorflow_never_reads_may_be_added(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    checked(folder)


def test_another_digest(folder: Path) -> None:
    digest = checked(folder).digest
    assert read_manifest(folder, digest) == read_manifest(folder, digest.upper()) == read_manifest(folder)
    other = "0" * 64
    with pytest.raises(InputError) as caught:
        read_manifest(folder, other)
    assert str(caught.value) == (
        f"--expect_digest: must be the SHA-256 of {folder / MANIFEST}. Received: {other}, and a manifest with "
        f"{digest}. Name the export that is meant, or its digest."
    )
    (folder / MANIFEST).write_bytes(b"[" * 100_000)  # told before anything is made of it
    with pytest.raises(InputError, match="--expect_digest: must be the SHA-256 of"):
        read_manifest(folder, other)
    for wrong in ("0", "g" * 64, f"{other}\n", f" {other}", "0x" + "0" * 62):
        with pytest.raises(InputError, match="--expect_digest: must be the SHA-256 of a manifest, 64 hexadecimal"):
            check_digest(wrong)
    check_digest("")


class Watch:
    """Tells which files of some folders are opened, by Linux's inotify."""

    _OPEN = 0x20

    def __init__(self, folders: list[Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._descriptor >= 0
        self._folders = {
            self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), self._OPEN): folder
            for folder in folders
        }
        assert -1 not in self._folders

    def opened(self) -> Iterator[Path]:
        while select.select([self._descriptor], [], [], 0)[0]:
            events = os.read(self._descriptor, 1 << 20)
            while events:
                watch, _, _, length = struct.unpack_from("iIII", events)
                if name := events[16 : 16 + length].rstrip(b"\0").decode():
                    yield self._folders[watch] / name
                events = events[16 + length :]

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.mark.parametrize("without", ["", "saved_model.pb", "fingerprint.pb"])
def test_all_that_tensorflow_reads_is_checked(folder: Path, without: str) -> None:
    """With a file in every place where it might look, and with the one that it prefers gone."""
    names = [*FILES, "variables/variables.data-00000-of-00001"]
    text = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    (folder / "saved_model.pbtxt").write_text(str(text))
    decoys = ("saved_model.cpb", "keras_metadata.pb", "debug/saved_model_debug_info.pb", "variables/checkpoint")
    for name in (*decoys, "assets/other.txt", "assets.extra/other", "other"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    if without:
        (folder / without).unlink()
    watch = Watch([folder, *(path for path in folder.iterdir() if path.is_dir())])
    tf.saved_model.load(str(folder))
    opened = {path.relative_to(folder).as_posix() for path in watch.opened() if path.is_file()}
    watch.close()
    assert {*names, "saved_model.pbtxt"} - {without} >= opened - {"debug/saved_model_debug_info.pb"}
    assert len(opened) >= 5
    for name in opened:  # where the manifest names all files but this one
        write_manifest(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["files"][name]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        assert f"Received: {name!r}. Remove it" in refused(folder)

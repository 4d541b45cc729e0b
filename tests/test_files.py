"""Publishing: whole or not at all, through links, and into what is no file (devices and pipes of our own)."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest

from din_dist import files
from din_dist.errors import InputError
from din_dist.files import (
    claimed,
    delete_folder,
    folder_aside,
    is_locked,
    local_path,
    locked_in_turn,
    publish_folder,
    published,
    published_folder,
    read_record,
    repair_publishing,
    take_lock,
    without_password,
    write_text,
)
from tests.support import special_files
from tests.support.programs import missing


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/first", "runs/first"),
        ("/data/*.csv", "/data/*.csv"),
        ("", ""),
        ("~", "/home/me"),
        ("~/runs", "/home/me/runs"),
        ("runs/~", "runs/~"),
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
        ("a:b", "a:b"),
    ],
)
def test_a_path_of_this_machine(monkeypatch: pytest.MonkeyPatch, given: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path(given, "output_dir") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("s3://bucket/run", "--output_dir: must be a path of this machine. Received: 's3://bucket/run', a URL."),
        ("https://me:secret@host/x", "Received: 'https://host/x', a URL."),
        ("HDFS://x", "a URL"),
        ("file://host/x", "Received: 'file://host/x'"),
        ("file://", "Received: 'file://'"),
        ("~nobody-of-this-name/x", "--output_dir: ~ stands for a home folder. Received: '~nobody-of-this-name/x'"),
        ("a\0b", "Received: 'a\\x00b', with a zero byte"),
        ("runs/r\udcff", "--output_dir: must be a path in UTF-8. Received: runs/r\\udcff, from a shell"),
    ],
)
def test_what_is_no_path_of_this_machine(given: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        local_path(given, "output_dir")
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old é")
    with published(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert files.read_text(path) == "old é"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyError), published(path) as stream:
        stream.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    """What was synced, and what had its name by then: else a machine that fails keeps the name, and nothing in it."""
    path, calls = tmp_path / "file", []
    real = os.fsync

    def note(descriptor: int) -> None:
        calls.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, path.exists()))
        real(descriptor)

    with mock.patch.object(os, "fsync", note):
        write_text(path, "x")
    assert calls == [(f".file.{os.getpid()}", False), (tmp_path.name, True)]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("second")
    (tmp_path / "second").symlink_to("real/file")  # which is not there yet
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "x"
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError) as refused:
        write_text(tmp_path / "round", "x")
    assert refused.value.errno == errno.ELOOP


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null, which is never touched here
    except PermissionError:
        missing("making a device takes root: run the tests as root")
    (tmp_path / "link").symlink_to("null")
    write_text(tmp_path / "link", "x")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "null"]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(OSError) as refused:  # and does not wait
        write_text(pipe, "x")
    assert refused.value.errno == errno.ENXIO
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    text = "x" * 200_000  # more than a pipe holds
    while not read:
        with contextlib.suppress(OSError):  # until the reader is there
            write_text(pipe, text)
            reader.join()
    assert read == [text]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"])
def test_an_open_descriptor_goes_on_where_it_stands(tmp_path: Path, name: str) -> None:
    """Not as another file of that name, nor over what was printed before."""
    program = (
        "from pathlib import Path; from din_dist.files import write_text\n"
        f"print('before', flush=True); write_text(Path({name!r}), 'published\\n'); print('after')"
    )
    out = tmp_path / "out"
    with out.open("w") as stream:
        subprocess.run([sys.executable, "-c", program], stdout=stream, check=True)
    assert out.read_text() == "before\npublished\nafter\n"
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert piped.stdout == "before\npublished\nafter\n"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_replaces_another(tmp_path: Path, can_exchange: bool) -> None:
    folder = tmp_path / "folder"
    for text in ("first", "second"):
        aside = tmp_path / "aside"
        (aside / "deep").mkdir(parents=True)
        (aside / "deep" / "file").write_text(text)
        with mock.patch.object(files, "exchange", files.exchange if can_exchange else lambda *_: False):
            publish_folder(aside, folder)
        assert (folder / "deep" / "file").read_text() == text
        assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    folder, aside = tmp_path / "folder", tmp_path / "aside"
    (aside / "deep").mkdir(parents=True)
    (aside / "deep" / "file").write_text("x")
    synced = []
    with mock.patch.object(files, "sync", lambda path: synced.append((path.name, folder.exists()))):
        publish_folder(aside, folder)
    assert synced == [("file", False), ("deep", False), ("aside", False), (tmp_path.name, True)]


def test_a_folder_is_deleted_name_first(tmp_path: Path) -> None:
    folder, aside = tmp_path / "folder", tmp_path / ".folder.deleted"
    folder.mkdir()
    (folder / "file").touch()
    with mock.patch.object(shutil, "rmtree"):  # a process that is killed before it has deleted anything
        delete_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == [aside.name]
    folder.mkdir()
    delete_folder(folder)
    assert list(tmp_path.iterdir()) == []
    delete_folder(folder)  # which is gone


def test_a_process_that_was_killed_between_two_renames(tmp_path: Path) -> None:
    """On a file system that cannot exchange names."""
    folder, before = tmp_path / "folder", tmp_path / ".folder.replaced"
    before.mkdir()
    repair_publishing(folder)
    assert list(tmp_path.iterdir()) == [folder]
    before.mkdir()
    repair_publishing(folder)
    assert list(tmp_path.iterdir()) == [folder]
    repair_publishing(folder)


def test_names_of_new_folders_are_on_the_disk(tmp_path: Path) -> None:
    synced = []
    with mock.patch.object(files, "sync", lambda path: synced.append(path)):
        files.make_folder(tmp_path / "a" / "b")
        files.make_folder(tmp_path / "a" / "b")
    assert sorted(synced) == [tmp_path, tmp_path / "a"]


def test_a_folder_is_published_when_its_block_ends_well(tmp_path: Path) -> None:
    folder, named = tmp_path / "folder", tmp_path / "folder.incomplete"
    for aside in (None, named):
        with published_folder(folder, aside) as new:
            (new / "file").write_text(f"{aside}")
            assert not folder.exists() or (folder / "file").read_text() == "None"
        with pytest.raises(KeyError), published_folder(folder, aside) as new:
            (new / "half").touch()
            raise KeyError
        assert (folder / "file").read_text() == f"{aside}"
        assert list(tmp_path.iterdir()) == [folder]
    named.mkdir()
    (named / "half").touch()  # left by a process that was killed
    with published_folder(folder, named):
        pass
    assert list(tmp_path.iterdir()) == [folder]
    assert not list(folder.iterdir())


def test_the_first_of_several_publishers_can_decide(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for number in range(2):
        with published_folder(folder, replace=False) as new:
            (new / "file").write_text(f"{number}")
    assert (folder / "file").read_text() == "0"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_aside_is_removed_unless_it_was_published(tmp_path: Path) -> None:
    with pytest.raises(KeyError), folder_aside(tmp_path, "new-") as aside:
        assert aside.name.startswith("new-")
        assert aside.stat().st_mode & 0o777 == 0o755, "for others too"
        (aside / "half").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with folder_aside(tmp_path, "new-") as aside, folder_aside(tmp_path, "new-") as another:
        assert aside != another
        publish_folder(aside, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_file_that_need_not_outlive_the_machine(tmp_path: Path) -> None:
    with mock.patch.object(os, "fsync", side_effect=AssertionError):
        write_text(tmp_path / "file", "x", durable=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["x"]


def test_locks_in_turn(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def wait() -> None:
        with locked_in_turn(path):
            order.append("second")

    with locked_in_turn(path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_is_taken_over_by_its_holder_alone(tmp_path: Path) -> None:
    lost = take_lock(tmp_path / "lock", "one")
    for other in ("", "two"):
        with pytest.raises(BlockingIOError):
            take_lock(tmp_path / "lock", other)
    successor = take_lock(tmp_path / "lock", "one")
    lost.close()
    with pytest.raises(BlockingIOError):
        take_lock(tmp_path / "lock", "two")
    successor.close()
    take_lock(tmp_path / "lock", "two").close()


def test_a_lock_is_seen_without_being_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)  # there is none
    lock = take_lock(path)
    assert is_locked(path)
    assert not is_locked(tmp_path)  # another inode
    lock.close()
    assert not is_locked(path)


def test_a_name_is_claimed_once(tmp_path: Path) -> None:
    with claimed(tmp_path / "part") as first, claimed(tmp_path / "part") as second:
        assert (first, second) == (True, False)
    assert not list(tmp_path.iterdir())


PUBLISHING_OR_LOCKING = {"fsync", "fdatasync", "flock", "lockf", "rename", "renames"}


def publishes_or_locks(node: ast.AST) -> bool:
    """Tells whether a part of a program is one of the steps that belong in `files.py`."""
    if isinstance(node, ast.Attribute):
        return node.attr in PUBLISHING_OR_LOCKING or node.attr == "O_EXCL"
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "replace":
        return False
    owner = ast.unparse(node.func.value)
    # One argument: `Path.replace`. Text takes two, and data classes take keywords.
    return owner == "os" or (owner != "dataclasses" and len(node.args) == 1 and not node.keywords)


def test_publishing_and_locking_stand_in_one_place() -> None:
    for text in ("os.replace(a, b)", "path.replace(target)", "fcntl.flock(f, 2)", "os.O_EXCL", "aside.rename(b)"):
        assert any(map(publishes_or_locks, ast.walk(ast.parse(text)))), text
    for text in ("text.replace(a, b)", "dataclasses.replace(a, b=c)", "dataclasses.replace(a)"):
        assert not any(map(publishes_or_locks, ast.walk(ast.parse(text)))), text
    package = Path(files.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if publishes_or_locks(node)
    }
    assert found == {"files.py"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://gateway:9091", "http://gateway:9091"),
        ("http://me:secret@gateway:9091/a@b", "http://gateway:9091/a@b"),
        ("me:secret@gateway:80", "gateway:80"),
        ("//me:secret@gateway", "//gateway"),
        ("/a/b@c", "/a/b@c"),
    ],
)
def test_urls_are_shown_without_their_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize("kind", special_files.KINDS)
def test_what_is_no_record(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "record"
    special_files.put(kind, path)
    with pytest.raises(OSError, match="regular file|No such file|symbolic links"):
        read_record(path)

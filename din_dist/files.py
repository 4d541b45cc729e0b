"""Files and folders: published whole or not at all, and on the disk before anyone is told.

This is the only module that calls fsync. Text is UTF-8, whatever the locale.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from din_dist import progress
from din_dist.errors import InputError
from din_dist.text import printable

if TYPE_CHECKING:
    import numpy as np  # which starts threads: not before a worker has its cores

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DESCRIPTORS = re.compile(r"/proc/(\d+)(/task/\d+)?/fd")
_PART_BYTES = 64 << 20
_MOST_RECORD_BYTES = 1 << 30
_MOST_LINKS = 40  # as the kernel has it
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux


# --- Paths that users give. ---


def local_path(text: str, flag: str) -> str:
    """Returns a path of this machine as the system understands it: `~` is the home, `file://` is left away.

    Args:
        flag: the flag that `text` was given by.

    Raises:
        InputError: it names another kind of storage, or a home that is not known.
    """
    if _SCHEME.match(text):
        parts = urlsplit(text)
        if parts.scheme.lower() != "file" or parts.netloc not in ("", "localhost") or not parts.path:
            raise InputError(
                f"--{flag}: must be a path of this machine. Received: {without_password(text)!r}, a URL. Mount that "
                "storage, or copy from and to a local folder."
            )
        return unquote(parts.path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"--{flag}: must be a path in UTF-8. Received: {printable(text)}, by a shell whose locale has another "
            "encoding, or none. Rename it, or set LC_ALL=C.UTF-8."
        ) from error
    if "\0" in text:
        raise InputError(f"--{flag}: must be a path. Received: {text!r}, with a zero byte. Correct it.")
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)  # noqa: PTH111 (`Path` would drop a final slash)
    if expanded.startswith("~"):
        raise InputError(
            f"--{flag}: ~ stands for a home folder. Received: {text!r}, and no such home is known. Set HOME, or write "
            "the path in full."
        )
    return expanded


def without_password(url: str) -> str:
    """Returns a URL as it may be shown: without the user and password that may stand before its host."""
    return re.sub(r"^((?:[A-Za-z][A-Za-z0-9+.-]*:)?//)?[^/?#]*@", r"\1", url)


# --- Text. ---


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Returns a file's text, decoded as UTF-8."""
    return path.read_text(encoding="utf-8", errors=errors)


def write_text(path: Path, text: str) -> None:
    """Publishes a file with `text`, encoded as UTF-8; see `published`."""
    with published(path) as stream:
        stream.write(text.encode("utf-8", errors="surrogateescape"))


def read_record(path: Path, *, errors: str = "strict") -> str:
    """Returns the text of a file that this package wrote, and that others may have changed since.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than any of ours.
        ValueError: it is not UTF-8.
    """
    return read_bounded(path, _MOST_RECORD_BYTES).decode("utf-8", errors=errors)


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Returns the content of a file of at most `most_bytes`.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes} bytes", str(path))
    return content


def open_regular(path: Path) -> BufferedReader:
    """Opens a file to read. A pipe would wait for somebody to write to it, and a device may have no end.

    Raises:
        OSError: there is no such file, or it is no regular one.
    """
    _check_regular(path.stat())  # before it is opened, which some devices take for an order
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_regular(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "what is no regular file")


# --- Publishing. ---


@contextlib.contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """Yields a stream whose content is the file at `path` once the block has ended well.

    Readers see the old file or the new one, never a part. The new one is on the disk, and so is its name. A link stays
    a link, and what it leads to is replaced. A device, a pipe or an open descriptor (/dev/stdout) is written to.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    target = _followed(path)
    if isinstance(target, int):
        with os.fdopen(os.dup(target), "wb") as stream:
            yield cast(BinaryIO, stream)
        return
    if _is_special(target):
        with _opened_special(target) as stream:
            yield stream
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(target.parent)


def _followed(path: Path) -> Path | int:
    """Returns the file that `path` leads to, or the number of this process' descriptor that it stands for."""
    for _ in range(_MOST_LINKS):
        folder = path.parent.resolve()
        if match := _DESCRIPTORS.fullmatch(str(folder)):
            if int(match[1]) == os.getpid() and path.name.isdecimal():
                return int(path.name)
            return path  # of another process: opened as it is
        if not path.is_symlink():
            return folder / path.name
        path = folder / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _is_special(path: Path) -> bool:
    """Tells whether there is something at `path` that cannot be replaced by a file."""
    if _DESCRIPTORS.fullmatch(str(path.parent)):
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _opened_special(path: Path) -> BinaryIO:
    # Without O_NONBLOCK, opening a pipe that nobody reads would wait for ever.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    return cast(BinaryIO, os.fdopen(descriptor, "wb"))


def publish_folder(aside: Path, folder: Path) -> None:
    """Moves a finished folder to its place; a folder that was there before is replaced and deleted.

    Everything in it is on the disk before it gets its name, and its name is when this returns.

    Raises:
        OSError: it cannot be moved; what was there before is still there.
    """
    sync_tree(aside)
    repair_publishing(folder)
    try:
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        before = aside
        if not _exchange(aside, folder):
            before = _replaced(folder)
            folder.rename(before)
            aside.rename(folder)
        sync(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    sync(folder.parent)


def repair_publishing(folder: Path) -> None:
    """Brings back the folder that `publish_folder` was replacing when its process was killed."""
    before = _replaced(folder)
    if before.exists():
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(folder)


def _replaced(folder: Path) -> Path:
    """Returns where a folder waits between two renames, on a file system that cannot exchange two names."""
    return folder.with_name(f".{folder.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Lets two names change places at once; False where the file system cannot do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number))


# --- The disk. ---


def write_in_parts(file: BinaryIO, values: np.ndarray) -> None:
    """Writes the bytes of an array; each part is on the disk before the next, so that a slow disk is seen to work."""
    content = values.reshape(-1).view("u1").data
    for begin in range(0, len(content), _PART_BYTES):
        file.write(content[begin : begin + _PART_BYTES])
        if len(content) > _PART_BYTES:
            file.flush()
            os.fdatasync(file.fileno())
        progress.note()


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, as far as they are missing; their names are then on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all in it are on the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
            progress.note()
        sync(Path(root))


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


# --- Locks. ---


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder's lock for the block.

    Raises:
        OSError: another process has it, or the file system knows no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)

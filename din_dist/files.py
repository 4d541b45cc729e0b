"""Publishes files and folders whole or not at all, takes locks, and reads text.

Only this module calls fsync, renames a file to publish it, or takes a lock; a test holds that. A published file is on
the disk when the function that publishes it returns. Text is UTF-8 in every locale.
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
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO, cast
from urllib.parse import unquote, urlsplit

from din_dist import progress
from din_dist.errors import InputError
from din_dist.text import printable

if TYPE_CHECKING:
    import numpy as np  # which starts threads: not before a worker has its cores

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
REMOTE_SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs")  # of stores that `pyarrow.fs` reads
_REMOTE = re.compile(rf"({'|'.join(REMOTE_SCHEMES)})://([^/?]*)(.*?)(?:\?([A-Za-z_]+=[^?]*))?", re.DOTALL)
_SECRET = re.compile(r"(secret|password|token|access_key)\w*=", re.IGNORECASE)
_DESCRIPTORS = re.compile(r"/proc/(\d+)(/task/\d+)?/fd")
_PART_BYTES = 64 << 20
_MOST_RECORD_BYTES = 1 << 30
_MOST_LINKS = 40  # the kernel's own limit
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux


# --- Paths that users give. ---


def local_path(text: str, flag: str) -> str:
    """Returns the path of this machine that a user gave, with `~` expanded and `file://` removed.

    Args:
        text: the path as the user wrote it.
        flag: the flag that `text` was given by.

    Raises:
        InputError: the path names another kind of storage, or a home that is not known.
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
            f"--{flag}: must be a path in UTF-8. Received: {printable(text)}, from a shell whose locale has "
            "another encoding, or none. Rename it, or set LC_ALL=C.UTF-8."
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


def source_path(text: str, flag: str) -> str:
    """Returns where a user's file lies that may be in a store: a path as of `local_path`, or a URI.

    Args:
        text: the path or the URI as the user wrote it.
        flag: the flag that `text` was given by.

    Raises:
        InputError: the text is neither, or the URI has a password.
    """
    if not is_remote(text):
        if _SCHEME.match(text) and urlsplit(text).scheme.lower() != "file":
            raise InputError(
                f"--{flag}: must be a path of this machine, or begin with {', '.join(REMOTE_SCHEMES)} and ://. "
                f"Received: {without_password(text)!r}. Mount that storage, or copy the files."
            )
        return local_path(text, flag)
    if not text.isprintable():
        raise InputError(f"--{flag}: must be a URI of printable characters. Received: {text!r}. Correct it.")
    store, path, query = split_remote(text)
    user, at, _ = store.partition("://")[2].rpartition("@")
    if (at and (":" in user or store.startswith("s3"))) or _SECRET.search(query):
        raise InputError(
            f"--{flag}: must have no password, because URIs are saved with a job. Received: one in a URI of "
            f"{store.partition('://')[0]}://. Give credentials in the environment or in a profile."
        )
    if store.endswith("://") and not store.startswith("hdfs"):
        raise InputError(f"--{flag}: must name a bucket or container. Received: {text!r}. Write it after ://.")
    path = "".join(f"/{part}" for part in path.split("/") if part)
    return f"{store}{path}?{query}" if query else store + path


def is_remote(text: str) -> bool:
    """Tells whether a text is the URI of a store that `pyarrow.fs` reads."""
    return _REMOTE.fullmatch(text) is not None


def split_remote(uri: str) -> tuple[str, str, str]:
    """Returns scheme and authority (`s3://bucket`), path and query of the URI of a store.

    The query begins at the last `?` that stands before NAME=. Any other `?` is the sign of a glob.
    """
    match = _REMOTE.fullmatch(uri)
    assert match is not None
    scheme, authority, path, query = match.groups()
    return f"{scheme}://{authority}", path, query or ""


def cache_folder() -> Path:
    """Returns the folder of this package in the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "din_dist")


def without_password(url: str) -> str:
    """Returns a URL without the user and password before its host, so that it may be shown."""
    return re.sub(r"^((?:[A-Za-z][A-Za-z0-9+.-]*:)?//)?[^/?#]*@", r"\1", url)


# --- Text. ---


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Returns a file's text, decoded as UTF-8."""
    return path.read_text(encoding="utf-8", errors=errors)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Publishes a file with `text`, encoded as UTF-8; see `published`."""
    with published(path, durable=durable) as stream:
        stream.write(text.encode("utf-8", errors="surrogateescape"))


def read_record(path: Path, *, errors: str = "strict") -> str:
    """Returns the text of a file that this package wrote and that others may have changed since.

    Raises:
        OSError: the file cannot be read, is not regular, or is larger than any that this package writes.
        ValueError: the file is not UTF-8.
    """
    return read_bounded(path, _MOST_RECORD_BYTES).decode("utf-8", errors=errors)


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Returns the content of a file of at most `most_bytes`.

    Raises:
        OSError: the file cannot be read, is not regular, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes} bytes", str(path))
    return content


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file to read. A pipe would wait for a writer, and a device may never end.

    Raises:
        OSError: there is no such file, or it is not regular.
    """
    _check_regular(path.stat())  # before opening: some devices act when they are opened
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_regular(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


# --- Publishing. ---


@contextlib.contextmanager
def published(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yields a stream whose content becomes the file at `path` when the block ends without an error.

    Readers see the old file or the new one, never a part of it. A link stays a link, and its target is replaced. A
    device, a pipe or an open descriptor (/dev/stdout) is written to.

    Args:
        path: the file to replace or create.
        durable: put the new content and its name on the disk before returning. A file that only serves while this
            process lives does not need that.

    Raises:
        OSError: the file cannot be written; the old one is still there.
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
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        aside.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    if durable:
        sync(target.parent)


def _followed(path: Path) -> Path | int:
    """Returns the file that `path` leads to, or the descriptor of this process that it stands for."""
    for _ in range(_MOST_LINKS):
        folder = path.parent.resolve()
        if match := _DESCRIPTORS.fullmatch(str(folder)):
            if int(match[1]) == os.getpid() and path.name.isdecimal():
                return int(path.name)
            return path  # another process owns it: opened as it is
        if not path.is_symlink():
            return folder / path.name
        path = folder / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _is_special(path: Path) -> bool:
    """Tells whether `path` holds something that a file cannot replace."""
    if _DESCRIPTORS.fullmatch(str(path.parent)):
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _opened_special(path: Path) -> BinaryIO:
    # Without O_NONBLOCK, opening a pipe that nobody reads would never return.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    return cast(BinaryIO, os.fdopen(descriptor, "wb"))


@contextlib.contextmanager
def published_folder(folder: Path, aside: Path | None = None, replace: bool = True) -> Iterator[Path]:
    """Yields a new folder that becomes `folder` when the block ends without an error; see `publish_folder`.

    Args:
        folder: the folder to replace or create.
        aside: where the new folder is filled, beside `folder`; what a killed process left there is deleted. The caller
            must hold a lock. None: a name of its own, so that several processes may write at once.
        replace: False: a folder that is there at the end stays, and the new one is deleted.

    Raises:
        OSError: the folder cannot be written; the old one is still there.
    """
    with folder_aside(folder.parent, f".{folder.name}-") if aside is None else _emptied(aside) as new:
        yield new
        publish_folder(new, folder, replace)


@contextlib.contextmanager
def folder_aside(parent: Path, prefix: str) -> Iterator[Path]:
    """Makes a new folder in `parent`, and removes it at the end of the block unless it was published.

    Its name begins with `prefix` and is its own, so that several processes may write at once.
    """
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        aside.chmod(0o755)  # like other folders, so that others may read it
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _emptied(aside: Path) -> Iterator[Path]:
    """Makes `aside` an empty folder, and removes it at the end of the block unless it was published."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish_folder(aside: Path, folder: Path, replace: bool = True) -> None:
    """Moves a finished folder to its place; a folder that was there before is replaced and deleted.

    The content is on the disk before the folder gets its name. The name is on the disk when this function returns.

    Args:
        aside: the finished folder.
        folder: its place.
        replace: False: a folder that is there stays. So the first of several processes that publish the same content
            decides, and none replaces files that another has opened.

    Raises:
        OSError: the folder cannot be moved; the old one is still there.
    """
    sync_tree(aside)
    repair_publishing(folder)
    try:
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not replace:
            return
        before = aside
        if not exchange(aside, folder):
            before = _replaced(folder)
            folder.rename(before)
            aside.rename(folder)
        sync(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    sync(folder.parent)


def repair_publishing(folder: Path) -> None:
    """Restores the folder that `publish_folder` was replacing when its process was killed."""
    before = _replaced(folder)
    if before.exists():
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(folder)


def _replaced(folder: Path) -> Path:
    """Returns where a folder waits between two renames, if the file system cannot exchange two names."""
    return folder.with_name(f".{folder.name}.replaced")


def delete_folder(folder: Path) -> None:
    """Deletes a folder that others may read: its name is gone at once, and then its content.

    What a killed process left of this is deleted, too. The folder need not be there.

    Raises:
        OSError: the name cannot be taken away.
    """
    aside = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names at once; returns False if the file system cannot do that."""
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
    """Writes the bytes of an array in parts, each on the disk before the next, so that a slow disk shows progress."""
    content = values.reshape(-1).view("u1").data
    for begin in range(0, len(content), _PART_BYTES):
        file.write(content[begin : begin + _PART_BYTES])
        if len(content) > _PART_BYTES:
            file.flush()
            os.fdatasync(file.fileno())
        progress.note()


def make_folder(folder: Path) -> None:
    """Makes a folder and its missing parents, and puts their names on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and everything in it are on the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
            progress.note()
        sync(Path(root))


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
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
    """Holds a folder's lock during the block.

    Raises:
        OSError: another process holds it, or the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_in_turn(path: Path) -> Iterator[None]:
    """Waits for the lock of a file and holds it during the block.

    Args:
        path: an empty file, which is made if it is missing.

    Raises:
        OSError: the file cannot be written, or the file system has no locks.
    """
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def take_lock(path: Path, holder: str = "") -> TextIO:
    """Takes the lock of a file and holds it until the returned stream is closed, at the latest when the process ends.

    Args:
        path: the file, which is made if it is missing and then holds the name of the holder.
        holder: a name that several processes share. From another process of that name the lock is taken over, even if
            that process still lives, as on a host that hangs. Empty: the lock is never taken over.

    Raises:
        BlockingIOError: another holder has it.
        OSError: the file cannot be written, or the file system has no locks.
    """
    while True:
        lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            found = lock.read()
            lock.close()
            if not holder or found != holder:
                raise
            return _take_over(path, holder)
        if _is_at(lock, path):
            return _note_holder(lock, holder)
        lock.close()  # another process took it over meanwhile: the file that was locked here has lost its name


def _take_over(path: Path, holder: str) -> TextIO:
    """Puts another file, locked by this process, in the place of the one that is locked."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    lock = aside.open("a+", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    aside.replace(path)
    return _note_holder(lock, holder)


def _note_holder(lock: TextIO, holder: str) -> TextIO:
    with contextlib.suppress(OSError):  # a full disk: then nobody can take it over
        lock.truncate(0)
        lock.write(holder)
        lock.flush()
    return lock


def _is_at(lock: TextIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    return False


def is_locked(path: Path) -> bool:
    """Tells if a process of this machine holds the file's lock.

    The lock is not tried, because that could keep another process from taking it. The kernel's list of locks is read
    instead. It names files by inode; its device numbers differ from those of `stat` on layered file systems.
    """
    try:
        inode = str(path.stat().st_ino)
        locks = [line.split() for line in read_text(Path("/proc/locks")).splitlines()]
    except OSError:
        return False
    return any(words[1] == "FLOCK" and words[-3].rpartition(":")[2] == inode for words in locks if len(words) >= 8)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Yields True to the first process that asks for `path`, and False to all others until its block ends.

    A claim outlives a process that is killed, and works where the file system has no locks.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)

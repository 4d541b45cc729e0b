"""Files that lie in an object store or in HDFS, read and written by `pyarrow.fs`.

A `RemoteFile` has the names of a `pathlib.Path` that readers use, so that they take either. Only this module talks to
a store. A request that fails is tried again until `MOST_SECONDS` have passed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from din_dist import progress
from din_dist.errors import InputError
from din_dist.files import is_remote, split_remote
from din_dist.text import printable

MOST_SECONDS = 60.0  # from the first failure of a request on, before the last attempt
_FIRST_WAIT, _MOST_WAIT = 0.25, 8.0  # seconds between attempts
_ATTEMPTS_OF_S3 = 3  # within one of ours; each may wait 3 seconds for an answer
_STREAM_BYTES = 8 << 20  # read by one request, or written at once
_TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json"}  # browsers save all others
_THREADS = 16  # that ask for the state of files
_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|"
    r"EXPIRED_TOKEN|MISSING_AUTHENTICATION|NO_SUCH_BUCKET|HTTP status 40[013]|PermissionDenied|Unauthenticated|"
    r"InvalidAccessKeyId|SignatureDoesNotMatch|Permission denied|libjvm|libhdfs",
    re.IGNORECASE,
)
_Result = TypeVar("_Result")


class Refused(InputError):
    """A store does not give its files to these credentials."""


@dataclasses.dataclass(frozen=True, order=True)
class RemoteFile:
    """A file or a folder in a store.

    Attributes:
        store: scheme and authority, as in `s3://bucket`.
        parts: the names of the folders and of the file. They order files as `Path` does.
        query: the options of the store, as in a URI; texts leave them out.
    """

    store: str
    parts: tuple[str, ...] = ()
    query: str = ""

    @classmethod
    def of(cls, uri: str) -> RemoteFile:
        """Returns the file of a URI, whose path is taken as it is, without escapes."""
        store, path, query = split_remote(uri)
        return cls(store, tuple(part for part in path.split("/") if part), query)

    def __str__(self) -> str:
        return "/".join([self.store, *self.parts])

    def __truediv__(self, name: str) -> RemoteFile:
        return dataclasses.replace(self, parts=(*self.parts, name))

    @property
    def uri(self) -> str:
        """The whole URI."""
        return f"{self}?{self.query}" if self.query else str(self)

    @property
    def name(self) -> str:
        """The last of the parts; of a bucket itself nothing."""
        return self.parts[-1] if self.parts else ""

    @property
    def suffix(self) -> str:
        """The last suffix of the name, as `Path` gives it."""
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        """The suffixes of the name, as `Path` gives them."""
        return PurePosixPath(self.name).suffixes

    @property
    def parent(self) -> RemoteFile:
        """The folder around it; of a bucket the bucket."""
        return dataclasses.replace(self, parts=self.parts[:-1])

    @property
    def parents(self) -> list[RemoteFile]:
        """All folders around it, the innermost first."""
        return [dataclasses.replace(self, parts=self.parts[:end]) for end in reversed(range(len(self.parts)))]

    def relative_to(self, folder: RemoteFile) -> PurePosixPath:
        """Returns the path below `folder`."""
        return PurePosixPath(*self.parts[len(folder.parts) :])

    def below(self, name: str) -> RemoteFile:
        """Returns the file of a name with slashes below this folder."""
        return dataclasses.replace(self, parts=(*self.parts, *name.split("/")))

    def is_file(self) -> bool:
        """Tells whether there is such a file.

        Raises:
            InputError: the store does not answer or refuses.
        """
        filesystem, root = _filesystem(self.store, self.query)
        return _retried(self, lambda: filesystem.get_file_info(_inside(root, self))).type is fs.FileType.File

    def stat(self) -> State:
        """Asks for the file's state.

        Raises:
            InputError: the file is not there, or the store does not answer or refuses.
        """
        return State.of(self, _opened(self))


File = Path | RemoteFile


@dataclasses.dataclass(frozen=True)
class State:
    """Size, time and etag of a file, by which a change is noticed.

    Attributes:
        st_size: bytes.
        st_mtime_ns: the time of the last change, in nanoseconds since 1970; 0 if the store does not tell it.
        etag: of S3 and Google Cloud Storage a digest of the content or a number of the version; otherwise empty.
    """

    st_size: int
    st_mtime_ns: int
    etag: str

    @classmethod
    def of(cls, file: RemoteFile, opened: pa.NativeFile) -> State:
        """Returns the state of a file that was opened."""
        told = {_text(key).lower(): _text(value) for key, value in (opened.metadata() or {}).items()}
        etag, changed = told.get("etag", "").strip('"'), told.get("last-modified", "")
        if etag and changed:
            return cls(opened.size(), _nanoseconds(changed), etag)
        filesystem, root = _filesystem(file.store, file.query)
        info = _retried(file, lambda: filesystem.get_file_info(_inside(root, file)))
        return cls(opened.size(), info.mtime_ns or 0, etag)

    def facts(self) -> dict[str, int | str]:
        """Returns the facts about a file for `sources.fingerprint_files`; the content is not read."""
        decisive = f"etag {self.etag}" if self.etag else f"time {self.st_mtime_ns}"
        digest = hashlib.blake2b(f"{self.st_size} {decisive}".encode(), digest_size=16).hexdigest()
        return {"size": self.st_size, "mtime_ns": self.st_mtime_ns, "digest": digest}


def _text(part: str | bytes) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part


def _nanoseconds(text: str) -> int:
    """Returns a time of a store, in either of two notations, in nanoseconds since 1970; 0 for another notation."""
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            return int(parse(text).timestamp()) * 10**9
        except ValueError:
            continue
    return 0


def file_of(source: str) -> File:
    """Returns the file that a path or the URI of a store names."""
    return RemoteFile.of(source) if is_remote(source) else Path(source)


def states(files: Iterable[RemoteFile]) -> dict[RemoteFile, State]:
    """Asks for the state of each file, of many at once. That takes one request a file.

    Raises:
        InputError: a file is not there, or the store does not answer or refuses.
    """
    files = list(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(RemoteFile.stat, files), strict=True))


def readable(file: File) -> Any:
    """Returns what Arrow can open to read a file from any place: a local path, or a stream."""
    return file if isinstance(file, Path) else _RemoteInput(file)


def stream_of(file: File) -> Any:
    """Returns what Arrow and `lzma` can open to read a file from start to end: a local path, or a stream."""
    return file if isinstance(file, Path) else io.BufferedReader(_RemoteInput(file), _STREAM_BYTES)


class _RemoteInput(io.RawIOBase):
    """Reads a file. After a failure it is opened again, and must still be the same.

    Raises:
        InputError: the file changed, or the store does not answer or refuses.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._position = file, 0
        self._input: pa.NativeFile | None = _opened(file)
        self._state = State.of(file, self._input)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._state.st_size}
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._state.st_size - self._position)
        if wanted <= 0:
            return 0
        found = _retried(self._file, lambda: self._read(wanted))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _read(self, num_bytes: int) -> bytes:
        if self._input is None:
            self._input = _opened(self._file)
            if State.of(self._file, self._input) != self._state:
                raise changed_while_read(self._file)
        try:
            found = self._input.read_at(num_bytes, self._position)
            if len(found) < num_bytes:
                raise OSError(f"{len(found)} bytes instead of {num_bytes}")
        except OSError:
            self._input = None
            raise
        progress.note()
        return found


def read_all(file: RemoteFile, most_bytes: int) -> bytes:
    """Returns the content of a file of at most `most_bytes`.

    Raises:
        InputError: the file is not there or larger, or the store does not answer or refuses.
    """
    with _RemoteInput(file) as stream:
        content = stream.read(most_bytes + 1) or b""
    if len(content) > most_bytes:
        raise InputError(f"{file}: must have at most {most_bytes:,} bytes. Received: more. Name the right file.")
    return content


def download(file: RemoteFile, path: Path) -> None:
    """Copies a file of a store to a local one.

    Raises:
        InputError: the file is not there, or the store does not answer or refuses.
        OSError: the local file cannot be written.
    """
    with stream_of(file) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _STREAM_BYTES)


def write(file: RemoteFile, content: bytes | Path) -> None:
    """Writes a file, or replaces it. A process that is killed meanwhile leaves the old one, or a part of the new one.

    Args:
        file: where to.
        content: the bytes, or a local file that has them.

    Raises:
        InputError: the store does not answer or refuses.
        OSError: the local file cannot be read.
    """
    filesystem, root = _filesystem(file.store, file.query)
    kind = _TYPES.get(file.suffix)
    metadata = {"Content-Type": kind} if kind else None

    def attempt() -> None:
        with (
            io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source,
            filesystem.open_output_stream(_inside(root, file), compression=None, metadata=metadata) as stream,
        ):
            while piece := source.read(_STREAM_BYTES):
                stream.write(piece)
                progress.note()

    _retried(file, attempt, to_write=True)
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if (found := file.stat().st_size) != size:
        raise InputError(
            f"{file}: a store must keep what is written. Received: {found:,} bytes of {size:,}. Run the command again, "
            "while nothing else writes there."
        )


def delete(files: Iterable[RemoteFile]) -> None:
    """Deletes files; those that are not there are left aside.

    Raises:
        InputError: the store does not answer or refuses.
    """

    def attempt(file: RemoteFile) -> None:
        filesystem, root = _filesystem(file.store, file.query)
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(_inside(root, file))

    for file in files:
        _retried(file, functools.partial(attempt, file), to_write=True)


def changed_while_read(file: File) -> InputError:
    """Returns the error for a file that something else writes to."""
    return InputError(
        f"{file}: must stay as it is while it is read. Received: a file of another size, time or etag than at first. "
        "Run the command again once nothing writes to it."
    )


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files and folders below one place of a store.

    Attributes:
        top: that place.
        is_folder: what each of them is, `top` among them; empty: nothing is there.
    """

    top: RemoteFile
    is_folder: dict[RemoteFile, bool]

    @classmethod
    def of(cls, top: RemoteFile, recursive: bool = True) -> Listing:
        """Lists a folder; the listing of a file has only that file.

        Raises:
            InputError: the store does not answer or refuses.
        """
        filesystem, root = _filesystem(top.store, top.query)
        path = _inside(root, top)
        kind = _retried(top, lambda: filesystem.get_file_info(path)).type
        if kind is not fs.FileType.Directory:
            return cls(top, {top: False} if kind is fs.FileType.File else {})
        infos = _retried(top, lambda: filesystem.get_file_info(fs.FileSelector(path, recursive=recursive)))
        found = {top: True}
        for info in infos:
            below = info.path.removeprefix(path).strip("/").split("/")
            entry = dataclasses.replace(top, parts=(*top.parts, *below))
            found[entry] = info.type is fs.FileType.Directory
            for folder in entry.parents:  # which not every store lists
                if folder in found:
                    break
                found[folder] = True
        return cls(top, found)


def _opened(file: RemoteFile) -> pa.NativeFile:
    filesystem, root = _filesystem(file.store, file.query)
    return _retried(file, lambda: filesystem.open_input_file(_inside(root, file)))


def _inside(root: str, file: RemoteFile) -> str:
    return "/".join([root.rstrip("/"), *file.parts]) if root.strip("/") else root + "/".join(file.parts)


@functools.cache
def _filesystem(store: str, query: str) -> tuple[fs.FileSystem, str]:
    """Connects to a store; returns it, and where in it the paths of its URIs begin.

    Raises:
        InputError: pyarrow cannot connect, or refuses the URI.
    """
    file = RemoteFile(store, (), query)

    def connect() -> tuple[fs.FileSystem, str]:
        return fs.FileSystem.from_uri(f"{store}/?{query}" if query else f"{store}/")

    try:
        found, root = _retried(file, connect)
    except (pa.ArrowInvalid, NotImplementedError) as error:
        raise InputError(
            f"{file.uri}: must be a URI that pyarrow opens. Received: {_detail(error)}. Correct it."
        ) from error
    if isinstance(found, fs.S3FileSystem):  # otherwise a request that gets no answer would be sent for minutes
        rebuild, (options,) = found.__reduce__()
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS_OF_S3)
        # Writes in the background would hold a whole file in memory, and show no progress.
        found = rebuild(options | {"retry_strategy": retries, "background_writes": False})
    return found, root


def _retried(file: RemoteFile, request: Callable[[], _Result], to_write: bool = False) -> _Result:
    """Sends a request until it is answered; see `MOST_SECONDS`.

    Raises:
        InputError: the store does not answer or refuses, or there is no such file.
    """
    first_failure, wait = None, _FIRST_WAIT
    while True:
        try:
            return request()
        except FileNotFoundError as error:
            raise InputError(f"{file}: must be there. Received: no such file. Correct the path.") from error
        except OSError as error:
            detail = _detail(error)
            if _REFUSED.search(detail):
                be, do = ("writable", "list, read and write") if to_write else ("readable", "list and read")
                raise Refused(
                    f"{file}: must be {be}. Received: {detail}. Give credentials that may {do} it, in the environment "
                    "or a profile, or correct the name."
                ) from error
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            if now + wait > first_failure + MOST_SECONDS:
                raise InputError(
                    f"{file}: the store must answer. Received, and again for {now - first_failure:.0f} seconds: "
                    f"{detail}. Check the network and the URI's endpoint, and run the command again."
                ) from error
        progress.note()  # not a disk that hangs
        time.sleep(wait)
        wait = min(2 * wait, _MOST_WAIT)


def _detail(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:300].rstrip(". :;")

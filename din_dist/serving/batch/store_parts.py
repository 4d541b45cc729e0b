"""Parts of results in an object store: each one is made on this machine and written there whole."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from din_dist.errors import InputError
from din_dist.serving.batch.parts import MOST_PLAN_BYTES, STOPPING, Part, PartsFolder, Plan
from din_dist.tables.storage import Listing, RemoteFile, delete, read_all, write

_SECONDS_BETWEEN_LOOKS = 10.0  # at whether another process asked to stop


class StoreParts(PartsFolder):
    """A place in a store where several processes put parts. Nobody can claim one, so each does its own share."""

    folder: RemoteFile

    def __init__(self, folder: RemoteFile) -> None:
        super().__init__(folder)
        self._looked, self._stopping = time.monotonic(), False

    def names(self) -> set[str]:
        found = Listing.of(self.folder, recursive=False).is_folder
        return {file.name for file, is_folder in found.items() if not is_folder}

    def has(self, part: Part) -> bool:
        return (self.folder / part.name).is_file()

    def share(self, plan: Plan, rank: int, world_size: int) -> list[Part]:
        parts, missing = plan.parts(), {part.name for part in self.missing(plan)}
        own = parts[len(parts) * rank // world_size : len(parts) * (rank + 1) // world_size]
        return [part for part in own if part.name in missing]

    @contextlib.contextmanager
    def claimed(self, part: Part) -> Iterator[bool]:
        yield True

    @contextlib.contextmanager
    def published(self, part: Part) -> Iterator[BinaryIO]:
        with self.writing(), tempfile.TemporaryDirectory(prefix="din_dist-part-") as folder:
            path = Path(folder, part.name)
            with path.open("wb") as stream:
                yield stream
            write(self.folder / part.name, path)

    def stop_all(self) -> None:
        with contextlib.suppress(InputError):
            write(self.folder / STOPPING, b"")

    def is_stopping(self) -> bool:
        if time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked, self._stopping = time.monotonic(), (self.folder / STOPPING).is_file()
        return self._stopping

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"--predictions_dir: parts for a store are made in {tempfile.gettempdir()}. Received: "
                f"{error.strerror or error}. Make room there, or set TMPDIR; the same command goes on."
            ) from error

    def _read(self, name: str) -> str:
        return read_all(self.folder / name, MOST_PLAN_BYTES).decode()

    def _write(self, name: str, text: str) -> None:
        write(self.folder / name, text.encode())

    def _remove(self, names: Iterable[str]) -> None:
        delete(self.folder / name for name in names)

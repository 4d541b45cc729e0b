"""Checkpoints: written aside, then published by one rename, so that a crash leaves the last one whole.

`OUTPUT_DIR/checkpoints/step-000000001000/` holds one .npy file a variable, or one for each shard of it (any number of
workers reads what any number wrote), and `manifest.json`: training state, settings and a digest of each file.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorflow as tf

from din_dist import progress
from din_dist.background_writer import Writer
from din_dist.config import Config, differences
from din_dist.distributed.placement import RowShard
from din_dist.distributed.runtime import Runtime
from din_dist.errors import FailedElsewhere, InputError
from din_dist.files import (
    folder_aside,
    make_folder,
    open_regular,
    publish_folder,
    read_bounded,
    write_text,
)
from din_dist.machine import free_memory_bytes
from din_dist.text import parse_json, reason, shown
from din_dist.training.checkpoint_arrays import digest_of, first_file, is_entry, read_variable, write_array
from din_dist.training_state import TrainingState

_MANIFEST = "manifest.json"
_ABANDONED_AFTER_SECONDS = 600.0
_MOST_MANIFEST_BYTES = 64 << 20
_FOLDER_NAME = re.compile(r"step-\d{12,}")
TRY_AGAIN_SECONDS = 1.0
_DIGEST_BYTES = 16
_COPY_SHARE = 0.5  # of the free memory, at most, for what waits to be written
_OTHER = "Name another job, or an export."
_PATIENCE_SECONDS = 5.0  # with a write that makes no progress, before updates go on without another


class DamagedCheckpoint(InputError):
    """A checkpoint that is not as it was saved."""


class CheckpointStore:
    """Saves and restores a job's variables and state under one output directory.

    All ranks call `save` and `restore`; the chief reads and writes, the others get its values. Each rank reads and
    writes its shards of tables that are dealt out; any number of ranks reads what any number has written.

    Args:
        config: all settings.
        data_fingerprint: of the prepared data.
        runtime: the ranks.
        shards: this rank's shard of each variable whose rows are dealt out. None: there are none.
    """

    def __init__(
        self, config: Config, data_fingerprint: str, runtime: Runtime, shards: Mapping[str, RowShard] | None = None
    ) -> None:
        self._shards = dict(shards or {})
        self._root = checkpoints_dir(config)
        self._config = config
        self._data_fingerprint = data_fingerprint
        self._runtime = runtime
        self._writer = Writer("checkpoints", capacity=1)
        self._is_stuck = False
        self.damaged: list[str] = []  # what the last `restore` passed over, on the chief

    def save(self, variables: Mapping[str, tf.Variable], state: TrainingState) -> int:
        """Publishes a checkpoint of `state.step`, and deletes those that need not be kept; returns its bytes.

        Raises:
            InputError: it could not be written; the checkpoints before it are untouched.
            FailedElsewhere: likewise, on the other ranks.
        """
        problem, num_bytes = None, 0
        shards = _ShardWriter(self._runtime, {name: variables[name] for name in self._shards})
        whole = {name: variable for name, variable in variables.items() if name not in self._shards}
        if self._runtime.is_chief:
            try:
                with progress.at(f"saving step {state.step} in {self._root}"):
                    num_bytes = self._write(_values(whole), state, shards.write if self._shards else None)
                    self._prune(state.best_step)
            except OSError as error:
                problem = self._problem(error, state)
        if self._shards:
            shards.finish()
        problem, num_bytes = self._runtime.broadcast_object((problem, num_bytes))
        if problem:
            raise InputError(problem) if self._runtime.is_chief else FailedElsewhere
        return num_bytes

    def save_later(
        self,
        variables: Mapping[str, tf.Variable],
        state: TrainingState,
        tries: int,
        saved: Callable[[TrainingState, float, int], None],
        failed: Callable[[str], None],
    ) -> None:
        """Saves while training goes on; only the chief calls it. If no memory is free for a copy, training waits.

        A write before it that makes progress is waited for. With one that is stuck this one fails.

        Args:
            tries: how often it is tried, once a second.
            saved: called, perhaps in another thread, with the state, the seconds and the bytes.
            failed: called with the problem after each failed try.
        """
        if not self._writer.wait(0 if self._is_stuck else _PATIENCE_SECONDS):
            self._is_stuck = True
            failed(
                f"--output_dir: a checkpoint must be written before the next. Received: step {state.step}, and the "
                f"disk of {self._root} does not answer."
            )
            return
        self._is_stuck = False
        size = sum(variable.dtype.size * int(np.prod(variable.shape)) for variable in variables.values())
        fits = size <= _COPY_SHARE * free_memory_bytes()
        what, state = f"saving step {state.step} in {self._root}", TrainingState.from_json(state.to_json())
        values = [(name, np.array(value)) for name, value in _values(variables)] if fits else []

        def write() -> None:
            for further_tries in reversed(range(tries)):
                started = time.perf_counter()
                try:
                    num_bytes = self._write(values if fits else _values(variables), state)
                    self._prune(state.best_step)
                except OSError as error:
                    failed(self._problem(error, state))
                    if further_tries:
                        time.sleep(TRY_AGAIN_SECONDS)
                else:
                    saved(state, time.perf_counter() - started, num_bytes)
                    return

        if fits:
            self._writer.offer(what, write)
        else:
            with progress.at(what):
                write()

    def finish(self, patience_seconds: float = math.inf) -> bool:
        """Waits for what `save_later` writes. Returns False after `patience_seconds` without progress."""
        with progress.at(f"waiting for a checkpoint in {self._root}"):
            return self._writer.wait(patience_seconds)

    def _problem(self, error: OSError, state: TrainingState) -> str:
        last = latest_checkpoint(self._config)
        kept = f"The last good checkpoint is {last.name}." if last else "There is none before it."
        return (
            f"--output_dir: a checkpoint must fit. Received: {error.strerror or error} while saving step {state.step} "
            f"in {self._root}. {kept} Free some space."
        )

    def save_alone(self, variables: Mapping[str, tf.Variable], state: TrainingState) -> None:
        """Saves by this rank alone, because the others may be gone.

        Raises:
            OSError: the checkpoint could not be written.
        """
        with progress.at(f"saving step {state.step} in {self._root}"):
            self._write(_values(variables), state)
            self._prune(state.best_step)

    def restore(self, variables: Mapping[str, tf.Variable], step: int | None = None) -> TrainingState | None:
        """Loads the newest checkpoint, or that of `step`, into `variables`; None when there is none.

        Damaged ones are passed over in favour of the one before; `damaged` says which.

        Raises:
            InputError: it belongs to other settings or data, or all are damaged.
            FailedElsewhere: likewise, on the other ranks.
        """
        if self._shards:
            return self._restore_shards(variables, step)
        problem, fields = None, None
        if self._runtime.is_chief:
            try:
                with progress.at(f"reading a checkpoint in {self._root}"):
                    fields = self._read(variables, step)
            except InputError as error:
                problem = str(error)
        problem, fields = self._runtime.broadcast_object((problem, fields))
        if problem:
            raise InputError(problem) if self._runtime.is_chief else FailedElsewhere
        if fields is None:
            return None
        self._runtime.broadcast_variables(list(variables.values()))
        return TrainingState.from_json(fields)

    def _restore_shards(self, variables: Mapping[str, tf.Variable], step: int | None) -> TrainingState | None:
        """Does what `restore` does; each rank reads its own shards, and all take the same checkpoint."""
        whole = {name: variable for name, variable in variables.items() if name not in self._shards}
        own = variables if self._runtime.is_chief else {name: variables[name] for name in self._shards}
        folders = _published(self._root)[::-1] if step is None else [self._root / _folder_name(step)]
        names = self._runtime.broadcast_object([folder.name for folder in folders])
        self.damaged = []
        for name in names:
            problem, fields = None, {}
            with self._runtime.together(), progress.at(f"reading a checkpoint in {self._root}"):
                try:
                    fields = self._read_one(own, self._root / name)
                except DamagedCheckpoint as error:
                    problem = str(error)
            refused = np.flatnonzero(self._runtime.gather(np.array([problem is not None], np.int32)))
            if not len(refused):
                self._runtime.broadcast_variables(list(whole.values()))
                return TrainingState.from_json(fields)
            self.damaged.append(self._runtime.broadcast_object(problem, root=int(refused[0])))
        if self.damaged and not self._runtime.is_chief:
            raise FailedElsewhere
        if self.damaged:
            raise InputError(f"{self.damaged[0]} None of {len(names)} can be read: name another --output_dir.")
        return None

    @property
    def needs_all_ranks(self) -> bool:
        """True if every rank writes a part of a checkpoint."""
        return bool(self._shards)

    def has(self, step: int) -> bool:
        """Tells whether there is a checkpoint of `step`."""
        with progress.at(f"reading a checkpoint in {self._root}"):
            found = (self._root / _folder_name(step)).exists()
        return bool(self._runtime.broadcast_object(found))

    def _write(
        self,
        values: Iterable[tuple[str, np.ndarray]],
        state: TrainingState,
        write_shards: Callable[[Path], dict[str, Any]] | None = None,
    ) -> int:
        make_folder(self._root)
        for other in self._root.glob("writing-*"):
            # Of a process that was killed; a new one may be of a worker that was cut off and saves what it has.
            if time.time() - other.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
        with folder_aside(self._root, f"writing-{state.step}-") as aside:
            files = {}
            for name, value in values:
                path = _new_path(aside, name.replace("/", "."))
                files[name] = write_array(path, value)
            if write_shards:
                files |= write_shards(aside)
            manifest = {
                "state": state.to_json(),
                "config": self._config.to_json(),
                "data_fingerprint": self._data_fingerprint,
                "variables": files,
            }
            write_text(aside / _MANIFEST, json.dumps(manifest, indent=1))
            num_bytes = sum(path.stat().st_size for path in aside.iterdir())
            # It may replace one of a run that came this far before and was resumed from earlier.
            publish_folder(aside, self._root / _folder_name(state.step))
            return num_bytes

    def _prune(self, best_step: int) -> None:
        folders = _published(self._root)
        for folder in folders[: -self._config.recovery.keep_checkpoints]:
            if folder.name != _folder_name(best_step):
                shutil.rmtree(folder)

    def _read(self, variables: Mapping[str, tf.Variable], step: int | None) -> dict[str, Any] | None:
        folders = _published(self._root)[::-1] if step is None else [self._root / _folder_name(step)]
        self.damaged = []
        for folder in folders:
            try:
                return self._read_one(variables, folder)
            except DamagedCheckpoint as error:
                self.damaged.append(str(error))
        if self.damaged:
            raise InputError(f"{self.damaged[0]} None of {len(folders)} can be read: name another --output_dir.")
        return None

    def _read_one(self, variables: Mapping[str, tf.Variable], folder: Path) -> dict[str, Any]:
        manifest = check_compatible(folder, self._config, self._data_fingerprint)
        for name, variable in variables.items():
            entry = manifest["variables"].get(name)
            path = first_file(folder, entry) if entry else folder / name
            try:
                if not entry:
                    raise ValueError("a manifest without it")
                shard, shape = self._shards.get(name), tuple(variable.shape)
                if shard:
                    shape = (shard.num_rows, *shape[1:])
                variable.assign(read_variable(folder, entry, shape, np.dtype(variable.dtype.as_numpy_dtype), shard))
                progress.note()
            except (OSError, ValueError) as error:
                raise DamagedCheckpoint(f"{path}: must be as it was saved. Received: {reason(error)}.") from error
        return manifest["state"]


class _ShardWriter:
    """Lets every rank write its shards of some variables into a folder that the chief has made."""

    def __init__(self, runtime: Runtime, variables: Mapping[str, tf.Variable]) -> None:
        self._runtime, self._variables, self._begun = runtime, variables, False

    def write(self, folder: Path) -> dict[str, Any]:
        """Writes the shards of all ranks; only the chief calls it. Returns the entries of the manifest.

        Raises:
            OSError: a rank could not write.
        """
        self._begun = True
        self._runtime.broadcast_object(str(folder))
        return self._write_own(folder)

    def finish(self) -> None:
        """Writes this rank's shards, if the chief asks for them; all ranks call it."""
        if self._begun:
            return
        folder = self._runtime.broadcast_object(None)
        if folder and not self._runtime.is_chief:
            with contextlib.suppress(OSError):  # the chief says what was wrong
                self._write_own(Path(folder))

    def _write_own(self, folder: Path) -> dict[str, Any]:
        rank, count, problem = self._runtime.rank, self._runtime.world_size, None
        digests = np.zeros([1, len(self._variables), _DIGEST_BYTES], np.uint8)
        try:
            for place, (name, variable) in enumerate(self._variables.items()):
                path = folder / _shard_name(name, place, rank, count)
                digest = write_array(path, variable.numpy())["digest"]
                digests[0, place] = np.frombuffer(bytes.fromhex(digest), np.uint8)
                progress.note()
        except OSError as error:
            problem = error.strerror or str(error)
        refused = np.flatnonzero(self._runtime.gather(np.array([problem is not None], np.int32)))
        if len(refused):
            problem = self._runtime.broadcast_object(problem, root=int(refused[0]))
            raise OSError(errno.EIO, f"{problem} on rank {refused[0]}, which must see the same folder")
        digests = self._runtime.gather(digests)
        return {
            name: {
                "num_rows": int(num_rows),
                "shards": [
                    {"file": _shard_name(name, place, rank, count), "digest": digests[rank, place].tobytes().hex()}
                    for rank in range(count)
                ],
            }
            for place, (name, num_rows) in enumerate(self._num_rows().items())
        }

    def _num_rows(self) -> dict[str, int]:
        sizes = np.array([[variable.shape[0] for variable in self._variables.values()]], np.int64)
        return dict(zip(self._variables, self._runtime.sum(sizes)[0], strict=True))


def _shard_name(name: str, place: int, rank: int, count: int) -> str:
    return f"{place:03d}.{name.replace('/', '.')}.{rank:05d}-of-{count:05d}.npy"


def _values(variables: Mapping[str, tf.Variable]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the values of variables, one after the other in memory."""
    for name, variable in variables.items():
        yield name, variable.numpy()


def checkpoints_dir(config: Config) -> Path:
    return Path(config.job.output_dir) / "checkpoints"


def latest_checkpoint(config: Config) -> Path | None:
    """Returns the folder of the newest published checkpoint, if any."""
    folders = _published(checkpoints_dir(config))
    return folders[-1] if folders else None


class SavedCheckpoint:
    """The variables of a checkpoint that another job reads.

    Args:
        folder: of the checkpoint.

    Raises:
        DamagedCheckpoint: its manifest cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._manifest = _read_manifest(folder / _MANIFEST)
            with open_regular(folder / _MANIFEST) as file:
                self.digest = digest_of(file)  # which covers that of each variable
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{folder}: must be a checkpoint. Received: {reason(error)}. {_OTHER}") from error
        self.state = TrainingState.from_json(self._manifest["state"])
        self.settings: dict[str, Any] = self._manifest["config"]
        self.data_fingerprint: str = self._manifest["data_fingerprint"]

    @classmethod
    def chosen(cls, root: Path) -> Self | None:
        """Returns the best checkpoint of a job by validation, or the newest where there is none; None: it has none.

        Args:
            root: the folder of all checkpoints of the job.

        Raises:
            DamagedCheckpoint: its manifest cannot be read.
        """
        folders = _published(root)
        if not folders:
            return None
        newest = cls(folders[-1])
        best = root / _folder_name(newest.state.best_step)
        # 0 stands for none, although a job that began warm has a checkpoint of step 0: its parent's weights.
        return cls(best) if newest.state.best_step and best in folders else newest

    def read(self, name: str) -> np.ndarray:
        """Returns the value of a variable.

        Raises:
            DamagedCheckpoint: it has no such variable, or another one than was saved.
        """
        entry = self._manifest["variables"].get(name, {"file": name, "digest": ""})
        path = first_file(self._folder, entry)
        try:
            return read_variable(self._folder, entry)
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{path}: must be as it was saved. Received: {reason(error)}. {_OTHER}") from error


def published_steps(folder: Path) -> list[int]:
    """Returns the updates after which checkpoints in `folder` were saved, in their order."""
    return [int(path.name.removeprefix("step-")) for path in _published(folder)]


def check_compatible(folder: Path, config: Config, data_fingerprint: str | None) -> dict[str, Any]:
    """Returns the manifest of a checkpoint that `config` may go on from.

    Args:
        data_fingerprint: the fingerprint of the prepared data. None: there are none yet, and they are not compared.

    Raises:
        InputError: the checkpoint has other settings or data.
        DamagedCheckpoint: the checkpoint cannot be read.
    """
    try:
        manifest = _read_manifest(folder / _MANIFEST)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder}: must be a checkpoint. Received: {reason(error)}.") from error
    if found := differences(manifest["config"], config.to_json()):
        raise InputError(
            f"{folder}: a checkpoint is resumed with the settings it was made with. Received: {'; '.join(found)}. "
            "Give the same settings, or another --output_dir."
        )
    if data_fingerprint not in (None, manifest["data_fingerprint"]):
        raise InputError(
            f"{folder}: a checkpoint is resumed on the data it was made with. Received: data that was prepared anew, "
            "from a changed source or by another version. Give another --output_dir to train on it from the start."
        )
    return manifest


def check_resumable(config: Config, data_fingerprint: str | None) -> None:
    """Checks that a job may go on from the newest checkpoint in its folder, if there is one; as `check_compatible`.

    One that cannot be read is passed over, because training resumes from the one before.

    Raises:
        InputError: the checkpoint has other settings or data.
    """
    if checkpoint := latest_checkpoint(config):
        with contextlib.suppress(DamagedCheckpoint):
            check_compatible(checkpoint, config, data_fingerprint)


def _read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest in `path`, each part of the kind that is written.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no manifest of a checkpoint.
    """
    manifest = parse_json(read_bounded(path, _MOST_MANIFEST_BYTES))
    kinds = {"state": dict, "config": dict, "data_fingerprint": str, "variables": dict}
    if not isinstance(manifest, dict):
        raise ValueError(f"a manifest that is {shown(manifest)}")
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise ValueError(f"a manifest whose {name} is {shown(manifest.get(name))}")
    TrainingState.from_json(manifest["state"])
    for room, settings in manifest["config"].items():
        if not isinstance(settings, dict):
            raise ValueError(f"a manifest whose settings of {shown(room)} are {shown(settings)}")
    for name, entry in manifest["variables"].items():
        if not is_entry(entry):
            raise ValueError(f"a manifest whose variable {shown(name)} is {shown(entry)}")
    return manifest


def _published(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if _FOLDER_NAME.fullmatch(path.name) and path.is_dir())


def _folder_name(step: int) -> str:
    return f"step-{step:012d}"


def _new_path(folder: Path, stem: str) -> Path:
    """Returns a path of a file that is not there yet: names of variables differ, but those of files need not."""
    path = folder / f"{stem}.npy"
    for number in itertools.count(2):
        if not path.exists():
            break
        path = folder / f"{stem}.{number}.npy"
    return path

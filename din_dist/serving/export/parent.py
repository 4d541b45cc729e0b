"""Reads the weights of an export, from which another job may begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from din_dist import progress
from din_dist.errors import InputError
from din_dist.serving.manifest import MANIFEST, digest_of_file, read_manifest
from din_dist.text import reason
from din_dist.training.warm_start import ROWS_DIR, Parent, read_kept_rows

EXPORTED_ROWS = MANIFEST.parent / ROWS_DIR
_VARIABLES = Path("variables")
_AGAIN = "Write the export again, or warm start from its job."


class ParentExport(Parent):
    """An export, which has weights, but no slots of an optimizer.

    Args:
        folder: of the export.

    Raises:
        InputError: there is no export, it is damaged, or an earlier version wrote it.
    """

    kind = "export"

    def __init__(self, folder: Path) -> None:
        self.folder, manifest = folder, read_manifest(folder)
        self.step, self.slot_updates = manifest.step, 0
        self.digest, self.settings = manifest.digest, dict(manifest.settings)
        for name, digest in manifest.files.items():
            if {_VARIABLES, EXPORTED_ROWS} & {*Path(name).parents}:
                self._check(folder / name, digest)
        self.rows = read_kept_rows(folder / EXPORTED_ROWS, _AGAIN)
        try:
            self._reader = tf.train.load_checkpoint(str(folder / _VARIABLES / "variables"))
        except (tf.errors.OpError, ValueError) as error:
            raise self._changed(folder / _VARIABLES, error) from error

    def read(self, name: str) -> np.ndarray:
        try:
            return np.asarray(self._reader.get_tensor(self.rows.variables.get(name, name)))
        except (tf.errors.OpError, ValueError, KeyError) as error:
            raise self._changed(self.folder / _VARIABLES / name, error) from error

    def _check(self, path: Path, digest: str) -> None:
        progress.note()
        try:
            if digest_of_file(path) != digest:
                raise ValueError("its content changed")
        except (OSError, ValueError) as error:
            raise self._changed(path, error) from error

    def _changed(self, path: Path, error: Exception) -> InputError:
        return InputError(f"{path}: must be as it was exported. Received: {reason(error)}. {_AGAIN}")

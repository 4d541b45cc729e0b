"""What tests of several commands share, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.finished_job import finish
from tests.support.preloaded import Preloaded, preloaded
from tests.support.small_log import write_log


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloaded]:
    """Starts commands without their imports, which take seconds."""
    with preloaded(tmp_path_factory.mktemp("commands") / "printed") as process:
        yield process


@pytest.fixture(scope="session")
def exported_job(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job: log.parquet, prepared, run and export. Tests must not change it."""
    folder = tmp_path_factory.mktemp("job")
    write_log(folder / "log.parquet", num_users=60)
    return finish(commands, folder, "--epochs=3", "--learning_rate=0.02")

"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with amazon_beauty.parquet, which the repository does not hold.

    It lies beside the checkout, or DIN_DIST_SHARED_DATA names it. Tests that need it are skipped where it is missing,
    in continuous integration too: a clone with nothing beside it passes.
    """
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DIN_DIST_SHARED_DATA") or beside)
    if not (folder / "amazon_beauty.parquet").is_file():
        pytest.skip(f"no amazon_beauty.parquet in {folder}: set DIN_DIST_SHARED_DATA to the folder that has it")
    return folder

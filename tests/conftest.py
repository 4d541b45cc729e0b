"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.programs import missing


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with amazon_beauty.parquet and amazon_sports.parquet, which are not in the repository.

    Found beside the checkout or by DIN_DIST_SHARED_DATA. Where it is missing tests are skipped; in CI they fail.
    """
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DIN_DIST_SHARED_DATA") or beside)
    if not (folder / "amazon_beauty.parquet").is_file():
        missing(f"no amazon_beauty.parquet in {folder}: set DIN_DIST_SHARED_DATA to the folder that has it")
    return folder

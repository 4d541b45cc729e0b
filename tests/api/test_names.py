"""The names of the library, found when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import din_dist
from din_dist import api
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT

LOOK = """
import sys
import din_dist

names = dir(din_dist)
assert "DIN" in names and din_dist.__version__
print("tensorflow" in sys.modules, "keras" in sys.modules)
print(issubclass(din_dist.InputError, ValueError), "tensorflow" in sys.modules)
"""


def test_the_import_alone_takes_no_tensorflow() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout == "False False\nTrue True\n"


def test_the_names_are_those_of_the_room() -> None:
    assert sorted({*dir(din_dist)} & {*api.__all__}) == sorted(api.__all__)
    for name in api.__all__:
        assert getattr(din_dist, name) is getattr(api, name)


def test_other_names_are_none_of_the_library() -> None:
    with pytest.raises(AttributeError, match="module 'din_dist' has no attribute 'Din'"):
        din_dist.Din  # noqa: B018

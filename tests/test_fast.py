"""The table of fast tests in conftest.py: its paths exist, and no room is forgotten."""

from __future__ import annotations

import pytest

from tests.conftest import FAST, is_fast
from tests.support.repository import ROOT

ROOMS = sorted(path.parent.name for path in ROOT.glob("din_dist/*/__init__.py") if path.parent.name != "kernels")


@pytest.mark.parametrize("path", FAST)
def test_the_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_fast_tests(room: str) -> None:
    assert any(path.startswith(f"tests/{room}") for path in FAST)


def test_what_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAST, "tests/room", ("slow", "[True]"))
    monkeypatch.setitem(FAST, "tests/other/test_a.py", ())
    assert is_fast("tests/room/deep/test_a.py::test_b[False]") and is_fast("tests/other/test_a.py::test_slow")
    for name in ("room/test_a.py::test_slow", "room/test_a.py::test_b[True]", "rooms/test_a.py::test_b"):
        assert not is_fast(f"tests/{name}")
    assert not is_fast("tests/other/test_b.py::test_c")

"""The tests that conftest.py selects: those of its table of fast ones, and those that only thorough runs take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


CASES = """
import pytest

def test_usual():
    pass

@pytest.mark.thorough
def test_long():
    pass

@pytest.mark.thorough(unless=lambda case: case["form"] == "native")
@pytest.mark.parametrize("form", ["native", "plain"])
def test_each(form):
    pass
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ["test_usual", "test_each[native]"]),
        (("--thorough",), ["test_usual", "test_long", "test_each[native]", "test_each[plain]"]),
    ],
)
def test_what_is_left_to_thorough_runs(tmp_path: Path, words: tuple[str, ...], expected: list[str]) -> None:
    file = tmp_path / "test_cases.py"
    file.write_text(CASES)
    assert collected(file, *words) == expected


def test_a_test_that_is_named_runs(tmp_path: Path) -> None:
    file = tmp_path / "test_cases.py"
    file.write_text(CASES)
    assert collected(f"{file}::test_long") == ["test_long"]


def collected(*words: str | Path) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:xdist", "--collect-only", "-q", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]

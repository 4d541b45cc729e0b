"""The walls between tests: what they share lies in tests/support, and of din_dist they use public names alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import ROOT

TESTS = ROOT / "tests"
FILES = {path.relative_to(TESTS).as_posix(): path for path in sorted(TESTS.rglob("*.py"))}
del FILES[Path(__file__).name]  # which has examples of what is wrong
ALLOWED = {
    "horovod/test_store.py": {"client._addr", "client._port"},  # Horovod's own class, which has no public name for them
}
# Also in programs that tests start, which stand in strings.
TEST_MODULE = re.compile(r"\bfrom tests[\w.]* import test_|\b(?:from|import) tests\.(?:\w+\.)*test_")
PRIVATE_NAME = re.compile(r"\bdin_dist(?:\.\w+)*\._[a-zA-Z]|\bfrom din_dist[\w.]* import (?:.*\W)?_[a-zA-Z]")
PATCHES = re.compile(r"(.*\.)?(set|get|del|has)attr|.*patch\.object")
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public in spite of their names


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def foreign_names(tree: ast.Module) -> set[str]:
    """Returns the names by which a file knows modules and objects of other packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ("din_dist", "tests"):
            found |= {name.asname or name.name for name in node.names}
    return found - {"din_dist", "tests"}


def reached_for(path: Path) -> Iterator[str]:
    """Yields the expressions by which a file names what is private elsewhere, and imports of test modules."""
    text = path.read_text()
    tree = ast.parse(text)
    foreign = foreign_names(tree)
    for pattern in (TEST_MODULE, PRIVATE_NAME):
        yield from pattern.findall(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("din_dist"):
            yield from (f"{node.module}.{name.name}" for name in node.names if private(name.name))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if ast.unparse(node.value) not in {"self", "cls"} | foreign:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            patched, name = ast.unparse(node.args[0]), node.args[1].value
            patches = PATCHES.fullmatch(ast.unparse(node.func)) and patched.split(".")[0] not in foreign
            if patches and isinstance(name, str) and private(name):
                yield f"{patched}.{name}"


def test_files_keep_to_support_and_to_public_names() -> None:
    """Give what is worth testing by itself a public name and a docstring; move what tests share to tests/support."""
    found = {file: names for file, path in FILES.items() if (names := set(reached_for(path)))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("from tests.cli.test_flags import parse", True),
        ("from tests.cli import test_flags", True),
        ("import tests.cli.test_flags", True),
        ("program = 'from tests.cli import test_flags'", True),
        ("from din_dist.files import _replaced", True),
        ("from din_dist.files import sync, _replaced", True),
        ("from din_dist.files import (\n    sync,\n    _replaced,\n)", True),
        ("from din_dist.files import (sync, make_folder)\nx = y._replace(a=1)", False),
        ("monkeypatch.setattr('din_dist.files._replaced', None)", True),
        ("monkeypatch.setattr(files, '_replaced', None)", True),
        ("mock.patch.object(files, '_replaced')", True),
        ("job.trainer._step", True),
        ("from tests.support.commands import run", False),
        ("import os\nos._exit(0)", False),
        ("self._step = 1", False),
        ("files.__file__", False),
    ],
)
def test_it_sees(statement: str, found: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(statement)
    assert bool(list(reached_for(path))) == found

"""The walls of the house: which room may import which. Where a statement stands in its file does not matter."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import ROOT

PACKAGE = ROOT / "din_dist"
LEAVES = {
    *(
        "background_writer",
        "bounded_server",
        "config",
        "environment",
        "errors",
        "execution",
        "features",
        "files",
        "kernels",
        "machine",
    ),
    *("mapped_files", "place", "progress", "schema", "streams", "text", "training_state", "versions"),
}
MAY_IMPORT = {name: set() for name in [*LEAVES, "__init__"]} | {  # besides leaves and itself
    "layers": set(),
    "metrics": set(),
    "tables": set(),
    "data": {"tables"},
    "models": {"layers"},
    "distributed": {"layers"},
    "cluster": {"data", "tables"},
}
MAY_IMPORT["tuning"] = {"cluster"}
MAY_IMPORT["tracking"] = set()
MAY_IMPORT["telemetry"] = {"tracking", "distributed", "layers", "data", "tables"}
MAY_IMPORT["evaluation"] = {"distributed", "metrics", "models", "layers", "data", "tables"}
MAY_IMPORT["training"] = {"evaluation", "telemetry", "tracking", *MAY_IMPORT["evaluation"]}
MAY_IMPORT["report"] = {"training", *MAY_IMPORT["training"]}
MAY_IMPORT["serving"] = {"training", *MAY_IMPORT["training"]}
MAY_IMPORT["assembly"] = {"training", *MAY_IMPORT["training"]}
MAY_IMPORT["benchmark"] = {"assembly", *MAY_IMPORT["assembly"]}
MAY_IMPORT["daily"] = {"data", "tables", "serving"}
MAY_IMPORT["__init__"] = {"api"}
MAY_IMPORT["api"] = {"assembly", "cli", *MAY_IMPORT["assembly"]}
MAY_IMPORT["cli"] = {
    "assembly",
    "benchmark",
    "cluster",
    "daily",
    "report",
    "serving",
    "training",
    "tuning",
    *MAY_IMPORT["training"],
}
# Read in place.py only. Other DIN_DIST_* say where things lie, not which process this is.
LAUNCH_VARIABLE = re.compile(r"(HOROVOD|SLURM|OMPI|PMIX?)_\w+|DIN_DIST_(LAUNCHER|JOB|BEATS_FD|FIND_CARD)")
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> Iterator[str]:
    """The full name of everything that a file imports, also by name at run time."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


@pytest.mark.parametrize("file", FILES)
def test_the_walls_hold(file):
    room = file.split("/")[0].removesuffix(".py")
    for name in imported(FILES[file]):
        top, _, rest = name.partition(".")
        if top == "din_dist" and rest != "__version__":
            assert rest.split(".")[0] in MAY_IMPORT[room] | LEAVES | {room}, f"{file} imports {name}"
        assert room == "cli" or not name.startswith(("absl.flags", "absl.app")), f"{file} imports {name}"
        assert file == "distributed/runtime.py" or top != "horovod", f"{file} imports {name}"


def test_horovod_is_seen_where_it_is_imported():
    """Else the wall around it would hold for want of eyes."""
    assert "horovod.tensorflow" in set(imported(FILES["distributed/runtime.py"]))


def launch_variables(tree: ast.Module) -> set[str]:
    """The launch variables that a file reads.

    A string that is such a name and nothing else counts as a reading. It is set instead, for Horovod or for children,
    as the target of an assignment (`os.environ["X"] = ...`), as the first argument of `os.environ.setdefault`, and as
    a key of a dict that is written out.
    """
    is_set: set[ast.expr] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            is_set.add(node.slice)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.setdefault":
            is_set.add(node.args[0])
        elif isinstance(node, ast.Dict):
            is_set.update(key for key in node.keys if key)
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in is_set
        if LAUNCH_VARIABLE.fullmatch(node.value)
    }


@pytest.mark.parametrize("file", FILES)
def test_launch_variables_are_read_in_one_place(file):
    assert file == "place.py" or not launch_variables(ast.parse(FILES[file].read_text()))


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ('os.environ["HOROVOD_RANK"]', True),
        ('os.environ.get("SLURM_PROCID", "0")', True),
        ('"PMI_RANK" in os.environ', True),
        ('NAME = "DIN_DIST_LAUNCHER"', True),
        ('os.environ["HOROVOD_RANK"] = "1"', False),
        ('os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")', False),
        ('{**os.environ, "HOROVOD_GLOO_IFACE": card}', False),
        ('os.environ.get("DIN_DIST_COMMIT")', False),
        ('"HOROVOD_RANK must be a number."', False),
    ],
)
def test_what_counts_as_reading_a_launch_variable(code, read):
    assert bool(launch_variables(ast.parse(code))) is read


def test_the_place_is_read_where_it_should_be():
    """Otherwise the pattern may match nothing."""
    found = launch_variables(ast.parse(FILES["place.py"].read_text()))
    assert found >= {"HOROVOD_RANK", "SLURM_JOB_NODELIST", "OMPI_MCA_orte_set_default_slots", "DIN_DIST_LAUNCHER"}


def test_operations_of_the_kernels_are_called_in_one_module() -> None:
    """By the library that TensorFlow loads; mapped_files.py and kernels/__init__.py call plain C functions."""
    calls = re.compile(r"library\(\)\.din_dist_\w+\(")
    assert [file for file, path in FILES.items() if calls.search(path.read_text())] == ["kernels/operations.py"]

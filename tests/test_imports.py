"""The walls of the house: which room may import which. Where a statement stands in its file does not matter."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "din_dist"
LEAVES = {
    *(
        "background_writer",
        "bounded_server",
        "config",
        "environment",
        "errors",
        "execution",
        "files",
        "kernels",
        "machine",
    ),
    *("mapped_files", "progress", "schema", "streams", "text", "training_state", "versions"),
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
MAY_IMPORT["telemetry"] = {"distributed", "layers", "data", "tables"}
MAY_IMPORT["evaluation"] = {"distributed", "metrics", "models", "layers", "data", "tables"}
MAY_IMPORT["training"] = {"evaluation", "telemetry", *MAY_IMPORT["evaluation"]}
MAY_IMPORT["report"] = {"training", *MAY_IMPORT["training"]}
MAY_IMPORT["serving"] = {"training", *MAY_IMPORT["training"]}
MAY_IMPORT["assembly"] = {"training", *MAY_IMPORT["training"]}
MAY_IMPORT["benchmark"] = {"assembly", *MAY_IMPORT["assembly"]}
MAY_IMPORT["cli"] = {"assembly", "benchmark", "cluster", "report", "serving", "training", *MAY_IMPORT["training"]}
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

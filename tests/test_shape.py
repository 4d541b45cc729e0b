"""The rules that keep the code easy to read: few parameters, short functions, no flag for how to compute, own names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

from tests.support.repository import ROOT

PACKAGE = ROOT / "din_dist"
MOST_PARAMETERS, MOST_LINES = 8, 60
HOW_TO_COMPUTE = {"compiled", "in_bfloat16", "native", "sum_over_ranks"}  # execution.py and `Mode` say it, once
# Still larger, or still told how to compute; none may be added.
LARGER: set[str] = set()
TOLD: set[str] = set()

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    """Every function of the package, by file and name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function):
                yield f"{path.relative_to(PACKAGE)}:{node.name}", node


def parameters(node: Function) -> list[str]:
    """The names of a function's parameters, but for `self` and `cls`."""
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def types(tree: ast.Module) -> Iterator[str]:
    """The names of a module's classes, type aliases and type variables."""
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from (name for name in map(ast.unparse, targets) if re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", name))


def test_no_signature_is_long_and_no_function() -> None:
    found = {
        name
        for name, node in functions()
        if len(parameters(node)) > MOST_PARAMETERS or (node.end_lineno or 0) - node.lineno >= MOST_LINES
    }
    assert found == LARGER


def test_no_function_is_told_how_to_compute() -> None:
    told = {
        name
        for name, node in functions()
        if HOW_TO_COMPUTE & set(parameters(node)) and not name.startswith("execution.py:")
    }
    assert told == TOLD


def test_no_two_types_have_one_name() -> None:
    modules = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in types(ast.parse(path.read_text())):
            modules[name].append(str(path.relative_to(PACKAGE)))
    assert not {name: found for name, found in modules.items() if len(found) > 1}

"""Every flag that is a path means the same in every command."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import din_dist
from din_dist import files

PACKAGE = Path(din_dist.__file__).parent
COMMANDS = sorted(
    path.stem
    for path in (PACKAGE / "cli").glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
)
LISTED = """
import importlib, json, sys
from absl import flags
module = importlib.import_module("din_dist.cli." + sys.argv[1])
values = [flags.FLAGS, *([module._FLAGS] if hasattr(module, "_FLAGS") else [])]
found = {name: type(each[name].parser).__name__ for each in values for name in each}
ours = {name for each in values for flag_module, names in each.flags_by_module_dict().items()
        for name in (flag.name for flag in names) if flag_module.startswith(("din_dist", "__main__"))}
print(json.dumps({name: kind for name, kind in found.items() if name in ours}))
"""
# Of what is called like a path and is none: the name of a column, of a split.
PATHS = ("_dir", "_path", "_file", "hosts_file", "tls_key", "tls_certificate")
OTHERS = {"extend", "features", "input", "log", "measured", "space", "user_histories", "warm_start_from"}


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_are_defined_in_one_way(command: str) -> None:
    done = subprocess.run([sys.executable, "-c", LISTED, command], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    others = OTHERS | ({"compare"} if command == "report" else set())  # `benchmark` compares forms by that name
    paths = {name for name in found if name.endswith(PATHS) or name in others}
    assert {name for name, kind in found.items() if kind == "PathParser"} == paths
    assert paths or command in ("sweep",)


IN_A_STORE = {  # what a command reads from a store, or writes there
    "evaluate": ["export_dir"],
    "export": ["export_dir", "retriever_export_dir"],
    "predict": ["export_dir", "predictions_dir"],
    "recommend": ["export_dir", "predictions_dir"],
    "report": ["report_path"],
    "serve": ["export_dir"],
}


@pytest.mark.parametrize(("command", "flag"), [(name, flag) for name, found in IN_A_STORE.items() for flag in found])
def test_what_may_lie_in_a_store_is_in_one_that_is_known(command: str, flag: str, tmp_path: Path) -> None:
    for uri, expected in (
        ("ftp://bucket/run", "must be a path of this machine, or begin with s3, gs, abfs, abfss, hdfs and ://."),
        ("s3://key:hidden@bucket/run", "must have no password, because URIs are saved with a job."),
        ("s3:///run", "must name a bucket or container."),
    ):
        words = [sys.executable, "-m", f"din_dist.cli.{command}", f"--{flag}={uri}"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"--{flag}: {expected}" in line
        assert "hidden" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "serve"])
def test_another_kind_of_storage_is_refused_in_one_line(command: str, tmp_path: Path) -> None:
    """And makes no folder of that name."""
    flag = {
        "predict": "input",
        "check_cluster": "hosts_file",
        "daily": "work_dir",
        "launch": "log_dir",
        "predict_scaling": "measured",
        "recommend": "input",
    }.get(command, "output_dir")
    words = [sys.executable, "-m", f"din_dist.cli.{command}", f"--{flag}=s3://bucket/run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"--{flag}: must be a path of this machine. Received: 's3://bucket/run', a URL. Mount that" in line
    assert list(tmp_path.iterdir()) == []


def test_tilde_is_the_home_in_every_command(tmp_path: Path) -> None:
    """A shell leaves it as it is behind `--flag=`."""
    words = [sys.executable, "-m", "din_dist.cli.report", "--output_dir=~/runs/first"]
    done = subprocess.run(words, env={"HOME": str(tmp_path), "PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path / "runs" / "first") in done.stderr
    words = [sys.executable, "-m", "din_dist.cli.report", "--output_dir=~no-such-user/first"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --output_dir: ~ stands for a home folder. Received: '~no-such-user/first'")


def test_one_function_knows_what_a_path_is() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "files.py":
            continue
        for node in ast.walk(ast.parse(files.read_text(path))):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            assert name not in ("expanduser", "urlsplit"), f"{path}:{node.lineno}"

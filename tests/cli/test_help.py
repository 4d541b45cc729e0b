"""`--help` of every command: all its flags, in groups by theme."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from absl import flags

from din_dist.cli import help
from tests.support.repository import ROOT

TRAINER = [
    *(
        "data",
        "synthetic data",
        "examples",
        "model",
        "models that find items",
        "optimizer",
        "schedule",
        "training",
        "warm start",
        "execution",
    ),
    *("checkpoints and recovery", "elastic", "evaluation", "logs and TensorBoard", "Prometheus", "experiment tracker"),
]
THEMES = {
    "benchmark": ["benchmark", "sweep", *TRAINER],
    "check_cluster": ["hosts", *TRAINER],
    "daily": ["days", "quality", "what is kept", "workers and hosts", "start and logs", *TRAINER],
    "evaluate": ["what to evaluate", "retrieval metrics", "result", "data", "examples", "evaluation"],
    "export": ["what to export", "finding items", "result", "data"],
    "launch": ["workers and hosts", "start and logs", *TRAINER],
    "predict": ["model", "input", "histories from prepared data", "data", "result", "logs"],
    "recommend": ["model", "input", "histories from prepared data", "data", "result", "logs"],
    "predict_scaling": ["measurement", "cluster"],
    "prepare_data": TRAINER,
    "report": ["report", "data"],
    "serve": [
        *("model", "addresses", "batching and queue", "timeouts", "connections", "limits of a request"),
    ],
    "train": TRAINER,
    "tune": ["search", *TRAINER],
}
# Prints the names of the flags that our own modules define.
LISTED = """
import importlib, json, sys
from absl import flags
module = importlib.import_module("din_dist.cli." + sys.argv[1])
values = [flags.FLAGS, *([module._FLAGS] if hasattr(module, "_FLAGS") else [])]
print(json.dumps([flag.name for each in values for name, found in each.flags_by_module_dict().items()
                  for flag in found if name.startswith(("din_dist", "__main__"))]))
"""


def test_every_command_is_listed_here() -> None:
    scripts = (ROOT / "din_dist" / "cli").glob("*.py")
    assert {path.stem for path in scripts if 'if __name__ == "__main__"' in path.read_text()} == THEMES.keys()


@pytest.mark.parametrize("command", THEMES)
def test_help_shows_all_flags_in_groups(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"din_dist.cli.{command}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    titles = re.findall(r"^(\S[^:\n]*):$", done.stdout, re.MULTILINE)
    assert sorted(titles) == sorted(title[0].upper() + title[1:] for title in THEMES[command])
    shown = re.findall(r"^  (?:-\w, )?--(?:\[no\])?(\w+): ", done.stdout, re.MULTILINE)
    listed = subprocess.run(
        [sys.executable, "-c", LISTED, command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(shown) == len(set(shown))
    assert set(shown) >= set(json.loads(listed.stdout))
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_a_flag_shows_its_default_once() -> None:
    values = flags.FlagValues()
    with help.theme("first", values):
        flags.DEFINE_integer("number", 5, "A number.", short_name="n", flag_values=values)
        flags.DEFINE_string("name", "", "A name. Default: that of the user.", flag_values=values)
    with help.theme("second", values):
        flags.DEFINE_boolean("quick", True, "Be quick.", flag_values=values)
    with help.theme("first", values):
        flags.DEFINE_list("names", ["a", "b"], "Names.", flag_values=values)
    assert help.page("Does it.\n", values).splitlines() == [
        "Does it.",
        "",
        "First:",
        "  -n, --number: A number. Default: 5.",
        "  --name: A name. Default: that of the user.",
        "  --names: Names. Default: a,b.",
        "",
        "Second:",
        "  --[no]quick: Be quick. Default: true.",
        "",
        "--flagfile=FILE reads flags from a file.",
    ]


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [(["--help"], True), (["-help"], True), (["--seed=1", "-?"], True), (["--helpfull"], False), (["help"], False)],
)
def test_what_asks_for_help(arguments: list[str], asked: bool) -> None:
    assert help.is_asked_for(arguments) is asked

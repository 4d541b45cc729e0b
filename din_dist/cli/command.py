"""Runs the commands under one name: `din-dist train ...` is `python -m din_dist.cli.train ...`.

`din-dist` alone lists them. Nothing of this imports TensorFlow. `din-dist train` prepares the data before, as
`launch/train.sh` does, unless `horovodrun` started it.
"""

from __future__ import annotations

import ast
import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from din_dist import __version__
from din_dist.errors import EXIT_INPUT_ERROR
from din_dist.place import name_program

COMMANDS = {
    "prepare": "prepare_data",
    "train": "train",
    "launch": "launch",
    "daily": "daily",
    "tune": "tune",
    "evaluate": "evaluate",
    "export": "export",
    "predict": "predict",
    "recommend": "recommend",
    "serve": "serve",
    "report": "report",
    "benchmark": "benchmark",
    "check-cluster": "check_cluster",
}
_COMPLETION = "completion"
_HELP = ("-h", "-help", "--help", "help")

_BASH = """\
_din_dist() {{
  local word=${{COMP_WORDS[COMP_CWORD]}}
  if ((COMP_CWORD == 1)); then
    mapfile -t COMPREPLY < <(compgen -W "{words}" -- "$word")
  else
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
  fi
}}
complete -o filenames -F _din_dist din-dist
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names; exits with its code, or with 2 if there is no such command."""
    word, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if word in _HELP:
        _print(_listing())
    elif word == "--version":
        _print(f"din_dist {__version__}")
    elif word == _COMPLETION:
        if rest != ["bash"]:
            _refuse(f"{_COMPLETION}: must be for bash. Received: {' '.join(rest)!r}. Run: din-dist {_COMPLETION} bash")
        _print(_BASH.format(words=" ".join(COMMANDS)).rstrip())
    elif word in COMMANDS:
        name_program(f"din-dist {word}")
        if word == "train" and (code := _prepare(rest)):
            sys.exit(code)
        sys.argv[1:] = rest
        runpy.run_module(f"din_dist.cli.{COMMANDS[word]}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(word.replace("_", "-"), COMMANDS, n=1)
        remedy = f"Did you mean {near[0]}?" if near else "Run din-dist, which lists them."
        _refuse(f"the first word must be a command. Received: {word!r}. {remedy}")


def _prepare(arguments: Sequence[str]) -> int:
    """Prepares the data of a process alone, in a process whose memory is free again; returns its exit code."""
    from din_dist.cli import help, launch
    from din_dist.place import Place

    if Place.from_environment().under_horovodrun or help.is_asked_for(arguments):
        return 0
    return launch.run_first("prepare_data", arguments)


def _listing() -> str:
    """Returns the page with a line for each command, from the first line of its docstring."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {_summary(module)}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "din-dist COMMAND [FLAGS]",
            "",
            *lines,
            "",
            "din-dist COMMAND --help lists its flags, din-dist --version prints the version.",
            f"For completion in bash: source <(din-dist {_COMPLETION} bash)",
        ]
    )


def _summary(module: str) -> str:
    """Returns what a command does, read from its source, because to import it takes longer."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return first.partition(": `")[0].partition("; `")[0].rstrip(".")


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as of `din-dist | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _refuse(text: str) -> None:
    print(f"din-dist: {text}", file=sys.stderr)
    sys.exit(EXIT_INPUT_ERROR)

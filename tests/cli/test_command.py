"""`din-dist`, which runs every command under one name."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from din_dist import __version__
from din_dist.cli import command
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT


def run(*words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from din_dist.cli.command import main; main()"]
    return subprocess.run([*program, *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_alone_it_lists_the_commands() -> None:
    shortest = 60.0
    for _ in range(3):  # other work on this machine may hold one up
        started = time.monotonic()
        done = run()
        shortest = min(shortest, time.monotonic() - started)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  train          Trains a model on prepared data\n" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(command.COMMANDS)
    assert all(len(line.split()) > 3 and "`" not in line for line in lines)
    assert done.stdout == run("--help").stdout
    assert shortest < 1, "it imports nothing that takes time"


def test_version() -> None:
    assert run("--version").stdout == f"din_dist {__version__}\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["trian"], "the first word must be a command. Received: 'trian'. Did you mean train?"),
        (["check_cluster"], "the first word must be a command. Received: 'check_cluster'. Did you mean check-cluster?"),
        (["--epochs=2"], "the first word must be a command. Received: '--epochs=2'. Run din-dist, which lists them."),
        (["completion", "csh"], "completion: must be for bash. Received: 'csh'. Run: din-dist completion bash"),
    ],
)
def test_a_wrong_word(words: list[str], error: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"din-dist: {error}\n")


def test_a_command_is_run_as_by_itself() -> None:
    for words in (["--help"], ["--dropout=2"]):
        ours = run("train", *words)
        alone = subprocess.run(
            [sys.executable, "-m", "din_dist.cli.train", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (ours.returncode, ours.stdout, ours.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert alone.returncode == 2


@pytest.mark.parametrize(
    ("flag", "error"),
    [
        ("--num_workers=x", "--num_workers: must be a whole number from 1. Received: 'x'."),
        ("--num_worker=2", "Unknown command line flag 'num_worker'. Did you mean --num_workers? See --help."),
        ("--epoch=2", "Unknown command line flag 'epoch'. Did you mean --epochs? See --help."),
        (
            "--flagfile=none",
            "--flagfile: must be a file that can be read. Received: 'none', No such file or directory.",
        ),
    ],
)
def test_the_launcher_speaks_under_the_name_that_it_was_called_by(flag: str, error: str) -> None:
    ours = run("launch", flag)
    assert (ours.returncode, ours.stdout, len(ours.stderr.splitlines())) == (2, "", 1)
    assert ours.stderr.startswith(f"din-dist launch: {error}")
    words = [sys.executable, "-m", "din_dist.cli.launch", flag]
    script = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert script.stderr.startswith(f"train.sh: {error}")


def test_the_usage_of_the_launcher_has_its_name() -> None:
    assert "\ndin-dist launch [--num_workers N] [trainer flags]\n" in run("launch", "--help").stdout


def test_completion() -> None:
    script = run("completion", "bash").stdout
    program = f"{script}\nCOMP_WORDS=(din-dist re) COMP_CWORD=1; _din_dist; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("recommend report\n", "")

"""`cli.export` as users run it: what it tells, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from din_dist.serving.bundle import Bundle
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT
from tests.support.small_log import small_config
from tests.support.trained_job import write_job

FLAGS_OF_JOB = "flags.txt"

# Runs the command again and again in one process: importing TensorFlow takes seconds.
COMMANDS = """
import contextlib, io, json, sys
from absl import flags
from din_dist.cli import entry, export

for arguments in json.loads(sys.argv[1]):
    flags.FLAGS.unparse_flags()
    sys.argv = ["export", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            entry.run(export.main)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def run_commands(*commands: list[str]) -> list[tuple[int, str, str]]:
    words = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_the_command_and_what_it_refuses(tmp_path: Path) -> None:
    folder = tmp_path
    write_job(small_config(folder), steps=(3, 7))
    run, exports = folder / "run", folder / "exports"
    without_data, damaged = (Path(shutil.copytree(run, folder / name)) for name in ("without_data", "damaged"))
    flags = (run / FLAGS_OF_JOB).read_text()
    (without_data / FLAGS_OF_JOB).write_text(flags.replace(str(folder / "prepared"), str(folder / "nowhere")))
    for path in damaged.glob("checkpoints/*/lookup.item.npy"):
        path.write_bytes(path.read_bytes()[:-1])
    half = Path(shutil.copytree(run, folder / "half"))
    next(half.glob("checkpoints/*07/lookup.item.npy")).unlink()

    def command(output_dir: Path, name: str, *more: str) -> list[str]:
        return [f"--output_dir={output_dir}", f"--export_dir={exports / name}", *more]

    whole, passed_over, *refused = run_commands(
        command(run, "whole", "--checkpoint_step=7"),
        command(half, "half"),
        command(run, "whole"),
        command(run, "other", "--checkpoint_step=5"),
        command(without_data, "other"),
        command(damaged, "other"),
        command(exports, "other"),
        [f"--output_dir={run}"],
        command(run, "other", "--checkpoint_step=-1"),
    )
    for (code, out, err), name, step in ((whole, "whole", 7), (passed_over, "half", 3)):
        assert code == 0, err
        told = json.loads(out.splitlines()[-1])
        manifest = Bundle.open(exports / name).manifest
        assert told["export_dir"] == str(exports / name)
        assert told["step"] == manifest.step == step
        assert told["max_difference"] == manifest.max_difference <= 1e-5
        assert told["digest"] == manifest.digest
        assert manifest.flags == flags
        assert manifest.summary is None
    assert "passed over: " in passed_over[2]
    assert "lookup.item.npy: must be as it was saved." in passed_over[2]
    messages = (
        "which holds an export. Add --overwrite to replace it, or name another one.",
        "--checkpoint_step: must be one whose checkpoint was kept. Received: 5. Choose among 3, 7.",
        "the data must be prepared before. Received: nothing there. Run: python -m din_dist.cli.prepare_data --dataset",
        "lookup.item.npy: must be as it was saved. Received: its content changed.",
        "flags.txt: holds the settings of a training job. Received: no such file.",
        "--export_dir: must name a folder. Received: ''.",
        "--checkpoint_step: must be an update, or 0. Received: -1.",
    )
    for (code, out, err), message in zip(refused, messages, strict=True):
        assert (code, out) == (2, ""), err
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert {path.name for path in exports.iterdir()} == {"whole", "half"}

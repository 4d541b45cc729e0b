"""A stand-in for the job of a trial: it writes validations by a formula, obeys SIGTERM and resumes, in milliseconds.

The best learning rate is 0.01. A dropout of 0.9 is refused. As a program with `--tune`, this module is the command tune
with such jobs: `python -m tests.support.trial_stub --tune --trials=3 ...`.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from pathlib import Path

NUM_STEPS = 6
SLOW = "slow"  # a file beside the folders of trials: its jobs wait after each step while it is there


def _flags(path: Path) -> dict[str, str]:
    """Returns the flags of a flagfile; of two with one name the last counts."""
    lines = [line.removeprefix("--").partition("=") for line in path.read_text().splitlines() if line[:2] == "--"]
    return {name: value for name, _, value in lines}


def job(flagfile: Path) -> int:
    """Runs the job of a trial; returns its exit code."""
    from din_dist.training.output_dir import claim_output_dir

    flags, asked = _flags(flagfile), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    folder = Path(flags["output_dir"])
    if flags["dropout"] == "0.9":
        print("error: --dropout: must be another. Received: 0.9. Give less.", file=sys.stderr)
        return 2
    lock = claim_output_dir(folder)
    done = int((folder / "saved").read_text()) if (folder / "saved").exists() else 0
    with (folder / "metrics.jsonl").open("a") as lines:
        for step in range(done + 1, NUM_STEPS + 1):
            gauc = 0.8 - 0.1 * abs(math.log10(float(flags["learning_rate"])) + 2) + 0.001 * step
            lines.write(json.dumps({"kind": "validation", "step": step, "gauc": gauc}) + "\n")
            lines.flush()
            with (folder / "pauses").open("a") as pauses:
                pauses.write(f"{step} {time.monotonic()}\n")
            time.sleep(0.05)
            while (folder.parent / SLOW).exists() and not asked:
                time.sleep(0.01)
            if asked:
                (folder / "saved").write_text(str(step))
                print("stopped: on request", file=sys.stderr)
                return 75
    lock.close()
    return 0


def main() -> None:
    word, *rest = sys.argv[1:]
    if word != "--tune":
        with contextlib.suppress(KeyboardInterrupt):
            sys.exit(job(Path(word.removeprefix("--flagfile="))))
    from din_dist.cli import entry, launch, tune

    sys.argv = ["tune", *rest]
    tune.trial_command = lambda *_: [sys.executable, "-m", "tests.support.trial_stub"]
    launch.run_first = lambda *_: 0  # the jobs need no data
    entry.run(tune.main)


if __name__ == "__main__":
    main()

"""Speed of this checkout against another's: `python -m tests.benchmarks.two_checkouts OTHER_CHECKOUT ROUNDS FLAGS`.

Both run `cli.benchmark FLAGS` at the same time, each on one core, and exchange cores from round to round. Each needs an
environment (`launch/setup.sh --test`) and prepared data. Prints the ratio of each round, and their median.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.repository import ROOT


def main(other: Path, rounds: int, flags: Sequence[str]) -> None:
    ratios = []
    for number in range(rounds):
        started = [_start(checkout, (place + number) % 2, flags) for place, checkout in enumerate((other, ROOT))]
        theirs, ours = map(_examples_per_second, started)
        ratios.append(ours / theirs)
        print(f"{ours:,.0f} here, {theirs:,.0f} there: {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f} of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f}")


def _start(checkout: Path, core: int, flags: Sequence[str]) -> subprocess.Popen[str]:
    command = ["taskset", "-c", str(core), ".venv/bin/python", "-m", "din_dist.cli.benchmark", *flags]
    return subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _examples_per_second(process: subprocess.Popen[str]) -> float:
    printed, _ = process.communicate()
    return float(json.loads(printed.splitlines()[-1])["examples_per_second"])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3:])

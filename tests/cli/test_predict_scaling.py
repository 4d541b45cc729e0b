"""The command that predicts: its table, its last line, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.benchmark_report import benchmark_report
from tests.support.commands import assert_one_line
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT

LINK = ("--bandwidth_gbits=25", "--latency_us=50")


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "din_dist.cli.predict_scaling", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "one.json"
    path.write_text(f"a line before it\n{json.dumps(benchmark_report())}\n")
    return path


def test_it_says_that_it_predicts_and_what_dominates(measured: Path) -> None:
    done = run(f"--measured={measured}", *LINK)
    assert done.returncode == 0, done.stderr
    first, _, _, *rows = done.stderr.splitlines()
    assert first.startswith("PREDICTION, not a measurement: 25 Gbit/s a worker, 50 us latency")
    assert [row.split()[0] for row in rows] == ["8", "16", "32", "64", "128", "256", "512", "1,024"]
    assert rows[0].endswith("  compute")
    assert rows[-1].endswith("  rows of others")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kind"] == "prediction"
    assert found["measured"]["compute_seconds"] == 0.1
    assert found["cluster"]["bandwidth_bits_per_second"] == 25e9
    assert [entry["world_size"] for entry in found["predictions"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    # 0.1 s and 8 * 3 ms + 2 * 20 ms for rows; 5 all-reduces of 3 + 14 hops, 2 gathers of 3 + 7, 50 us each; bytes.
    first_step = 0.1 + 0.064 + 0.00525 + (2.1e6 + 3.5e6) * 8 / 25e9 * 1538 / 1448
    assert found["predictions"][0]["step_seconds"] == pytest.approx(first_step)


def test_other_workers_and_software_a_message(measured: Path) -> None:
    done = run(f"--measured={measured}", *LINK, "--workers=2,3", "--overhead_us=1000")
    two, three = json.loads(done.stdout)["predictions"]
    assert (two["world_size"], three["world_size"]) == (2, 3)
    assert two["seconds"]["message_overhead"] == pytest.approx(7 * 0.001)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--bandwidth_gbits: must be a number above 0. Received: None. Give Gbit/s"),
        (("--bandwidth_gbits=0",), "--bandwidth_gbits: must be a number above 0. Received: 0.0."),
        (("--bandwidth_gbits=inf",), "--bandwidth_gbits: must be a number above 0. Received: inf."),
        (("--bandwidth_gbits=25",), "--latency_us: must be a number from 0 up. Received: None. Give microseconds"),
        ((*LINK, "--overhead_us=-1"), "--overhead_us: must be a number from 0 up. Received: -1.0."),
        ((*LINK, "--workers=8,many"), "--workers: must be whole numbers from 1 up. Received: 'many'."),
        ((*LINK, "--workers="), "--workers: must name at least one number. Received: []."),
        (LINK, "--measured: must name a file. Received: ''. Save the last line"),
        ((*LINK, "--measured=nowhere.json"), "Received: 'nowhere.json': No such file or directory. Save the last line"),
        ((*LINK, "--measured=README.md"), "README.md: must end in a line of JSON. Received: '"),
    ],
)
def test_wrong_flags_give_one_line(flags: tuple[str, ...], message: str) -> None:
    assert_one_line(run(*flags), message)


def test_a_report_of_two_workers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    path.write_text(json.dumps(benchmark_report(world_size=2)))
    assert_one_line(run(f"--measured={path}", *LINK), f"{path}: must come from one worker. Received: world_size 2.")

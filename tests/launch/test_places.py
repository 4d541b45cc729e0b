"""Every launcher does the same through a link, from any folder, beneath any name."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.fake_checkout import FakeCheckout
from tests.support.repository import ROOT

# For a quick end; otherwise a flag that there is not.
FLAGS = {"test.sh": "--version", "train.sh": "--num_workers=0", "horovodrun.sh": "--num_workers=0"}
LAUNCHERS = sorted(path.name for path in (ROOT / "launch").glob("*.sh") if path.name != "common.sh")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> FakeCheckout:
    checkout = FakeCheckout(tmp_path_factory.mktemp("places"))
    checkout.put_wheel()
    checkout.env["DIN_DIST_DEVICE"] = "cpu"
    assert checkout.run("setup.sh", "--test").returncode == 0
    return checkout


def said(checkout: FakeCheckout, command: str | Path, folder: Path, flag: str) -> tuple[int, str, str]:
    """What it ends with and prints, less the names of launchers and those that are new each time."""
    words = ["bash", "-c", 'cd "$1"; "$2" "$3"', "", folder, command, flag]
    done = subprocess.run(words, env={**checkout.env, "CDPATH": "/usr:/"}, capture_output=True, text=True)
    others = r"\b\w+\.sh\b|another-name|/tmp/tmp\.\w+|\blogs/[0-9-]+"
    return done.returncode, re.sub(others, "", done.stdout), re.sub(others, "", done.stderr)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_through_a_link(checkout: FakeCheckout, tmp_path: Path, name: str) -> None:
    launcher = checkout.root / "launch" / name
    flag = FLAGS.get(name, "--no_such_flag")
    direct = said(checkout, launcher, tmp_path, flag)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / name).symlink_to(os.path.relpath(launcher, elsewhere))
    (elsewhere / "another-name").symlink_to(name)
    (elsewhere / "launchers").symlink_to(launcher.parent)
    for command in (elsewhere / name, f"./{name}", "./another-name", f"launchers/{name}"):
        assert said(checkout, command, elsewhere, flag) == direct, command

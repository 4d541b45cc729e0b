"""launch/setup.sh: its error lines, what it asks pip for, and when it does nothing."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.fake_checkout import FakeCheckout, finished, path_without


@pytest.fixture
def checkout(tmp_path: Path) -> FakeCheckout:
    return FakeCheckout(tmp_path)


@pytest.fixture
def with_wheel(checkout: FakeCheckout) -> FakeCheckout:
    checkout.put_wheel()
    return checkout


@pytest.mark.parametrize("command", ["g++", "make", "patch"])
def test_missing_compiler(checkout: FakeCheckout, tmp_path: Path, command: str) -> None:
    error = checkout.error("setup.sh", PATH=path_without(tmp_path / "bin", command))
    assert error == (
        f"build_horovod.sh: building Horovod takes {command}, which is not on PATH. "
        f"Install it (Debian, Ubuntu: apt-get install {command})."
    )
    assert not checkout.venv.exists(), "checked before anything is made"


def test_no_compiler_is_needed_with_a_cached_wheel(with_wheel: FakeCheckout, tmp_path: Path) -> None:
    assert with_wheel.run("setup.sh", PATH=path_without(tmp_path / "bin", "g++", "make", "patch")).returncode == 0


def test_missing_nvcc(checkout: FakeCheckout, tmp_path: Path) -> None:
    path = path_without(tmp_path / "bin", "nvcc")
    assert checkout.error("setup.sh", "--gpu", PATH=path, HOROVOD_CUDA_HOME="/no/cuda") == (
        "build_horovod.sh: --gpu takes nvcc, which is neither in /no/cuda/bin nor on PATH. "
        "Install the CUDA toolkit, or set HOROVOD_CUDA_HOME to it."
    )
    assert not checkout.venv.exists()


def test_old_python(checkout: FakeCheckout) -> None:
    checkout.write_python(version="3.9")
    assert checkout.error("setup.sh") == (
        f"setup.sh: din_dist needs Python 3.11 or newer. Found: 3.9 ({checkout.env['PYTHON']}). "
        f"Install a newer one and name it: PYTHON=python3.11 {checkout.root}/launch/setup.sh"
    )
    assert not checkout.venv.exists()


def test_newer_python(with_wheel: FakeCheckout) -> None:
    with_wheel.write_python(version="3.12")
    assert with_wheel.run("setup.sh").returncode == 0


def test_no_python(checkout: FakeCheckout) -> None:
    assert checkout.error("setup.sh", PYTHON="python3.99") == (
        "setup.sh: din_dist needs Python 3.11 or newer. Found: no python3.99. "
        "Install it (Debian, Ubuntu: apt-get install python3 python3-venv), or set PYTHON."
    )


def test_no_venv_module(checkout: FakeCheckout) -> None:
    checkout.write_python(ensurepip=1)
    assert checkout.error("setup.sh") == (
        f"setup.sh: {checkout.env['PYTHON']} lacks the venv module. "
        "Install it (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON to another Python."
    )
    assert not checkout.venv.exists()


def test_environment_of_another_python(checkout: FakeCheckout) -> None:
    (checkout.venv / "lib" / "python3.14").mkdir(parents=True)
    assert checkout.error("setup.sh") == (
        f"setup.sh: {checkout.venv} was made with python3.14, not Python 3.11. "
        "Remove that folder, or set DIN_DIST_VENV to another place."
    )


def test_unknown_flag(checkout: FakeCheckout) -> None:
    assert (
        checkout.error("setup.sh", "--gpus")
        == "setup.sh: unknown flag --gpus. Usage: launch/setup.sh [--gpu] [--test] [--wheels=DIR]"
    )


def test_unreachable_index(with_wheel: FakeCheckout) -> None:
    """With the real Python and pip."""
    pip = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": "/dev/null"}
    for name in ("PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        with_wheel.env.pop(name, None)
    error = with_wheel.error("setup.sh", PYTHON=sys.executable, **pip)
    log = with_wheel.venv / "din_dist_setup.log"
    assert error == (
        "setup.sh: the Python package index cannot be reached. "
        f"Connect to it, or set PIP_INDEX_URL to one that can be reached. Log: {log}"
    )
    assert "127.0.0.1" in log.read_text()


def test_another_failure_of_pip(with_wheel: FakeCheckout, tmp_path: Path) -> None:
    (tmp_path / "fake_pip_install").write_text("#!/bin/sh\necho 'ERROR: No space left on device'\nexit 1\n")
    assert with_wheel.error("setup.sh") == (
        "setup.sh: pip failed: ERROR: No space left on device. Correct this and run again. "
        f"Log: {with_wheel.venv}/din_dist_setup.log"
    )


def test_what_is_installed(with_wheel: FakeCheckout) -> None:
    done = with_wheel.run("setup.sh", "--test")
    assert (done.returncode, done.stdout) == (0, ""), "stdout belongs to the summary of train.sh"
    pins = f"--require-hashes -c {with_wheel.root}/launch/constraints.txt --no-build-isolation"
    [wheel] = with_wheel.cache.glob("wheels/*/*.whl")
    assert with_wheel.pip_calls() == [
        "pip install --require-hashes --no-deps -r /dev/fd/63",  # pip itself
        f"pip install {pins} tensorflow-cpu setuptools",
        f"pip install --force-reinstall --no-deps --no-build-isolation {wheel} --editable {with_wheel.root}",
        f"pip install {pins} -r /dev/fd/63",
    ]


def test_gpu_replaces_the_tensorflow_that_owns_the_same_files(checkout: FakeCheckout, tmp_path: Path) -> None:
    checkout.put_wheel("gpu")
    assert checkout.run("setup.sh", "--gpu", FAKE_INSTALLED="tensorflow-cpu").returncode == 0
    _, uninstall, tensorflow, *_ = checkout.pip_calls()
    assert uninstall == "pip uninstall --yes tensorflow tensorflow-cpu horovod"
    assert "tensorflow[and-cuda]" in tensorflow
    assert "tensorflow[and-cuda]==2.21.0" in checkout.asked()


def test_an_environment_for_gpus_serves_where_none_is_found(checkout: FakeCheckout) -> None:
    """As in an image, whose launcher runs on a node without."""
    checkout.put_wheel("gpu")
    checkout.run("setup.sh", "--gpu", "--test")
    calls = checkout.pip_calls()
    for flags in ([], ["--test"]):
        assert checkout.run("setup.sh", *flags).returncode == 0
    assert checkout.pip_calls() == calls
    checkout.put_wheel("cpu")
    checkout.run("setup.sh", DIN_DIST_DEVICE="cpu")
    assert "tensorflow-cpu" in checkout.pip_calls()[len(calls) + 1], "who wants no GPU gets no CUDA"


def test_venv_elsewhere(with_wheel: FakeCheckout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    assert with_wheel.run("setup.sh", DIN_DIST_VENV=str(elsewhere)).returncode == 0
    assert (elsewhere / "bin" / "python").exists()
    assert not with_wheel.venv.exists()


def test_again_it_does_nothing_at_once(with_wheel: FakeCheckout) -> None:
    with_wheel.run("setup.sh", "--test")
    calls = with_wheel.pip_calls()
    started = time.monotonic()
    for flags in (["--test"], []):  # what has the test dependencies will do without them
        done = with_wheel.run("setup.sh", *flags)
        assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 3
    assert with_wheel.pip_calls() == calls


@pytest.mark.parametrize(
    "file", ["setup.cfg", "launch/constraints.txt", "launch/horovod/01-leave-out-xla-operations.patch"]
)
def test_again_after_a_change(with_wheel: FakeCheckout, file: str) -> None:
    with_wheel.run("setup.sh")
    with (with_wheel.root / file).open("a") as changed:
        changed.write("\n# changed\n")
    calls = with_wheel.pip_calls()
    assert with_wheel.run("setup.sh").returncode == 0
    assert with_wheel.pip_calls() == calls * 2


def test_more_is_installed_when_more_is_asked_for(with_wheel: FakeCheckout) -> None:
    with_wheel.run("setup.sh")
    with_wheel.run("setup.sh", "--test")
    assert {"pytest", "tensorflow-cpu==2.21.0"} <= set(with_wheel.asked())


def test_a_set_up_that_was_cut_off_is_done_afresh(with_wheel: FakeCheckout) -> None:
    process = with_wheel.start("setup.sh", FAKE_PIP_SECONDS="30")
    while not with_wheel.pip_calls():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    finished(process)
    pip = with_wheel.venv / "lib" / "python3.11" / "site-packages" / "pip"
    pip.mkdir(parents=True)
    assert with_wheel.run("setup.sh").returncode == 0
    assert not pip.exists(), "it may be half a pip"
    _, _, tensorflow, _, ours = with_wheel.pip_calls()
    assert "--ignore-installed" in tensorflow and "--ignore-installed" in ours
    assert with_wheel.run("setup.sh").stderr == ""


def test_a_moved_environment_is_done_afresh(with_wheel: FakeCheckout, tmp_path: Path) -> None:
    with_wheel.run("setup.sh")
    moved = with_wheel.venv.rename(tmp_path / "moved")
    assert with_wheel.run("setup.sh", DIN_DIST_VENV=str(moved)).returncode == 0
    _, tensorflow, _, ours = with_wheel.pip_calls()[4:]
    assert "--ignore-installed" in tensorflow and "--ignore-installed" in ours


def test_horovod_is_the_wheel_that_was_built(with_wheel: FakeCheckout) -> None:
    """Named with the rest: pip would otherwise build another from its index, where it ignores what is installed."""
    with_wheel.run("setup.sh")
    [wheel] = with_wheel.cache.glob("wheels/*/*.whl")
    horovods = [line for line in with_wheel.asked() if "horovod" in line]
    assert horovods == [f"{wheel} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"]


def test_two_at_once(with_wheel: FakeCheckout) -> None:
    processes: list[subprocess.Popen[str]] = [with_wheel.start("setup.sh", FAKE_PIP_SECONDS="0.5") for _ in range(2)]
    assert [finished(process).returncode for process in processes] == [0, 0]
    assert len(with_wheel.pip_calls()) == 4, "the second had nothing left to do"

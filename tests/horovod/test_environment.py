"""Which variables reach workers on other hosts, and how."""

from __future__ import annotations

import errno
import multiprocessing.synchronize
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
from horovod.runner.common.util import safe_shell_exec
from horovod.runner.common.util.env import PASS_ENVIRONMENT, is_passed, to_script


@pytest.mark.parametrize(
    "name",
    [
        *("HOROVOD_SECRET_KEY", "HOROVOD_RANK", "DIN_DIST_LAUNCHER", "DIN_DIST_DEVICE", "NCCL_DEBUG", "GLOO_X"),
        *("TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS", "CUDA_LAUNCH_BLOCKING", "OMP_NUM_THREADS", "KMP_AFFINITY", "MKL_X"),
        *("PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME", "TMPDIR"),
        *("XDG_CACHE_HOME", "VIRTUAL_ENV", "NVIDIA_VISIBLE_DEVICES", "KERAS_BACKEND", "TFDS_DATA_DIR"),
    ],
)
def test_what_such_a_job_needs(name: str) -> None:
    assert is_passed(name)


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_SECRET"),
        *("GITHUB_TOKEN", "DATABASE_URL", "http_proxy", "HTTPS_PROXY", "KUBECONFIG", "SSH_AUTH_SOCK", "PGPASSWORD"),
        *("NVIDIA_API_KEY", "TF_VAR_database", "TF_TOKEN_app_terraform_io", "KERAS_API_KEY", "DIN_DIST_PASSWORD"),
        *("CUDA_VISIBLE_DEVICES", "BASH_FUNC_x%%", "OLDPWD", "HOROVOD_A.B", "LC_A B", "HOME;reboot", "SLURM_JOB_ID"),
        *("HOROVOD_SECRET_KEY_FILE", "MYPATH", "PATHS"),
    ],
)
def test_what_it_does_not(name: str) -> None:
    assert not is_passed(name)


def test_what_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASS_ENVIRONMENT, "AWS_SECRET_ACCESS_KEY,AWS_REGION")
    assert is_passed("AWS_SECRET_ACCESS_KEY")
    assert is_passed("AWS_REGION")
    assert not is_passed("AWS_SESSION_TOKEN")


def test_a_shell_makes_of_the_script_what_was_meant(tmp_path: Path) -> None:
    """Whatever is in the values; what is run has nothing to read."""
    values = {"DIN_DIST_A": "two\nlines, 'quotes', $HOME `id` \\", "DIN_DIST_B": "", "DIN_DIST_C": "ä€"}
    script = to_script({**values, "OTHER": "no"}, str(tmp_path), "sh -c 'pwd; env; cat'")
    done = subprocess.run(["sh", "-s"], input=script, env={}, capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.startswith(f"{tmp_path}\n")
    assert "OTHER" not in done.stdout
    for name, value in values.items():
        assert f"\n{name}={value}\n" in done.stdout


def test_what_is_read_by_a_command_stands_in_no_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    command = 'sh -c \'cat; tr "\\0" " " </proc/$PPID/cmdline; echo $DIN_DIST_A\''
    code = safe_shell_exec.execute(command, env={"DIN_DIST_A": "variable", "PATH": "/usr/bin:/bin"}, stdin="script\n")
    said = capfd.readouterr().out
    assert code == 0
    assert "script\n" in said
    assert "variable\n" in said
    assert said.count("variable") == said.count("script") == 1
    assert safe_shell_exec.execute("cat", env={"PATH": "/usr/bin:/bin"}) == 0, "without a script the input is empty"


@pytest.fixture
def no_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose /dev/shm cannot be written to."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", refuse)


@pytest.mark.usefixtures("no_semaphores")
def test_a_command_takes_no_semaphore() -> None:
    assert safe_shell_exec.execute("exit 3") == 3


@pytest.mark.usefixtures("no_semaphores")
def test_a_command_ends_when_it_is_told(tmp_path: Path) -> None:
    told, ready = threading.Event(), tmp_path / "ready"
    codes: list[int] = []

    def run() -> None:
        codes.append(safe_shell_exec.execute(f"touch {ready}; exec sleep 60", events=[told]))

    runner = threading.Thread(target=run)
    runner.start()
    while runner.is_alive() and not ready.exists():
        time.sleep(0.02)
    told.set()
    runner.join(timeout=20)
    assert codes == [128 + signal.SIGTERM]


def test_the_exit_code_of_an_ended_command_is_kept() -> None:
    with subprocess.Popen(["sleep", "60"]) as command:
        safe_shell_exec.terminate_executor_shell_and_children(command)
        assert command.wait(timeout=20) == -signal.SIGTERM

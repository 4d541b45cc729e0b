"""What libraries read from the environment cannot break a command."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import signal
import subprocess
from pathlib import Path

import pytest

from din_dist import environment, place, versions
from din_dist.cli import entry
from din_dist.config import DataConfig
from din_dist.data.prepared import data_dir
from din_dist.errors import InputError
from din_dist.files import local_path
from tests.support.commands import assert_one_line, command
from tests.support.patience import PATIENCE

PLACE = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "1"}
MEETING = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "4000"}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*place.WORKER_VARIABLES, *environment.SET]:
        monkeypatch.setenv(name, "")  # so that it is given back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("given", [{}, PLACE | MEETING, PLACE | MEETING | {"HOROVOD_ELASTIC": "1"}, MEETING])
def test_all_of_a_place_or_nothing(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment.settle()
    assert place.Place.from_environment().rank == int(given.get("HOROVOD_RANK", "0"))
    place.forget()
    assert not any(name.startswith("HOROVOD_") for name in os.environ)


@pytest.mark.parametrize("ignored", [False, True])
def test_nohup_is_obeyed(monkeypatch: pytest.MonkeyPatch, ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        assert (signal.SIGHUP in environment.ending_signals()) is not ignored
        assert {signal.SIGTERM, signal.SIGINT} <= set(environment.ending_signals())
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("given", "received"),
    [
        ({"HOROVOD_SIZE": "2"}, "no HOROVOD_RANK, beside HOROVOD_SIZE: left over"),
        ({"HOROVOD_ELASTIC": "1"}, "no HOROVOD_RANK, beside HOROVOD_ELASTIC: left over"),
        (PLACE, "no HOROVOD_GLOO_RENDEZVOUS_ADDR"),
        (PLACE | MEETING | {"HOROVOD_RANK": "first"}, "HOROVOD_RANK='first'"),
        (PLACE | MEETING | {"HOROVOD_RANK": "-1"}, "HOROVOD_RANK='-1'"),
        (PLACE | MEETING | {"HOROVOD_SIZE": ""}, "HOROVOD_SIZE=''"),
        (PLACE | MEETING | {"HOROVOD_SIZE": "1"}, "HOROVOD_RANK=1, HOROVOD_SIZE=1"),
        (PLACE | MEETING | {"HOROVOD_LOCAL_SIZE": "3"}, "HOROVOD_LOCAL_SIZE=3"),
    ],
)
def test_what_is_left_over_from_another_job(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], received: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as refused:
        environment.settle()
    assert "HOROVOD_*: horovodrun gives its workers all of these variables. Received: " in str(refused.value)
    assert received in str(refused.value)
    assert f"Run: unset {' '.join(name for name in place.WORKER_VARIABLES if name in given)}" in str(refused.value)


def start(name: str, folder: Path, *flags: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, folder, "--epochs=1", *flags),
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_what_other_projects_leave_in_the_environment(tmp_path: Path) -> None:
    """No HOME but one with a keras.json for another backend in other numbers."""
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text('{"backend": "torch", "floatx": "float64", "epsilon": 1}')
    variables = {
        "HOME": str(tmp_path),
        "KERAS_BACKEND": "",
        "PROMETHEUS_MULTIPROC_DIR": "/nonexistent",
        "prometheus_multiproc_dir": "/nonexistent",
        "TF_USE_LEGACY_KERAS": "1",
    }
    for name in ("prepare_data", "train"):
        done = start(name, tmp_path, "--metrics_port=0", variables=variables)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["epochs"] == 1


def test_another_backend_is_refused(tmp_path: Path) -> None:
    assert_one_line(
        start("train", tmp_path, variables={"KERAS_BACKEND": "jax"}),
        "KERAS_BACKEND: must be tensorflow, on which din_dist is built. Received: 'jax'. Run: unset KERAS_BACKEND",
    )


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/launch/test_wheels.py has commands that meet this."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"TensorFlow: must be installed, .* Received: none. Install din_dist\[cpu\]"):
        entry.import_tensorflow()
    with pytest.raises(InputError, match=r"Horovod: must be installed .* Received: none. Install din_dist\[distrib"):
        versions.require_horovod()


def test_why_a_library_ended_the_process_is_told(tmp_path: Path) -> None:
    """In C++, while it was imported, with its standard error held back."""
    done = start("train", tmp_path, variables={"TF_XLA_FLAGS": "--nonsense"})
    assert done.returncode == 1
    assert "--nonsense" in done.stderr


def test_a_worker_alone_with_the_variables_of_another_job(tmp_path: Path) -> None:
    assert_one_line(start("train", tmp_path, variables={"HOROVOD_RANK": "x"}), "Received: no HOROVOD_SIZE, beside")


def test_no_home_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a service of systemd has it, of a user without an entry in /etc/passwd."""

    def no_entry(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="--data_dir: lies in the home folder unless it is given. Received: no"):
        data_dir(DataConfig())
    with pytest.raises(InputError, match="--output_dir: ~ stands for a home folder. Received: '~/run', and no such"):
        local_path("~/run", "output_dir")
    assert data_dir(DataConfig(data_dir="/data")) == Path("/data")


def test_a_place() -> None:
    assert place.Place.from_environment({}) == place.Place()
    assert place.Place().alone
    found = place.Place.from_environment(
        PLACE | MEETING | {"HOROVOD_HOSTNAME": "gpu7", "HOROVOD_ELASTIC": "1", "DIN_DIST_BEATS_FD": "9"}
    )
    assert (found.rank, found.size, found.local_rank, found.local_size) == (1, 2, 0, 1)
    assert (found.rendezvous, found.host, found.elastic, found.beats) == (("127.0.0.1", 4000), "gpu7", True, 9)
    assert not found.alone


def test_what_the_launcher_gives_its_agents() -> None:
    launcher = place.LauncherAddress("10.0.0.1", 4000, 2.5)
    found = place.Place.from_environment(place.variables_of_agents(launcher, key="secret", job="one"))
    assert (found.launcher, found.key, found.job) == (launcher, "secret", "one")
    assert "secret" not in repr(found)

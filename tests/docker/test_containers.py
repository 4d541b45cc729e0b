"""What docker/ says and the scripts that run in containers. The containers themselves: tests/docker/smoke.py."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from din_dist import __version__
from tests.support.fake_checkout import write_script
from tests.support.programs import free_port, missing
from tests.support.repository import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())
# By version for people, and by digest: a tag can be moved to another image.
PINNED = re.compile(r"docker\.io/[a-z/]+:v?[0-9]+\.[0-9.]+[a-z0-9.-]*@sha256:[0-9a-f]{64}")


def test_base_images_are_pinned() -> None:
    bases = re.findall(r"^ARG \w+_BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 3
    assert all(PINNED.fullmatch(base) for base in bases)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert [base for base, _ in stages] == ["${CPU_BASE}", "${GPU_BUILD_BASE}", "${GPU_BASE}", "${CPU_BASE}"]


def test_images_carry_the_version_of_the_package() -> None:
    assert re.findall(r'image\.version="(.*)"', DOCKERFILE) == [__version__] * 2
    assert (
        COMPOSE["services"]["launcher"]["image"] == COMPOSE["services"]["worker"]["image"] == f"din-dist:{__version__}"
    )


def test_the_last_stages_hold_no_compiler_and_no_root() -> None:
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[3:]:
        assert "g++" not in stage
        assert "\nUSER 1000:1000\n" in stage
        assert "COPY --from=" in stage
        assert "HEALTHCHECK" in stage and 'ENTRYPOINT ["tini", "--"]' in stage


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_each_service_is_bounded_and_seen_from_this_machine_only(name: str) -> None:
    service = COMPOSE["services"][name]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["image"] == f"din-dist:{__version__}" or PINNED.fullmatch(service["image"])
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (DOCKER / source).is_dir()


def sshd() -> None:
    if not Path("/usr/sbin/sshd").exists():
        missing("sshd is not installed: apt-get install openssh-server")
    if not os.geteuid():
        Path("/run/sshd").mkdir(exist_ok=True)  # which sshd wants of root


@contextlib.contextmanager
def serving(home: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """docker/sshd.sh, from when it answers."""
    sshd()
    (home / ".ssh").mkdir(parents=True)
    port = free_port()
    variables = {**os.environ, "HOME": str(home), "DIN_DIST_SSH_PORT": str(port), "TMPDIR": str(home)}
    with subprocess.Popen(
        [DOCKER / "sshd.sh", "--make_key"], env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                        assert connection.recv(4) == b"SSH-"
                        break
                except OSError:
                    assert time.monotonic() < deadline and process.poll() is None
                    time.sleep(0.05)
            yield process, variables
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_the_jobs_own_ports_are_seen_in_its_network_only() -> None:
    """NCCL's and the metrics' let in whoever reaches them."""
    for name in ("worker", "launcher"):
        assert "ports" not in COMPOSE["services"][name]
        assert COMPOSE["services"][name]["networks"] == ["job"]


def test_sshd_makes_keys_for_a_shared_volume_and_a_host_key_for_itself(tmp_path: Path) -> None:
    with serving(tmp_path / "first") as (_, variables):
        keys = Path(variables["HOME"]) / ".ssh"
        assert {path.name for path in keys.iterdir()} == {"id_ed25519", "id_ed25519.pub", "authorized_keys"}
        assert (keys / "id_ed25519").stat().st_mode & 0o077 == 0
        first = (keys / "authorized_keys").read_text()
        (host_key,) = Path(variables["HOME"]).glob("tmp.*/host_key.pub")
        assert host_key.read_text() != first
    with serving(tmp_path / "second") as (_, variables):
        assert (Path(variables["HOME"]) / ".ssh" / "authorized_keys").read_text() != first


def test_a_container_that_is_stopped_lets_its_workers_end_first(tmp_path: Path) -> None:
    """With a stand-in for the agent, which takes a second to end."""
    agent = tmp_path / "din_dist" / "cluster" / "agent.py"
    agent.parent.mkdir(parents=True)
    agent.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print('saved'), sys.exit()))\n"
        "print('ready', flush=True)\nsignal.pause()\n"
    )
    command = [sys.executable, "-m", "din_dist.cluster.agent"]
    with contextlib.ExitStack() as stack:
        process, variables = stack.enter_context(serving(tmp_path / "home"))
        (own,) = Path(variables["HOME"]).glob("tmp.*")

        def start(server: str) -> subprocess.Popen[str]:
            """As the server does for who logs in, which root may not."""
            told = {**os.environ, "DIN_DIST_SSHD": server}
            worker = subprocess.Popen(command, cwd=tmp_path, env=told, stdout=subprocess.PIPE, text=True)
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            assert worker.stdout
            assert worker.stdout.readline() == "ready\n"
            return worker

        worker, of_another = start(str(own)), start("another")
        process.terminate()
        assert worker.stdout
        assert (worker.wait(timeout=30), worker.stdout.read()) == (0, "saved\n")
        assert process.wait(timeout=30) == 75
        assert of_another.poll() is None


def test_sshd_without_keys_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [DOCKER / "sshd.sh"], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"sshd.sh: {tmp_path}/.ssh/authorized_keys must hold the launcher's public key. Received: no such file. Mount "
        "a folder with it.\n"
    )


def test_health_is_that_of_sshd(tmp_path: Path) -> None:
    with serving(tmp_path / "home") as (_, variables):
        check = [DOCKER / "healthcheck.sh"]
        assert subprocess.run(check, env=variables, check=False).returncode == 0
        elsewhere = {**variables, "DIN_DIST_SSH_PORT": str(free_port())}
        assert subprocess.run(check, env=elsewhere, check=False, capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("index", "expected"), [("0", "train.sh --epochs=1\n"), ("1", "sshd.sh \n"), ("7", "sshd.sh \n")]
)
def test_the_first_pod_of_an_indexed_job_runs_the_launcher(tmp_path: Path, index: str, expected: str) -> None:
    for name in ("launch/train.sh", "docker/sshd.sh"):
        (tmp_path / name).parent.mkdir()
        write_script(tmp_path / name, f'#!/bin/sh\necho "{Path(name).name} $*"\n')
    done = subprocess.run(
        [DOCKER / "indexed_pod.sh", "--epochs=1"],
        cwd=tmp_path,
        env={**os.environ, "JOB_COMPLETION_INDEX": index},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == expected


def test_a_pod_outside_of_an_indexed_job_is_refused(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "JOB_COMPLETION_INDEX"}
    done = subprocess.run([DOCKER / "indexed_pod.sh"], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "JOB_COMPLETION_INDEX: must be set, as Kubernetes does for an Indexed Job" in done.stderr

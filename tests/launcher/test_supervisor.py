"""The supervisor, with a made-up agent that ends before its link does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from din_dist.errors import EXIT_RETRY
from din_dist.launcher.supervisor import Supervisor

# Its child has the link after it. What the child does: by the first argument.
AGENT = """
import os, pathlib, socket, sys, time
from din_dist.launcher.link import KEY_VARIABLE, Address, introduce
address = Address.from_environment()
link = socket.create_connection((address.host, address.port))
seal, _ = introduce(link, os.environ[KEY_VARIABLE], {"host": "", "local_rank": 0, "rank": 0})
if os.fork():
    os._exit(int(sys.argv[2]))
if sys.argv[1] == "ends":
    time.sleep(.5)
    link.sendall(seal.encode({"ended": int(sys.argv[2])}))
elif sys.argv[1] == "goes_on":
    heard = b""
    while b"stop" not in heard:
        heard += link.recv(4096)
    pathlib.Path("stopped").touch()
elif sys.argv[1] == "has_ended":
    link.sendall(seal.encode({"ended": 0}))
    while link.recv(4096):
        pass
"""


def run(way: str, code: int) -> int:
    command = [sys.executable, "-c", AGENT, way, str(code)]
    return Supervisor(command, horovod=False, address="127.0.0.1", stall_timeout_seconds=60).run()


@pytest.mark.parametrize("code", [0, 2, 75])
def test_what_an_agent_said_last_is_heard_after_its_end(capfd: pytest.CaptureFixture[str], code: int) -> None:
    assert run("ends", code) == code
    assert capfd.readouterr().err == ""


def test_workers_that_are_left_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("goes_on", 137) == EXIT_RETRY
    assert Path("stopped").exists()
    said = "train.sh: horovodrun ended before its workers: they stop after this step and a checkpoint\n"
    assert capfd.readouterr().err == said


def test_a_job_that_is_done_is_done_whatever_link_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    """As to a host that was cut off in the last moment."""
    assert run("has_ended", 0) == 0
    assert capfd.readouterr().err == ""

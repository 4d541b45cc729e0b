"""The supervisor, with a made-up agent that ends before its link does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from din_dist.cluster.supervisor import Supervisor
from din_dist.errors import EXIT_RETRY

# Its child has the link after it. What the child does: by the first argument.
AGENT = """
import os, pathlib, socket, sys, time
from din_dist.cluster.link import introduce
from din_dist.place import Place
place = Place.from_environment()
address = place.launcher
if sys.argv[1] == "beset":
    strangers = [socket.create_connection((address.host, address.port)) for _ in range(300)]
    for stranger in strangers[::2]:
        try:
            stranger.sendall(b"0" * 32)  # of a nonce, which never ends
        except OSError:
            pass
    most, ends = 0, time.monotonic() + 2
    while time.monotonic() < ends:
        most = max(most, len(os.listdir(f"/proc/{os.getppid()}/fd")))
        time.sleep(.01)
    before = 0
    while before != (before := len(os.listdir(f"/proc/{os.getppid()}/fd"))):
        time.sleep(.5)
    pathlib.Path("files").write_text(f"{most} {before}")
link = socket.create_connection((address.host, address.port))
seal, _ = introduce(link, place.key, {"host": sys.argv[3], "local_rank": 0, "rank": 0})
if sys.argv[1] == "is_silent":
    time.sleep(60)
if os.fork():
    os._exit(int(sys.argv[2]))
if sys.argv[1] == "ends":
    time.sleep(.5)
    link.sendall(seal.encode({"ended": int(sys.argv[2])}))
elif sys.argv[1] == "leaves":
    link.sendall(seal.encode({"ended": 75}))
elif sys.argv[1] == "goes_on":
    heard = b""
    while b"stop" not in heard:
        heard += link.recv(4096)
    pathlib.Path("stopped").touch()
elif sys.argv[1] == "parts":
    link.sendall(seal.encode({"parted": True}))
elif sys.argv[1] == "is_changed_on_its_way":
    link.sendall(seal.encode({"ended": 0}).replace(b"0}", b"1}"))
    link.recv(4096)
elif sys.argv[1] == "has_ended":
    link.sendall(seal.encode({"ended": 0}))
    while link.recv(4096):
        pass
"""


class AnyHosts:
    """The hosts of an elastic job, none of which is silent or refused."""

    silent: ClassVar[set[str]] = set()
    refused: ClassVar[set[str]] = set()

    async def refresh(self, *_: object) -> None:
        pass


def run(
    way: str, code: int, address: str = "127.0.0.1", host: str = "", stall_timeout_seconds: float = 60, **more: Any
) -> int:
    command = [sys.executable, "-c", AGENT, way, str(code), host]
    return Supervisor(
        command, horovod=False, address=address, stall_timeout_seconds=stall_timeout_seconds, **more
    ).run()


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


def test_an_elastic_job_whose_last_workers_left_can_be_run_again() -> None:
    """Horovod's driver takes for success that no host is left to run on."""
    assert run("leaves", 0, hosts=AnyHosts()) == EXIT_RETRY
    assert run("has_ended", 0, hosts=AnyHosts()) == 0


def test_an_agent_gets_in_among_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert run("beset", 75) == 75
    most, at_rest = (int(number) - before for number in Path("files").read_text().split())
    assert at_rest < 64 + 30
    # What is accepted at once (16) is met, sent away and closed in turns of the loop.
    assert 64 < most < 64 + 5 * 16


def test_a_line_that_changed_on_its_way_is_not_heeded(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("is_changed_on_its_way", 3) == 3
    assert "exit code 1" not in capfd.readouterr().err


def test_a_job_whose_launcher_was_cut_off_can_be_run_again(capfd: pytest.CaptureFixture[str]) -> None:
    """All workers have said that they do not hear it; what Horovod's driver makes of that is another matter."""
    assert run("parts", 1, address="127.0.0.2") == EXIT_RETRY
    assert capfd.readouterr().err == (
        "train.sh: no worker gave a sign of life for 60 s: this machine is cut off from them, and they save and stop. "
        "The same command resumes.\n"
    )


def test_a_terminal_does_not_obey_a_hosts_name(capfd: pytest.CaptureFixture[str]) -> None:
    run("is_silent", 0, host="\x1b[2Jone\ntwo", stall_timeout_seconds=1)
    said = "train.sh: worker 0 on \\x1b[2Jone two gave no sign of life for 1 s: it counts as lost\n"
    assert capfd.readouterr().err.startswith(said)


def test_what_horovodrun_said_is_repeated_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    script = r"import sys; sys.stderr.write('ssh: \x1b[2Jhost\n'); sys.exit(3)"
    command = [sys.executable, "-c", script]
    assert Supervisor(command, horovod=True, address="127.0.0.1", stall_timeout_seconds=60).run() == 3
    assert capfd.readouterr().err == "ssh: \\x1b[2Jhost\n"


def test_on_one_machine_nothing_is_cut_off() -> None:
    assert run("parts", 1) == 1

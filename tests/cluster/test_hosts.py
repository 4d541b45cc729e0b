"""Hosts as they are written down, and the list of those that answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from din_dist.cluster.hosts import HostList, HostSlots, is_local, parse_hosts, read_hosts_file, wait_for_ssh
from din_dist.errors import InputError
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT


def test_hosts_of_a_flag() -> None:
    assert parse_hosts("gpu1:8, gpu2") == [HostSlots("gpu1", 8), HostSlots("gpu2", 1)]
    assert parse_hosts("gpu1:8,gpu2", default_slots=4) == [HostSlots("gpu1", 8), HostSlots("gpu2", 4)]


def test_hosts_of_a_file_in_each_form(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\na:2\nb slots=3  # as MPI has it\nc\tslots = 4 max_slots=8\n\nd\n")
    expected = [HostSlots("a", 2), HostSlots("b", 3), HostSlots("c", 4), HostSlots("d", 7)]
    assert read_hosts_file(str(path), default_slots=7) == expected


@pytest.mark.parametrize("line", ["a slots=0", "a slots", "a b", "a:2 slots=2", "a slots=2 other=1"])
def test_wrong_lines_of_a_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"b:1\n{line}\n")
    with pytest.raises(InputError, match=f"line 2: {line}. Correct it."):
        read_hosts_file(str(path))


@pytest.mark.parametrize("text", ["gpu1:", "gpu1:0", "gpu1:8:8", "a b", "", "gpu1,,gpu2", "-x:1"])
def test_wrong_hosts_of_a_flag(text: str) -> None:
    with pytest.raises(InputError, match="--hosts: must be HOST or HOST:SLOTS, comma-separated, or slurm. Received: "):
        parse_hosts(text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "binary"):
        with pytest.raises(
            InputError, match=r"--hosts_file: must be a file .* which cannot be read. Correct the path."
        ):
            read_hosts_file(str(path))


def test_what_is_local() -> None:
    assert is_local("localhost")
    assert is_local("127.0.0.2")
    assert not is_local("203.0.113.7")  # of a network that is kept for examples
    assert not is_local("no.such.host.invalid")


WITHOUT_NAME_SERVER = """
import socket
from din_dist.cluster.hosts import is_local
def unknown(name):
    raise socket.gaierror
socket.gethostbyname = unknown
print(is_local("localhost"), is_local("other.test"))
"""


def test_localhost_needs_no_name_server() -> None:
    """In a process of its own: answers of name servers are remembered."""
    command = [sys.executable, "-c", WITHOUT_NAME_SERVER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "True False\n"


@contextlib.contextmanager
def greeter(greeting: bytes) -> Iterator[int]:
    """The port of a server that says so much and hangs up."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(greeting)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def refreshed(hosts: HostList, path: Path, at_work: set[str]) -> list[str]:
    asyncio.run(hosts.refresh(at_work))
    return path.read_text().splitlines()


def host_list(folder: Path, lines: str, port: int, patience_seconds: float) -> HostList:
    listed = folder / "listed"
    listed.write_text(lines)
    return HostList(["cat", str(listed)], folder / "hosts", port, patience_seconds)


def test_hosts_that_do_not_answer_are_left_out_until_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("din_dist.cluster.hosts.is_local", lambda name: False)
    monkeypatch.setattr("din_dist.cluster.hosts.NOTED_SECONDS", 0.0)
    with greeter(b"SSH-2.0-test\r\n") as port:
        hosts = host_list(tmp_path, "127.0.0.1:4\n127.0.0.2:4\n127.0.0.3\nhalf a li", port, patience_seconds=0.0)
        path = tmp_path / "hosts"
        # The first answers; of the third a worker was heard of just now.
        hosts.patience_seconds = 60.0
        assert refreshed(hosts, path, {"127.0.0.3"}) == ["127.0.0.1:4", "127.0.0.3:1"]
        assert hosts.silent == {"127.0.0.2"}
    # One that answered a moment ago may be busy: it keeps its workers for a while.
    assert refreshed(hosts, path, set()) == ["127.0.0.1:4", "127.0.0.3:1"]
    hosts.patience_seconds = 0.0
    assert refreshed(hosts, path, set()) == []
    assert hosts.silent == {"127.0.0.1", "127.0.0.2", "127.0.0.3"}


def test_a_host_of_this_machine_needs_no_ssh(tmp_path: Path) -> None:
    hosts = host_list(tmp_path, "localhost:2\n", port=1, patience_seconds=60)
    assert refreshed(hosts, tmp_path / "hosts", set()) == ["localhost:2"]


def test_a_host_comes_back_when_the_workers_that_it_had_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hosts"
    hosts = host_list(tmp_path, "localhost:1\n127.0.0.1:1\n", port=1, patience_seconds=60)
    assert refreshed(hosts, path, set()) == ["localhost:1", "127.0.0.1:1"]
    both = {"localhost", "127.0.0.1"}
    assert refreshed(hosts, path, both) == ["localhost:1", "127.0.0.1:1"], "workers are no reason to leave it out"
    (tmp_path / "listed").write_text("localhost:1\n")
    assert refreshed(hosts, path, both) == ["localhost:1"]
    (tmp_path / "listed").write_text("localhost:1\n127.0.0.1:1\n")
    assert refreshed(hosts, path, both) == ["localhost:1"], "its worker has not ended yet"
    assert refreshed(hosts, path, {"localhost"}) == ["localhost:1"], "Horovod may not have noted that it has"
    asyncio.run(hosts.refresh({"localhost"}, {"127.0.0.1"}))
    assert path.read_text() == "localhost:1\n", "Horovod still waits for it"
    monkeypatch.setattr("din_dist.cluster.hosts.NOTED_SECONDS", 0.0)
    assert refreshed(hosts, path, {"localhost"}) == ["localhost:1", "127.0.0.1:1"]


def test_a_host_that_is_refused_stays_out(tmp_path: Path) -> None:
    hosts = host_list(tmp_path, "localhost:2\n127.0.0.1:2\n", port=1, patience_seconds=60)
    hosts.refused.add("localhost")
    assert refreshed(hosts, tmp_path / "hosts", {"localhost"}) == ["127.0.0.1:2"]
    assert hosts.silent == set()


def test_without_a_list_the_last_one_stays(tmp_path: Path) -> None:
    hosts = host_list(tmp_path, "localhost:2\n", port=1, patience_seconds=60)
    assert refreshed(hosts, tmp_path / "hosts", set()) == ["localhost:2"]
    (tmp_path / "listed").unlink()
    with pytest.raises(InputError, match=r"cat must print the hosts\. Received: .*listed: No such file"):
        asyncio.run(hosts.refresh(set()))
    assert (tmp_path / "hosts").read_text() == "localhost:2\n"


@pytest.fixture
def all_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("din_dist.cluster.hosts.is_local", lambda name: False)


def test_nobody_waits_for_this_machine() -> None:
    assert asyncio.run(wait_for_ssh(["localhost", "no.such.host.invalid"], 1, 0.0)) == ["no.such.host.invalid"]


def test_a_name_that_is_not_known_yet_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise OSError

    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostbyname", unknown)
        assert not is_local("ip6-localhost.test")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    assert is_local("ip6-localhost.test")


def test_a_name_server_that_is_away_holds_up_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher gives signs of life meanwhile. Without them the workers would stop."""
    asked = []
    is_back = threading.Event()

    def wait_in_vain(name: str, *_: object, **__: object) -> NoReturn:
        asked.append(name)
        is_back.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "gethostbyname", wait_in_vain)
    monkeypatch.setattr(socket, "getaddrinfo", wait_in_vain)
    monkeypatch.setattr("din_dist.cluster.hosts.PROBE_SECONDS", 0.3)
    hosts = host_list(tmp_path, "away1.test\naway2.test\n", port=1, patience_seconds=0.0)

    async def refresh() -> float:
        refreshing = [asyncio.create_task(hosts.refresh(set()))]
        refreshing.append(asyncio.create_task(hosts.refresh(set())))
        longest, before = 0.0, time.monotonic()
        while not all(task.done() for task in refreshing):
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        return longest

    assert asyncio.run(refresh()) < 30
    is_back.set()
    assert hosts.silent == {"away1.test", "away2.test"}
    names = sorted(name for name in asked if name.endswith(".test"))  # other threads of this process may ask too
    assert names == ["away1.test", "away2.test"], "one question a name at a time"


@pytest.mark.usefixtures("all_elsewhere")
def test_waiting_for_ssh() -> None:
    with greeter(b"SSH-2.0-test\r\n") as port:
        names = ["127.0.0.1", "no.such.host.invalid"]
        assert asyncio.run(wait_for_ssh(names, port, 0.0)) == ["no.such.host.invalid"]


@pytest.mark.usefixtures("all_elsewhere")
def test_who_takes_a_connection_need_not_be_an_ssh_server() -> None:
    """As a proxy before a container that has not started."""
    for greeting in (b"", b"HTTP/1.1 503\r\n"):
        with greeter(greeting) as port:
            assert asyncio.run(wait_for_ssh(["127.0.0.1"], port, 0.0)) == ["127.0.0.1"]


@pytest.mark.usefixtures("all_elsewhere")
def test_waiting_ends_when_ssh_answers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def answer_late() -> list[str]:
        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-test\r\n")
            writer.close()

        waiting = asyncio.create_task(wait_for_ssh(["127.0.0.1"], port, 60.0))
        await asyncio.sleep(0.5)
        async with await asyncio.start_server(greet, "127.0.0.1", port):
            return await waiting

    assert asyncio.run(answer_late()) == []

"""Hosts as they are written down, and the list of those that answer."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.launcher.hosts import HostList, HostSlots, is_local, parse_hosts, read_hosts_file


def test_hosts_of_a_flag() -> None:
    assert parse_hosts("gpu1:8, gpu2") == [HostSlots("gpu1", 8), HostSlots("gpu2", 1)]


@pytest.mark.parametrize("text", ["gpu1:", "gpu1:0", "gpu1:8:8", "a b", "", "gpu1,,gpu2", "-x:1"])
def test_wrong_hosts_of_a_flag(text: str) -> None:
    with pytest.raises(InputError, match="--hosts: must be HOST or HOST:SLOTS, comma-separated. Received: "):
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


def refreshed(hosts: HostList, path: Path, at_work: set[str]) -> list[str]:
    asyncio.run(hosts.refresh(at_work))
    return path.read_text().splitlines()


def host_list(folder: Path, lines: str, port: int, patience_seconds: float) -> HostList:
    listed = folder / "listed"
    listed.write_text(lines)
    return HostList(["cat", str(listed)], folder / "hosts", port, patience_seconds)


def test_hosts_that_do_not_answer_are_left_out_until_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("din_dist.launcher.hosts.is_local", lambda name: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hosts = host_list(tmp_path, "127.0.0.1:4\n127.0.0.2:4\n127.0.0.3\nhalf a li", port, patience_seconds=0.0)
        path = tmp_path / "hosts"
        # The first answers; of the third a worker was heard of just now.
        hosts._patience_seconds = 60.0
        assert refreshed(hosts, path, {"127.0.0.3"}) == ["127.0.0.1:4", "127.0.0.3:1"]
        assert hosts.silent == {"127.0.0.2"}
    # One that answered a moment ago may be busy: it keeps its workers for a while.
    assert refreshed(hosts, path, set()) == ["127.0.0.1:4", "127.0.0.3:1"]
    hosts._patience_seconds = 0.0
    assert refreshed(hosts, path, set()) == []
    assert hosts.silent == {"127.0.0.1", "127.0.0.2", "127.0.0.3"}


def test_a_host_of_this_machine_needs_no_ssh(tmp_path: Path) -> None:
    hosts = host_list(tmp_path, "localhost:2\n", port=1, patience_seconds=60)
    assert refreshed(hosts, tmp_path / "hosts", set()) == ["localhost:2"]


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

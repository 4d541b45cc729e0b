"""The store of our Horovod: what strangers get from it, how much they can fill, and what members are told."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from horovod.runner.common.util import codec, network
from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.elastic import worker
from horovod.runner.elastic.registration import WorkerStateRegistry
from horovod.runner.elastic.rendezvous import HostUpdates, create_rendezvous_handler
from horovod.runner.http import authentication, http_server
from horovod.runner.http.http_client import StoreClient
from horovod.runner.http.http_server import RendezvousServer, Values

from tests.support.repository import ROOT

KEY = "k" * 64


class Driver:
    """As much of an elastic job's as the store asks."""

    def __init__(self) -> None:
        self.host_updates = HostUpdates()
        self.coordinator = SlotInfo("host", 0, 1, 0, 2, 2, 1)
        self.ready: list[tuple[str, int]] = []

    def get_coordinator_info(self) -> SlotInfo:
        return self.coordinator

    def record_ready(self, host: str, slot: int) -> None:
        self.ready.append((host, slot))

    def get_slot_info(self, host: str, slot: int) -> SlotInfo:
        return SlotInfo(host, 3, slot, 1, 4, 2, 2)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Iterator[int]:
    monkeypatch.setenv(authentication.KEY_VARIABLE, KEY)
    server = RendezvousServer()
    yield server.start("127.0.0.1", create_rendezvous_handler(driver))
    server.stop()


@pytest.fixture
def client(port: int) -> StoreClient:
    return StoreClient("127.0.0.1", port)


def say(port: int, *pieces: bytes) -> bytes:
    """What is answered to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        for piece in pieces:
            link.sendall(piece)
        answer = b""
        while piece := link.recv(65536):
            answer += piece
    return answer


def test_a_member_writes_reads_and_gives_up(client: StoreClient) -> None:
    assert client.request("GET", "global", "0") is None
    client.request("PUT", "global", "0", b"\0any bytes\xff")
    assert client.request("GET", "global", "0") == b"\0any bytes\xff"
    client.request("DELETE", "global", "0")
    assert client.request("GET", "global", "0") is None


class Trap:
    """Runs on whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_strangers_neither_write_nor_read_nor_run_anything(client: StoreClient, port: int, tmp_path: Path) -> None:
    client.request("PUT", "global", "0", b"address")
    trap = codec.dumps_base64(([Trap(tmp_path / "sprung")], b""), to_ascii=False)
    forged = f"{authentication.NONCE_HEADER}: {'0' * 32}-1\r\n{authentication.DIGEST_HEADER}: {'0' * 64}\r\n".encode()
    for line in (
        b"PUT /worker_addresses/host:0 HTTP/1.1",
        b"PUT /global/0 HTTP/1.1",
        b"GET /global/0 HTTP/1.1",
        b"GET /worker_addresses/host:0 HTTP/1.1",
        b"GET /rank_and_size/host:0 HTTP/1.1",
        b"GET /host_updates/host:0: HTTP/1.1",
        b"DELETE /global/0 HTTP/1.1",
    ):
        for headers in (b"", forged):
            body = trap if line.startswith(b"PUT") else b""
            answer = say(port, line + b"\r\nContent-Length: %d\r\n%s\r\n" % (len(body), headers) + body)
            assert answer.startswith(b"HTTP/1.0 403 "), (line, answer)
            assert b"address" not in answer
    assert say(port, b"HEAD / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.0 501 "), "no files of the folder"
    assert not (tmp_path / "sprung").exists()
    assert client.request("GET", "global", "0") == b"address"


def signed(method: str, path: str, nonce: str, body: bytes = b"", key: str = KEY) -> bytes:
    digest = authentication.request_digest(key.encode(), method, path, nonce, body)
    headers = f"{authentication.NONCE_HEADER}: {nonce}\r\n{authentication.DIGEST_HEADER}: {digest}\r\n"
    return f"{method} {path} HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_request_counts_once_and_as_it_was_said(port: int) -> None:
    nonce = "a" * 32
    request = signed("PUT", "/global/0", f"{nonce}-7", b"mine")
    assert say(port, request).startswith(b"HTTP/1.0 200 ")
    for changed in (
        request,  # said again
        signed("PUT", "/global/0", f"{nonce}-6", b"mine"),  # or overtaken
        signed("PUT", "/global/0", f"{nonce}-8", b"mine").replace(b"mine", b"your"),
        signed("PUT", "/global/0", f"{nonce}-8", b"mine").replace(b"/global/0", b"/global/1"),
        signed("PUT", "/global/0", f"{nonce}-8", b"mine").replace(b"PUT", b"GET"),
        signed("PUT", "/global/0", f"{nonce}-8", b"mine").replace(b"-8", b"-9"),
        signed("PUT", "/global/0", f"{nonce}-8", b"mine", key="x" * 64),
        signed("PUT", "/global/0", "no nonce", b"mine"),
    ):
        assert say(port, changed).startswith(b"HTTP/1.0 403 "), changed
    assert say(port, signed("PUT", "/global/0", f"{nonce}-8", b"mine")).startswith(b"HTTP/1.0 200 ")
    assert say(port, signed("GET", "/a/b/../c", f"{nonce}-9")).startswith(b"HTTP/1.0 400 ")


def test_an_answer_must_be_the_servers_own(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Not that of who sits between, nor one that changed on its way."""
    monkeypatch.setattr(authentication, "answer_digest", lambda *_: "0" * 64)
    client = StoreClient("127.0.0.1", port)
    monkeypatch.setattr(authentication, "is_same", lambda one, other: other != "0" * 64)
    with pytest.raises(OSError, match="not from the server of this job"):
        client.request("GET", "global", "0")


def test_no_key_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("", "short"):
        monkeypatch.setenv(authentication.KEY_VARIABLE, key)
        with pytest.raises(RuntimeError, match=f"must have at least 32 characters. Received: {len(key)}"):
            RendezvousServer().start("127.0.0.1")
        with pytest.raises(RuntimeError, match="HOROVOD_SECRET_KEY"):
            StoreClient("127.0.0.1", 1)


def test_nonces_are_bounded() -> None:
    """One more client than fit is refused: forgetting another would let its requests be said again."""
    nonces = authentication.Nonces(most_clients=2)
    assert [nonces.accept(f"{digit * 32}-0") for digit in "abca"] == [True, True, False, False]
    assert nonces.accept("b" * 32 + "-1")
    assert not any(nonces.accept(text) for text in ("", "a" * 32, f"{'a' * 32}-", f"{'a' * 32}--1", f"{'a' * 31}-9"))


def test_values_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MOST_VALUES", 3)
    monkeypatch.setattr(http_server, "MOST_VALUE_BYTES", 10)
    values = Values()
    assert [values.put("one", key, b"1234") for key in "abc"] == [True, True, False]
    assert values.put("one", "a", b"12"), "in the place of more"
    assert [values.put("two", key, b"") for key in "ab"] == [True, False]
    values.remove("one", "b")
    values.remove("one", "b")
    assert values.put("two", "b", b"12345678")
    values.remove_scope("two")
    assert values.put("two", "b", b"12345678")
    assert values.get("two", "a") is None
    values.clear()
    assert values.put("three", "c", b"1234567890")


def test_what_is_too_long_is_not_read(port: int) -> None:
    huge = b"PUT /global/0 HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n"
    assert say(port, huge).startswith(b"HTTP/1.0 413 ")
    for length in (b"-1", b"1e3", b"9" * 400, b"\xb2"):
        assert say(port, b"PUT /global/0 HTTP/1.1\r\nContent-Length: %s\r\n\r\n" % length).startswith(b"HTTP/1.0 413 ")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        started = time.monotonic()
        with pytest.raises(OSError):  # hung up on, not listened to
            for _ in range(2000):
                link.sendall(b"X-Header: " + b"x" * 50_000 + b"\r\n")
                time.sleep(0.001)
        assert time.monotonic() - started < 15


def files_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def threads() -> int:
    return sum(thread.name.startswith("Thread-") for thread in threading.enumerate())


def test_strangers_fill_neither_threads_nor_files(client: StoreClient, port: int) -> None:
    before, files = threads(), files_open()
    strangers = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(300)]
    for number, stranger in enumerate(strangers):
        if number % 2:
            with contextlib.suppress(OSError):  # it had given way
                stranger.sendall(b"GET / HTTP")
    client.request("PUT", "global", "0", b"members still get in")
    until = time.monotonic() + 20  # those that gave way end a moment later
    while max(threads() - before, files_open() - files - len(strangers)) > 64 + 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert threads() - before <= 64 + 2
    assert files_open() - files - len(strangers) <= 64 + 2
    for stranger in strangers:
        stranger.close()
    assert client.request("GET", "global", "0") == b"members still get in"


def test_a_byte_now_and_then_does_not_keep_a_place(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server.RendezvousHTTPServer, "patience_seconds", 1.0)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        until = time.monotonic() + 20
        with pytest.raises(OSError):
            while time.monotonic() < until:
                link.sendall(b"G")
                time.sleep(0.2)
        assert time.monotonic() < until


# --- Elastic jobs. ---


def test_a_new_rank(client: StoreClient, driver: Driver) -> None:
    assert client.request("GET", "rank_and_size", "host:1") == b"3,4,1,2,1,2"
    assert driver.ready == [("host", 1)]
    with pytest.raises(OSError, match="refused with 400"):
        client.request("GET", "rank_and_size", "host:x")


def later(work: Callable[[], Any]) -> Any:
    return ThreadPoolExecutor(1).submit(work)


def test_the_coordinator_is_told_of_changes_of_hosts(client: StoreClient, driver: Driver) -> None:
    def ask(slot: str, number: object) -> dict[str, int]:
        asker = StoreClient(client._addr, client._port)
        return json.loads(asker.request("GET", "host_updates", f"{slot}:{number}", timeout=30) or "{}")

    driver.host_updates.announce(1, worker.HostUpdateResult.added)
    assert ask("host:1", "") == {"number": 1}
    waiting, other = later(lambda: ask("host:1", 1)), later(lambda: ask("host:0", 1))
    time.sleep(0.3)
    assert not waiting.done(), "the update that it knows is none"
    driver.host_updates.announce(2, worker.HostUpdateResult.mixed)
    assert waiting.result(timeout=10) == {"number": 2, "timestamp": 2, "result": 3}
    assert not other.done(), "it does not coordinate"
    driver.coordinator = SlotInfo("host", 0, 0, 0, 2, 2, 1)
    assert other.result(timeout=10)["number"] == 2


def test_changes_that_the_ranks_were_assigned_by_are_no_news(driver: Driver) -> None:
    """Else every rank would join twice. One that came while they were assigned is news."""
    updates = driver.host_updates
    updates.announce(1, 1)
    updates.heed(1)
    assert updates.after(0, lambda: True, seconds=0) is None
    updates.announce(2, 2)
    updates.heed(1)
    update = updates.after(0, lambda: True, seconds=0)
    assert update
    assert update["number"] == 2
    assert updates.after(0, lambda: False, seconds=0.1) is None


def test_a_worker_asks_and_hears(port: int, driver: Driver) -> None:
    driver.host_updates.announce(1, worker.HostUpdateResult.removed)  # before it came
    heard: list[tuple[int, object]] = []
    manager = worker.WorkerNotificationManager()
    manager.register_listener(mock.Mock(on_hosts_updated=lambda *what: heard.append(what)))
    manager.init("127.0.0.1", port, "host", 1)
    time.sleep(0.5)
    driver.host_updates.announce(5, worker.HostUpdateResult.added)
    deadline = time.monotonic() + 20
    while not heard:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert heard == [(5, worker.HostUpdateResult.added)]


def test_a_rank_that_asks_again_is_counted_once() -> None:
    """Its first answer was lost. Counted twice, it would have the others begin without a third."""
    done: list[str] = []
    asked = SimpleNamespace(finished=lambda: False, resume=lambda: done.append("resume"), stop=lambda: None)
    registry = WorkerStateRegistry(asked, SimpleNamespace(is_blacklisted=lambda host: False))
    asked.resume = lambda: (done.append("resume"), registry.reset(3))
    registry.reset(3)
    calls = [later(lambda slot=slot: registry.record_ready("host", slot)) for slot in (0, 1, 1, 1)]
    time.sleep(0.5)
    assert not done
    calls.append(later(lambda: registry.record_ready("host", 2)))
    for call in calls:
        call.result(timeout=10)
    assert done == ["resume"]


# --- Pickles. ---


def test_nothing_unpickles(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    with pytest.raises(RuntimeError, match="no services that unpickle"):
        network.Wire(b"key")
    with pytest.raises(RuntimeError, match="no services that unpickle"):
        network.BasicService("service", b"key", None)
    with pytest.raises(RuntimeError, match="no services that unpickle"):
        network.BasicClient("service", {}, b"key", 0)
    with pytest.raises(RuntimeError, match="unpickles nothing"):
        codec.loads_base64(codec.dumps_base64(trap))
    pickle.load(io.BytesIO(trap))
    assert (tmp_path / "sprung").exists(), "it would have been sprung"


def test_the_client_uses_no_proxy(client: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    client.request("PUT", "global", "0", b"straight")


def test_what_still_unpickles_is_known() -> None:
    """Each with its reason in 16-unpickle-nothing.patch. Spark, Ray and other frameworks are not here."""
    package = Path(network.__file__).parents[3]
    elsewhere = ("spark", "ray", "torch", "mxnet", "data", "keras", "_keras")
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] not in elsewhere and "pickle.load" in path.read_text(encoding="utf-8")
    }
    assert found == {"runner/util/cache.py", "tensorflow/functions.py"}
    for path in (ROOT / "din_dist").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"import (cloud)?pickle|allow_pickle=True|hvd\.(broadcast|allgather)_object", text), path

"""Clients that keep the server waiting, over real sockets: they have bounds, and others are answered."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from din_dist.serving.http.parse import RANK
from tests.support.stand_in_model import Running, ask, running

PATH = "/v1/models/din_dist"
ONE = {"instances": [{"history_item_ids": ["a"], "candidate_item_id": "x"}]}
# An answer of 1.3 MB: what may not be written as it is takes six characters.
LARGE = {
    "signature_name": RANK,
    "inputs": {"history_item_ids": [], "candidate_item_ids": [f"{number:04}" + "\x7f" * 40 for number in range(4_000)]},
}


def body_of(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def head_of(length: int) -> bytes:
    return f"POST {PATH}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def request(value: Any) -> bytes:
    body = body_of(value)
    return head_of(len(body)) + body


def connected(server: Running, stack: contextlib.ExitStack, port: int = 0) -> socket.socket:
    return stack.enter_context(socket.create_connection(("127.0.0.1", port or server.port), timeout=20))


def narrow(server: Running, stack: contextlib.ExitStack) -> socket.socket:
    """A client for which the kernel keeps little."""
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", server.port))
    return client


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_hung_up_on(client: socket.socket) -> bool:
    """Reads what is there; whether it ends."""
    client.settimeout(0.01)
    try:
        while client.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_clients_that_do_not_read_are_hung_up_on() -> None:
    """Not at all, or a byte at a time. Their answers are given up, and others are answered before and after."""
    with running(client_timeout_seconds=1.0, max_connections=8) as server, contextlib.ExitStack() as stack:
        silent, slow = ([narrow(server, stack) for _ in range(4)] for _ in range(2))
        for client in (*silent, *slow):
            client.sendall(request(LARGE))
        wait_until(lambda: server.metrics().get('requests_total{code="200",signature="rank"}') == 8)
        while server.metrics()["connections"]:
            for client in slow:
                with contextlib.suppress(ConnectionError):
                    client.recv(1)
            time.sleep(0.05)
        found = server.metrics()
        assert found["buffered_bytes"] == 0
        assert found['connections_dropped_total{reason="unread"}'] == 8
        assert server.predict(ONE)[0] == 200
        assert all(map(is_hung_up_on, silent))


def test_a_client_that_reads_slowly_but_in_time_gets_all() -> None:
    with running(client_timeout_seconds=5.0) as server, contextlib.ExitStack() as stack:
        client = narrow(server, stack)
        client.sendall(request(LARGE))
        read = b""
        while not read.endswith(b"]}}"):
            read += client.recv(50_000)
            time.sleep(0.01)
        head, _, body = read.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert len(json.loads(body)["outputs"]["item_ids"]) == 4_000


def test_those_that_say_nothing_give_way() -> None:
    """Silent, in the midst of headers or of a body, or with an unread answer: who comes later is served."""
    head = f"POST {PATH}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n".encode()
    with running(max_connections=20) as server, contextlib.ExitStack() as stack, contextlib.ExitStack() as members:
        known = members.enter_context(contextlib.closing(server.connect()))
        assert ask(known, "POST", f"{PATH}:predict", ONE)[0] == 200
        strangers = []
        for sent in (b"", head, head + b"\r\n{", request(LARGE)):
            for _ in range(5 if sent else 4):
                strangers.append(narrow(server, stack))
                strangers[-1].sendall(sent)
        wait_until(lambda: server.metrics()["connections"] == 20)
        wait_until(lambda: server.metrics().get('requests_total{code="200",signature="rank"}') == 5)
        time.sleep(1.1)  # as long as nobody has to give way
        for _ in range(3):
            assert server.predict(ONE)[0] == 200
        assert ask(known, "POST", f"{PATH}:predict", ONE)[0] == 200  # strangers go first
        assert server.metrics()['connections_dropped_total{reason="room"}'] >= 1
        assert server.metrics()["connections"] <= 20


def test_those_that_wait_for_the_server_never_give_way() -> None:
    with running(max_connections=3) as server, contextlib.ExitStack() as stack:
        server.model.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(server.predict, ONE) for _ in range(3)]
            wait_until(lambda: server.metrics()["in_progress"] == 3)
            time.sleep(1.2)
            for _ in range(3):
                assert connected(server, stack).recv(20).startswith(b"HTTP/1.1 503 ")
            server.model.gate.set()
            assert [one.result()[0] for one in asked] == [200] * 3


def test_probes_are_answered_when_all_connections_are_taken() -> None:
    """At a port of their own, where those that say nothing give way, too."""
    with running(max_connections=3) as server, contextlib.ExitStack() as stack:
        server.model.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(server.predict, ONE) for _ in range(3)]
            wait_until(lambda: server.metrics()["in_progress"] == 3)
            for _ in range(40):
                connected(server, stack, server.health_port)
            time.sleep(1.1)
            for path in ("/healthz", "/readyz"):
                with contextlib.closing(server.connect(server.health_port)) as connection:
                    assert ask(connection, "GET", path)[0] == 200
            with contextlib.closing(server.connect(server.health_port)) as connection:
                told = {"error": f"There is nothing at {PATH}. The paths: /healthz, /readyz, /metrics."}
                assert ask(connection, "GET", PATH) == (404, told)
            assert server.metrics()["connections"] == 3
            server.stop()
            wait_until(lambda: _status(server, "/readyz") == 503)  # until the end
            assert _status(server, "/healthz") == 200
            server.model.gate.set()
            assert [one.result()[0] for one in asked] == [200] * 3
    assert server.answered is True


def _status(server: Running, path: str) -> int:
    with contextlib.closing(server.connect(server.health_port)) as connection:
        return ask(connection, "GET", path)[0]


def test_bodies_and_answers_have_a_bound_together() -> None:
    """What comes first keeps its place, what comes on top of it gets 503, and all is given back."""
    body = json.dumps(ONE).encode().ljust(400_000)
    with running(max_body_bytes=500_000, max_buffered_bytes=1_000_000) as server, contextlib.ExitStack() as stack:
        clients = [connected(server, stack) for _ in range(2)]
        for client in clients:
            client.sendall(head_of(len(body)) + body[:-1])
        wait_until(lambda: server.metrics()["buffered_bytes"] == 2 * 399_999)
        told = {"error": "The server holds as many bytes as it may. Try again later."}
        assert server.predict(body) == (503, told)
        assert server.predict(body_of(LARGE)) == (503, told)  # for its answer
        assert server.predict(ONE)[0] == 200
        for client in clients:
            client.sendall(body[-1:])
            assert client.recv(20).startswith(b"HTTP/1.1 200 ")
        assert server.metrics()["buffered_bytes"] == 0
        assert server.predict(body)[0] == 200
        clients = [connected(server, stack) for _ in range(2)]
        for client in clients:
            client.sendall(head_of(len(body)) + body[:-1])
        wait_until(lambda: server.metrics()["buffered_bytes"] == 2 * 399_999)
        stack.close()
        wait_until(lambda: server.metrics()["buffered_bytes"] == 0)


def test_what_is_sent_behind_a_request_waits_at_the_client() -> None:
    """Some of it the server has, and the kernel keeps a few megabytes; without a bound all of it would be here."""
    large = head_of(500_000) + body_of(ONE).ljust(500_000)
    with running(request_timeout_seconds=60.0) as server, contextlib.ExitStack() as stack:
        server.model.gate.clear()
        client = connected(server, stack)
        client.sendall(request(ONE))
        assert server.model.entered.acquire(timeout=20)
        client.setblocking(False)
        left = memoryview(large * 60)  # 30 MB
        while left and select.select([], [client], [], 1.0)[1]:
            left = left[client.send(left) :]
        assert len(left) > 15_000_000
        server.model.gate.set()
        client.settimeout(20)
        assert client.recv(20).startswith(b"HTTP/1.1 200 ")  # and then it reads on
        client.setblocking(False)
        before = len(left)
        while len(left) > before - 1_000_000:
            assert select.select([], [client], [], 20.0)[1]
            left = left[client.send(left) :]
        assert server.predict(ONE)[0] == 200


def test_requests_sent_behind_each_other_are_answered_in_order() -> None:
    with running() as server, contextlib.ExitStack() as stack:
        client = connected(server, stack)
        bodies = [
            {"instances": [{"history_item_ids": [f"h{number}"] * 20, "candidate_item_id": f"c{number}"}]}
            for number in range(500)
        ]
        expected = [server.predict(body)[1] for body in bodies]
        threading.Thread(target=client.sendall, args=(b"".join(map(request, bodies)),)).start()
        stream = client.makefile("rb")
        for answer in expected:
            length = 0
            while (line := stream.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert json.loads(stream.read(length)) == answer


@pytest.mark.parametrize("what", ["GET /metrics", "GET /nowhere", "POST /v1/models/din_dist:predict"])
def test_requests_sent_behind_each_other_let_others_in_between(what: str) -> None:
    """Another task has its turn many times, whichever version of Python runs them."""
    with running() as server, contextlib.ExitStack() as stack:
        client = connected(server, stack)
        turns: list[int] = []
        over = threading.Event()

        async def take_turns() -> None:
            while not over.is_set():
                await asyncio.sleep(0)
                turns.append(1)

        count = 200
        server.block(0.5)
        client.sendall(f"{what} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode() * count)
        asyncio.run_coroutine_threadsafe(take_turns(), server.loop)
        read = b""
        while read.count(b"HTTP/1.1 ") < count:
            read += client.recv(1 << 20)
        over.set()
        assert len(turns) > count


def test_what_is_no_http_is_not_repeated() -> None:
    with running() as server, contextlib.ExitStack() as stack:
        for data in (b"\x00" * 100_000, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\xff" + b"\x1b" * 100_000):
            client = connected(server, stack)
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(65536):
                    answer += part
            assert answer[:12] in (b"HTTP/1.0 400", b"HTTP/1.1 400", b""), answer[:100]
            assert len(answer) < 400


def test_a_head_has_a_bound() -> None:
    """A hundred headers from each of a thousand connections would take more than all bodies may."""
    with running(client_timeout_seconds=60.0) as server, contextlib.ExitStack() as stack:
        client = connected(server, stack)
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(50):
                client.sendall(f"h{number}: ".encode() + b"x" * 4_000 + b"\r\n")
                time.sleep(0.002)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 431 ") or answer == b""
        assert server.metrics()["connections"] == 0
        whole = b"".join(f"h{number}: ".encode() + b"x" * 4_000 + b"\r\n" for number in range(14))
        client = connected(server, stack)
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + whole)
        time.sleep(0.1)
        client.sendall(b"\r\n")
        assert client.recv(20).startswith(b"HTTP/1.1 200 ")


def test_the_end_waits_for_answers_to_be_read() -> None:
    """It waits for a client that reads, and not for one that does not."""
    with running(shutdown_timeout_seconds=60.0) as server, contextlib.ExitStack() as stack:
        reader, silent = narrow(server, stack), narrow(server, stack)
        for client in (reader, silent):
            client.sendall(request(LARGE))
        wait_until(lambda: server.metrics().get('requests_total{code="200",signature="rank"}') == 2)
        server.stop()
        read = b""
        while part := reader.recv(20_000):
            read += part
            time.sleep(0.03)
        assert len(json.loads(read.partition(b"\r\n\r\n")[2])["outputs"]["item_ids"]) == 4_000
        server.thread.join(15)
        assert server.answered is True

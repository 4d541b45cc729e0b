"""The server over real sockets, with a model that can be held up: answers, batches, bounds, hostile clients."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gzip
import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from din_dist.serving.http.parse import RANK
from tests.support.asked import PATH, in_background, logits, row, score, wait_until
from tests.support.stand_in_model import INTEGERS, NO_NUMBER, POISON, Running, ask, logit, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def raw(server: Running, data: bytes, half_close: bool = False) -> bytes:
    """All that comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(65536):
                parts.append(part)
        return b"".join(parts)


def test_scores_are_the_models(server: Running) -> None:
    """Also with features, which the rows that lack them are not given."""
    status, answer = server.predict(score(row(), row([], "y"), row("abcdefg", "z")))
    assert status == 200
    assert logits(answer) == [logit("ab", "x"), logit("", "y"), logit("cdefg", "z")]
    featured = row(history_features={"category_id": [None, "c"]}, candidate_features={"shelf": 4})
    status, answer = server.predict(score(featured, row()))
    missing = -(2**63)
    assert logits(answer) == [logit("ab", "x", [["", "c"], [missing, missing], "", 4]), logit("ab", "x")]


def test_rank_is_the_models_best(server: Running) -> None:
    candidates = list("pqrst")
    body = {"history_item_ids": ["a"], "candidate_item_ids": candidates, "k": 3}
    status, answer = server.predict({"signature_name": RANK, "inputs": body})
    best = sorted(candidates, key=lambda one: -logit("a", one))[:3]
    assert (status, answer["outputs"]["item_ids"]) == (200, best)
    assert answer["outputs"]["logits"] == [logit("a", one) for one in best]
    assert answer["outputs"]["places"] == [candidates.index(one) for one in best]
    featured = body | {"candidate_features": {"category_id": list("vwxyz")}}
    _, answer = server.predict({"signature_name": RANK, "instances": [featured]})
    by_feature = {
        one: logit("a", one, [[""], [-(2**63)], kind, -(2**63)]) for one, kind in zip(candidates, "vwxyz", strict=True)
    }
    assert answer["predictions"][0]["item_ids"] == sorted(candidates, key=lambda one: -by_feature[one])[:3]


def test_integer_ids() -> None:
    with running(INTEGERS) as server:
        status, answer = server.predict({"instances": [{"history_item_ids": [1, 2], "candidate_item_id": -3}]})
        assert (status, logits(answer)) == (200, [logit([1, 2], -3)])
        assert server.predict(score())[0] == 400


def test_what_it_says_of_the_model(server: Running) -> None:
    ok = {"error_code": "OK", "error_message": ""}
    status = {"model_version_status": [{"version": "7", "state": "AVAILABLE", "status": ok}]}
    for path in (PATH, f"{PATH}/versions/7"):
        assert server.ask("GET", path) == (200, status)
    code, told = server.ask("GET", f"{PATH}/metadata")
    assert (code, told["model_spec"]["version"], told["metadata"]["din_dist"]) == (200, "7", {"digest": "abc"})
    signatures = told["metadata"]["signature_def"]["signature_def"]
    history = signatures["serving_default"]["inputs"]["history_item_ids"]
    assert (history["dtype"], len(history["tensor_shape"]["dim"])) == ("DT_STRING", 1)
    assert server.ask("POST", f"{PATH}/versions/7:predict", score())[0] == 200
    assert server.ask("GET", "/healthz")[0] == server.ask("GET", "/readyz")[0] == 200


def test_other_places_and_methods(server: Running) -> None:
    assert server.ask("GET", "/") == (404, {"error": f"There is nothing at /. The model: {PATH}."})
    for path in ("/v1/models/other:predict", f"{PATH}/versions/8:predict", f"{PATH}:classify", f"{PATH}/labels/a"):
        assert server.ask("POST", path, score())[0] == 404
    assert server.ask("GET", f"{PATH}:predict") == (405, {"error": f"{PATH}:predict takes POST only."})
    assert server.ask("PUT", "/healthz", b"{}")[0] == 405
    assert raw(server, f"GET /{'%0a<b>' * 3000} HTTP/1.1\r\n\r\n".encode()).startswith(b"HTTP/1.0 400 ")
    assert server.ask("GET", f"/{'%0a<b>' * 1000}")[0] == 404


def test_wrong_bodies_get_400_and_the_reason(server: Running) -> None:
    for body, told in (
        (b"", "The body must be JSON. Received: Expecting value at character 0."),
        (b"[" * 10_000, "The body must be a JSON object. Received: lists or objects nested too deeply."),
        (score(row(candidate=1)), "instances[0].candidate_item_id must be a string. Received: 1."),  # type: ignore[arg-type]
        (score(row(["\udc00"])), "history_item_ids must be Unicode text"),
        (score(row(["a"] * 10_001)), "instances[0].history_item_ids must have at most 10000 entries. Received: 10001."),
    ):
        status, answer = server.predict(body)
        assert (status, list(answer)) == (400, ["error"])
        assert told in answer["error"]
    status, answer = server.predict(gzip.compress(json.dumps(score()).encode()), Content_Encoding="gzip")
    assert (status, logits(answer)) == (200, [logit("ab", "x")])
    status, answer = server.predict(b"not gzip", Content_Encoding="gzip")
    assert status == 400


def test_large_bodies_get_413() -> None:
    """Told by their headers, in chunks without end, and unpacked."""
    with running(max_body_bytes=200_000) as server:
        at_most = server.config.max_body_bytes
        large = b" " * (at_most + 1)
        told = {"error": f"The body must have at most {at_most} bytes."}
        assert server.predict(large) == (413, told)
        assert server.predict(b" " * at_most)[0] == 400
        assert server.predict(gzip.compress(b" " * 5_000_000), Content_Encoding="gzip") == (413, told)
        with contextlib.closing(server.connect()) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", f"{PATH}:predict", (b" " * 65536 for _ in range(2 * at_most // 65536)))
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())) == (413, told)
        head = f"POST {PATH}:predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9999999999\r\n\r\n"
        assert raw(server, head.encode()).startswith(b"HTTP/1.1 413 ")  # before a byte of it came


def test_what_arrives_together_is_scored_together() -> None:
    with running() as server:
        server.model.gate.clear()
        with in_background(server, 1, score()) as first:
            assert server.model.entered.acquire(timeout=20)
            with in_background(server, 6, score(row(), row([], "y"))) as others:
                wait_until(lambda: server.metrics()["queue_requests"] == 6)
                assert server.metrics()["queue_positions"] == 6 * 3
                server.model.gate.set()
            assert {one.result()[0] for one in [*first, *others]} == {200}
        assert server.model.sizes == [1, 12]
        found = server.metrics()
        assert found["queue_requests"] == found["queue_positions"] == found["in_progress"] == 0
        assert (found["batch_requests_count"], found["batch_requests_sum"]) == (2, 7)
        assert (found["batch_examples_sum"], found["batch_positions_sum"]) == (13, 2 + 6 * 3)
        assert (found["batch_seconds_count"], found['batch_requests_bucket{le="4.0"}']) == (2, 1)


def test_batches_have_bounds() -> None:
    with running(max_batch_examples=4, max_batch_positions=7) as server:
        server.model.gate.clear()
        with in_background(server, 1, score()):
            assert server.model.entered.acquire(timeout=20)
            with in_background(server, 3, score(row([]), row([]))):
                wait_until(lambda: server.metrics()["queue_requests"] == 3)
                with in_background(server, 3, score(row("abcd"))):
                    wait_until(lambda: server.metrics()["queue_requests"] == 6)
                    server.model.gate.set()
        assert server.model.sizes == [1, 4, 3, 1, 1]  # four candidates; 2 + 4 positions; 4 and 4


def test_waiting_for_company() -> None:
    """With a time-out, those that come a little apart are scored together, and a full batch waits for nothing."""
    with running(batch_timeout_ms=1000) as server:
        with in_background(server, 2, score()):
            pass
        assert server.model.sizes == [2]
    with running(batch_timeout_ms=10_000, max_batch_examples=3) as server:
        started = time.monotonic()
        with in_background(server, 3, score()):
            pass
        assert server.model.sizes == [3]
        assert time.monotonic() - started < 5


def test_a_request_that_breaks_the_model_breaks_no_other() -> None:
    with running() as server:
        server.model.gate.clear()
        with in_background(server, 1, score()):
            assert server.model.entered.acquire(timeout=20)
            with (
                in_background(server, 3, score()) as others,
                in_background(server, 1, score(row(candidate=POISON))) as bad,
            ):
                wait_until(lambda: server.metrics()["queue_requests"] == 4)
                server.model.gate.set()
            assert bad[0].result() == (500, {"error": "The server failed at this request; its log says how."})
            assert {one.result()[0] for one in others} == {200}
        (told,) = server.said
        assert told.splitlines()[-1] == r"RuntimeError: 'the model broke: \x1b[31m\nserving since noon'"
        assert "\x1b" not in told
        assert server.predict(score())[0] == 200


def test_a_model_that_gives_no_number(server: Running) -> None:
    """Its answer would be no JSON."""
    status, answer = server.predict(score(row(), row(candidate=NO_NUMBER)))
    assert (status, answer) == (500, {"error": "The server failed at this request; its log says how."})


def test_a_full_queue_answers_at_once() -> None:
    """429 for those that find it full, by number or by positions; nothing for those before them is lost."""
    with running(max_queue_requests=2, max_batch_positions=50, max_queue_positions=50) as server:
        server.model.gate.clear()
        with in_background(server, 1, score()) as first:
            assert server.model.entered.acquire(timeout=20)
            with in_background(server, 1, score(*[row("abcde")] * 9)) as second:
                wait_until(lambda: server.metrics()["queue_positions"] == 45)
                started = time.monotonic()
                told = {"error": "Too many requests wait already. Try again later."}
                assert server.predict(score(row("abcde"), row("a"))) == (429, told)  # six positions more
                with in_background(server, 1, score(row("abcde"))) as third:
                    wait_until(lambda: server.metrics()["queue_requests"] == 2)
                    with contextlib.closing(server.connect()) as connection:
                        connection.request("POST", f"{PATH}:predict", json.dumps(score(row([]))))
                        response = connection.getresponse()
                        assert (response.status, response.headers["Retry-After"]) == (429, "1")
                        assert json.loads(response.read()) == told
                    assert time.monotonic() - started < 5
                    server.model.gate.set()
            assert [one[0].result()[0] for one in (first, second, third)] == [200] * 3
        assert server.metrics()['requests_total{code="429",signature="score"}'] == 1
        assert server.metrics()['requests_total{code="429",signature="none"}'] == 1


def test_a_deadline_gives_503_and_leaves_the_queue() -> None:
    with running(request_timeout_seconds=0.3) as server:
        server.model.gate.clear()
        with in_background(server, 1, score()) as first:
            assert server.model.entered.acquire(timeout=20)
            with in_background(server, 2, score()) as others:
                pass
            told = {"error": "No answer within 0.3 seconds. Try again later."}
            assert [one.result() for one in others] == [(503, told)] * 2
            assert first[0].result() == (503, told)
        assert server.metrics()["queue_requests"] == 0
        server.model.gate.set()
        assert server.predict(score())[0] == 200
        assert server.model.sizes == [1, 1]


def test_clients_that_go_away_leave_the_queue() -> None:
    with running() as server:
        server.model.gate.clear()
        with in_background(server, 1, score()):
            assert server.model.entered.acquire(timeout=20)
            connection = server.connect()
            connection.request("POST", f"{PATH}:predict", json.dumps(score()))
            wait_until(lambda: server.metrics()["queue_requests"] == 1)
            connection.close()
            wait_until(lambda: server.metrics()["queue_requests"] == 0)
            server.model.gate.set()
        assert server.model.sizes == [1]
        assert server.metrics()['requests_total{code="499",signature="score"}'] == 1


def test_slow_and_silent_clients_are_hung_up_on() -> None:
    """Headers that never end, a body that never comes, and silence; others are answered meanwhile."""
    head = f"POST {PATH}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n"
    with running(client_timeout_seconds=0.6, max_connections=30) as server, contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20)) for _ in range(20)
        ]
        started = time.monotonic()
        for place, client in enumerate(slow[:15]):
            client.sendall(f"{head}X-Slow: ".encode() if place < 10 else f"{head}\r\n".encode())
        while time.monotonic() < started + 0.4:
            for client in slow[:15]:
                with contextlib.suppress(ConnectionError):  # on a slow machine it has been hung up on
                    client.sendall(b"a")
            assert server.predict(score())[0] == 200
            time.sleep(0.05)
        ends = [b"".join(iter(functools.partial(client.recv, 65536), b"")) for client in slow]
        assert time.monotonic() - started < 8
        assert [end[:13] for end in ends] == [b""] * 10 + [b"HTTP/1.1 408 "] * 5 + [b""] * 5
        assert server.predict(score())[0] == 200
        assert server.metrics()['requests_total{code="408",signature="none"}'] == 5


def test_connections_have_a_bound() -> None:
    """Also for a crowd that comes while the server looks elsewhere."""
    with running(max_connections=3) as server, contextlib.ExitStack() as stack:
        server.block(0.3)
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20)) for _ in range(10)
        ]
        for client in crowd[3:]:
            response = http.client.HTTPResponse(client)
            response.begin()
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
            assert json.loads(response.read()) == {"error": "Too many connections are open. Try again later."}
        stack.close()
        wait_until(lambda: _is_served(server))
        assert server.metrics()["connections_refused_total"] >= 7


def _is_served(server: Running) -> bool:
    with contextlib.suppress(ConnectionError):
        return server.ask("GET", "/healthz")[0] == 200
    return False


def test_what_is_no_http(server: Running) -> None:
    body = json.dumps(score()).encode()
    length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    head = f"POST {PATH}:predict HTTP/1.1\r\nHost: x\r\n".encode()
    assert raw(server, head + length + body).startswith(b"HTTP/1.1 200 ")
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00",  # of TLS
        b"GET / HTTP/9.9\r\n\r\n",
        head + b"Content-Length: -5\r\n\r\n",
        head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n",
        head + b"a: " + b"x" * 100_000 + b"\r\n\r\n",
        head + b"".join(b"a%d: b\r\n" % place for place in range(10_000)) + b"\r\n",
    ):
        answer = raw(server, data, half_close=True)
        assert answer == b"" or answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400")), answer[:200]
        assert b"Traceback" not in answer
    for cut in (head, head + length, head + length + body[:-1]):
        raw(server, cut, half_close=True)
    assert server.predict(score())[0] == 200


def test_metrics_count_exactly() -> None:
    with running() as server:
        for body in (score(), score(row(), row(), row()), {"inputs": {}}, b"{", {"signature_name": RANK, "inputs": 1}):
            server.predict(body)
        server.ask("GET", "/nowhere")
        found = server.metrics()
        counts = {name: value for name, value in found.items() if name.startswith(("requests_total", "instances_t"))}
        assert counts == {
            'requests_total{code="200",signature="score"}': 2,
            'requests_total{code="400",signature="score"}': 1,
            'requests_total{code="400",signature="none"}': 1,
            'requests_total{code="400",signature="rank"}': 1,
            'instances_total{signature="score"}': 4,
        }
        assert found['request_seconds_count{signature="score"}'] == 3
        assert 0 < found['request_seconds_sum{signature="score"}'] < 20
        assert found["ready"] == 1
        assert found['model_info{digest="abc",name="din_dist",version="7"}'] == 1


def test_the_end_answers_what_was_accepted() -> None:
    """Kept connections are told to close, new ones are refused, and those in the queue get their answers."""
    with running() as server, contextlib.closing(server.connect()) as kept:
        assert ask(kept, "GET", "/readyz")[0] == 200
        server.model.gate.clear()
        with in_background(server, 1, score()) as first:
            assert server.model.entered.acquire(timeout=20)
            with in_background(server, 5, score()) as others:
                wait_until(lambda: server.metrics()["queue_requests"] == 5)
                server.stop()
                wait_until(lambda: not _accepts(server))
                kept.request("GET", "/readyz")
                response = kept.getresponse()
                assert (response.status, response.headers["Connection"]) == (503, "close")
                assert json.loads(response.read()) == {"error": "The server is ending."}
                server.model.gate.set()
            assert [one.result()[0] for one in [*first, *others]] == [200] * 6
        server.thread.join(20)
        assert server.answered is True


def test_the_end_takes_in_those_that_have_connected() -> None:
    """Up to the very last moment: who gets a connection gets an answer."""
    body = json.dumps(score()).encode()
    data = f"POST {PATH}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with running() as server, contextlib.ExitStack() as stack:
        clients = []

        def connect() -> bool:
            try:
                client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            except ConnectionRefusedError:
                return False
            clients.append(stack.enter_context(client))
            client.sendall(data)
            return True

        server.stop_amid(connect)
        assert 1 <= len(clients) < 50
        for client in clients:
            assert client.recv(20).startswith(b"HTTP/1.1 200 ")


def test_the_end_has_a_bound() -> None:
    """A model that hangs costs its requests, not the exit; a body that never comes is not waited for."""
    with running(shutdown_timeout_seconds=0.3) as server, contextlib.closing(server.connect()) as slow:
        slow.putrequest("POST", f"{PATH}:predict")
        slow.putheader("Content-Length", "10")
        slow.endheaders()
        server.model.gate.clear()
        with in_background(server, 1, score()) as first:
            assert server.model.entered.acquire(timeout=20)
            server.stop()
            server.thread.join(15)
            assert not server.thread.is_alive()
            assert server.answered is False
            assert isinstance(first[0].exception(), (ConnectionError, http.client.HTTPException))


def _accepts(server: Running) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    except ConnectionError:
        return False
    return True


def test_overload_loses_nothing() -> None:
    """More clients than the queue takes: each request gets 200 or 429, and the server counts the same."""
    seen: Counter[int] = Counter()
    lock = threading.Lock()
    with running(max_queue_requests=4, max_batch_examples=2) as server:
        until = time.monotonic() + 1.5

        def client() -> None:
            mine: Counter[int] = Counter()
            with contextlib.closing(server.connect()) as connection:
                while time.monotonic() < until:
                    code, answer = ask(connection, "POST", f"{PATH}:predict", score())
                    assert code != 200 or logits(answer) == [logit("ab", "x")]
                    mine[code] += 1
            with lock:
                seen.update(mine)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(client) for _ in range(16)]:
                done.result()
        found = server.metrics()
        assert set(seen) == {200, 429}
        for code, count in seen.items():
            names = (f'requests_total{{code="{code}",signature="{name}"}}' for name in ("score", "none"))
            assert sum(found.get(name, 0) for name in names) == count
        assert sum(server.model.sizes) == seen[200]


WORDS = (
    *("instances", "inputs", "signature_name", "history_item_ids", "candidate_item_id", "candidate_item_ids", "k"),
    *("history_lengths", "history_features", "candidate_features", "shelf", "category_id", "score", "rank", "a"),
)


def json_values() -> st.SearchStrategy[Any]:
    words = st.sampled_from(WORDS)
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=5), max_leaves=12
    )


def nearly_right() -> st.SearchStrategy[Any]:
    """Bodies with one part in the place of another."""
    ids = st.lists(st.text(max_size=3), max_size=4) | json_values()
    one = st.text(max_size=3) | json_values()
    lengths = st.lists(st.integers(-2, 5), max_size=3) | json_values()
    some = st.fixed_dictionaries(
        {"history_item_ids": ids},
        optional={
            "candidate_item_id": one,
            "candidate_item_ids": ids,
            "history_lengths": lengths,
            "k": st.integers() | json_values(),
            "candidate_features": json_values(),
        },
    )
    names = st.sampled_from(["score", "rank", "score_padded", "serving_default"])
    rows = st.fixed_dictionaries({"instances": st.lists(some, max_size=3)}, optional={"signature_name": names})
    return rows | st.fixed_dictionaries({"inputs": some}, optional={"signature_name": names})


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
@hypothesis.given(body=json_values() | nearly_right() | st.binary(max_size=60))
def test_any_body_gets_200_or_400(server: Running, body: Any) -> None:
    status, answer = server.predict(body)
    assert status in (200, 400)
    assert list(answer) in ([["error"], ["predictions"], ["outputs"]])
    if status == 400:
        assert len(answer["error"]) < 400
        assert "\n" not in answer["error"]

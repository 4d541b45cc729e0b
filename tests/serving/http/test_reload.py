"""A newer version takes the place of the served one while requests are answered."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from din_dist.serving.http.reload import Reloader
from din_dist.serving.http.served import Served
from din_dist.serving.http.versions import RefusedVersion
from tests.support.asked import PATH, in_background, logits, row, score, wait_until
from tests.support.stand_in_model import INTEGERS, STRINGS, Running, StandIn, logit, running

ANSWER = logit(["a", "b"], "x")


class Newer:
    """Finds what a test puts into `found`; errors are raised."""

    def __init__(self) -> None:
        self.found: queue.SimpleQueue[Served | Exception] = queue.SimpleQueue()
        self.opening = threading.Event()
        self.may_open = threading.Event()
        self.may_open.set()

    def look(self) -> Served | None:
        with contextlib.suppress(queue.Empty):
            found = self.found.get_nowait()
            self.opening.set()
            assert self.may_open.wait(30)
            if isinstance(found, Exception):
                raise found
            return found
        return None


def version(number: int, shift: float) -> Served:
    return Served(StandIn(shift), STRINGS, number, {"digest": f"digest {number}"})


@contextlib.contextmanager
def reloading(**settings: Any) -> Iterator[tuple[Running, Newer, Reloader]]:
    with running(**settings) as server:
        newer = Newer()
        reloader = Reloader(newer, 0.005, server.serving_metrics, server.said.append)  # type: ignore[arg-type]
        server.in_loop(lambda: reloader.start(server.server.replace))
        try:
            yield server, newer, reloader
        finally:
            newer.may_open.set()
            reloader.stop()
            assert reloader.has_ended()


def test_a_newer_version_takes_the_place() -> None:
    with reloading() as (server, newer, _):
        assert server.metrics()["version"] == 7
        newer.found.put(version(8, shift=100.0))
        wait_until(lambda: "version 8 is served" in server.said)
        status, answer = server.predict(score())
        assert (status, logits(answer)) == (200, [pytest.approx(ANSWER + 100)])
        told = server.ask("GET", f"{PATH}/metadata")[1]
        assert (told["model_spec"]["version"], told["metadata"]["din_dist"]) == ("8", {"digest": "digest 8"})
        assert server.ask("POST", f"{PATH}/versions/8:predict", score())[0] == 200
        for path in (f"{PATH}/versions/7", f"{PATH}/versions/7/metadata"):
            assert server.ask("GET", path)[0] == 404
        assert server.ask("POST", f"{PATH}/versions/7:predict", score())[0] == 404
        found = server.metrics()
        assert (found["version"], found['reloads_total{result="served"}']) == (8, 1)
        assert found['reloads_total{result="refused"}'] == 0
        assert found['model_info{digest="digest 8",name="din_dist",version="8"}'] == 1
        assert 'model_info{digest="abc",name="din_dist",version="7"}' not in found
        assert server.said == ["version 8 is served"]


def test_a_request_keeps_the_version_that_it_began_with() -> None:
    """Also in the queue: no call of a model has requests of two versions. The former's memory is free after them."""
    with running() as server:
        former_model, model = server.model, StandIn(100.0)
        former_model.gate.clear()
        with in_background(server, 1, score()) as first:
            assert former_model.entered.acquire(timeout=20)
            with in_background(server, 2, score()) as before:
                wait_until(lambda: server.metrics()["queue_requests"] == 2)
                former = server.replace(model, 8)
                with in_background(server, 3, score(row(), row())) as after:
                    wait_until(lambda: server.metrics()["queue_requests"] == 5)
                    assert isinstance(former(), Served)
                    former_model.gate.set()
                answers = [one.result() for one in [*first, *before, *after]]
        assert [logits(answer) for _, answer in answers] == [[pytest.approx(ANSWER)]] * 3 + [
            [pytest.approx(ANSWER + 100)] * 2
        ] * 3
        assert (former_model.sizes, model.sizes) == ([1, 2], [6])
        wait_until(lambda: former() is None)


def test_another_vocabulary_reads_the_next_requests() -> None:
    with running() as server:
        assert server.predict(score())[0] == 200
        server.replace(StandIn(), 8, INTEGERS)
        assert server.predict(score())[0] == 400
        body = {"instances": [{"history_item_ids": [1, 2], "candidate_item_id": -3}]}
        assert logits(server.predict(body)[1]) == [logit([1, 2], -3)]


def test_what_cannot_be_opened_is_counted_and_not_served() -> None:
    with reloading() as (server, newer, _):
        newer.found.put(RefusedVersion("8 is not served: half of it \x1b[31m is missing"))
        for _ in range(3):
            newer.found.put(OSError("the disk is away"))
        newer.found.put(version(9, shift=100.0))
        wait_until(lambda: "version 9 is served" in server.said)
        assert server.said == [
            "8 is not served: half of it \\x1b[31m is missing",
            "looking for versions failed: OSError: the disk is away",
            "version 9 is served",
        ]
        found = server.metrics()
        assert (found['reloads_total{result="refused"}'], found['reloads_total{result="served"}']) == (1, 1)


def test_the_former_version_is_freed_before_the_next_is_opened() -> None:
    """At most two are held, also while a request to the former takes its time."""
    with reloading() as (server, newer, _):
        server.model.gate.clear()
        with in_background(server, 1, score()):
            assert server.model.entered.acquire(timeout=20)
            newer.found.put(version(8, shift=1.0))
            wait_until(lambda: "version 8 is served" in server.said)
            newer.opening.clear()
            newer.found.put(version(9, shift=2.0))
            assert not newer.opening.wait(0.3)
            server.model.gate.set()
        wait_until(lambda: "version 9 is served" in server.said)


def test_the_end_while_a_version_is_opened() -> None:
    """It does not wait for it, and does not serve it."""
    with reloading() as (server, newer, reloader):
        newer.may_open.clear()
        opened = weakref.ref(served := version(8, shift=1.0))
        newer.found.put(served)
        del served
        assert newer.opening.wait(20)
        server.stop()
        reloader.stop()
        server.thread.join(20)
        assert server.answered
        assert not reloader.has_ended()
        newer.may_open.set()
        assert reloader.has_ended()
        assert (opened(), server.said) == (None, [])


def test_an_interval_of_zero_never_looks() -> None:
    with running() as server:
        newer = Newer()
        newer.found.put(version(8, shift=1.0))
        reloader = Reloader(newer, 0.0, server.serving_metrics, server.said.append)  # type: ignore[arg-type]
        server.in_loop(lambda: reloader.start(server.server.replace))
        assert not newer.opening.wait(0.2)
        assert reloader.has_ended()

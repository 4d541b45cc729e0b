"""A thread that writes beside training."""

from __future__ import annotations

import threading

import pytest

from din_dist.background_writer import Writer
from din_dist.progress import note


def test_jobs_are_done_in_their_order() -> None:
    writer, done = Writer("test", capacity=10), []
    for number in range(10):
        assert writer.offer("writing", lambda number=number: done.append(number))  # type: ignore[misc]
    assert writer.wait(60)
    assert done == list(range(10))


def test_nobody_waits_for_one_that_is_stuck() -> None:
    writer, answers, begun = Writer("test", capacity=2), threading.Event(), threading.Event()

    def stick() -> None:
        begun.set()
        answers.wait()

    assert writer.offer("writing", stick)
    assert begun.wait(60)
    assert writer.offer("writing", lambda: None)
    assert not writer.offer("writing", lambda: None)
    assert writer.num_waiting == 2
    assert not writer.wait(0)
    answers.set()
    assert writer.wait(60)
    assert writer.offer("writing", lambda: None)


def test_one_that_is_slow_is_waited_for() -> None:
    writer, go_on = Writer("test", capacity=1), threading.Event()

    def write_slowly() -> None:
        for _ in range(20):
            go_on.wait(0.1)
            note()

    assert writer.offer("writing", write_slowly)
    assert writer.wait(1.5)  # less than it takes in all, more than each part


def test_what_nobody_caught_is_raised_where_it_was_asked_for() -> None:
    writer = Writer("test", capacity=1)
    writer.offer("writing", lambda: 1 // 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        writer.wait(60)
    assert writer.wait(60)

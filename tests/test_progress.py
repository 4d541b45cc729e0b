"""What a process is at, and when that is taken for stuck; the clock is ours."""

from __future__ import annotations

import threading
import time

import pytest

from din_dist import progress
from din_dist.progress import Watch, at, note


class Clock:
    """Stands in for `time`, and for what the process used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cpu_seconds, self.reads = 1000.0, 0.0, 0
        monkeypatch.setattr(progress, "time", self)
        monkeypatch.setattr(progress, "signs_of_life", lambda: progress.SignsOfLife(self.cpu_seconds, self.reads))
        note()

    def monotonic(self) -> float:
        return self.now

    def look(self, watch: Watch, seconds: int, cpu: float = 0.01, reads: int = 0) -> list[str]:
        """What is stuck after so many looks, one a second."""
        for _ in range(seconds):
            self.now += 1
            self.cpu_seconds += cpu
            self.reads += reads
            found = [stuck.what for stuck in watch.stuck()]
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_only_who_is_at_a_disk_is_stuck(clock: Clock) -> None:
    watch = Watch(15)
    assert clock.look(watch, 100) == []  # an update, which may wait for the others
    with at("reading"):
        assert clock.look(watch, 14) == []
        assert clock.look(watch, 1) == ["reading"]
        note()
        assert clock.look(watch, 14) == []
        with at("looking"):
            assert clock.look(watch, 15) == ["looking"]
        assert clock.look(watch, 14) == []
    assert clock.look(watch, 100) == []


@pytest.mark.parametrize("work", [{"cpu": 0.5}, {"reads": 1}])
def test_who_computes_or_reads_slowly_is_not_stuck(clock: Clock, work: dict) -> None:
    watch = Watch(15)
    with at("reading"):
        assert clock.look(watch, 100, **work) == []
        assert clock.look(watch, 15) == ["reading"]


def test_a_pause_of_the_whole_process_does_not_count(clock: Clock) -> None:
    watch = Watch(15)
    with at("reading"), at("writing", essential=False):
        clock.now += 1000
        assert clock.look(watch, 1) == []


def test_a_request_to_stop_has_less_time(clock: Clock) -> None:
    watch = Watch(60)
    watch.stop()
    with at("reading"):
        assert clock.look(watch, 9) == []
        assert clock.look(watch, 1) == ["reading"]
    assert clock.look(watch, 19) == []
    assert clock.look(watch, 1, cpu=1.0) == [""]  # whatever it does, it does not end


def test_what_training_does_not_wait_for_comes_last_and_for_itself(clock: Clock) -> None:
    watch, done, begun = Watch(15), threading.Event(), threading.Event()

    def write() -> None:
        with at("writing", essential=False):
            begun.set()
            done.wait()

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait()
    try:
        note()
        assert clock.look(watch, 15, cpu=1.0) == ["writing"]  # of an update that computes meanwhile
        with at("reading"):
            assert clock.look(watch, 15) == ["reading", "writing"]
    finally:
        done.set()
        thread.join()
    assert clock.look(watch, 1) == []


def test_threads_that_poll_are_known() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    with progress.pollers():
        thread.start()
    try:
        assert thread.native_id in progress.polling_threads
        assert progress.signs_of_life().cpu_seconds > 0
    finally:
        end.set()
        thread.join()
    until = time.monotonic() + 10
    while thread.native_id in progress.polling_threads:  # the kernel may take a moment to end it
        assert time.monotonic() < until
        progress.signs_of_life()

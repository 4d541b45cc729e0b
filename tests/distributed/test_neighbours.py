"""Workers of one machine that speak through shared memory: here as threads; as processes in tests/multi_process."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from din_dist.distributed import neighbours as module
from din_dist.distributed.neighbours import Neighbours, neighbours
from din_dist.distributed.runtime import Runtime
from din_dist.errors import is_lost_peer

SMALL = 128  # bytes of a buffer: most messages take several turns


class Meeting:
    """Where threads that play the ranks meet outside of graphs."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._told: list[Any] = [None] * world_size

    def all(self, rank: int, value: Any) -> list[Any]:
        """What all ranks say."""
        self._told[rank] = value
        self._barrier.wait()
        told = list(self._told)
        self._barrier.wait()
        return told


class PlayedRank(Runtime):
    """One of some ranks of this machine."""

    def __init__(self, rank: int, world_size: int, meeting: Meeting) -> None:
        self.rank = self.local_rank = rank
        self.world_size = self.local_size = world_size
        self._meeting = meeting

    def gather(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate(self._meeting.all(self.rank, values))

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        return self._meeting.all(self.rank, value)[root]


def play(world_size: int, work: Callable[[PlayedRank], Any]) -> list[Any]:
    """What `work` gives on each rank."""
    meeting = Meeting(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [PlayedRank(rank, world_size, meeting) for rank in range(world_size)]
        return list(pool.map(work, ranks))


def message(rank: int, number: int, kind: str) -> list[np.ndarray]:
    """For a sum: the same shapes on all ranks. For a gather: other lengths, also none."""
    random = np.random.default_rng([rank, number])
    if kind == "sum":
        shapes: list[tuple[int, ...]] = [(), (number * 7 % 50,), (3, number % 4)]
        return [random.normal(0, 1, shape).astype(np.float32) for shape in shapes]
    lengths = random.integers(0, 30, 2) * random.integers(0, 2, 2)
    if kind == "rows":
        return [random.normal(0, 1, (lengths[0], 3)).astype(np.float32), np.full((lengths[1], 1), rank, np.float32)]
    return [random.integers(-(2**31), 2**31, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("buffer", [SMALL, 1 << 20])
def test_many_messages_of_all_kinds_arrive(world_size: int, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, with ranks that are late by turns; sums are the same to the bit on all ranks."""
    monkeypatch.setattr(module, "BUFFER_BYTES", buffer)
    kinds = ["sum", "ids", "rows", "sum", "rows", "sum"]

    def work(runtime: PlayedRank) -> list[list[list[np.ndarray]]]:
        ranks = neighbours(runtime)
        assert isinstance(ranks, Neighbours)
        ways = {"sum": ranks.sum_in_graph, "ids": ranks.gather_in_graph, "rows": ranks.gather_in_graph}
        heard = []
        for turn in range(10):
            if turn % world_size == runtime.rank:
                time.sleep(0.005)
            heard.append([])
            for place, kind in enumerate(kinds):
                said = [tf.constant(part) for part in message(runtime.rank, turn * len(kinds) + place, kind)]
                heard[-1].append([part.numpy() for part in ways[kind](said, kind)])
        return heard

    heard = play(world_size, work)
    for turn in range(10):
        for place, kind in enumerate(kinds):
            said = [message(rank, turn * len(kinds) + place, kind) for rank in range(world_size)]
            for number in range(len(said[0])):
                parts = [tensors[number] for tensors in said]
                expected = sum(parts[1:], parts[0]) if kind == "sum" else np.concatenate(parts)
                for rank in range(world_size):
                    np.testing.assert_array_equal(heard[rank][turn][place][number], expected)


def test_messages_of_a_graph_are_sent_in_the_order_of_the_calls() -> None:
    """Where nothing else orders them: else ranks would take one message for another."""
    (graph, other) = (tf.Graph(), tf.Graph())
    ranks = Neighbours(PlayedRank(0, 2, Meeting(2)), file=0)
    for each in (graph, other):
        with each.as_default():
            ranks.sum_in_graph([tf.constant(1.0)])
            ranks.gather_in_graph([tf.constant([1])], "ids")
            ranks.sum_in_graph([tf.constant(2.0)])
        sent = [operation for operation in each.get_operations() if operation.type.startswith("DinDistNeighbours")]
        assert [list(operation.control_inputs) for operation in sent] == [[], [sent[0]], [sent[1]]]


def test_nothing_is_left_in_the_folder() -> None:
    before = set(module.FOLDER.glob("din_dist-*"))
    play(2, neighbours)
    assert set(module.FOLDER.glob("din_dist-*")) <= before


def test_without_memory_to_share_horovod_is_spoken_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDER", tmp_path / "missing")
    assert play(2, lambda runtime: neighbours(runtime) is runtime) == [True, True]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert play(2, lambda runtime: neighbours(runtime) is runtime) == [True, True]
    assert not list(tmp_path.iterdir())


def test_when_one_rank_cannot_open_it_none_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    opened, fails = os.open, threading.Event()

    def refuse(path: Any, *rest: Any) -> int:
        if str(path).startswith(str(tmp_path)) and not rest[0] & os.O_CREAT and not fails.is_set():
            fails.set()
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert play(3, lambda runtime: neighbours(runtime) is runtime) == [True] * 3
    assert fails.is_set() and not list(tmp_path.iterdir())


def test_containers_that_share_memory_but_no_process_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of them would take the other's process for one of its own."""
    seen, namespaces = Path.stat, iter((1, 2))

    def stat(path: Path, **rest: Any) -> Any:
        inside = str(path) == "/proc/self/ns/pid"
        return types.SimpleNamespace(st_ino=next(namespaces)) if inside else seen(path, **rest)

    monkeypatch.setattr(Path, "stat", stat)
    assert play(2, lambda runtime: neighbours(runtime) is runtime) == [True, True]


@pytest.mark.parametrize(("world_size", "local_size", "elastic"), [(1, 1, False), (4, 2, False), (2, 2, True)])
def test_others_speak_through_horovod(world_size: int, local_size: int, elastic: bool) -> None:
    runtime = Runtime()
    runtime.world_size, runtime.local_size, runtime.elastic = world_size, local_size, elastic
    assert neighbours(runtime) is runtime


def wait_for(peer: int, path: str, buffer: int, result: Any) -> None:
    """As rank 0, for process `peer`, which never says anything."""
    module.BUFFER_BYTES, file = buffer, os.open(path, os.O_RDWR)
    os.pwrite(file, peer.to_bytes(8, "little"), 64)
    runtime = Runtime()
    runtime.world_size = runtime.local_size = 2
    try:
        Neighbours(runtime, file).sum_in_graph([tf.constant([1.0])])
    except tf.errors.OpError as error:
        result.put((type(error).__name__, str(error), is_lost_peer(error)))


def test_a_peer_that_ends_is_told_of() -> None:
    """Also when nobody has taken note of its end: it is a zombie until the end of the test."""
    spawn = multiprocessing.get_context("spawn")
    file = os.memfd_create("shared")
    os.ftruncate(file, 4 * (64 + SMALL))
    peer = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
    result = spawn.Queue()
    waiting = spawn.Process(target=wait_for, args=(peer, f"/proc/{os.getpid()}/fd/{file}", SMALL, result))
    waiting.start()
    with pytest.raises(queue.Empty):
        result.get(timeout=8)  # as long as it lives
    os.kill(peer, signal.SIGKILL)
    name, text, is_lost = result.get(timeout=60)
    os.waitpid(peer, 0)
    waiting.join()
    os.close(file)
    assert (name, is_lost) == ("UnavailableError", True)
    assert f"the Horovod worker of rank 1 (process {peer}) ended in the middle of an update" in text

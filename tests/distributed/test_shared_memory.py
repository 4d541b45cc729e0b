"""Workers of one machine that speak through shared memory: here as threads; as processes in tests/multi_process."""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
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

from din_dist import kernels
from din_dist.distributed import shared_memory as module
from din_dist.distributed.runtime import Runtime, raise_lost_peer
from din_dist.distributed.shared_memory import SharedMemory, share_memory
from din_dist.errors import FailedElsewhere, InputError, LostPeer
from tests.support.patience import PATIENCE

SMALL = 128  # bytes of a buffer: most messages take several turns


class Meeting:
    """Where threads that play the ranks meet outside of graphs."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=PATIENCE)
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

    def barrier(self) -> None:
        self._meeting.all(self.rank, None)


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
        ranks = share_memory(runtime)
        assert isinstance(ranks, SharedMemory)
        ways = {"sum": ranks.all_reduce, "ids": ranks.all_gather, "rows": ranks.all_gather}
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
    ranks = SharedMemory(PlayedRank(0, 2, Meeting(2)), file=0)
    for each in (graph, other):
        with each.as_default():
            ranks.all_reduce([tf.constant(1.0)])
            ranks.all_gather([tf.constant([1])], "ids")
            ranks.reduce_scatter_rows([tf.constant([1])], [tf.constant([[1.0]])])
            ranks.all_reduce([tf.constant(2.0)])
        sent = [operation for operation in each.get_operations() if operation.type.startswith("DinDistNeighbours")]
        assert [list(operation.control_inputs) for operation in sent] == [[], [sent[0]], [sent[1]], [sent[2]]]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("buffer", [SMALL, 1 << 20])
def test_rows_come_to_who_updates_them(world_size: int, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three tables; all rows, few, or none of a rank's. Whole numbers add up to the same in any order."""
    monkeypatch.setattr(module, "BUFFER_BYTES", buffer)
    widths, num_turns = (5, 1, 64), 8

    def own(rank: int, turn: int) -> list[tuple[np.ndarray, np.ndarray]]:
        random = np.random.default_rng([rank, turn])
        counts = random.integers(0, 150, 3) * random.integers(0, 2, 3)
        ids = [random.permutation(150)[:count].astype(np.int32) for count in counts]
        return [
            (some, random.integers(-99, 99, (len(some), width)).astype(np.float32))
            for some, width in zip(ids, widths, strict=True)
        ]

    def work(runtime: PlayedRank) -> list[Any]:
        ranks = share_memory(runtime)
        return [ranks.reduce_scatter_rows(*zip(*own(runtime.rank, turn), strict=True)) for turn in range(num_turns)]

    found = play(world_size, work)
    for turn in range(num_turns):
        for table, width in enumerate(widths):
            expected, touched = np.zeros((150, width), np.float32), set()
            for rank in range(world_size):
                ids, rows = own(rank, turn)[table]
                expected[ids] += rows
                touched |= set(ids.tolist())
            seen: list[int] = []
            for rank in range(world_size):
                ids, rows, num_rows = (part[table].numpy() for part in found[rank][turn])
                np.testing.assert_array_equal(rows, expected[ids])
                assert num_rows == len(touched)
                assert set(ids // 16 % world_size) <= {rank}, "as no two ranks may write to one line of memory"
                seen += ids.tolist()
            assert sorted(seen) == sorted(touched)


def test_what_one_rank_writes_to_shared_tables_all_have() -> None:
    """And what was read before stays as it was."""

    def work(runtime: PlayedRank) -> tuple[Any, ...]:
        ranks = share_memory(runtime)
        tables = [tf.Variable(tf.fill([4, 3], 1.0 + runtime.rank)), tf.Variable(tf.fill([5000], 7.0))]
        assert ranks.share(tables)
        before = [table.numpy() for table in tables]
        read = tables[0].value()
        runtime.barrier()
        if runtime.rank == 1:
            time.sleep(0.3)  # the others wait for it
            rows = [[[10.0, 20.0, 30.0]], [[0.5, 0.5, 0.5]]]
            kernels.library().din_dist_update_rows(
                1.0, tf.zeros([0]), rows[:1], [[2]], [tables[0].handle], B=0, rule="Sgd", num_threads=1
            )
        ranks.fence(tables)
        return *before, read.numpy(), tf.gather(tables[0], [2, 3]).numpy()

    for whole, other, read, after in play(3, work):
        np.testing.assert_array_equal(whole, np.ones([4, 3]), err_msg="the values are the chief's")
        np.testing.assert_array_equal(other, np.full([5000], 7.0))
        np.testing.assert_array_equal(read, np.ones([4, 3]))
        np.testing.assert_array_equal(after, [[-9.0, -19.0, -29.0], [1.0, 1.0, 1.0]])


def test_a_shared_table_takes_memory_once() -> None:
    """TensorFlow's allocator keeps what is freed, so that own copies would stay for as long as the job."""

    def own_megabytes() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024

    def work(runtime: PlayedRank) -> tuple[int, int, float]:
        ranks = share_memory(runtime)
        table = tf.Variable(tf.fill([400_000, 64], float(runtime.rank)))  # 98 MiB
        table.assign_add(tf.ones(table.shape))  # now its memory is its own, whoever still holds its first values
        runtime.barrier()
        before = own_megabytes()
        runtime.barrier()
        assert ranks.share([table])
        runtime.barrier()
        return before, own_megabytes(), float(table[399_999, 63])

    for before, after, value in play(3, work):
        assert before - after > 250
        assert value == 1.0


def test_memory_that_others_hold_is_not_given_back() -> None:
    size = 1 << 20
    given = np.empty(size + 16, np.float32)
    given = given[-given.ctypes.data // 4 % 16 :][:size]  # so aligned TensorFlow would keep it, and not a copy
    given[:] = 3.0
    tables = [tf.Variable(given), tf.Variable(tf.fill([size], 3.0))]
    read, seen = tables[1].read_value(), tables[1].numpy()
    for table in tables:
        file = os.memfd_create("table")
        os.ftruncate(file, 4 * size)
        kernels.library().din_dist_share(table.handle, fd=file, fill=True)
        os.close(file)
    for values in (given, read.numpy(), seen, *(table.numpy() for table in tables)):
        assert values.min() == values.max() == 3.0


def test_tables_that_are_no_longer_shared_are_noticed() -> None:
    """As after they were assigned: else each rank would have updates of its own part alone."""

    def work(runtime: PlayedRank) -> str:
        ranks, table = share_memory(runtime), tf.Variable(tf.zeros([4, 3]))
        assert ranks.share([table])
        ranks.fence([table])
        table.assign(tf.ones([4, 3]))
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            ranks.fence([table])
        return caught.value.message

    for told in play(2, work):
        assert "tables that ranks update for each other must stay in the memory that they share" in told


def test_wrong_rows_are_refused() -> None:
    place = {"fd": os.memfd_create("one"), "buffer": SMALL, "rank": 0, "num_ranks": 1}
    os.ftruncate(place["fd"], 2 * (64 + SMALL))
    for ids, rows, rule in (
        ([1], tf.zeros([2, 3]), "there must be an id for each row"),
        ([1, 2], tf.zeros([2]), "there must be an id for each row"),
        ([1, -1], tf.zeros([2, 3]), "rows must be those of a table"),
        ([1, 7, 1], tf.zeros([3, 3]), "a rank must name no row twice"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=rule):
            kernels.library().din_dist_neighbours_reduce_rows([ids], [rows], **place)
    os.close(place["fd"])


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["memfd_create", "posix_fallocate"])
def test_without_memory_to_share_horovod_is_spoken_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, name, full)
    with pytest.warns(UserWarning, match="can have no memory in common, so that updates wait for Horovod"):
        assert play(2, lambda runtime: share_memory(runtime) is runtime) == [True, True]


def test_where_tables_cannot_be_shared_each_rank_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(runtime: PlayedRank) -> tuple[bool, list[float]]:
        ranks, table = share_memory(runtime), tf.Variable([1.0 + runtime.rank])
        runtime.barrier()
        monkeypatch.setattr(os, "memfd_create", full)
        runtime.barrier()
        return ranks.share([table]), table.numpy().tolist()

    assert play(2, work) == [(False, [1.0]), (False, [2.0])]


def test_without_memory_for_tables_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have let go of theirs by then."""

    def work(runtime: PlayedRank) -> tuple[type, str]:
        ranks, table = share_memory(runtime), tf.Variable(tf.ones([101]))
        runtime.barrier()
        monkeypatch.setattr(os, "posix_fallocate", full)
        runtime.barrier()
        with pytest.raises((InputError, FailedElsewhere)) as caught:
            ranks.share([table])
        return caught.type, str(caught.value)

    chief, other = play(2, work)
    assert chief == (
        InputError,
        "Workers of one machine need memory for one copy of their tables. Received: no room for 404 bytes. Free "
        "some, or use smaller tables.",
    )
    assert other[0] is FailedElsewhere


def test_when_one_rank_cannot_open_it_none_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, fails = os.open, threading.Event()

    def refuse(path: Any, *rest: Any) -> int:
        if str(path).startswith(f"/proc/{os.getpid()}/fd/") and not fails.is_set():
            fails.set()
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="no memory in common"):
        assert play(3, lambda runtime: share_memory(runtime) is runtime) == [True] * 3
    assert fails.is_set()


def test_containers_that_share_memory_but_no_process_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of them would take the other's process for one of its own."""
    seen, namespaces = Path.stat, iter((1, 2))

    def stat(path: Path, **rest: Any) -> Any:
        inside = str(path) == "/proc/self/ns/pid"
        return types.SimpleNamespace(st_ino=next(namespaces)) if inside else seen(path, **rest)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.warns(UserWarning, match="no memory in common"):
        assert play(2, lambda runtime: share_memory(runtime) is runtime) == [True, True]


@pytest.mark.parametrize(("world_size", "local_size", "elastic"), [(1, 1, False), (4, 2, False), (2, 2, True)])
def test_others_speak_through_horovod(world_size: int, local_size: int, elastic: bool) -> None:
    runtime = Runtime()
    runtime.world_size, runtime.local_size, runtime.elastic = world_size, local_size, elastic
    assert share_memory(runtime) is runtime


def wait_for(peer: int, path: str, buffer: int, result: Any) -> None:
    """As rank 0, for process `peer`, which never says anything."""
    module.BUFFER_BYTES, file = buffer, os.open(path, os.O_RDWR)
    os.pwrite(file, peer.to_bytes(8, "little"), 64)
    runtime = Runtime()
    runtime.world_size = runtime.local_size = 2
    try:
        with raise_lost_peer():
            SharedMemory(runtime, file).all_reduce([tf.constant([1.0])])
    except LostPeer as error:
        result.put((type(error.__cause__).__name__, str(error)))


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
    name, text = result.get(timeout=PATIENCE)
    os.waitpid(peer, 0)
    waiting.join()
    os.close(file)
    assert name == "UnavailableError"
    assert f"the Horovod worker of rank 1 (process {peer}) ended in the middle of an update" in text

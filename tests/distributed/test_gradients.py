"""The exchange, with two ranks played by hand; real ranks are in tests/multi_process."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from din_dist import kernels
from din_dist.config import WireDtype
from din_dist.distributed.gradients import DenseExchange, GradientExchange
from din_dist.distributed.row_transports import NO_ROW, merge_rows
from din_dist.distributed.runtime import Runtime
from din_dist.execution import Execution


class TwoRanks(Runtime):
    """The other rank sends what this one does: sums double, gathers repeat. Notes what went over the wire."""

    world_size = 2

    def __init__(self) -> None:
        self.sent: dict[str, list[tf.Tensor]] = {}

    def all_reduce(self, tensors: Sequence[tf.Tensor], name: str | None = None) -> list[tf.Tensor]:
        self.sent[str(name)] = list(tensors)
        return [2 * tensor for tensor in tensors]

    def all_gather(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        self.sent[name] = list(tensors)
        return [tf.concat([tensor, tensor], axis=0) for tensor in tensors]


def slices(row_ids: list[int], rows: list[list[float]], num_rows: int = 1000) -> tf.IndexedSlices:
    return tf.IndexedSlices(tf.constant(rows), tf.constant(row_ids), dense_shape=[num_rows, len(rows[0])])


@pytest.mark.parametrize("native", [False, True])
def test_rows_that_share_an_id_are_added_and_padding_is_left_out(native: bool) -> None:
    rows = tf.constant([[1.0, 2.0], [5.0, 5.0], [9.0, 9.0], [10.0, 20.0]])
    merged = merge_rows(tf.constant([7, 3, NO_ROW, 7]), rows, Execution(kernels=native))
    assert merged.row_ids.numpy().tolist() == [7, 3]
    assert merged.rows.numpy().tolist() == [[11.0, 22.0], [5.0, 5.0]]


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 300, 5000])
def test_the_kernel_merges_as_the_operations_do(num_rows: int, num_threads: int, monkeypatch: Any) -> None:
    """Few and many that share an id, ids that collide in a small table, and padding."""
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    random = np.random.default_rng(num_rows)
    for most, factor in ((40, 4096), (num_rows // 2 + 1, 1), (2**31 - 1, 1)):
        ids = random.integers(0, most, num_rows) * factor
        ids[random.random(num_rows) < 0.1] = NO_ROW
        rows = tf.constant(random.normal(0, 1, (num_rows, 5)), tf.float32)
        expected = merge_rows(tf.constant(ids, tf.int32), rows)
        found = merge_rows(tf.constant(ids, tf.int32), rows, execution=Execution(kernels=True))
        assert found.row_ids.numpy().tolist() == expected.row_ids.numpy().tolist()
        np.testing.assert_allclose(found.rows, expected.rows, rtol=1e-5, atol=1e-5)


def test_lengths_that_travel_are_few() -> None:
    """Horovod remembers how to gather a length that it has seen."""
    runtime = TwoRanks()
    seen = set()
    for num_rows in range(1000, 1064):
        gradient = slices(list(range(num_rows)), [[1.0]] * num_rows, 2000)
        ((found,), _) = GradientExchange(runtime)([gradient], [tf.constant(0.0)], tf.constant(1.0))
        assert found.row_ids.numpy().tolist() == list(range(num_rows))
        assert (found.rows.numpy() == 2.0).all()
        seen.add((len(runtime.sent["row_ids"][0]), len(runtime.sent["rows"][0])))
    assert seen == {(1024, 1024), (1088, 1088)}


def test_alone_nothing_changes() -> None:
    gradients = [tf.constant([1.0, 2.0]), slices([4, 3], [[1.0], [2.0]])]
    (dense, rows), (loss,) = GradientExchange(Runtime())(gradients, tf.constant([3.0]), tf.constant(1.0))
    assert dense.numpy().tolist() == [1.0, 2.0]
    assert (rows.row_ids.numpy().tolist(), rows.rows.numpy().tolist()) == ([4, 3], [[1.0], [2.0]])
    assert float(loss) == 3.0


def test_two_ranks_add_up_and_send_each_row_once() -> None:
    runtime = TwoRanks()
    gradients = [slices([4, 9], [[5.0], [2.0]]), tf.constant([1.0]), slices([1], [[3.0, 3.0]])]
    found, (loss, stops) = GradientExchange(runtime)(gradients, tf.constant([3.0, 1.0]), tf.constant(8.0))
    assert dict(zip(found[0].row_ids.numpy().tolist(), found[0].rows.numpy().ravel(), strict=True)) == {4: 10.0, 9: 4.0}
    assert found[1].numpy().tolist() == [2.0]
    assert found[2].rows.numpy().tolist() == [[6.0, 6.0]]
    assert (float(loss), float(stops)) == (6.0, 2.0)
    assert [ids.numpy().tolist() for ids in runtime.sent["row_ids"]] == [[4, 9] + [NO_ROW] * 62, [1] + [NO_ROW] * 63]
    assert [rows.shape.as_list() for rows in runtime.sent["rows"]] == [[64, 1], [64, 2]]


@pytest.mark.parametrize(("wire_dtype", "error"), [(WireDtype.BFLOAT16, 2**-8), (WireDtype.FLOAT16, 2**-11)])
def test_16_bits_halve_the_bytes_and_keep_small_gradients(wire_dtype: WireDtype, error: float) -> None:
    """Gradients of a mean over 8,192 examples are tiny: float16 alone would flush them to zero."""
    runtime, examples = TwoRanks(), tf.constant(8192.0)
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) / 8192e3
    gradients = [slices(list(range(50)), rows.tolist())]
    ((found,), _) = GradientExchange(runtime, wire_dtype)(gradients, tf.constant([0.0]), examples)
    assert runtime.sent["rows"][0].dtype.size == 2
    np.testing.assert_allclose(found.rows, 2 * rows, rtol=error, atol=1e-11)


class FourRanks(TwoRanks):
    """This is rank 1; the other three do as it does."""

    world_size = 4

    def all_to_all(self, message: tf.Tensor, lengths: tf.Tensor, name: str) -> tf.Tensor:
        self.sent[name] = [message, lengths]
        return tf.tile(tf.split(message[: sum(lengths.numpy())], lengths)[1], [4])

    def all_gather(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        self.sent[name] = list(tensors)
        return list(tensors)  # of this rank's part only


@pytest.mark.parametrize("wire_dtype", list(WireDtype))
def test_an_owner_sums_what_all_have_for_its_rows(wire_dtype: WireDtype) -> None:
    """Rows 1, 5 and 9 are those of rank 1."""
    runtime = FourRanks()
    exchange = GradientExchange(runtime, wire_dtype, execution=Execution(kernels=True))
    gradients = [slices([4, 9, 1, 2], [[5.0], [2.0], [3.0], [7.0]]), slices([5, 6], [[1.0, -2.0], [3.0, 4.0]])]
    found, _ = exchange(gradients, tf.constant([3.0]), tf.constant(8.0))
    assert [each.row_ids.numpy().tolist() for each in found] == [[9, 1], [5]]
    assert [each.rows.numpy().tolist() for each in found] == [[[8.0], [12.0]], [[4.0, -8.0]]]
    assert runtime.sent["send_to_owners"][1].shape == [4]
    assert int(exchange.rows.rows_sent(tf.constant(100), tf.constant(42))) == 110


def test_sums_of_many_fit_into_16_bits() -> None:
    """What travels is 7,500 by 8, which float16 just holds: not four times as much."""
    exchange = GradientExchange(FourRanks(), WireDtype.FLOAT16, execution=Execution(kernels=True))
    ((found,), _) = exchange([slices([1], [[7500.0]])], tf.constant([0.0]), tf.constant(8.0))
    assert found.rows.numpy().tolist() == [[30000.0]]


@pytest.mark.parametrize(("world_size", "native", "messages"), [(3, True, ["rows"]), (4, False, ["row_ids", "rows"])])
def test_few_ranks_and_gpus_gather_all_rows(world_size: int, native: bool, messages: list[str]) -> None:
    runtime = TwoRanks()
    runtime.world_size = world_size
    exchange = GradientExchange(runtime, execution=Execution(kernels=native))
    tables = [slices([4, 7], [[1.0], [3.0]]), slices([9], [[1.0, 2.0]])]
    found, _ = exchange(tables, tf.constant([0.0]), tf.constant(8.0))
    assert not exchange.sums_at_owners
    assert [each.row_ids.numpy().tolist() for each in found] == [[4, 7], [9]]
    assert [each.rows.numpy().tolist() for each in found] == [[[2.0], [6.0]], [[2.0, 4.0]]]
    assert list(runtime.sent) == ["dense", *messages]
    assert int(exchange.rows.rows_sent(tf.constant(100), tf.constant(150))) == (100 if native else 128)


def test_what_is_known_early_goes_before_the_rest_and_after_the_statistics() -> None:
    runtime = TwoRanks()
    runtime.after_sums = lambda: contextlib.nullcontext(runtime.sent.setdefault("after sums", []))
    gradients = [tf.constant([1.0]), slices([4], [[5.0]]), tf.constant([2.0]), tf.constant([3.0])]
    early = [False, True, True, False]  # of rows it says nothing
    exchange = GradientExchange(runtime, execution=Execution(kernels=True))
    found, extra = exchange(gradients, tf.constant([4.0]), tf.constant(8.0), early)
    assert [found[place].numpy().tolist() for place in (0, 2, 3)] == [[2.0], [4.0], [6.0]]
    assert (found[1].rows.numpy().tolist(), extra.numpy().tolist()) == ([[10.0]], [8.0])
    assert list(runtime.sent) == ["after sums", "dense_early", "dense", "rows"]
    assert [tensor.numpy().tolist() for tensor in runtime.sent["dense_early"]] == [[2.0]]
    assert [tensor.numpy().tolist() for tensor in runtime.sent["dense"]] == [[1.0], [3.0], [4.0]]


@pytest.mark.parametrize("change", [{"native": False}, {"travels": False}])
def test_where_messages_cost_more_than_bytes_dense_gradients_go_together(change: dict[str, bool]) -> None:
    runtime = TwoRanks()
    runtime.travels = change.get("travels", True)
    exchange = GradientExchange(runtime, execution=Execution(kernels=change.get("native", True)))
    exchange([tf.constant([1.0]), tf.constant([2.0])], tf.constant([4.0]), tf.constant(8.0), [True, False])
    assert list(runtime.sent) == ["dense"]


@pytest.mark.parametrize("num_parts", [1, 2, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_what_is_packed_is_unpacked(dtype: Any, num_parts: int) -> None:
    """Tables with many rows, with few, and with none; an odd number of 16-bit values."""
    random = np.random.default_rng(0)
    tables = []
    for count, width in ((1000, 64), (3, 1), (0, 5)):
        ids = random.permutation(5000)[:count].astype(np.int32)
        tables.append((ids, random.integers(0, 60000, (count, width)).astype(dtype)))
    ops = kernels.library()
    ids, rows = (list(column) for column in zip(*tables, strict=True))
    message, lengths = (value.numpy() for value in ops.din_dist_pack_rows(num_parts, ids, rows))
    assert lengths.sum() <= len(message) <= 1.2 * lengths.sum()
    for part, words in enumerate(np.split(message[: lengths.sum()], np.cumsum(lengths)[:-1])):
        found = ops.din_dist_unpack_rows(words, N=3, T=dtype, widths=[64, 1, 5])
        for (all_ids, all_rows), found_ids, found_rows in zip(tables, *found, strict=True):
            mine = all_ids % num_parts == part
            np.testing.assert_array_equal(found_ids, all_ids[mine])
            np.testing.assert_array_equal(found_rows, all_rows[mine])
    again = ops.din_dist_unpack_rows(message[: lengths.sum()], N=3, T=dtype, widths=[64, 1, 5])
    assert [len(found_ids) for found_ids in again.row_ids] == [1000, 3, 0]


def test_a_message_keeps_its_length() -> None:
    """Horovod remembers how to send a length that it has seen."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)])
    def length(ids: tf.Tensor) -> tf.Tensor:
        message, _ = kernels.library().din_dist_pack_rows(4, [ids], [tf.zeros([tf.size(ids), 8])])
        return tf.size(message)

    seen = [int(length(tf.range(count))) for count in (1000, 1020, 990, 1010, 700, 1000)]
    assert len(set(seen)) == 1
    assert int(length(tf.range(2000))) >= 2000 * 9
    assert int(length(tf.range(100))) < 1000 * 9  # it does not stay large for ever


WHOLE = [6, 1, 7, 0, 0, 0]  # a row of id 7 of one table, 2 values wide, and a word that nobody reads


@pytest.mark.parametrize(
    ("message", "widths"),
    [
        (WHOLE[:-2], [2]),
        ([*WHOLE, 9], [2]),
        ([5, *WHOLE[1:]], [2]),
        ([0, *WHOLE[1:]], [2]),
        ([-1, *WHOLE[1:]], [2]),
        ([6, 2, *WHOLE[2:]], [2]),
        ([6, -1, *WHOLE[2:]], [2]),
        (WHOLE, [4]),
    ],
)
def test_a_message_that_is_not_whole_is_refused(message: list[int], widths: list[int]) -> None:
    unpack = kernels.library().din_dist_unpack_rows
    assert unpack(WHOLE, N=1, T=tf.float32, widths=[2]).row_ids[0].numpy().tolist() == [7]
    with pytest.raises(tf.errors.InvalidArgumentError, match="a message of rows must be whole"):
        unpack(message, N=1, T=tf.float32, widths=widths)


@pytest.mark.parametrize(
    ("num_parts", "row_ids", "rows", "message"),
    [
        (0, [1], [[1.0]], "a message has at least one part"),
        (2, [1, 2], [[1.0]], "there must be an id for each row"),
        (2, [1], [1.0], "there must be an id for each row"),
        (2, [-1], [[1.0]], "ids of rows must not be negative"),
    ],
)
def test_what_cannot_be_packed_is_refused(num_parts: int, row_ids: Any, rows: Any, message: str) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        kernels.library().din_dist_pack_rows(num_parts, [row_ids], [rows])


def test_what_does_not_travel_is_neither_rounded_nor_padded() -> None:
    runtime = TwoRanks()
    runtime.travels = False
    third = slices([4, 9], [[1 / 3], [2.0]])
    exchange = GradientExchange(runtime, WireDtype.BFLOAT16)
    ((found,), _) = exchange([third], tf.constant([0.0]), tf.constant(8.0))
    assert runtime.sent["row_ids"][0].numpy().tolist() == [4, 9]
    assert runtime.sent["rows"][0].dtype == tf.float32
    assert found.rows.numpy().tolist() == [[2 * np.float32(1 / 3)], [4.0]]
    assert int(exchange.rows.rows_sent(tf.constant(2), tf.constant(3))) == 2
    runtime.world_size = 100
    assert not GradientExchange(runtime, execution=Execution(kernels=True)).sums_at_owners


def test_a_rank_without_rows_takes_part() -> None:
    nothing = tf.IndexedSlices(tf.zeros([0, 3]), tf.zeros([0], tf.int32), dense_shape=[10, 3])
    ((found,), _) = GradientExchange(TwoRanks())([nothing], tf.constant([0.0]), tf.constant(1.0))
    assert found.rows.shape == [0, 3]


class SharingRanks(TwoRanks):
    """Which have `shared` in common: this one is given every other row, and hears of one more that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: list[tf.Variable] = []
        self.finished: list[tf.Variable] = []

    def share(self, variables):
        self.shared = list(variables)
        return True

    def reduce_scatter_rows(self, row_ids, rows):
        sizes = [tf.size(ids) + 1 for ids in row_ids]
        return [ids[::2] for ids in row_ids], [2 * some[::2] for some in rows], sizes

    def fence(self, variables):
        self.finished = list(variables)


def test_ranks_that_share_tables_get_a_part_of_the_rows() -> None:
    ranks, tables = SharingRanks(), [tf.Variable(tf.zeros([10, 1]))]
    exchange = GradientExchange(ranks, execution=Execution(kernels=True))
    exchange.share(tables)
    ((found,), (loss,)) = exchange([slices([4, 9, 1], [[5.0], [2.0], [3.0]])], tf.constant([3.0]), tf.constant(8.0))
    assert found.row_ids.numpy().tolist() == [4, 1]
    assert found.rows.numpy().tolist() == [[10.0], [6.0]]
    assert (int(found.num_rows), float(loss)) == (4, 6.0)
    assert float(exchange.sum_of_parts(tf.constant(7.0))) == 14.0
    exchange.finish()
    assert ranks.finished == ranks.shared == tables


@pytest.mark.parametrize(
    "exchange", [GradientExchange(SharingRanks()), DenseExchange(SharingRanks(), execution=Execution(kernels=True))]
)
def test_others_keep_their_own_tables(exchange: GradientExchange) -> None:
    """TensorFlow's operations give a table other memory, as a whole table's update does."""
    exchange.share([tf.Variable([[0.0]])])
    assert float(exchange.sum_of_parts(tf.constant(7.0))) == 7.0

"""The exchange, with two ranks played by hand; real ranks are in tests/multi_process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from din_dist import kernels
from din_dist.config import WireDtype
from din_dist.distributed.gradients import NO_ROW, DenseExchange, GradientExchange, merge_rows
from din_dist.distributed.runtime import Runtime


class TwoRanks(Runtime):
    """The other rank sends what this one does: sums double, gathers repeat. Notes what went over the wire."""

    world_size = 2

    def __init__(self) -> None:
        self.sent: dict[str, list[tf.Tensor]] = {}

    def sum_in_graph(self, tensors: Sequence[tf.Tensor], name: str | None = None) -> list[tf.Tensor]:
        self.sent[str(name)] = list(tensors)
        return [2 * tensor for tensor in tensors]

    def gather_in_graph(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        self.sent[name] = list(tensors)
        return [tf.concat([tensor, tensor], axis=0) for tensor in tensors]


def slices(row_ids: list[int], rows: list[list[float]], num_rows: int = 1000) -> tf.IndexedSlices:
    return tf.IndexedSlices(tf.constant(rows), tf.constant(row_ids), dense_shape=[num_rows, len(rows[0])])


@pytest.mark.parametrize("native", [False, True])
def test_rows_that_share_an_id_are_added_and_padding_is_left_out(native: bool) -> None:
    rows = tf.constant([[1.0, 2.0], [5.0, 5.0], [9.0, 9.0], [10.0, 20.0]])
    merged = merge_rows(tf.constant([7, 3, NO_ROW, 7]), rows, native)
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
        found = merge_rows(tf.constant(ids, tf.int32), rows, native=True)
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


def test_what_does_not_travel_is_neither_rounded_nor_padded() -> None:
    runtime = TwoRanks()
    runtime.travels = False
    third = slices([4, 9], [[1 / 3], [2.0]])
    exchange = GradientExchange(runtime, WireDtype.BFLOAT16)
    ((found,), _) = exchange([third], tf.constant([0.0]), tf.constant(8.0))
    assert runtime.sent["row_ids"][0].numpy().tolist() == [4, 9]
    assert runtime.sent["rows"][0].dtype == tf.float32
    assert found.rows.numpy().tolist() == [[2 * np.float32(1 / 3)], [4.0]]
    assert int(exchange.rows_sent(tf.constant(2))) == 2


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

    def reduce_rows_in_graph(self, row_ids, rows):
        sizes = [tf.size(ids) + 1 for ids in row_ids]
        return [ids[::2] for ids in row_ids], [2 * some[::2] for some in rows], sizes

    def finish_in_graph(self, variables):
        self.finished = list(variables)


def test_ranks_that_share_tables_get_a_part_of_the_rows() -> None:
    ranks, tables = SharingRanks(), [tf.Variable(tf.zeros([10, 1]))]
    exchange = GradientExchange(ranks, native=True)
    exchange.share(tables)
    ((found,), (loss,)) = exchange([slices([4, 9, 1], [[5.0], [2.0], [3.0]])], tf.constant([3.0]), tf.constant(8.0))
    assert found.row_ids.numpy().tolist() == [4, 1]
    assert found.rows.numpy().tolist() == [[10.0], [6.0]]
    assert (int(found.num_rows), float(loss)) == (4, 6.0)
    assert float(exchange.sum_of_parts(tf.constant(7.0))) == 14.0
    exchange.finish()
    assert ranks.finished == ranks.shared == tables


@pytest.mark.parametrize("exchange", [GradientExchange(SharingRanks()), DenseExchange(SharingRanks(), native=True)])
def test_others_keep_their_own_tables(exchange: GradientExchange) -> None:
    """TensorFlow's operations give a table other memory, as a whole table's update does."""
    exchange.share([tf.Variable([[0.0]])])
    assert float(exchange.sum_of_parts(tf.constant(7.0))) == 7.0

"""What the benchmark counts, by hand; that it runs is tested with the command."""

import tensorflow as tf

from din_dist.benchmark.step import bytes_sent, message_sizes
from din_dist.distributed.row_transports import RowGradients


def test_bytes_and_messages_by_hand() -> None:
    """A table of 10 rows of 4 with 3 touched, its bias of width 1, and a dense kernel of 2 x 5; a layer 6 wide.

    Of the table five rows are touched by any rank; of the bias, of which this rank updates one row, four.
    """
    variables = [tf.Variable(tf.zeros(shape)) for shape in ((10, 4), (10, 1), (2, 5))]
    rows = tf.constant([7, 1, 2])
    gradients = [
        tf.IndexedSlices(tf.zeros([3, 4]), rows),
        tf.IndexedSlices(tf.zeros([3, 1]), rows),
        tf.zeros([2, 5]),
    ]
    merged = [
        RowGradients(tf.range(5), tf.zeros([5, 4])),
        RowGradients(tf.range(1), tf.zeros([1, 1]), num_rows=tf.constant(4)),
        tf.zeros([2, 5]),
    ]
    sizes = message_sizes(gradients, merged, variables, [6], wire_bytes=2, packed=False)
    assert sizes == {
        "dense_gradient_bytes": 40,  # 10 numbers of 4 bytes
        "row_gradient_bytes": 3 * (4 + 4 * 2) + 3 * (4 + 1 * 2),  # ids of 4 bytes, values of 2
        "summed_row_bytes": 5 * (4 + 4 * 2) + 4 * (4 + 1 * 2),
        "table_bytes": 10 * (4 + 4 * 2) + 10 * (4 + 1 * 2),
        "statistics_bytes": 4 * ((2 * 6 + 1) + 2 * 6),  # sum, sum of squares and count; two sums backward
        "num_gradient_messages": 3,
        "num_gather_messages": 2,
        "num_statistics_messages": 2,
    }
    packed = message_sizes(gradients, merged, variables, [6], wire_bytes=2, packed=True)
    assert packed == {**sizes, "num_gather_messages": 1}  # of the three, for dense ones take two
    for owners_sum_rows in (False, True):
        assert bytes_sent(sizes, 1, owners_sum_rows) == {"dense": 0, "statistics": 0, "sparse": 0}
        assert bytes_sent(sizes, 3, owners_sum_rows)["sparse"] == 108
    # Of four: what is reduced in two steps; one's own part goes to three others.
    assert bytes_sent(sizes, 4, owners_sum_rows=False) == {"dense": 80, "statistics": 200, "sparse": 162}
    # Or three quarters of its own part to owners, and a quarter of all sums to three others.
    assert bytes_sent(sizes, 4, owners_sum_rows=True)["sparse"] == round(0.75 * (54 + 84))
    # 2 * 3/4 of what is too much for steps.
    assert bytes_sent({**sizes, "dense_gradient_bytes": 20_000}, 4, owners_sum_rows=True)["dense"] == 30_000


def test_a_dense_model_sends_one_message() -> None:
    dense = [tf.zeros([3])]
    sizes = message_sizes(dense, dense, [tf.Variable(tf.zeros([3]))], [], wire_bytes=4, packed=False)
    assert (sizes["num_gradient_messages"], sizes["num_gather_messages"], sizes["table_bytes"]) == (1, 0, 0)

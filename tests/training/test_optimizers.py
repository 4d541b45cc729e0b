import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import kernels
from din_dist.config import OptimizerConfig, OptimizerKind
from din_dist.distributed.row_transports import RowGradients
from din_dist.execution import Execution
from din_dist.training.optimizers import Adagrad, LazyAdam, Sgd, make_optimizer

NUM_ROWS, WIDTH = 6, 3
ROWS_OF_STEP = [[4, 1], [1], [], [0, 4, 1], [2]]  # row 3 and 5 never, row 2 late


LARGE = 3 * 4096 + 5  # weights: more than one part of the kernel


def apply(optimizer, *gradients, rate=0.1, step=1):
    values, step = optimizer.values_of(gradients), tf.constant(step, tf.int64)
    assert optimizer.apply(gradients, values, tf.constant(rate), step) == [], "nothing is kept unless asked for"


of_each_kind = pytest.mark.parametrize(
    ("kind", "row_wise"),
    [
        (OptimizerKind.SGD, False),
        (OptimizerKind.ADAGRAD, False),
        (OptimizerKind.ADAGRAD, True),
        (OptimizerKind.LAZY_ADAM, False),
    ],
    ids=["sgd", "adagrad", "adagrad_row_wise", "lazy_adam"],
)


class Reference:
    """The formulas on whole float64 arrays; a table is given to it as some of its rows."""

    def __init__(self, kind, row_wise):
        self.kind, self.row_wise, self.state = kind, row_wise, {}

    def change(self, name, rows, gradient, rate, step):
        if self.kind is OptimizerKind.SGD:
            return rate * gradient
        if self.kind is OptimizerKind.ADAGRAD:
            squares = gradient**2
            if self.row_wise and name == "table":
                squares = np.broadcast_to(squares.mean(axis=-1, keepdims=True), gradient.shape)
            total = self.state.setdefault(f"{name}/a", np.full((NUM_ROWS, WIDTH), 0.1))
            total[rows] += squares
            return rate * gradient / (np.sqrt(total[rows]) + 1e-7)
        first = self.state.setdefault(f"{name}/m", np.zeros((NUM_ROWS, WIDTH)))
        second = self.state.setdefault(f"{name}/v", np.zeros((NUM_ROWS, WIDTH)))
        first[rows] = 0.9 * first[rows] + 0.1 * gradient
        second[rows] = 0.999 * second[rows] + 0.001 * gradient**2
        rate *= np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        return rate * first[rows] / (np.sqrt(second[rows]) + 1e-7)


@of_each_kind
@pytest.mark.parametrize("by", ["operations", "compiled", "native"])
def test_steps_equal_the_reference_and_other_rows_stay_to_the_bit(kind, row_wise, by):
    """A dense variable and a table through five steps; after each, rows not named and their state are as they were."""
    random = np.random.default_rng(0)
    exact = {name: random.normal(0, 1, (NUM_ROWS, WIDTH)) for name in ("dense", "table")}
    variables = {name: tf.Variable(values, dtype=tf.float32) for name, values in exact.items()}
    config = OptimizerConfig(optimizer=kind, adagrad_row_wise=row_wise)
    optimizer = make_optimizer(
        config, list(variables.values()), list(variables), ["table"], Execution(by == "native", by == "compiled")
    )
    reference = Reference(kind, row_wise)
    of_table = [variables["table"], *(state for name, state in optimizer.state.items() if name.startswith("table/"))]
    for step, rows in enumerate(ROWS_OF_STEP, start=1):
        rate = 0.1 / step
        whole, some = random.normal(0, 1, (NUM_ROWS, WIDTH)), random.normal(0, 1, (len(rows), WIDTH))
        before = [values.numpy() for values in of_table]
        sparse = RowGradients(tf.constant(rows, tf.int32), tf.constant(some, tf.float32))
        apply(optimizer, tf.constant(whole, tf.float32), sparse, rate=rate, step=step)
        exact["dense"] -= reference.change("dense", slice(None), whole, rate, step)
        exact["table"][rows] -= reference.change("table", rows, some, rate, step)
        for name, variable in variables.items():
            assert_allclose(variable, exact[name], rtol=1e-5, atol=1e-6, err_msg=f"{name}, step {step}")
        others = [row for row in range(NUM_ROWS) if row not in rows]
        for values, old in zip(of_table, before, strict=True):
            assert_array_equal(values.numpy()[others], old[others])


def test_sgd_by_hand():
    variable = tf.Variable([[1.0, 2.0], [3.0, 4.0]])
    apply(Sgd([variable], ["w"]), tf.constant([[10.0, 0.0], [0.0, -10.0]]))
    assert_allclose(variable, [[0.0, 2.0], [3.0, 5.0]], atol=1e-6)


@pytest.mark.parametrize("sparse", [True, False])
def test_adagrad_by_hand(sparse):
    """The accumulator starts at 0.1 and gets 3.9: its root is 2. A second equal step: 7.9."""
    gradient = tf.fill([1, 2], np.sqrt(3.9).astype(np.float32))
    variable = tf.Variable([[1.0, 1.0]])
    optimizer = Adagrad([variable], ["w"])
    for step, change in enumerate([3.9**0.5 / 2, 3.9**0.5 / 2 + (3.9 / 7.9) ** 0.5], start=1):
        apply(optimizer, RowGradients(tf.constant([0]), gradient) if sparse else gradient, rate=1.0, step=step)
        assert_allclose(variable, [[1.0 - change] * 2], rtol=1e-5)


def test_row_wise_adagrad_keeps_one_number_a_row():
    """The mean of 7 and 0.8 is 3.9: both columns are divided by 2. Other variables keep a number for each value."""
    table, kernel = tf.Variable(tf.zeros([5, 2])), tf.Variable(tf.zeros([5, 2]))
    optimizer = Adagrad([table, kernel], ["table", "kernel"], tables=["table"], row_wise=True)
    assert optimizer.state["table/accumulator"].shape == (5,)
    assert optimizer.state["kernel/accumulator"].shape == (5, 2)
    gradient = RowGradients(tf.constant([3]), tf.sqrt([[7.0, 0.8]]))
    apply(optimizer, gradient, tf.zeros([5, 2]), rate=1.0)
    assert_allclose(table[3], -np.sqrt([7.0, 0.8]) / 2, rtol=1e-5)
    assert_allclose(optimizer.state["table/accumulator"], [0.1, 0.1, 0.1, 4.0, 0.1], rtol=1e-6)


@pytest.mark.parametrize("sparse", [True, False])
def test_adam_first_moves_by_the_rate(sparse):
    """Bias correction makes the first step rate * sign(g), whatever the size of g."""
    variable = tf.Variable([[1.0, 1.0, 1.0]])
    gradient = tf.constant([[5.0, -0.01, 0.0]])
    apply(LazyAdam([variable], ["w"]), RowGradients(tf.constant([0]), gradient) if sparse else gradient)
    assert_allclose(variable, [[0.9, 1.1, 1.0]], rtol=1e-4)


def test_adam_corrects_bias_by_the_steps_of_the_job():
    """A row first met at step 3 has moments of one gradient, 0.1 g and 0.001 g^2, but corrections of three steps."""
    variable = tf.Variable([[1.0], [1.0]])
    apply(LazyAdam([variable], ["w"]), RowGradients(tf.constant([1]), tf.constant([[5.0]])), rate=0.1, step=3)
    change = 0.1 * np.sqrt(1 - 0.999**3) / (1 - 0.9**3) * 0.1 / np.sqrt(0.001)
    assert_allclose(variable, [[1.0], [1.0 - change]], rtol=1e-5)


def test_the_state_is_named_for_checkpoints():
    def state(**config):
        variables = [tf.Variable(tf.zeros([2, 3])), tf.Variable(tf.zeros([4]))]
        optimizer = make_optimizer(OptimizerConfig(**config), variables, ["a/table", "b"], ["a/table"], Execution())
        return {name: tuple(value.shape) for name, value in optimizer.state.items()}

    assert state(optimizer=OptimizerKind.SGD) == {}
    assert state(optimizer=OptimizerKind.ADAGRAD) == {"a/table/accumulator": (2, 3), "b/accumulator": (4,)}
    assert state(optimizer=OptimizerKind.ADAGRAD, adagrad_row_wise=True) == {
        "a/table/accumulator": (2,),
        "b/accumulator": (4,),
    }
    assert state(optimizer=OptimizerKind.LAZY_ADAM) == {
        "a/table/first_moment": (2, 3),
        "b/first_moment": (4,),
        "a/table/second_moment": (2, 3),
        "b/second_moment": (4,),
    }


@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_kernel_equals_the_operations_on_many_variables_of_any_size(kind, num_threads, monkeypatch):
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    random = np.random.default_rng(1)
    shapes = [(), (1,), (17,), (5, 3), (LARGE,), (0,)]
    first = [random.normal(0, 1, shape).astype(np.float32) for shape in shapes]
    ended = []
    for native in (False, True):
        random = np.random.default_rng(2)
        variables = [tf.Variable(values) for values in first]
        names = [f"v{place}" for place in range(len(shapes))]
        optimizer = make_optimizer(
            OptimizerConfig(optimizer=kind), variables, names, [], execution=Execution(kernels=native)
        )
        for step in range(1, 4):
            gradients = [tf.constant(random.normal(0, 1, shape), tf.float32) for shape in shapes]
            apply(optimizer, *gradients, step=step)
        ended.append([*variables, *optimizer.state.values()])
    for ours, theirs in zip(*ended, strict=True):
        assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not any(np.array_equal(ours, old) for ours, old in zip(ended[1], first, strict=False) if old.size)


@of_each_kind
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_kernel_equals_the_operations_on_rows_of_many_tables(kind, row_wise, num_threads, monkeypatch):
    """More rows than one part of the kernel has, rows wider than one, narrow ones, few and none; rows before it."""
    monkeypatch.setattr(kernels, "num_threads", lambda: num_threads)
    random = np.random.default_rng(3)
    sizes = {"long": (500, 20), "wide": (3, 5000), "narrow": (300, 1), "some": (7, 16), "none": (0, 4)}
    first = {name: random.normal(0, 1, (1000, width)).astype(np.float32) for name, (_, width) in sizes.items()}
    config = OptimizerConfig(optimizer=kind, adagrad_row_wise=row_wise)
    ended, kept = [], []
    for native in (False, True):
        random = np.random.default_rng(4)
        variables = [tf.Variable(values) for values in first.values()]
        optimizer = make_optimizer(config, variables, [*sizes], [*sizes], execution=Execution(kernels=native))
        for step in range(1, 4):
            gradients = [
                RowGradients(
                    tf.constant(random.permutation(1000)[:rows], tf.int32),
                    tf.constant(random.normal(0, 1, (rows, width)), tf.float32),
                )
                for rows, width in sizes.values()
            ]
            before = [tf.identity(changing) for changing in optimizer.changing_by_rows]
            values, count = optimizer.values_of(gradients), tf.constant(step, tf.int64)
            replaced = optimizer.apply(gradients, values, tf.constant(0.1), count, keep=True)
        ids = [gradient.row_ids for gradient in gradients for _ in range(1 + len(optimizer.initial_state))]
        for rows, table, row_ids in zip(replaced, before, ids, strict=True):
            assert_array_equal(rows.row_ids, row_ids)
            assert_array_equal(rows.rows, tf.gather(table, row_ids))
        ended.append([*variables, *optimizer.state.values()])
        kept.append(replaced)
    assert len(kept[0]) == len(kept[1]) == len(optimizer.changing_by_rows)
    for ours, theirs in zip(*ended, strict=True):
        assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_whole_tables_gradient_with_one_number_held_a_row():
    """As where all of a table is exchanged."""
    ended = []
    for native in (False, True):
        table = tf.Variable([[1.0, 2.0], [3.0, 4.0]])
        optimizer = Adagrad([table], ["table"], tables=["table"], row_wise=True, execution=Execution(kernels=native))
        apply(optimizer, tf.constant([[1.0, -2.0], [0.0, 0.5]]))
        ended.append([table, optimizer.state["table/accumulator"]])
    for ours, theirs in zip(*ended, strict=True):
        assert_array_equal(ours, theirs)


def test_who_has_read_a_table_keeps_what_was_read():
    """Until something writes to it in place, TensorFlow gives those who read a variable its own memory."""
    table = tf.Variable([[1.0, 2.0], [3.0, 4.0]])
    read = table.value()
    gradient = RowGradients(tf.constant([1]), tf.constant([[10.0, 10.0]]))
    apply(Sgd([table], ["table"], ["table"], execution=Execution(kernels=True)), gradient)
    assert_array_equal(read, [[1.0, 2.0], [3.0, 4.0]])
    assert_allclose(table, [[1.0, 2.0], [2.0, 3.0]], rtol=1e-6)


def test_wrong_calls_of_the_kernel_are_refused():
    ops, some = kernels.library(), tf.zeros([3])
    with pytest.raises(tf.errors.InvalidArgumentError, match="equally large"):
        ops.din_dist_update(1.0, tf.zeros([0]), [some], [tf.zeros([2])], rule="Sgd", num_threads=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="constants"):
        ops.din_dist_update(1.0, tf.zeros([2]), [some], [some], rule="Sgd", num_threads=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="each gradient must have its weights"):
        ops.din_dist_update(1.0, tf.zeros([1]), [some], [some], rule="Adagrad", num_threads=1)
    known = "rule must be one of Sgd, Adagrad, LazyAdam, RowWiseAdagrad"
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{known}. Received: 'sgd'."):
        ops.din_dist_update(1.0, tf.zeros([0]), [some], [some], rule="sgd", num_threads=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="single weights"):
        ops.din_dist_update(1.0, tf.zeros([1]), [some], [some, some], rule="RowWiseAdagrad", num_threads=1)


def test_the_library_knows_rules_by_their_whole_names():
    known = ["Sgd", "Adagrad", "LazyAdam", "RowWiseAdagrad"]
    assert all(map(kernels.has_rule, known))
    assert not any(map(kernels.has_rule, ["", "sgd", "Sg", "Sgds", "Adam"]))


class HalvedAdagrad(Adagrad):
    """A rule of its own, without a kernel."""

    @staticmethod
    def update(gradient, rate, value, *slots):
        return Adagrad.update(gradient, rate / 2, value, *slots)


@pytest.mark.parametrize("row_wise", [False, True])
def test_a_subclass_of_a_rule_with_a_kernel_keeps_its_own_formula(row_wise):
    """The accumulators become 0.1 + 3.9: their roots are 2. Half of the rate 1, times 3.9^0.5, divided by 2."""
    table, kernel = tf.Variable(tf.zeros([3, 2])), tf.Variable(tf.zeros([2]))
    optimizer = HalvedAdagrad([table, kernel], ["table", "kernel"], ["table"], Execution(kernels=True), row_wise)
    gradient = tf.fill([1, 2], np.sqrt(3.9).astype(np.float32))
    apply(optimizer, RowGradients(tf.constant([1]), gradient), gradient[0], rate=1.0)
    assert_allclose(table, [[0.0, 0.0], [-(3.9**0.5) / 4] * 2, [0.0, 0.0]], rtol=1e-5)
    assert_allclose(kernel, [-(3.9**0.5) / 4] * 2, rtol=1e-5)


def test_wrong_calls_of_the_kernel_for_rows_change_nothing():
    table, slots = tf.Variable(tf.ones([4, 3])), tf.Variable(tf.ones([4, 3]))

    def refused(rows=(2, 3), row_ids=(0, 3), tables=(table, slots), rule="Adagrad", kept=0):
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            kernels.library().din_dist_update_rows(
                0.1,
                tf.zeros([1]),
                [tf.ones(rows)],
                [tf.constant(row_ids)],
                [each.handle for each in tables],
                B=kept,
                rule=rule,
                num_threads=1,
            )
        for variable in (table, slots):
            assert_array_equal(variable, np.ones([4, 3]))
        return caught.value.message.partition("}} ")[2].partition(" [Op")[0]

    for wrong in (-1, 4):
        assert refused(row_ids=[0, wrong]) == "rows must be those of the table"
    assert refused(row_ids=[0]) == refused(rows=[6]) == "there must be an id for each row"
    a_table = "a table and what is held for it must be as wide as the gradient"
    assert refused(rows=[2, 2]) == a_table
    assert refused(tables=[table, tf.Variable(tf.ones([4, 2]))]) == a_table
    assert refused(tables=[table, tf.Variable(tf.ones([3, 3]))]) == a_table
    assert refused(tables=[table, slots], rule="RowWiseAdagrad") == a_table
    assert refused(tables=[table, table]) == "no variable may be named twice"
    assert refused(kept=1) == "all rows must be kept, or none"
    assert refused(tables=[table]) == "each gradient must have its weights"
    assert refused(tables=[table, slots], rule="LazyAdam") == "each gradient must have its weights"

"""The operations of the C++ kernels, one typed function each. They run on CPUs, with as many threads as TensorFlow's.

Letters: M rows of a layer, W its columns, H width of an item vector, C candidates, K distinct behaviours, P pairs,
R rows of a table, D its width. "padded W" is W rounded up to a multiple of `LANES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from din_dist import kernels

SharedPlace = Mapping[str, int]  # of shared memory: fd, buffer, rank, num_ranks
PairIndex = tuple[tf.Tensor, tf.Tensor]


class GateInputs(NamedTuple):
    """An element-wise function before a product, as its kernel takes it."""

    activation: str  # its name in `kActivations` of attention.h
    mean: tf.Tensor  # float32 [W]
    scale: tf.Tensor  # float32 [W]
    alpha: tf.Tensor  # float32 [W]
    beta: tf.Tensor  # float32 [W]


class GateStatistics(NamedTuple):
    """Statistics of a gate's inputs, for their gradient."""

    mean: tf.Tensor  # float32 [W]
    scale: tf.Tensor  # float32 [W]
    sums: tf.Tensor  # float32 [2W], over all ranks: of the standardised inputs' gradient, and of it times them
    num_rows: tf.Tensor  # float32 [1], over all ranks


class FirstKernels(NamedTuple):
    """The first attention layer in factored form."""

    of_candidate: tf.Tensor  # float32 [H, W]
    of_behaviour: tf.Tensor  # float32 [H, W]
    of_product: tf.Tensor  # float32 [H, W]


class SideRows(NamedTuple):
    """Side information, by which behaviours of one item differ: T rows of width S. `no_sides` has none."""

    vectors: tf.Tensor  # float32 [T, S]
    kernel: tf.Tensor  # float32 [S, W], of the first attention layer
    side_of: tf.Tensor  # int32 [P], or empty


def no_sides(width: int) -> SideRows:
    """Returns no rows, for a first layer of a width."""
    return SideRows(tf.zeros([0, 0]), tf.zeros([0, width]), tf.zeros([0], tf.int32))


class ScoreScale(NamedTuple):
    """How attention scores become weights."""

    divisor: tf.Tensor  # float32, of the scores
    softmax: bool


class PooledGradient(NamedTuple):
    """The gradient that reaches the first attention layer."""

    held: tf.Tensor  # float32 [P, padded W], of the layer's results, with their statistics held fixed
    weights: tf.Tensor  # float32 [P], with which behaviours were pooled
    of_interest: tf.Tensor  # float32 [C, H + S]


# --- Rows and batches. ---


def segment_ids(lengths: tf.Tensor) -> tf.Tensor:
    """Returns the segment of each row, int32 `[N]`, of segments of `lengths` rows, int32 `[B]`."""
    return _shaped(kernels.library().din_dist_segment_ids(lengths), [None])


def merge_rows(row_ids: tf.Tensor, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums the rows, float32 `[R, D]`, that share an id, int32 `[R]`; those of id -1 are left out."""
    ids, merged = kernels.library().din_dist_merge_rows(row_ids, rows, num_threads=kernels.num_threads())
    return _shaped(ids, [None]), _shaped(merged, [None, rows.shape[1]])


def hash64(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns a uint64 for each tuple of `parts`: uint64 numbers, or vectors `[M]` of which there is at least one."""
    return _shaped(kernels.library().din_dist_hash64(parts), [None])


def untouched_items(
    random: tf.Tensor, begins: tf.Tensor, ends: tf.Tensor, touched_gaps: tf.Tensor, num_items: int
) -> tf.Tensor:
    """Returns an item that each user never touched, int32 `[M]`; see `data/negatives.py`.

    Args:
        random: uint64 `[M]`.
        begins: int64 `[M]`, where each user's window in `touched_gaps` begins.
        ends: int64 `[M]`, where it ends.
        touched_gaps: int32 `[T]`.
        num_items: the number of items to draw from.
    """
    items = kernels.library().din_dist_untouched_items(random, begins, ends, touched_gaps, num_items=num_items)
    return _shaped(items, random.shape)


def windows(values: tf.Tensor, begins: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
    """Returns `values[begin:end]` of each window, concatenated, int32 `[N]`; bounds are int64 `[B]`."""
    return _shaped(kernels.library().din_dist_windows(values, begins, ends), [None])


def distinct_ids(ids: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns each id of the int32 vectors once, `[U]`, and the index in it of all ids, `[N]`."""
    distinct, index = kernels.library().din_dist_distinct_ids(ids)
    return _shaped(distinct, [None]), _shaped(index, [None])


def pack_rows(
    num_parts: tf.Tensor, row_ids: Sequence[tf.Tensor], rows: Sequence[tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns rows in a part for each owner, int32 `[words]`, and the parts' lengths, int32 `[num_parts]`.

    Args:
        num_parts: int32.
        row_ids: int32 `[R]` of each table.
        rows: float32 or uint16 `[R, D]` of each table.
    """
    message, lengths = kernels.library().din_dist_pack_rows(num_parts, row_ids, rows)
    return _shaped(message, [None]), _shaped(lengths, [None])


def unpack_rows(message: tf.Tensor, widths: Sequence[int], dtype: tf.DType) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Returns the ids `[R]` and rows `[R, D]` of each table, from concatenated parts of `pack_rows`."""
    ids, rows = kernels.library().din_dist_unpack_rows(message, N=len(widths), T=dtype, widths=widths)
    return (
        [_shaped(some, [None]) for some in ids],
        [_shaped(some, [None, width]) for some, width in zip(rows, widths, strict=True)],
    )


# --- Item vectors. ---


def vectors(
    rows: Sequence[tf.Tensor], index: Sequence[tf.Tensor], shared: Sequence[bool], candidate_index: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the item vectors `[U, H]`, and once more those of the candidates, `[C, H]`.

    Args:
        rows: float32 `[R, D]` of each part.
        index: int32 `[U]` of each part, the row of each item; of no use if the part is not shared.
        shared: whether items share rows of the part; otherwise item i has row i.
        candidate_index: int32 `[C]`.
    """
    found = kernels.library().din_dist_vectors(
        rows, index, candidate_index, shared=shared, num_threads=kernels.num_threads()
    )
    width = sum(part.shape[1] for part in rows)
    of_items, of_candidates = (_shaped(some, [None, width]) for some in found)
    return of_items, of_candidates


def vectors_gradient(
    of_vectors: tf.Tensor,
    of_candidates: tf.Tensor,
    rows: Sequence[tf.Tensor],
    index: Sequence[tf.Tensor],
    shared: Sequence[bool],
    candidate_index: tf.Tensor,
) -> list[tf.Tensor]:
    """Returns the gradients of the `rows` of `vectors`, given those of its results; other arguments as there."""
    found = kernels.library().din_dist_vectors_gradient(
        of_vectors, of_candidates, rows, index, candidate_index, shared=shared, num_threads=kernels.num_threads()
    )
    return _shaped_like(found, rows)


def beside_product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Returns `[a, b, a * b]`, float32 `[M, 3H]`, of two `[M, H]`."""
    beside = kernels.library().din_dist_beside_product(a, b, num_threads=kernels.num_threads())
    return _shaped(beside, [None, 3 * a.shape[1]])


def beside_product_gradient(a: tf.Tensor, b: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
    """Returns the gradients of `a` and `b` `[M, H]`, given that of `beside_product` `[M, 3H]`."""
    found = kernels.library().din_dist_beside_product_gradient(a, b, upstream, num_threads=kernels.num_threads())
    return _shaped_like(found, (a, b))


# --- Normalization and dense layers. ---


def statistics(
    sums: tf.Tensor, moving_mean: tf.Tensor, moving_variance: tf.Tensor, constants: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """Returns mean, scale, number of rows, new moving mean and variance; see `Standardize.statistics_of`.

    Args:
        sums: float32 `[2W + 1]`, over all ranks.
        moving_mean: float32 `[W]`.
        moving_variance: float32 `[W]`.
        constants: float32 `[2]`, momentum and epsilon.
    """
    return kernels.library().din_dist_statistics(sums, moving_mean, moving_variance, constants)


def sums_about(inputs: tf.Tensor, centre: tf.Tensor) -> tf.Tensor:
    """Returns float32 `[2W + 1]`: sums of `inputs` `[M, W]` less `centre` `[W]`, of its square, and of 1 a row."""
    return kernels.library().din_dist_sums_about(inputs, centre, num_threads=kernels.num_threads())


def normalised_gradient(inputs: tf.Tensor, held: tf.Tensor, found: GateStatistics) -> tf.Tensor:
    """Returns the gradient of `inputs` `[M, W]`, given `held`, their gradient with their statistics held fixed."""
    return kernels.library().din_dist_normalised_gradient(inputs, held, *found, num_threads=kernels.num_threads())


def dense(
    inputs: tf.Tensor,
    gate: GateInputs,
    kernel: tf.Tensor,
    bias: tf.Tensor,
    centre: tf.Tensor,
    factors: tf.Tensor,
    bfloat16: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `(gate(inputs) * factors) kernel + bias`, `[M, padded units]`, and its `sums_about` the `centre`.

    Args:
        inputs: float32 `[M, padded W]`.
        gate: before the product.
        kernel: float32 `[W, units]`.
        bias: float32 `[units]`.
        centre: float32 `[units]`.
        factors: float32 `[M, padded W]`; empty: all are 1.
        bfloat16: round the factors of the product.
    """
    return kernels.library().din_dist_dense(
        *(inputs, kernel, bias, centre, gate.mean, gate.scale, gate.alpha, gate.beta, factors),
        activation=gate.activation,
        in_bfloat16=bfloat16,
        num_threads=kernels.num_threads(),
    )


def dense_gradient(
    inputs: tf.Tensor,
    gate: GateInputs,
    kernel: tf.Tensor,
    above: tf.Tensor,
    found: GateStatistics,
    held: tf.Tensor,
    factors: tf.Tensor,
    bfloat16: bool,
) -> tuple[tf.Tensor, ...]:
    """Returns the gradients of a dense layer: of its inputs, kernel, bias, standardised inputs, alpha and beta.

    Args:
        inputs: as of `dense`, like gate, kernel, factors and bfloat16.
        gate: before the product.
        kernel: float32 `[W, units]`.
        above: float32 `[M, padded units]`, the results of `dense`.
        found: statistics of the gate above.
        held: float32 `[M, padded units]`, the gradient of `above` with their statistics held fixed.
        factors: float32 `[M, padded W]`; empty: all are 1.
        bfloat16: round the factors of the product.
    """
    return kernels.library().din_dist_dense_gradient(
        *(inputs, above, kernel, gate.mean, gate.scale, gate.alpha, gate.beta, factors, *found, held),
        activation=gate.activation,
        in_bfloat16=bfloat16,
        num_threads=kernels.num_threads(),
    )


# --- The local activation unit. ---


def attention_first(
    candidate: tf.Tensor,
    behaviours: tf.Tensor,
    first: FirstKernels,
    bias: tf.Tensor,
    centre: tf.Tensor,
    pairs: PairIndex,
    bfloat16: bool,
    sides: SideRows,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the first layer's results `[P, padded W]`, and their `sums_about` the `centre`.

    Args:
        candidate: float32 `[C, H]`.
        behaviours: float32 `[K, H]`.
        first: the layer's kernels.
        bias: float32 `[W]`.
        centre: float32 `[W]`.
        pairs: int32 `[P]` each, candidate and behaviour of each pair, by ascending candidate.
        bfloat16: round the factors of products.
        sides: of the behaviours.
    """
    return kernels.library().din_dist_first(
        *(candidate, behaviours, *first, bias, centre, *pairs, *sides),
        in_bfloat16=bfloat16,
        num_threads=kernels.num_threads(),
    )


def attention_first_gradient(
    rows: tuple[tf.Tensor, tf.Tensor],
    first: FirstKernels,
    inputs: tf.Tensor,
    found: GateStatistics,
    pooled: PooledGradient,
    pairs: PairIndex,
    bfloat16: bool,
    sides: SideRows,
) -> tuple[tf.Tensor, ...]:
    """Returns the gradients of what `attention_first` takes.

    Args:
        rows: candidate and behaviours, as of `attention_first`; likewise first, pairs, bfloat16 and sides.
        first: the layer's kernels.
        inputs: float32 `[P, padded W]`, the results of `attention_first`.
        found: statistics of the gate above.
        pooled: the gradient from above.
        pairs: int32 `[P]` each, candidate and behaviour of each pair, by ascending candidate.
        bfloat16: round the factors of products.
        sides: of the behaviours.

    Returns:
        The gradients of candidate, behaviours, the three kernels, the bias, the vectors of sides and their kernel.
    """
    return kernels.library().din_dist_first_gradient(
        *(*rows, *first, inputs, *found, *pooled, *pairs, *sides),
        in_bfloat16=bfloat16,
        num_threads=kernels.num_threads(),
    )


def attention_pool(
    inputs: tf.Tensor,
    gate: GateInputs,
    output: tuple[tf.Tensor, tf.Tensor],
    behaviours: tf.Tensor,
    num_candidates: tf.Tensor,
    scale: ScoreScale,
    pairs: PairIndex,
    sides: SideRows,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the interests `[C, H + S]`, and the weights with which behaviours were pooled, `[P]`.

    Args:
        inputs: float32 `[P, padded W]`, of the last hidden layer's activation.
        gate: that activation.
        output: kernel `[W]` and bias `[1]` of the output unit.
        behaviours: float32 `[K, H]`.
        num_candidates: int32.
        scale: how scores become weights.
        pairs: int32 `[P]` each, candidate and behaviour of each pair, by ascending candidate.
        sides: of the behaviours.
    """
    of_gate = (gate.mean, gate.scale, gate.alpha)
    interest, weights = kernels.library().din_dist_pool(
        *(inputs, *output, *of_gate, behaviours, num_candidates, scale.divisor, *pairs, sides.vectors, sides.side_of),
        activation=gate.activation,
        softmax=scale.softmax,
        num_threads=kernels.num_threads(),
    )
    return _shaped(interest, [None, behaviours.shape[-1] + sides.vectors.shape[-1]]), weights


def attention_pool_gradient(
    inputs: tf.Tensor,
    gate: GateInputs,
    output: tf.Tensor,
    behaviours: tf.Tensor,
    pooled: tuple[tf.Tensor, tf.Tensor],
    scale: ScoreScale,
    pairs: PairIndex,
    sides: SideRows,
) -> tuple[tf.Tensor, ...]:
    """Returns the gradients of inputs (with their statistics held fixed), output, bias, standardised inputs and alpha.

    Args:
        inputs: as of `attention_pool`, like gate, behaviours, scale, pairs and sides.
        gate: the last activation.
        output: float32 `[W]`, kernel of the output unit.
        behaviours: float32 `[K, H]`.
        pooled: float32 `[P]` and `[C, H + S]`, the weights of `attention_pool` and the gradient of its interests.
        scale: how scores become weights.
        pairs: int32 `[P]` each, candidate and behaviour of each pair, by ascending candidate.
        sides: of the behaviours.
    """
    of_gate = (gate.mean, gate.scale, gate.alpha)
    return kernels.library().din_dist_pool_gradient(
        *(inputs, output, *of_gate, behaviours, *pooled, scale.divisor, *pairs, sides.vectors, sides.side_of),
        activation=gate.activation,
        softmax=scale.softmax,
        num_threads=kernels.num_threads(),
    )


# --- Penalties and updates. ---


def regularize(
    embedding_l2: tf.Tensor,
    gradients: Sequence[tf.Tensor],
    tables: Sequence[tf.Variable],
    row_ids: Sequence[tf.Tensor],
    row_weights: Sequence[tf.Tensor],
    num_row_gradients: int,
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """Returns the first gradients with penalties, and the sums of squares of row gradients and of whole ones.

    Args:
        embedding_l2: float32.
        gradients: float32, those of `tables` first, then further row gradients, then whole ones.
        tables: float32 `[rows, D]` each.
        row_ids: int32 `[R]` of each table.
        row_weights: float32 `[rows]` of each table, or empty.
        num_row_gradients: how many of the gradients are of rows.
    """
    added, squares = kernels.library().din_dist_regularize(
        *(embedding_l2, gradients, [table.handle for table in tables], row_ids, row_weights),
        num_row_gradients=num_row_gradients,
        num_threads=kernels.num_threads(),
    )
    of_rows, of_whole = tf.unstack(_shaped(squares, [2]))
    return _shaped_like(added, gradients[: len(tables)]), of_rows, of_whole


def update(
    rule: str, rate: tf.Tensor, constants: Sequence[float], gradients: Sequence[tf.Tensor], values: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Returns the new `values`: all weights, then all slots of the first kind, and so on.

    Args:
        rule: its name in `kRules` of updates.cc.
        rate: float32.
        constants: of the rule.
        gradients: of each variable.
        values: of each variable, grouped by kind.
    """
    return kernels.library().din_dist_update(
        *(rate, tf.constant(constants, tf.float32, [len(constants)]), gradients, values),
        rule=rule,
        num_threads=kernels.num_threads(),
    )


def update_rows(
    rule: str,
    rate: tf.Tensor,
    constants: Sequence[float],
    gradients: Sequence[tf.Tensor],
    row_ids: Sequence[tf.Tensor],
    variables: Sequence[tf.Variable],
    keep: bool,
) -> list[tf.Tensor]:
    """Updates rows of tables where they are. Returns the rows as they were before, if asked to `keep` them.

    Args:
        rule: its name in `kRules` of updates.cc.
        rate: float32.
        constants: of the rule.
        gradients: float32 `[R, D]` of each table.
        row_ids: int32 `[R]` of each table.
        variables: all tables, then all slots of the first kind, and so on.
        keep: return the rows before, of each variable.
    """
    before = kernels.library().din_dist_update_rows(
        *(rate, tf.constant(constants, tf.float32, [len(constants)]), gradients, row_ids),
        [variable.handle for variable in variables],
        B=len(variables) if keep else 0,
        rule=rule,
        num_threads=kernels.num_threads(),
    )
    if not keep:
        return []
    return [_shaped(rows, [None, *of.shape[1:]]) for rows, of in zip(before, variables, strict=True)]


# --- Memory that the ranks of one machine share. ---


def shared_sum(values: tf.Tensor, place: SharedPlace) -> tf.Tensor:
    """Returns the sum over the ranks of float32 `values` `[N]`."""
    return kernels.library().din_dist_neighbours_sum(values, **place)


def shared_gather(tensors: Sequence[tf.Tensor], place: SharedPlace) -> list[tf.Tensor]:
    """Returns the rows of all ranks, concatenated, of tensors that are all float32 or all int32."""
    gathered = kernels.library().din_dist_neighbours_gather(tensors, **place)
    for rows, own in zip(gathered, tensors, strict=True):
        rows.set_shape([None, *own.shape[1:]])
    return gathered


def shared_reduce_rows(
    row_ids: Sequence[tf.Tensor], rows: Sequence[tf.Tensor], place: SharedPlace
) -> tuple[list[tf.Tensor], list[tf.Tensor], tf.Tensor]:
    """Returns ids and sums of the rows that this rank updates, and the rows of all ranks, int32 `[tables]`.

    Args:
        row_ids: int32 `[R]` of each table, none twice.
        rows: float32 `[R, D]` of each table.
        place: the shared memory.
    """
    ids, sums, counts = kernels.library().din_dist_neighbours_reduce_rows(row_ids, rows, **place)
    for some_ids, of_table, own in zip(ids, sums, rows, strict=True):
        some_ids.set_shape([None])
        of_table.set_shape([None, own.shape[1]])
    return ids, sums, counts


def shared_fence(variables: Sequence[tf.Variable], place: SharedPlace) -> Any:
    """Returns when all ranks have updated their rows of `variables`; gives the operation."""
    return kernels.library().din_dist_neighbours_finish([variable.handle for variable in variables], **place)


def share(variable: tf.Variable, file: int, fill: bool) -> Any:
    """Moves a variable to the memory of an open `file`; `fill` writes its values there. Gives the operation."""
    return kernels.library().din_dist_share(variable.handle, fd=file, fill=fill)


def _shaped(tensor: tf.Tensor, shape: Sequence[int | None]) -> tf.Tensor:
    """Returns `tensor`, of which TensorFlow then knows the shape: kernels do not tell it."""
    tensor.set_shape(shape)
    return tensor


def _shaped_like(found: Sequence[tf.Tensor], sources: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    for own, source in zip(found, sources, strict=True):
        own.set_shape(source.shape)
    return list(found)

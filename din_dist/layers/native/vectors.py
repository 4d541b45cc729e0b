"""Item vectors by our own kernels: each is written once and its gradient once, by all threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from din_dist.kernels import operations


class VectorColumns(NamedTuple):
    """Some columns of the vectors of U items."""

    rows: tf.Tensor  # float32 [R, D]
    row_of: tf.Tensor | None  # int32 [U], the row of each item; None: item i has row i


def concatenated(parts: Sequence[VectorColumns]) -> tf.Tensor:
    """Returns the vectors `[U, H]`, computed by TensorFlow's operations."""
    rows = [part.rows if part.row_of is None else tf.gather(part.rows, part.row_of) for part in parts]
    return tf.concat(rows, axis=1)


def vectors_and_candidates(parts: Sequence[VectorColumns], candidate_index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the vectors `[U, H]`, and once more those of the candidates, `[C, H]`.

    Args:
        parts: of all vectors.
        candidate_index: int32 `[C]`, the rows of the candidates.
    """
    shared = [part.row_of is not None for part in parts]
    index = [tf.zeros([0], tf.int32) if part.row_of is None else part.row_of for part in parts]

    @tf.custom_gradient
    def differentiable(*rows: tf.Tensor) -> Any:
        def gradient(of_vectors: tf.Tensor, of_candidates: tf.Tensor) -> list[tf.Tensor]:
            return operations.vectors_gradient(of_vectors, of_candidates, rows, index, shared, candidate_index)

        return operations.vectors(rows, index, shared, candidate_index), gradient

    return differentiable(*(part.rows for part in parts))


@tf.custom_gradient
def beside_product(a: tf.Tensor, b: tf.Tensor) -> Any:
    """Returns `[a, b, a * b]` of two `[M, H]`, `[M, 3H]`."""

    def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
        return operations.beside_product_gradient(a, b, upstream)

    return operations.beside_product(a, b), gradient

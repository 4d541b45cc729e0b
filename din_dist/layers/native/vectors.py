"""Vectors of items in kernels of our own, on CPUs: each is written once and its gradient once, by all threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from din_dist import kernels


class Part(NamedTuple):
    """Some columns of the vectors of U items."""

    rows: tf.Tensor  # [R, D]
    places: tf.Tensor | None  # int32 [U], the row of each item; None: item i has row i


def side_by_side(parts: Sequence[Part]) -> tf.Tensor:
    """`[U, H]`, by TensorFlow's operations."""
    rows = [part.rows if part.places is None else tf.gather(part.rows, part.places) for part in parts]
    return tf.concat(rows, axis=1)


def vectors_and_candidates(parts: Sequence[Part], candidate_places: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`side_by_side`, and its rows `candidate_places` `[C]` once more: `[U, H]`, `[C, H]`."""
    ops, width = kernels.library(), sum(part.rows.shape[1] for part in parts)
    settings = {"shared": [part.places is not None for part in parts], "num_threads": kernels.num_threads()}
    places = [tf.zeros([0], tf.int32) if part.places is None else part.places for part in parts]

    @tf.custom_gradient
    def differentiable(*rows: tf.Tensor) -> Any:
        def gradient(of_vectors: tf.Tensor, of_candidates: tf.Tensor) -> list[tf.Tensor]:
            found = ops.din_dist_vectors_gradient(of_vectors, of_candidates, rows, places, candidate_places, **settings)
            for own, source in zip(found, rows, strict=True):
                own.set_shape(source.shape)
            return found

        vectors, candidates = ops.din_dist_vectors(rows, places, candidate_places, **settings)
        for found in (vectors, candidates):
            found.set_shape([None, width])
        return (vectors, candidates), gradient

    return differentiable(*(part.rows for part in parts))


@tf.custom_gradient
def beside_product(a: tf.Tensor, b: tf.Tensor) -> Any:
    """`[a, b, a * b]`: `[M, H]` and `[M, H]` to `[M, 3H]`."""
    ops, threads = kernels.library(), {"num_threads": kernels.num_threads()}

    def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
        found = ops.din_dist_beside_product_gradient(a, b, upstream, **threads)
        for own, source in zip(found, (a, b), strict=True):
            own.set_shape(source.shape)
        return found

    beside = ops.din_dist_beside_product(a, b, **threads)
    beside.set_shape([None, 3 * a.shape[1]])
    return beside, gradient

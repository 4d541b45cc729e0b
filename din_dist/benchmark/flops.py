"""How much arithmetic an update is: the matrix products of a model, from its sizes alone.

Everything else (activations, softmax, gathers, the update) is left out: it costs memory traffic more than arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from din_dist.config import ModelConfig, ModelKind


class Product(NamedTuple):
    """`[rows, inner] x [inner, columns]`."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each of rows * inner * columns."""
        return 2 * self.rows * self.inner * self.columns


def forward_products(
    config: ModelConfig, width: int, num_examples: int, num_positions: int, num_items: int
) -> list[Product]:
    """The products of one forward pass, in their order.

    Args:
        width: H, of an item vector.
        num_positions: history positions of all examples; `num_items`: distinct items among candidates and histories.
    """
    products = []
    head_width = 2 * width
    if config.model is ModelKind.DIN:
        head_width = 3 * width
        first, *_ = config.attention_hidden_units
        # The factored first layer: a term a candidate, one a distinct item, one a pair.
        products += [Product(rows, width, first) for rows in (num_examples, num_items, num_positions)]
        products += _stack(num_positions, (*config.attention_hidden_units, 1))
    products.append(Product(num_examples, width, width))  # the interest's projection
    return products + _stack(num_examples, (head_width, *config.hidden_units, 1))


def training_flops(products: Sequence[Product]) -> int:
    """Forward and backward: the gradients of a product's two sides are a product of the same size each."""
    return 3 * sum(product.flops for product in products)


def _stack(rows: int, widths: Sequence[int]) -> list[Product]:
    return [Product(rows, inner, columns) for inner, columns in itertools.pairwise(widths)]

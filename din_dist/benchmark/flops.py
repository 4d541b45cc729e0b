"""The arithmetic of an update: the matrix products of a model, from its sizes alone.

Everything else (activations, softmax, gathers, the update) is left out, because it is bound by memory traffic rather
than by arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from din_dist.config import AttentionKind, ModelConfig, ModelKind, SessionReadout
from din_dist.features.spec import Form
from din_dist.layers.feature_columns import FeatureColumns


class Product(NamedTuple):
    """`[rows, inner] x [inner, columns]`."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """The floating-point operations: a multiplication and an addition for each of rows * inner * columns."""
        return 2 * self.rows * self.inner * self.columns


class BatchSizes(NamedTuple):
    """The sizes of a batch."""

    examples: int
    positions: int  # of the histories of all examples
    items: int  # distinct ones among candidates and histories
    sides: int = 0  # distinct combinations of features of behaviours


def forward_products(
    config: ModelConfig,
    width: int,
    sizes: BatchSizes,
    context_width: int = 0,
    num_tasks: int = 1,
    num_histories: int = 1,
    side_width: int = 0,
) -> list[Product]:
    """Returns the matrix products of one forward pass, in order.

    Args:
        config: the model's settings.
        width: H, the width of an item vector.
        sizes: of the batch.
        context_width: the columns of the examples' features.
        num_tasks: the labels to predict.
        num_histories: the histories of an example, which divide the positions.
        side_width: S, the width of features of behaviours.
    """
    num_examples, num_positions, num_items, num_sides = sizes
    products = []
    head_width = (1 + num_histories) * width
    if config.model is ModelKind.DIN:
        head_width = (1 + 2 * num_histories) * width
    if config.model is ModelKind.DIN and config.attention is AttentionKind.MLP:
        first, *_ = config.attention_hidden_units
        # The factored first layer has one term per candidate, one per distinct item and one per pair, the first two in
        # each history.
        rows = [*num_histories * (num_examples, num_items), num_positions]
        products += [Product(number, width, first) for number in rows]
        products += num_histories * [Product(num_sides, side_width, first)] if side_width else []
        products += _stack(num_positions, (*config.attention_hidden_units, 1))
    if config.interest_projection:
        products += num_histories * [Product(num_examples, width + side_width, width)]
    first, *_ = config.hidden_units
    experts = config.heads.experts if num_tasks > 1 else 0
    first_width = experts * (first + num_tasks) if experts else num_tasks * first
    products.append(Product(num_examples, head_width + context_width, first_width))
    return products + num_tasks * _stack(num_examples, (*config.hidden_units, 1))


def retrieval_products(config: ModelConfig, width: int, sizes: BatchSizes, num_sampled: int) -> list[Product]:
    """Returns the matrix products of one forward pass of a model that finds items.

    Args:
        config: the model's settings.
        width: H, the width of an item vector.
        sizes: of the batch. As many positions as there are count as nodes of sessions, of which there may be fewer.
        num_sampled: S, the items that the softmax compares targets with.
    """
    num_examples, num_positions, num_items, _ = sizes
    count = config.num_interests
    match config.model:
        case ModelKind.YOUTUBE_DNN:
            products = _stack(num_examples, (width + 3 * config.example_age, *config.tower_units, width))
        case ModelKind.COMIREC_SA:
            products = [Product(num_items, width, 4 * width), Product(num_positions, 4 * width, count)]
        case ModelKind.COMIREC_DR:
            products = [Product(num_positions, width, count * width)]
        case ModelKind.MIND:
            products = [Product(num_items, width, width), Product(count * num_examples, width, width)]
        case _:
            products = 2 * [Product(num_positions, width, width)]
            products += [Product(num_positions, 2 * width, 3 * width), Product(num_positions, width, 3 * width)]
            products.append(Product(num_examples, 2 * width, width))
            if config.session_readout is SessionReadout.GATE:
                products += [Product(rows, width, width) for rows in (num_positions, num_examples)]
    return [*products, Product(num_examples, width, num_sampled)]


def projection_products(columns: FeatureColumns | None, num_rows: int) -> list[Product]:
    """Returns the products of the projections of numbers and vectors, of `num_rows` rows each.

    Projections of trained vectors, whose rows are the distinct ids of a batch, are left out.
    """
    widths = columns.projected_widths if columns else []
    return [Product(num_rows, inner, outer) for encoding, inner, outer in widths if encoding.form is not Form.IDS]


def training_flops(products: Sequence[Product]) -> int:
    """Returns the operations of forward and backward pass.

    The gradient with respect to each side of a product is another product of the same size.
    """
    return 3 * sum(product.flops for product in products)


def _stack(rows: int, widths: Sequence[int]) -> list[Product]:
    return [Product(rows, inner, columns) for inner, columns in itertools.pairwise(widths)]

"""Counts made by hand."""

from __future__ import annotations

import pytest

from din_dist.benchmark.flops import BatchSizes, Product, forward_products, retrieval_products, training_flops
from din_dist.config import ModelConfig, ModelKind, SessionReadout

SIZES = BatchSizes(10, 70, 20)


def test_din_by_hand() -> None:
    """H = 6, attention 4-3-1, head 5-1; 10 examples with 70 positions of 20 distinct items."""
    config = ModelConfig(attention_hidden_units=(4, 3), hidden_units=(5,))
    products = forward_products(config, 6, SIZES)
    assert products == [
        Product(10, 6, 4),  # candidates: 480 flops
        Product(20, 6, 4),  # items: 960
        Product(70, 6, 4),  # pairs: 3,360
        Product(70, 4, 3),  # 1,680
        Product(70, 3, 1),  # 420
        Product(10, 6, 6),  # projection: 720
        Product(10, 18, 5),  # [interest, q, interest * q]: 1,800
        Product(10, 5, 1),  # 100
    ]
    assert training_flops(products) == 3 * (480 + 960 + 3360 + 1680 + 420 + 720 + 1800 + 100)


def test_two_histories_by_hand() -> None:
    config = ModelConfig(attention_hidden_units=(4, 3), hidden_units=(5,))
    products = forward_products(config, 6, SIZES, num_histories=2)
    of_attention = [Product(10, 6, 4), Product(20, 6, 4), Product(10, 6, 4), Product(20, 6, 4), Product(70, 6, 4)]
    of_attention += [Product(70, 4, 3), Product(70, 3, 1)]
    of_head = [Product(10, 6, 6), Product(10, 6, 6), Product(10, 30, 5), Product(10, 5, 1)]
    assert products == of_attention + of_head


def test_features_of_behaviours_by_hand() -> None:
    config = ModelConfig(attention_hidden_units=(4, 3), hidden_units=(5,))
    products = forward_products(config, 6, BatchSizes(10, 70, 20, 9), side_width=2)
    of_attention = [Product(10, 6, 4), Product(20, 6, 4), Product(70, 6, 4), Product(9, 2, 4), Product(70, 4, 3)]
    assert products == [*of_attention, Product(70, 3, 1), Product(10, 8, 6), Product(10, 18, 5), Product(10, 5, 1)]


def test_mean_pooling_by_hand() -> None:
    config = ModelConfig(model=ModelKind.MEAN_POOLING, hidden_units=(5,))
    products = forward_products(config, 6, SIZES)
    assert products == [Product(10, 6, 6), Product(10, 12, 5), Product(10, 5, 1)]
    assert training_flops(products) == 3 * (720 + 1200 + 100)


@pytest.mark.parametrize(
    ("settings", "products"),
    [
        ({"model": ModelKind.YOUTUBE_DNN, "tower_units": (5,)}, [(10, 6, 5), (10, 5, 6)]),
        ({"model": ModelKind.YOUTUBE_DNN, "tower_units": ()}, [(10, 6, 6)]),
        ({"model": ModelKind.YOUTUBE_DNN, "tower_units": (), "example_age": True}, [(10, 9, 6)]),
        ({"model": ModelKind.COMIREC_SA, "num_interests": 3}, [(20, 6, 24), (70, 24, 3)]),
        ({"model": ModelKind.COMIREC_DR, "num_interests": 3}, [(70, 6, 18)]),
        ({"model": ModelKind.MIND, "num_interests": 3}, [(20, 6, 6), (30, 6, 6)]),
        (
            {"model": ModelKind.SR_GNN},
            [(70, 6, 6), (70, 6, 6), (70, 12, 18), (70, 6, 18), (10, 12, 6), (70, 6, 6), (10, 6, 6)],
        ),
        (
            {"model": ModelKind.SR_GNN, "session_readout": SessionReadout.MEAN_LAST},
            [(70, 6, 6), (70, 6, 6), (70, 12, 18), (70, 6, 18), (10, 12, 6)],
        ),
    ],
)
def test_models_that_find_items_by_hand(settings: dict, products: list[tuple[int, int, int]]) -> None:
    """And the product of 10 users with 8 sampled items."""
    found = retrieval_products(ModelConfig(**settings), 6, SIZES, 8)
    assert found == [Product(*sizes) for sizes in [*products, (10, 6, 8)]]


@pytest.mark.parametrize(
    ("head", "heads"),
    [
        ("shared", [(18, 10), (5, 1), (5, 1)]),  # both first layers side by side, then each tower
        ("mmoe:3", [(18, 21), (5, 1), (5, 1)]),  # three experts of 5, and three gates of each tower
    ],
)
def test_two_labels_by_hand(head: str, heads: list[tuple[int, int]]) -> None:
    config = ModelConfig(attention_hidden_units=(4, 3), hidden_units=(5,), task_head=head)
    one, two = (forward_products(config, 6, SIZES, num_tasks=number) for number in (1, 2))
    assert two == [*one[:-2], *(Product(10, *sizes) for sizes in heads)]

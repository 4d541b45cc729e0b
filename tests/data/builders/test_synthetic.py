"""Made-up events: reproducible, of the asked-for size, and with interests that can be found."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from din_dist import schema
from din_dist.config import DataConfig
from din_dist.data import blocks as blocks_module
from din_dist.data.blocks import Block
from din_dist.data.builders import synthetic
from din_dist.data.builders.synthetic import Synthetic, SyntheticBlocks, SyntheticConfig
from din_dist.data.prepared import prepare

_FOLDER = tempfile.TemporaryDirectory()
SIZE = {"num_users": 4_000, "num_items": 3_000, "num_categories": 60, "events_per_user": 25, "seed": 7}


class SyntheticTest(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = Synthetic
    BUILDER_CONFIG_NAMES_TO_TEST: ClassVar = [SyntheticConfig.sized(**SIZE)]
    EXAMPLE_DIR = _FOLDER.name
    SPLITS: ClassVar = {schema.EVENTS_SPLIT: 2}  # blocks of 3,200 users
    MOCK_OUT_FORBIDDEN_OS_FUNCTIONS = False  # our files are local


def blocks_of(**changes: int) -> list[Block]:
    return list(SyntheticBlocks(SyntheticConfig.sized(**{**SIZE, **changes})))


def test_size_and_order() -> None:
    blocks = blocks_of()
    assert [block.first_user for block in blocks] == [0, 3_200]
    assert sum(len(block.offsets) - 1 for block in blocks) == 4_000
    num_events = 0
    for block in blocks:
        assert (np.diff(block.offsets) >= 2).all()
        assert block.offsets[-1] == len(block.item_ids) == len(block.timestamps) == len(block.labels)
        gaps = np.diff(block.timestamps)
        gaps[block.offsets[1:-1] - 1] = 0
        assert (gaps >= 0).all()
        assert block.item_ids.min() >= 1 and block.item_ids.max() <= 3_000
        num_events += len(block.item_ids)
    assert num_events == pytest.approx(4_000 * 25, rel=0.03)


def test_a_seed_and_a_block_give_the_same_events() -> None:
    first, again, other = (blocks_of(seed=seed)[1].item_ids for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[:100], other[:100])
    left, right = blocks_of(num_users=6_400)
    assert len(left.offsets) == len(right.offsets) and not np.array_equal(left.item_ids[:100], right.item_ids[:100])


def test_known_values() -> None:
    """Made by this very code: prepared data of one version must not change under users' feet."""
    block = blocks_of(num_users=2, events_per_user=3)[0]
    assert (block.offsets.tolist(), block.item_ids.tolist(), block.timestamps.tolist()) == KNOWN


KNOWN = (
    [0, 4, 6],
    [205, 204, 224, 201, 1, 27],
    [1605695288, 1605695879, 1605707317, 1605799183, 1606956342, 1607047475],
)


def test_items_are_popular_as_one_over_rank() -> None:
    counts = np.bincount(np.concatenate([block.item_ids for block in blocks_of(num_categories=1)]))[1:]
    shares = np.log((np.arange(3_000) + 2) / (np.arange(3_000) + 1)) / np.log(3_001)
    assert counts[0] / counts.sum() == pytest.approx(shares[0], rel=0.1)
    assert counts[9] / counts.sum() == pytest.approx(shares[9], rel=0.2)


def test_the_next_category_is_one_of_the_recent() -> None:
    block = blocks_of()[0]
    category = (block.item_ids - 1) * 60 // 3_000
    positions = np.arange(len(category)) - np.repeat(block.offsets[:-1], np.diff(block.offsets))
    late = np.flatnonzero(positions >= 10)
    same_as_last = np.mean(category[late] == category[late - 1])
    among_recent = np.mean((category[late, None] == category[late[:, None] - np.arange(1, 11)]).any(axis=1))
    by_chance = np.mean(category[late] == category[np.roll(late, 1000)])
    assert same_as_last > 0.6 and among_recent > 0.8 and by_chance < 0.15


@pytest.mark.parametrize(
    "size", [{"num_items": 2, "num_categories": 100}, {"events_per_user": 2}, {"num_users": 1}, {"num_categories": 1}]
)
def test_small_sizes(size: dict) -> None:
    config = SyntheticConfig.sized(**{**SIZE, **size})
    items = np.concatenate([block.item_ids for block in SyntheticBlocks(config)])
    assert items.min() >= 1 and items.max() <= config.num_items
    assert config.num_categories <= config.num_items


def test_every_item_has_its_category(tmp_path: Path) -> None:
    sizes = {f"synthetic_{name}": value for name, value in {**SIZE, "num_items": 7, "num_categories": 3}.items()}
    store = prepare(DataConfig(dataset="synthetic", data_dir=str(tmp_path), **sizes))
    assert store.item_features["category_id"].tolist() == [0, 1, 1, 2, 2, 3, 3, 3]
    assert (store.facts.num_users, store.facts.num_items, store.facts.sources) == (4_000, 7, {})
    assert store.facts.item_features == {"category_id": 3}


def test_a_block_does_not_depend_on_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    np.testing.assert_array_equal(blocks_of()[0].item_ids, blocks_of(num_users=100_000)[0].item_ids)
    assert synthetic.EVENTS_PER_BLOCK == blocks_module.EVENTS_PER_BLOCK

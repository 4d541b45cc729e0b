"""Makes events of any number, in which attention has something to find.

Prepared by `python -m din_dist.cli.prepare_data --dataset=synthetic --synthetic_num_users=...`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds

from din_dist.data.blocks import EVENTS_PER_BLOCK, Block, Blocks, EventLog, ItemFeature
from din_dist.data.builders.base import EventsBuilder

FAVOURITES = 4  # categories that a user cares about
SWITCH_PROBABILITY = 0.2  # the next event turns to another favourite: an interest lasts 5 events on average
STRAY_PROBABILITY = 0.1  # an event belongs to no favourite
FIRST_SECOND = 1_600_000_000
STARTS_WITHIN_SECONDS = 180 * 86_400
MEAN_GAP_SECONDS = 43_200


@dataclasses.dataclass(eq=False)
class SyntheticConfig(tfds.core.BuilderConfig):
    """The size of the data set; `events_per_user` is a mean: each user has 2 events and a geometric number more."""

    num_users: int = 10_000
    num_items: int = 10_000
    num_categories: int = 100
    events_per_user: int = 30
    seed: int = 0

    @classmethod
    def sized(
        cls, num_users: int, num_items: int, num_categories: int, events_per_user: int, seed: int
    ) -> SyntheticConfig:
        """Makes a configuration whose name, and so whose folder, follows from the numbers."""
        num_categories = min(num_categories, num_items)
        name = f"users_{num_users}-items_{num_items}-categories_{num_categories}-events_{events_per_user}-seed_{seed}"
        return cls(
            name=name,
            num_users=num_users,
            num_items=num_items,
            num_categories=num_categories,
            events_per_user=events_per_user,
            seed=seed,
        )


class Synthetic(EventsBuilder):
    """Made-up events: each user moves among a few favourite categories, and takes popular items of the current one.

    The popularity of categories, and of items within a category, is 1/rank. Timestamps are seconds. Each block follows
    from (seed, block) alone, so that any size fits in memory.
    """

    name = "synthetic"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First."}
    builder_config: SyntheticConfig

    def _settings(self) -> dict[str, Any]:
        return {"config": self.builder_config.name}

    def _read(self, dl_manager: tfds.download.DownloadManager) -> tuple[EventLog, Mapping[str, Mapping]]:
        config = self.builder_config
        blocks = SyntheticBlocks(config)
        categories = np.repeat(np.arange(1, config.num_categories + 1), np.diff(blocks.first_items))
        log = EventLog(
            user_ids=pa.array(np.arange(config.num_users)),
            item_ids=pa.array(np.arange(config.num_items)),
            item_features={
                "category_id": ItemFeature(
                    np.concatenate([[0], categories]).astype(np.int32), pa.array(np.arange(config.num_categories))
                )
            },
            has_labels=False,
            blocks=blocks,
        )
        return log, {}


class SyntheticBlocks(Blocks):
    """The blocks of the data set, each of which follows from (seed, index) alone."""

    def __init__(self, config: SyntheticConfig) -> None:
        self._config = config
        self._users_per_block = max(1, EVENTS_PER_BLOCK // config.events_per_user)
        share = np.linspace(0, config.num_items, config.num_categories + 1)
        self.first_items = np.floor(share).astype(np.int64)  # [C + 1], the items of a category have successive numbers

    def __len__(self) -> int:
        return -(-self._config.num_users // self._users_per_block)

    def __getitem__(self, index: int) -> Block:
        config = self._config
        # Only `random()`, because NumPy promises to keep bit streams but not distributions.
        random = np.random.Generator(np.random.Philox(key=[config.seed, index])).random
        first_user = index * self._users_per_block
        num_users = min(self._users_per_block, config.num_users - first_user)
        lengths = 2 + geometric(random(num_users), config.events_per_user - 2)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        num_events = int(offsets[-1])
        users = np.repeat(np.arange(num_users), lengths)

        favourites = zipf(random((num_users, FAVOURITES)), config.num_categories)
        turns = random(num_events) < SWITCH_PROBABILITY
        turns[offsets[:-1]] = True
        spell = np.cumsum(turns) - 1  # the stretch of one interest that an event belongs to
        interest = (random(int(turns.sum())) * FAVOURITES).astype(np.int64)[spell]
        strays = random(num_events) < STRAY_PROBABILITY
        category = np.where(strays, zipf(random(num_events), config.num_categories), favourites[users, interest])
        first = self.first_items[category]
        items = first + zipf(random(num_events), self.first_items[category + 1] - first)

        gaps = np.floor(-np.log1p(-random(num_events)) * MEAN_GAP_SECONDS).astype(np.int64)
        elapsed = np.cumsum(gaps)
        starts = FIRST_SECOND + np.floor(random(num_users) * STARTS_WITHIN_SECONDS).astype(np.int64)
        return Block(
            first_user=first_user,
            offsets=offsets,
            item_ids=(items + 1).astype(np.int32),
            timestamps=starts[users] + elapsed - elapsed[offsets[:-1]][users],
            labels=np.ones(num_events, np.uint8),
        )


def zipf(uniform: np.ndarray, size: np.ndarray | int) -> np.ndarray:
    """Returns ranks in [0, size): rank r has probability log((r + 2) / (r + 1)) / log(size + 1), about 1/(r + 1)."""
    return np.minimum(np.floor((size + 1.0) ** uniform).astype(np.int64) - 1, np.asarray(size) - 1)


def geometric(uniform: np.ndarray, mean: int) -> np.ndarray:
    """Returns integers from 0 with this mean; each is rarer than the one before it by the same factor."""
    if mean == 0:
        return np.zeros(len(uniform), np.int64)
    return np.floor(np.log1p(-uniform) / np.log(mean / (mean + 1.0))).astype(np.int64)

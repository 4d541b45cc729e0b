"""Makes a log of pages of shown items, with clicks and purchases whose probabilities are known.

Prepared by `python -m din_dist.cli.prepare_data --dataset=synthetic_impressions --synthetic_num_users=...`.

A page shows `ITEMS_PER_PAGE` items at one time. Whether a user clicks depends on what no log tells: the category that
the user is after now, which drifts among a few favourites, and one that the user dislikes. It also depends on the item
and its position. Whether a click becomes a purchase depends on the item in another way, and on the category again.
Items that are bought often are rather clicked seldom. So a model that learns purchases among clicks alone is wrong
among all items.

Letters of shapes: U users of a block, S slots of a page, I items.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from din_dist.data.blocks import EventLog
from din_dist.data.builders.base import EventsBuilder
from din_dist.data.builders.synthetic import (
    FIRST_SECOND,
    MEAN_GAP_SECONDS,
    STARTS_WITHIN_SECONDS,
    SyntheticConfig,
    geometric,
    zipf,
)
from din_dist.data.log_reader import Columns, read_log
from din_dist.data.raw_columns import RawColumns

ITEMS_PER_PAGE = 8
LABELS = ("click", "like", "cart", "buy")
_FAVOURITES = 3
_INTEREST_SECONDS = 86_400  # after so long another favourite is as likely as the same
_OF_INTEREST, _OF_FAVOURITES, _OF_DISLIKED = 0.4, 0.2, 0.15  # shares of the slots; the others are of any category
_USERS_AT_ONCE = 1000
_OF_ITEMS = 2**63  # its stream of random numbers is not that of a block
_MEAN_DELAY, _MEAN_DWELL = 30, 60  # seconds
_LEFT_IN_CART = 0.3  # share of the clicks without a purchase

Random = Callable[..., np.ndarray]


class Truth(dict[str, np.ndarray]):
    """The columns of a part of the log by name, `[E]` each, users in order and each user's events in time order.

    Some of them are what no log has: `p_LABEL`, the probabilities that the labels were drawn with.
    """


@dataclasses.dataclass(eq=False)
class SyntheticImpressionsConfig(tfds.core.BuilderConfig):
    """The size of the data set, and the columns to read."""

    size: SyntheticConfig = dataclasses.field(default_factory=SyntheticConfig)
    columns: Columns = dataclasses.field(default_factory=Columns)
    features: RawColumns = dataclasses.field(default_factory=RawColumns)

    @classmethod
    def of(cls, size: SyntheticConfig, columns: Columns, features: RawColumns) -> SyntheticImpressionsConfig:
        """Makes a configuration whose name, and so whose folder, follows from size and columns."""
        key = json.dumps([columns.to_json(), *features.name_parts()])
        name = f"{size.name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
        return cls(name=name, size=size, columns=columns, features=features)


class SyntheticImpressions(EventsBuilder):
    """Made-up pages of items that users click and buy, with known probabilities.

    Columns: `user_id`, `item_id`, `category_id`, `timestamp` (seconds), `page_id`, `position` from 1, `price`, the
    labels `click`, `like`, `cart` and `buy`, and of clicks `clicked_at` and `dwell`, in seconds. Who buys has put it
    into the cart, and who does that has clicked.
    """

    name = "synthetic_impressions"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First."}
    builder_config: SyntheticImpressionsConfig  # None in what TFDS makes only to look at it

    def _settings(self) -> dict[str, Any]:
        config = self.builder_config
        return {"size": config.size.name, **config.columns.to_json(), **config.features.settings()}

    def _more(self) -> dict[str, type]:
        return self.builder_config.columns.more if self.builder_config else {}

    def _read(self, dl_manager: tfds.download.DownloadManager) -> tuple[EventLog, Mapping[str, Mapping]]:
        config = self.builder_config
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "impressions.parquet"
            write_impressions(path, config.size)
            return read_log([path], config.columns, features=config.features), {}


def write_impressions(path: Path, size: SyntheticConfig) -> None:
    """Writes the log as a Parquet file, without the probabilities."""
    impressions = Impressions(size)
    with pq.ParquetWriter(path, impressions.schema) as writer:
        for first_user in range(0, size.num_users, _USERS_AT_ONCE):
            columns = impressions.of_users(first_user, min(first_user + _USERS_AT_ONCE, size.num_users))
            known = {name: columns[name] for name in impressions.schema.names}
            clicked = columns["click"] == 1
            arrays = [
                pa.array(values, mask=~clicked if name in ("clicked_at", "dwell") else None)
                for name, values in known.items()
            ]
            writer.write_table(pa.table(arrays, schema=impressions.schema))


class Impressions:
    """The log, in parts that follow from (seed, first user) alone. `synthetic_events_per_user` counts shown items."""

    schema: ClassVar = pa.schema(
        {
            **dict.fromkeys(("user_id", "item_id", "category_id", "timestamp", "page_id", "position"), pa.int64()),
            "price": pa.float64(),
            **dict.fromkeys(LABELS, pa.int64()),
            **dict.fromkeys(("clicked_at", "dwell"), pa.int64()),
        }
    )

    def __init__(self, size: SyntheticConfig) -> None:
        self._size = size
        share = np.linspace(0, size.num_items, size.num_categories + 1)
        self._first_items = np.floor(share).astype(np.int64)  # the items of a category have successive numbers
        random = _random(size.seed, _OF_ITEMS)
        appeal, value = _normal(random, size.num_items), _normal(random, size.num_items)
        self._appeal = 0.8 * appeal  # [I], what makes an item clicked
        self._value = 0.8 * value - 0.5 * appeal  # [I], what makes it bought once it is clicked
        self._price = np.round(np.exp(3 + 0.7 * _normal(random, size.num_items)), 2)

    def of_users(self, first_user: int, end_user: int) -> Truth:
        """Returns the columns of the events of users `first_user` to `end_user` - 1."""
        size, random = self._size, _random(self._size.seed, first_user)
        num_users = end_user - first_user
        mean_pages = max(2, -(-size.events_per_user // ITEMS_PER_PAGE))
        num_pages = 2 + geometric(random(num_users), mean_pages - 2)
        favourites = zipf(random((num_users, _FAVOURITES)), size.num_categories)
        disliked = zipf(random(num_users), size.num_categories)
        interest = favourites[:, 0]
        now = FIRST_SECOND + np.floor(random(num_users) * STARTS_WITHIN_SECONDS).astype(np.int64)
        pages = []
        for page in range(int(num_pages.max(initial=0))):
            gap = 1 + np.floor(-np.log1p(-random(num_users)) * MEAN_GAP_SECONDS).astype(np.int64)
            now = now + gap
            drifts = random(num_users) < 1 - np.exp(-gap / _INTEREST_SECONDS)
            drawn = favourites[np.arange(num_users), np.floor(random(num_users) * _FAVOURITES).astype(np.int64)]
            interest = np.where(drifts, drawn, interest)
            shown = self._page(random, interest, favourites, disliked)
            shown |= {"timestamp": np.repeat(now, ITEMS_PER_PAGE), "page": np.full(num_users * ITEMS_PER_PAGE, page)}
            active = np.repeat(page < num_pages, ITEMS_PER_PAGE)
            users = np.repeat(np.arange(first_user, end_user), ITEMS_PER_PAGE)
            pages.append({name: values[active] for name, values in {**shown, "user_id": users}.items()})
        columns = {name: np.concatenate([page[name] for page in pages]) for name in pages[0]}
        order = np.lexsort((columns["position"], columns["page"], columns["user_id"]))
        found = {name: values[order] for name, values in columns.items()}
        found["page_id"] = found["user_id"] * 1_000_000 + found.pop("page")
        found["clicked_at"] = found["timestamp"] + found.pop("delay")
        return Truth(found)

    def _page(
        self, random: Random, interest: np.ndarray, favourites: np.ndarray, disliked: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns the columns of one page of each user, `[U * S]` each."""
        shape = (len(interest), ITEMS_PER_PAGE)
        kind = random(shape)
        favourite = np.take_along_axis(favourites, np.floor(random(shape) * _FAVOURITES).astype(np.int64), axis=1)
        category = zipf(random(shape), self._size.num_categories)
        bounds = np.cumsum([_OF_INTEREST, _OF_FAVOURITES, _OF_DISLIKED])
        for bound, chosen in zip(bounds[::-1], (disliked[:, None], favourite, interest[:, None]), strict=True):
            category = np.where(kind < bound, chosen, category)
        first = self._first_items[category]
        items = first + zipf(random(shape), self._first_items[category + 1] - first)
        position = np.broadcast_to(np.arange(1, ITEMS_PER_PAGE + 1), shape)
        sought, liked = category == interest[:, None], (category[..., None] == favourites[:, None]).any(axis=-1)
        of_click = -2.0 + 1.8 * sought + 0.8 * liked - 2.0 * (category == disliked[:, None])
        of_click += self._appeal[items] - 0.5 * np.log(position)
        of_buy = -1.0 + 1.2 * sought + self._value[items]
        p_click = 1 / (1 + np.exp(-of_click))
        p_buy = p_click / (1 + np.exp(-of_buy))
        probabilities = {"click": p_click, "cart": p_buy + _LEFT_IN_CART * (p_click - p_buy), "buy": p_buy}
        uniform = random(shape)
        labels = {name: uniform < probability for name, probability in probabilities.items()}
        probabilities["like"] = 1 / (1 + np.exp(3 - self._appeal[items] - sought))
        labels["like"] = random(shape) < probabilities["like"]
        delay, dwell = (np.floor(-np.log1p(-random(shape)) * mean) for mean in (_MEAN_DELAY, _MEAN_DWELL))
        whole = {"item_id": items, "category_id": category, "position": position, **labels}
        whole |= {"delay": delay, "dwell": dwell * (1 + labels["buy"])}
        columns = {name: values.astype(np.int64) for name, values in whole.items()}
        columns |= {"price": self._price[items]} | {f"p_{name}": values for name, values in probabilities.items()}
        return {name: values.ravel() for name, values in columns.items()}


def _random(seed: int, stream: int) -> Random:
    # Only `random()`, because NumPy promises to keep bit streams but not distributions.
    return np.random.Generator(np.random.Philox(key=[seed, stream])).random


def _normal(random: Random, count: int) -> np.ndarray:
    """Returns `count` numbers of the standard normal distribution (Box and Muller 1958)."""
    return np.sqrt(-2 * np.log1p(-random(count))) * np.cos(2 * np.pi * random(count))

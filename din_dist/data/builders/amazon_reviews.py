"""Amazon product reviews by Julian McAuley (2014), the 5-core files: every user and every item has 5 reviews or more.

Prepared by `python -m din_dist.cli.prepare_data --dataset=amazon_reviews/Electronics` (or another category), with
`--data_path=FOLDER` for files that were downloaded by hand.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import hashlib
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import requests
import tensorflow_datasets as tfds

from din_dist.data.blocks import EventLog, ItemFeature
from din_dist.data.builders.base import EventsBuilder
from din_dist.data.log_reader import Columns, read_log
from din_dist.errors import InputError
from din_dist.tables.formats import Format
from din_dist.tables.sources import fingerprint_files

URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
CATEGORIES = (
    "Electronics",
    "Books",
    "Movies_and_TV",
    "CDs_and_Vinyl",
    "Clothing_Shoes_and_Jewelry",
    "Home_and_Kitchen",
    "Kindle_Store",
    "Sports_and_Outdoors",
    "Cell_Phones_and_Accessories",
    "Health_and_Personal_Care",
    "Toys_and_Games",
    "Video_Games",
    "Tools_and_Home_Improvement",
    "Beauty",
    "Apps_for_Android",
    "Office_Products",
    "Pet_Supplies",
    "Automotive",
    "Grocery_and_Gourmet_Food",
    "Patio_Lawn_and_Garden",
    "Baby",
    "Digital_Music",
    "Musical_Instruments",
    "Amazon_Instant_Video",
)
PUBLISHED = {  # size in bytes and MD5 of the files that are checked
    "reviews_Electronics_5.json.gz": (495_854_086, "e4524af6c644cd044b1969bac7b62b2a"),
    "meta_Electronics.json.gz": (186_594_679, "b39b77b4c980cca078ec2b93dfcba786"),
}
_ASIN = re.compile(r"'asin': '([^']*)'")


class AmazonReviews(EventsBuilder):
    """Reviews as events, one configuration a category; an item's category is the last entry of its last category path.

    The authors of DIN took the last entry of the last path. The files come from `--data_path` if they are there, and
    otherwise from the network. Sizes and MD5 digests are checked for Electronics alone; gzip's own checksum protects a
    file of another category against truncation. Timestamps are seconds, of whole days.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First."}
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=category, description=f"{category.replace('_', ' ')}.") for category in CATEGORIES
    ]
    DEFAULT_BUILDER_CONFIG_NAME = CATEGORIES[0]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"reviews_CATEGORY_5.json.gz and meta_CATEGORY.json.gz of {URL}"

    def _read(self, dl_manager: tfds.download.DownloadManager) -> tuple[EventLog, Mapping[str, Mapping]]:
        category = self.builder_config.name
        names = [f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz"]
        reviews, meta = (_fetch(name, names, dl_manager) for name in names)
        columns = Columns("reviewerID", "asin", "unixReviewTime", label="", item_features=())
        log = read_log([reviews], columns, Format.JSON_LINES)
        category_of = read_categories(meta, set(log.item_ids.to_pylist()))
        values = pa.array([category_of.get(asin) for asin in log.item_ids.to_pylist()], pa.string())
        features = {"category_id": ItemFeature.from_values(values)}
        return dataclasses.replace(log, item_features=features), fingerprint_files([reviews, meta])


def _fetch(name: str, names: list[str], dl_manager: tfds.download.DownloadManager) -> Path:
    """Returns the file in the manual folder, or downloads it."""
    try:
        path = Path(dl_manager.manual_dir) / name
    except AssertionError:  # TFDS raises it if there is no such folder, or it is empty
        path = Path()
    if not path.is_file():
        try:
            # Without a network TFDS retries for many minutes before it fails: look first.
            requests.head(URL + name, timeout=20, allow_redirects=True)
            path = Path(dl_manager.download(URL + name))
        except Exception as error:  # the network stack raises errors of many kinds
            raise InputError(
                f"{URL}{name}: cannot be downloaded ({' '.join(str(error).split())[:200]}). "
                f"Download {' and '.join(names)} by other means, put both into a folder and give that as --data_path."
            ) from error
    if name in PUBLISHED:
        size, md5 = PUBLISHED[name]
        with path.open("rb") as stream:
            found = (path.stat().st_size, hashlib.file_digest(stream, "md5").hexdigest())
        if found != (size, md5):
            raise InputError(
                f"{path}: must be the published file, {size} bytes with MD5 {md5}. "
                f"Received: {found[0]} bytes with {found[1]}. Delete it and download it again."
            )
    return path


def read_categories(meta: Path, asins: set[str]) -> dict[str, str]:
    """Returns the category of each item that has one. A line of the file is a Python dictionary, not JSON.

    Args:
        meta: the file, compressed by gzip.
        asins: the items to look for.

    Raises:
        InputError: a line cannot be read, or the file is cut off.
    """
    found: dict[str, str] = {}
    num_rows = 0
    try:
        with gzip.open(meta, "rt", encoding="utf-8") as lines:
            for line in lines:
                num_rows += 1
                if asins.isdisjoint(_ASIN.findall(line)):  # most items have no review: a cheap look before parsing
                    continue
                fields = ast.literal_eval(line)
                if fields["asin"] in asins and fields.get("categories"):
                    found[fields["asin"]] = fields["categories"][-1][-1]
    except (SyntaxError, ValueError, LookupError, TypeError, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{meta}, row {num_rows}: must be one Python dictionary a line, with 'asin'. "
            f"Received: {' '.join(str(error).split())[:200]}. Download the file again."
        ) from error
    return found

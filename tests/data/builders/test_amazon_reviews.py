"""The amazon_reviews builder, on made-up files of the same form."""

from __future__ import annotations

import gzip
import json
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import requests
import tensorflow_datasets as tfds

from din_dist import schema
from din_dist.config import DataConfig
from din_dist.data.builders.amazon_reviews import CATEGORIES, URL, AmazonReviews, read_categories
from din_dist.data.prepared import prepare
from din_dist.errors import InputError

REVIEWS = [
    {"reviewerID": "A1", "asin": "0001", "reviewText": 'so "good"', "overall": 5.0, "unixReviewTime": 1393545600},
    {"reviewerID": "A2", "asin": "B0\u00e9", "helpful": [0, 1], "overall": 1.0, "unixReviewTime": 1393545600},
    {"reviewerID": "A1", "asin": "B0\u00e9", "reviewText": "", "overall": 2.0, "unixReviewTime": 1363545600},
    {"reviewerID": "A1", "asin": "no meta", "overall": 2.0, "unixReviewTime": 1363545600},
]
META = [
    {"asin": "0001", "title": "it's", "categories": [["Music", "Old"], ["Music", "Guitars"]]},
    {"asin": "B0\u00e9", "price": 1.5, "categories": [["Music", "Strings"]]},
    {"asin": "unreviewed", "categories": [["Music", "Drums"]]},
]


def write_files(folder: Path, category: str = "Musical_Instruments") -> Path:
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / f"reviews_{category}_5.json.gz", "wt") as file:
        file.writelines(json.dumps(review) + "\n" for review in REVIEWS)
    with gzip.open(folder / f"meta_{category}.json.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{item}\n" for item in META)
    return folder


_FOLDER = tempfile.TemporaryDirectory()
write_files(Path(_FOLDER.name))


class AmazonReviewsTest(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = AmazonReviews
    BUILDER_CONFIG_NAMES_TO_TEST: ClassVar = ["Musical_Instruments"]
    EXAMPLE_DIR = _FOLDER.name
    SPLITS: ClassVar = {schema.EVENTS_SPLIT: 1}
    MOCK_OUT_FORBIDDEN_OS_FUNCTIONS = False  # our files are local


def config_of(tmp_path: Path, category: str = "Musical_Instruments") -> DataConfig:
    return DataConfig(
        dataset=f"amazon_reviews/{category}", data_path=str(tmp_path / "files"), data_dir=str(tmp_path / "prepared")
    )


def test_files_that_were_downloaded_by_hand(tmp_path: Path) -> None:
    write_files(tmp_path / "files")
    store = prepare(config_of(tmp_path))
    assert store.vocabulary("users").to_pylist() == ["A1", "A2"]
    assert store.vocabulary("items").to_pylist() == ["0001", "B0\u00e9", "no meta"]
    assert store.vocabulary("category_id").to_pylist() == ["Guitars", "Strings"]
    assert store.item_features["category_id"].tolist() == [0, 1, 2, 0]
    assert store.user_offsets.tolist() == [0, 3, 4]
    assert store.item_ids.tolist() == [2, 3, 1, 2]  # equal days keep the file's order
    assert store.timestamps.tolist() == [1363545600, 1363545600, 1393545600, 1393545600]
    assert not store.facts.has_labels


def test_files_from_the_network(tmp_path: Path) -> None:
    """TFDS gives downloads names that end in .gz but not in .json.gz."""
    files = write_files(tmp_path / "elsewhere")

    def download(url: str) -> Path:
        assert url.startswith(URL)
        path = tmp_path / f"{hash(url)}.gz"
        path.write_bytes((files / url.removeprefix(URL)).read_bytes())
        return path

    with (
        mock.patch.object(requests, "head"),
        mock.patch.object(tfds.download.DownloadManager, "download", side_effect=download),
    ):
        store = prepare(config_of(tmp_path))
    assert store.facts.num_events == 4


def offline() -> AbstractContextManager:
    """TFDS' own download would try again for minutes."""
    return mock.patch.object(requests, "head", side_effect=ConnectionError("no route"))


def test_no_network(tmp_path: Path) -> None:
    with offline(), pytest.raises(InputError) as caught:
        prepare(config_of(tmp_path))
    assert str(caught.value).startswith(
        f"{URL}reviews_Musical_Instruments_5.json.gz: cannot be downloaded (no route). "
        "Download reviews_Musical_Instruments_5.json.gz and meta_Musical_Instruments.json.gz by other means"
    )
    assert "--data_path" in str(caught.value)


def test_one_of_the_two_files_is_missing(tmp_path: Path) -> None:
    (write_files(tmp_path / "files") / "meta_Musical_Instruments.json.gz").unlink()
    with offline(), pytest.raises(InputError, match=r"meta_Musical_Instruments\.json\.gz: cannot be downloaded"):
        prepare(config_of(tmp_path))


def test_published_digests_are_checked(tmp_path: Path) -> None:
    write_files(tmp_path / "files", "Electronics")
    expected = (
        r"reviews_Electronics_5\.json\.gz: must be the published file, 495854086 bytes with MD5 "
        r"e4524af6c644cd044b1969bac7b62b2a\. Received: \d+ bytes with [0-9a-f]{32}\."
    )
    with pytest.raises(InputError, match=expected):
        prepare(config_of(tmp_path, "Electronics"))


@pytest.mark.parametrize("name", ["reviews_Musical_Instruments_5.json.gz", "meta_Musical_Instruments.json.gz"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    path = write_files(tmp_path / "files") / name
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match=name):
        prepare(config_of(tmp_path))


@pytest.mark.parametrize(
    "line", ["{'asin': '0001', 'categories': [[", "{'asin': '0001', 'categories': [[]]}", "f('0001')"]
)
def test_malformed_meta(tmp_path: Path, line: str) -> None:
    path = tmp_path / "meta.json.gz"
    with gzip.open(path, "wt") as file:
        file.write("{'asin': 'other'}\n" + (line if "asin" in line else f"'asin': '0001' {line}") + "\n")
    with pytest.raises(InputError, match=r"meta\.json\.gz, row 2: must be one Python dictionary a line"):
        read_categories(path, {"0001"})


def test_every_category_is_a_configuration() -> None:
    assert len(set(CATEGORIES)) == 24
    assert list(AmazonReviews.builder_configs) == list(CATEGORIES)
    assert AmazonReviews.default_builder_config.name == "Electronics"

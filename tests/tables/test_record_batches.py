"""Files of each format as record batches: some columns, or whole rows from any row on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.tables.formats import Format, format_of
from din_dist.tables.record_batches import Layout, column_names, read_columns, read_rows

NAMES = ["day.parquet", "day.csv", "day.jsonl"]


def write(folder: Path, name: str) -> tuple[Path, Format]:
    """Writes five rows with the columns a and b."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    form = format_of(path)
    assert form
    if form is Format.PARQUET:
        pq.write_table(pa.table({"a": list(range(5)), "b": ["x"] * 5}), path, row_group_size=2)
    elif form is Format.CSV:
        path.write_text("a,b\n" + "".join(f"{number},x\n" for number in range(5)))
    else:
        path.write_text("".join(json.dumps({"a": number, "b": "x"}) + "\n" for number in range(5)))
    return path, form


@pytest.mark.parametrize("name", NAMES)
def test_columns_in_the_order_asked_for_and_those_of_folders_names(tmp_path: Path, name: str) -> None:
    path, form = write(tmp_path / "shop=7" / "note=__HIVE_DEFAULT_PARTITION__", name)
    wanted = ["shop", "b", "note", "a"]
    layout = Layout.of(path, form, wanted)
    assert layout
    assert layout.names == ("a", "b", "shop", "note")
    table = pa.Table.from_batches(read_columns(path, form, layout, wanted))
    assert set(table.column_names) == set(wanted)
    assert table["shop"].to_pylist() == ["7"] * 5
    assert table["note"].to_pylist() == [None] * 5
    assert [int(value) for value in table["a"].to_pylist()] == list(range(5))


@pytest.mark.parametrize("name", NAMES)
def test_whole_rows_from_any_row_on(tmp_path: Path, name: str) -> None:
    path, form = write(tmp_path, name)
    assert column_names(path, form) == ("a", "b")
    for first_row in range(6):
        rows = [row for batch in read_rows(path, form, first_row, 2) for row in batch.to_pylist()]
        if form is Format.JSON_LINES:
            rows = [json.loads(row["line"]) for row in rows]
        assert [int(row["a"]) for row in rows] == list(range(first_row, 5))
        assert all(row["b"] == "x" for row in rows)


def test_a_file_without_rows_has_no_layout(tmp_path: Path) -> None:
    path = tmp_path / "day.jsonl"
    path.write_text("\n\n")
    assert Layout.of(path, Format.JSON_LINES, ["a"]) is None
    assert column_names(path, Format.JSON_LINES) == ()

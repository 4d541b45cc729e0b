"""Reading logs: what is accepted, and the message for all that is not."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import math
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.data.blocks import Block, EventLog
from din_dist.data.log_reader import Columns, read_log
from din_dist.errors import InputError
from din_dist.tables import json_lines, record_batches, text_files

ROWS = [
    {"user_id": "b", "item_id": "x", "category_id": "red", "timestamp": 30},
    {"user_id": "a", "item_id": "y", "category_id": "blue", "timestamp": 20},
    {"user_id": "b", "item_id": "y", "category_id": "blue", "timestamp": 10},
    {"user_id": "b", "item_id": "z", "category_id": None, "timestamp": 30},
]


def write_parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[dict]) -> None:
    def cell(value: object) -> str:
        return "" if value is None else str(value)

    names = list(rows[0])
    lines = [",".join(names)] + [",".join(cell(row[name]) for name in names) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)


WRITERS: dict[str, Callable[[Path, list[dict]], None]] = {
    "log.parquet": write_parquet,
    "log.csv": write_csv,
    "log.csv.gz": write_csv,
    "log.jsonl": write_jsonl,
    "log.jsonl.gz": write_jsonl,
}


def write(folder: Path, rows: list[dict], name: str = "log.parquet") -> Path:
    path = folder / name
    WRITERS["log" + "".join(path.suffixes)](path, rows)
    return path


def only_block(log: EventLog) -> Block:
    (block,) = log.blocks
    return block


def events(**columns: list) -> list[dict]:
    """Rows of one user and one item, with these columns besides or instead."""
    length = len(next(iter(columns.values())))
    defaults = {"user_id": ["u"] * length, "item_id": ["i"] * length, "timestamp": list(range(length))}
    merged = {**defaults, **columns}
    return [dict(zip(merged, values, strict=True)) for values in zip(*merged.values(), strict=True)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_events(tmp_path: Path, name: str) -> None:
    log = read_log([write(tmp_path, ROWS, name)], Columns())
    block = only_block(log)
    assert log.user_ids.to_pylist() == ["b", "a"]  # by first appearance
    assert log.item_ids.to_pylist() == ["x", "y", "z"]
    assert block.first_user == 0
    assert block.offsets.tolist() == [0, 3, 4]
    assert block.item_ids.tolist() == [2, 1, 3, 2]  # b: y at 10, then x and z at 30 as they came; a: y
    assert block.item_ids.dtype == np.int32
    assert block.timestamps.tolist() == [10, 30, 30, 20]
    assert block.labels.tolist() == [1, 1, 1, 1]
    assert not log.has_labels
    assert log.item_features["category_id"].ids.to_pylist() == ["red", "blue"]
    assert log.item_features["category_id"].of_item.tolist() == [0, 1, 2, 0]  # unknown item, x, y, z without category


@pytest.mark.parametrize("name", WRITERS)
def test_integer_ids_stay_integers(tmp_path: Path, name: str) -> None:
    rows = events(user_id=[7, 7, -3], item_id=[10, 0, 10], category_id=[5, None, 5])
    log = read_log([write(tmp_path, rows, name)], Columns())
    assert log.user_ids.to_pylist() == [7, -3]
    assert log.item_ids.to_pylist() == [10, 0]
    assert log.item_features["category_id"].ids.to_pylist() == [5]
    assert log.item_features["category_id"].of_item.tolist() == [0, 1, 0]


@pytest.mark.parametrize("odd", ["007", "+1", "1.0", "", "9" * 19, "-0", "1 "])
def test_csv_ids_become_integers_only_if_each_is_written_as_one(tmp_path: Path, odd: str) -> None:
    rows = events(user_id=["1", f'"{odd}"' if odd else "x"])
    assert read_log([write(tmp_path, rows, "log.csv")], Columns()).user_ids.to_pylist() == ["1", odd or "x"]


def test_dictionary_encoded_parquet_ignores_order_and_unused_entries(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": pa.DictionaryArray.from_arrays([1, 1], ["unused", "u"]),
            "item_id": pa.DictionaryArray.from_arrays([2, 0], ["late", "unused", "early"]),
            "timestamp": [1, 2],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    log = read_log([tmp_path / "log.parquet"], Columns())
    assert (log.user_ids.to_pylist(), log.item_ids.to_pylist()) == (["u"], ["early", "late"])


@pytest.mark.parametrize(
    "values",
    [[1, 0], [True, False], [1.0, 0.0], ["1", "0"], ["true", "False"]],
    ids=["integers", "booleans", "floats", "text", "words"],
)
@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl"])
def test_labels(tmp_path: Path, name: str, values: list) -> None:
    log = read_log([write(tmp_path, events(label=values), name)], Columns())
    assert log.has_labels
    assert only_block(log).labels.tolist() == [1, 0]


def test_any_number_of_item_features(tmp_path: Path) -> None:
    rows = events(item_id=["i", "j", "i"], brand=["b1", "b2", "b1"], shop=[3, 3, 3])
    path = write(tmp_path, rows)
    log = read_log([path], Columns(item_features=("brand", "shop"), item_features_required=True))
    assert {name: feature.of_item.tolist() for name, feature in log.item_features.items()} == {
        "brand": [0, 1, 2],
        "shop": [0, 1, 1],
    }
    assert read_log([path], Columns(item_features=())).item_features == {}
    assert read_log([path], Columns()).item_features == {}  # category_id may be absent


def test_an_item_may_name_its_category_once(tmp_path: Path) -> None:
    log = read_log([write(tmp_path, events(category_id=[None, "c", None]))], Columns())
    assert log.item_features["category_id"].of_item.tolist() == [0, 1]


DAY = 86_400_000_000


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([5, 3], pa.int32()), [3, 5]),
        (pa.array([5, 3], pa.uint64()), [3, 5]),
        (pa.array([5.0, 3.0]), [3, 5]),
        (pa.array(["5", "+3.0"]), [3, 5]),
        (pa.array([datetime.date(1970, 1, 3), datetime.date(1970, 1, 2)]), [DAY, 2 * DAY]),
        (pa.array([2_000, 1_999], pa.timestamp("ns")), [1, 2]),
        (pa.array([2, 1], pa.timestamp("s", "Europe/Paris")), [1_000_000, 2_000_000]),
        (pa.array(["1970-01-03", "1970-01-02 00:00:01"]), [DAY + 1_000_000, 2 * DAY]),
        (pa.array(["1970-01-03T01:00:00+01:00", "1970-01-02T00:00:00Z"]), [DAY, 2 * DAY]),
        (pa.array(["5", "3"]).dictionary_encode(), [3, 5]),
    ],
    ids=str,
)
def test_timestamps(tmp_path: Path, values: pa.Array, expected: list[int]) -> None:
    table = pa.table({"user_id": ["u", "u"], "item_id": ["i", "i"], "timestamp": values})
    pq.write_table(table, tmp_path / "log.parquet")
    assert only_block(read_log([tmp_path / "log.parquet"], Columns())).timestamps.tolist() == expected


def test_files_are_read_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_batches, "ROWS_PER_BATCH", 3)
    rows = [{"user_id": f"u{n % 7}", "item_id": f"i{n % 5}", "timestamp": n // 3} for n in range(40)]
    files = [write(tmp_path, rows[:11], "a.parquet"), write(tmp_path, rows[11:], "b.parquet")]
    whole, parts = (read_log(paths, Columns()) for paths in ([write(tmp_path, rows)], files))
    assert whole.user_ids.equals(parts.user_ids)
    for field in ("offsets", "item_ids", "timestamps"):
        np.testing.assert_array_equal(getattr(only_block(whole), field), getattr(only_block(parts), field))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_one_of_the_files_may_have_no_rows(tmp_path: Path, name: str) -> None:
    rows = events(timestamp=[1, 2])
    full = write(tmp_path, rows, name.replace("a", "b", 1))
    empty = tmp_path / name
    if name == "a.csv":
        empty.write_text("user_id,item_id,timestamp\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows).slice(0, 0), empty)
    assert only_block(read_log([empty, full, empty], Columns())).timestamps.tolist() == [1, 2]


def test_many_text_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BYTES_PER_BATCH", 200)
    rows = [{"user_id": f"u{n % 7}", "item_id": n % 5, "timestamp": n, "junk": "x" * (n % 9)} for n in range(99)]
    for name in ("log.csv", "log.jsonl"):
        log = read_log([write(tmp_path, rows, name)], Columns())
        assert log.item_ids.to_pylist() == [0, 1, 2, 3, 4]
        assert len(only_block(log).item_ids) == 99


def test_a_json_type_is_sought_beyond_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "HEAD_ROWS", 2)
    path = write(tmp_path, events(category_id=[None, None, None, 8]), "log.jsonl")
    assert read_log([path], Columns()).item_features["category_id"].ids.to_pylist() == [8]
    nothing = write(tmp_path, events(category_id=[None, None]), "none.jsonl")
    assert read_log([nothing], Columns()).item_features["category_id"].of_item.tolist() == [0, 0]


def test_json_ids_that_look_like_dates_stay_text(tmp_path: Path) -> None:
    log = read_log([write(tmp_path, events(user_id=["2020-01-01"]), "log.jsonl")], Columns())
    assert log.user_ids.to_pylist() == ["2020-01-01"]


def test_byte_order_mark_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("\ufeffuser_id,item_id,timestamp\nu,i,1\n")
    assert read_log([path], Columns()).item_ids.to_pylist() == ["i"]


def test_quoted_line_breaks_in_csv_at_any_place_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BYTES_PER_BATCH", 64)
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp,note\n" + 'u,"i\nj",1,"a,\n\n1,2 b"\n' * 50)
    log = read_log([path], Columns())
    assert log.item_ids.to_pylist() == ["i\nj"] and len(only_block(log).item_ids) == 50


def test_presorted_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    rows = events(user_id=["a", "b", "a", "b"], item_id=["1", "2", "3", "4"], timestamp=[5, 1, 5, 2])
    block = only_block(read_log([write(tmp_path, rows)], Columns(presorted=True)))
    assert block.item_ids.tolist() == [1, 3, 2, 4]


# --- Errors: each by its message. ---


def message(files: list[Path], columns: Columns | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_log(files, columns or Columns())
    text = str(caught.value)
    assert "\n" not in text
    assert str(files[-1].name) in text
    return text


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl"])
def test_missing_column(tmp_path: Path, name: str) -> None:
    text = message([write(tmp_path, [{"user": 1, "item_id": 2, "timestamp": 3}], name)])
    assert "column 'user_id' is missing. Received: columns user, item_id, timestamp." in text


def test_a_column_that_occurs_twice(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp,item_id\nu,i,1,j\n")
    assert "column 'item_id' occurs more than once. Received: columns user_id, item_id, timestamp, item_id." in message(
        [path]
    )


def test_required_columns_may_not_be_missing(tmp_path: Path) -> None:
    path = write(tmp_path, events(user_id=["u"]))
    assert "column 'label' is missing" in message([path], Columns(label_required=True))
    assert "column 'category_id' is missing" in message([path], Columns(item_features_required=True))


def test_all_files_have_a_column_or_none(tmp_path: Path) -> None:
    files = [write(tmp_path, events(label=[1]), "a.parquet"), write(tmp_path, events(user_id=["u"]), "b.parquet")]
    assert "column 'label' is missing" in message(files)


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl"])
def test_null(tmp_path: Path, name: str, column: str) -> None:
    rows = [{"user_id": "u", "item_id": "i", "timestamp": 1}] * 2
    text = message([write(tmp_path, [*rows, {**rows[0], column: None}], name)])
    assert f"row 3: every event needs its {column}. Received: no {column}." in text


def test_rows_count_from_the_start_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_batches, "ROWS_PER_BATCH", 2)
    files = [
        write(tmp_path, events(user_id=["u"] * 5), "a.parquet"),
        write(tmp_path, events(user_id=["u"] * 4 + [None]), "b.parquet"),
    ]
    assert "b.parquet, row 5: every event needs its user_id" in message(files)


@pytest.mark.parametrize(
    ("values", "received"),
    [([1.0, 1.5], "1.5"), ([1.0, float("nan")], "nan"), (["1", "soon"], "'soon'"), ([True, False], "True")],
)
def test_timestamps_must_be_integers(tmp_path: Path, values: list, received: str) -> None:
    text = message([write(tmp_path, events(timestamp=values))])
    row = 1 if received == "True" else 2
    assert f"row {row}: a timestamp must be an integer (64 bits, any unit) or a date. " in text
    assert f"Received: timestamp={received}." in text


@pytest.mark.parametrize(("text", "row"), [("1.5", 3), ("9" * 20, 3), ("x", 3)])
def test_timestamps_of_csv_must_be_integers(tmp_path: Path, text: str, row: int) -> None:
    found = message([write(tmp_path, events(timestamp=["1", "2", text]), "log.csv")])
    assert f"row {row}: a timestamp must be an integer" in found and f"timestamp={text!r}" in found


def test_a_bad_date_among_dates(tmp_path: Path) -> None:
    text = message([write(tmp_path, events(timestamp=["1970-01-01", "1970-02-30"]), "log.csv")])
    assert (
        "row 2: a timestamp must be an integer (64 bits, any unit) or a date. Received: timestamp='1970-02-30'" in text
    )


def test_dates_after_integers(tmp_path: Path) -> None:
    files = [
        write(tmp_path, events(timestamp=[1]), "a.parquet"),
        write(tmp_path, events(timestamp=[datetime.date(1970, 1, 1)]), "b.parquet"),
    ]
    assert "row 1: all timestamps must be of one kind, integers so far" in message(files)


@pytest.mark.parametrize("date", ["2020-01-01", "2020-01-01T00:00:00Z"])
def test_dates_and_integers_in_one_file(tmp_path: Path, date: str) -> None:
    text = message([write(tmp_path, events(timestamp=["5", date, "6"]), "log.csv")])
    assert (
        f"row 2: all timestamps must be of one kind, and other rows have integers. Received: timestamp='{date}'" in text
    )


def test_presorted_and_yet_not_sorted(tmp_path: Path) -> None:
    rows = events(user_id=["b", "a", "a", "b", "a"], timestamp=[9, 5, 7, 8, 6])
    text = message([write(tmp_path, rows)], Columns(presorted=True))
    assert "row 4: with --presorted each user's events must be in time order. Received: timestamp 8 after 9 " in text
    assert "log.parquet, row 1)" in text


@pytest.mark.parametrize("value", [2, -1, None, "yes", 0.5])
@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_labels_other_than_0_and_1(tmp_path: Path, name: str, value: object) -> None:
    good = "1" if isinstance(value, str) else 1.0 if isinstance(value, float) else 1
    text = message([write(tmp_path, events(label=[good, value]), name)])
    assert "row 2: a label must be 0 or 1. Received: " in text
    if value is None:
        assert "no label." in text
    else:
        assert f"label={str(value) if name == 'log.csv' else value!r}".replace("label=", "") in text


def test_an_item_with_two_categories(tmp_path: Path) -> None:
    files = [
        write(tmp_path, events(item_id=["i", "j"], category_id=["red", "blue"]), "a.parquet"),
        write(tmp_path, events(item_id=["i", "j"], category_id=["red", "green"]), "b.parquet"),
    ]
    text = message(files)
    rule = "b.parquet, row 2: a feature of items has one value for each, here category_id. "
    assert f"{rule}Received: item 'j' with 'blue' (" in text
    assert "a.parquet, row 2) and here with 'green'. Correct one of the two rows, or declare" in text


@pytest.mark.parametrize("column", ["user_id", "item_id", "category_id"])
def test_ids_of_float_type(tmp_path: Path, column: str) -> None:
    rows = events(**{column: [1.0, 2.0]})
    assert f"row 1: ids must be strings or integers, not double. Received: {column}=1.0." in message(
        [write(tmp_path, rows)]
    )


def test_ids_beyond_64_bits(tmp_path: Path) -> None:
    table = pa.table({"user_id": pa.array([1, 2**63], pa.uint64()), "item_id": [1, 1], "timestamp": [1, 1]})
    pq.write_table(table, tmp_path / "log.parquet")
    text = message([tmp_path / "log.parquet"])
    assert f"row 2: integer ids must fit 64 bits, signed. Received: user_id={2**63}." in text


def test_ids_beyond_64_bits_beside_a_null(tmp_path: Path) -> None:
    categories = pa.array([None, 2, 2**63], pa.uint64())
    table = pa.table({"user_id": [1] * 3, "item_id": [1, 2, 3], "timestamp": [1] * 3, "category_id": categories})
    pq.write_table(table, tmp_path / "log.parquet")
    text = message([tmp_path / "log.parquet"])
    assert f"row 3: integer ids must fit 64 bits, signed. Received: category_id={2**63}." in text


def test_ids_of_two_types(tmp_path: Path) -> None:
    files = [write(tmp_path, events(user_id=["u"]), "a.parquet"), write(tmp_path, events(user_id=[1]), "b.parquet")]
    assert "row 1: all ids of a column must be of one type, large_string so far. Received: user_id=1." in message(files)


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "a log must have events. Received: an empty file." in message([tmp_path / name])


def test_no_rows(tmp_path: Path) -> None:
    write(tmp_path, ROWS).with_name("log.csv").write_text("user_id,item_id,timestamp\n")
    assert "a log must have events. Received: no rows" in message([tmp_path / "log.csv"])
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "log.parquet")
    assert "a log must have events. Received: no rows" in message([tmp_path / "log.parquet"])
    (tmp_path / "log.jsonl").write_text("\n\n")
    assert "Received: " in message([tmp_path / "log.jsonl"])


@pytest.mark.parametrize("name", ["log.parquet", "log.csv.gz", "log.jsonl.gz"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_file(tmp_path: Path, name: str, share: float) -> None:
    rows = [
        {"user_id": f"u{n * n % 977}", "item_id": f"i{n * n % 613}", "timestamp": n * n % 8191} for n in range(20_000)
    ]
    path = write(tmp_path, rows, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    text = message([path])
    assert "from end to end" in text or "each line must be one JSON object" in text
    assert "write it again" in text


def test_garbage_inside_a_parquet_file(tmp_path: Path) -> None:
    path = write(tmp_path, events(user_id=[str(n) for n in range(5000)]))
    content = bytearray(path.read_bytes())
    content[100:400] = b"\xff" * 300
    path.write_bytes(content)
    assert "must be Parquet from end to end" in message([path])


def test_a_csv_row_of_the_wrong_width(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,i,1\nu,i\n")
    assert "row 2: must be CSV from end to end. Received: CSV parse error: Expected 3 columns, got 2: u,i." in message(
        [path]
    )


def test_csv_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"user_id,item_id,timestamp\n" + b'u,"i\nj",1\n' * 20 + b"u\xe9,i,1\n")
    assert r"row 21: text must be UTF-8. Received: user_id=b'u\xe9'. Convert the file to UTF-8." in message([path])
    monkeypatch.setattr(text_files, "BYTES_PER_BATCH", 64)
    assert r"row 21: text must be UTF-8. Received: user_id=b'u\xe9'." in message([path])
    path.write_bytes(b"us\xe9,user_id,item_id,timestamp\nu,u,i,1\n")
    assert r"log.csv, the first line: text must be UTF-8. Received: b'us\xe9,user_id,item" in message([path])


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
def test_utf_16(tmp_path: Path, name: str, encoding: str) -> None:
    path = write(tmp_path, ROWS, name)
    path.write_bytes(path.read_text().encode(encoding))
    assert f"{name}: text must be UTF-8. Received: UTF-16. Convert the file to UTF-8." in message([path])


@pytest.mark.parametrize(("separator", "shown"), [("\t", r"\t"), (";", ";"), ("|", "|")])
def test_csv_with_other_separators(tmp_path: Path, separator: str, shown: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,i,1\n".replace(",", separator))
    names = f"user_id{shown}item_id{shown}timestamp"
    names = f"'{names}'" if separator == "\t" else names
    assert f"Received: columns {names}. Columns of CSV must be separated by commas, not by '{shown}'. " in message(
        [path]
    )


def test_names_whose_blanks_are_not_seen(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id, item_id,timestamp\x1b[2J\nu,i,1\n")
    assert (
        r"column 'item_id' is missing. Received: columns user_id, ' item_id', 'timestamp\x1b[2J'. Correct"
        in message([path])
    )
    pq.write_table(pa.table({}), tmp_path / "log.parquet")
    assert "Received: columns none. Correct" in message([tmp_path / "log.parquet"])


def test_a_csv_header_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp")
    assert "a log must have events. Received: no rows in 1 file(s)." in message([tmp_path / "a.csv"])
    full = write(tmp_path, events(user_id=["u"]), "b.csv")
    assert len(only_block(read_log([tmp_path / "a.csv", full], Columns())).item_ids) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"user_id": "u", "item_id": "i", "timest', "row 3: each line must be one JSON object. Received: "),
        ("[1]", "row 3: each line must be one JSON object. Received: [1]."),
        (
            '{"user_id": 5, "item_id": "i", "timestamp": 1}',
            "row 3: all values of user_id must be text, as the first one is. Received: user_id=5.",
        ),
        (
            '{"user_id": "u", "item_id": "i", "timestamp": 1.5}',
            "row 3: all values of timestamp must be integers, as the first one is. Received: timestamp=1.5.",
        ),
        ('{"user_id": ["u"], "item_id": "i", "timestamp": 1}', "row 3: all values of user_id must be text, as the"),
        (
            '{"user_id": "u", "item_id": "i", "item_id": "j"}',
            "row 3: a row must name a column once. Received: 'item_id'",
        ),
        ('{"user_id": "u", "item_id": "i", "x": [1e400]}', "row 3: numbers must fit a float64. Received: '1e400'."),
        (
            r'{"user_id": "u", "item_id": "i", "x": ["\ud800"]}',
            "row 3: text must be whole characters. Received: half a",
        ),
        (
            '\ufeff{"user_id": "u", "item_id": "i", "timestamp": 1}',
            "row 3: a byte order mark may only stand at the start",
        ),
    ],
)
@pytest.mark.parametrize("typed", [1, 1000])
def test_malformed_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str, typed: int) -> None:
    monkeypatch.setattr(json_lines, "HEAD_ROWS", typed)
    path = tmp_path / "log.jsonl"
    path.write_text('{"user_id": "u", "item_id": "i", "timestamp": 1}\n\n' * 2 + line + "\n")
    assert expected in message([path])
    assert re.findall(r"row \d+", message([path])) == ["row 3"]


def test_json_whose_first_value_is_none_that_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, events(user_id=[["u"]]), "log.jsonl")
    assert "row 1: all values of user_id must be text, numbers, or true or false. Received: user_id=['u']." in message(
        [path]
    )


@pytest.mark.parametrize("typed", [1, 1000])
def test_json_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: int) -> None:
    monkeypatch.setattr(json_lines, "HEAD_ROWS", typed)
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"user_id": "u", "item_id": "i", "timestamp": 1}\n' * 2 + b'{"user_id": "\xe9", "item_id": "i"}')
    assert "row 3: text must be UTF-8. Received: " in message([path])


@pytest.mark.parametrize("values", [[1, 0.0, 1.0, 0], [1.0, 0], [0, 1.0], [True, False], ["1", "0.0", "true"]], ids=str)
def test_json_labels_of_one_kind(tmp_path: Path, values: list) -> None:
    log = read_log([write(tmp_path, events(label=values), "log.jsonl")], Columns())
    assert only_block(log).labels.tolist() == [int(value in (1, "1", "true")) for value in values]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 0.0, True], "numbers"),
        ([1.0, 0, "1"], "numbers"),
        ([True, False, 1], "true or false"),
        (["1", "0", 1], "text"),
    ],
    ids=str,
)
def test_json_labels_of_several_kinds(tmp_path: Path, values: list, kind: str) -> None:
    text = message([write(tmp_path, events(label=values), "log.jsonl")])
    assert f"row 3: all values of label must be {kind}, as the first one is. Received: label={values[2]!r}." in text
    assert re.findall(r"row \d+", text) == ["row 3"]


# --- Nothing is decided by a file's first rows, and what is read is bounded. ---

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_compressed_text(tmp_path: Path, name: str, suffix: str) -> None:
    content = write(tmp_path, ROWS, name).read_bytes()
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](content[:50]) + COMPRESS[suffix](content[50:]))  # as `cat a.gz b.gz` makes them
    log = read_log([path], Columns())
    assert log.user_ids.to_pylist() == ["b", "a"]
    assert only_block(log).timestamps.tolist() == [10, 30, 30, 20]
    path.write_bytes(COMPRESS[suffix](content)[:-9])
    assert "from end to end" in message([path])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_csv_without_a_first_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log.csv{suffix}"
    path.write_bytes(COMPRESS[suffix](b""))
    assert f"log.csv{suffix}: the first line must name the columns. Received: an empty file." in message([path])
    path.write_bytes(COMPRESS[suffix](b"\n\nuser_id,item_id,timestamp\nu,i,1\n"))
    assert "the first line must name the columns. Received: an empty first line. Correct the file." in message([path])


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv"])
def test_byte_order_marks(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, ROWS, name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_log([path], Columns()).user_ids.to_pylist() == ["b", "a"]


@pytest.mark.parametrize("column", ["category_id", "größe", "a/b", 'say "x"'])
@pytest.mark.parametrize("escaped", [str, str.upper, None])
def test_json_columns_that_begin_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, escaped: Callable[[str], str] | None
) -> None:
    """However the encoder writes their names."""
    monkeypatch.setattr(json_lines, "HEAD_ROWS", 2)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100)  # a row or two
    rows = events(item_id=list("abcdefghij"))
    path = tmp_path / "log.jsonl"
    key = json.dumps(column, ensure_ascii=escaped is not None)
    if escaped:
        key = re.sub(r"(?<=\\u)[0-9a-f]{4}", lambda match: escaped(match[0]), key).replace("/", r"\/")
    lines = [json.dumps(row) for row in rows[:-1]] + [json.dumps(rows[-1])[:-1] + f", {key}: 7}}"]
    path.write_text("\n\n".join(lines))
    log = read_log([path], Columns(item_features=(column,)))
    assert log.item_features[column].of_item.tolist() == [0, *[0] * 9, 1]
    assert log.late_columns == (column,)
    assert read_log([path], Columns(item_features=())).late_columns == ()


@pytest.mark.parametrize(
    "key", [r'"la\u0062el"', r'"\u006cabel" ', r'"\u006C\u0061bel"', r'"\u006c\u0061\u0062\u0065\u006c"']
)
def test_late_names_in_which_any_letter_has_an_escape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(json_lines, "HEAD_ROWS", 2)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100)
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(row)[:-1] + r', "x": "a\u0026b\u0027"}' for row in events(item_id=list("abcdef"))]
    path.write_text("\n".join(lines[:-1]) + f"\n{lines[-1][:-1]}, {key}: 1}}\n")
    assert "log.jsonl, row 1: a label must be 0 or 1. Received: no label. " in message([path])


def test_labels_that_begin_late_are_missed_in_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "HEAD_ROWS", 2)
    path = tmp_path / "log.jsonl"
    rows = events(item_id=list("abcdef"))
    path.write_text("".join(json.dumps(row | ({"label": 1} if n > 3 else {})) + "\n" for n, row in enumerate(rows)))
    assert "log.jsonl, row 1: a label must be 0 or 1. Received: no label. Fill it in, drop the row, or give" in message(
        [path]
    )


def test_a_late_name_inside_of_a_value_is_no_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "HEAD_ROWS", 2)
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row | {"page": {"label": 1}}) + "\n" for row in events(item_id=list("abcd"))))
    assert not read_log([path], Columns()).has_labels


@pytest.mark.parametrize("content", ["\n\n \n", "\n"])
def test_json_of_blank_lines(tmp_path: Path, content: str) -> None:
    blank = tmp_path / "a.jsonl"
    blank.write_text(content)
    assert "a log must have events. Received: no rows in 1 file(s)." in message([blank])
    full = write(tmp_path, ROWS, "b.jsonl")
    assert read_log([blank, full, blank], Columns()).user_ids.to_pylist() == ["b", "a"]


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("typed", [1, 1000])
def test_json_ids_beyond_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: int, typed: int) -> None:
    monkeypatch.setattr(json_lines, "HEAD_ROWS", typed)
    path = write(tmp_path, events(user_id=[1, 2, value]), "log.jsonl")
    assert f"log.jsonl, row 3: integers must fit 64 bits. Received: user_id={value}. Make" in message([path])


def test_deeply_nested_json(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"user_id": ' + "[" * 100_000 + "\n")
    assert "row 1: each line must be one JSON object. Received: lists or objects nested too deeply." in message([path])
    path.write_text(
        json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[0])[:-1] + ', "x":' + "[" * 99_999 + "]" * 99_999 + "}"
    )
    assert "row 2: each line must be one JSON object. Received: lists or objects nested" in message([path])


@pytest.mark.parametrize("name", ["log.jsonl.gz", "log.csv.gz"])
def test_a_line_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A few kilobytes that become gigabytes: they are read bit by bit, and no further than to the limit."""
    monkeypatch.setattr(text_files, "MOST_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 16)
    with gzip.open(tmp_path / name, "wb") as file:
        for _ in range(64):
            file.write(b"," * (1 << 20))
    resource_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = message([tmp_path / name])
    assert ("a line of more than 1 MiB" if "json" in name else "a header of more than 1 MiB") in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resource_before < 40_000  # kB


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize(
    ("column", "good"),
    [
        ("user_id", [b"ok", b"ok"]),
        ("item_id", [b"ok", b"ok"]),
        ("category_id", [b"ok", b"ok"]),
        ("timestamp", [b"1", b"2"]),
        ("timestamp", [b"2020-01-01", b"2020-01-02"]),
        ("timestamp", []),
        ("label", [b"1", b"0"]),
        ("label", []),
    ],
)
def test_parquet_text_that_is_not_utf8(tmp_path: Path, kind: pa.DataType, column: str, good: list[bytes]) -> None:
    raw = pa.array([*good, b"\xff\x1b[2J"], pa.binary())
    rows = len(raw)
    text = pa.Array.from_buffers(pa.string(), rows, raw.buffers()).cast(kind)
    table = {"user_id": ["u"] * rows, "item_id": ["i"] * rows, "timestamp": [1] * rows, column: text}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    received = rf"row {rows}: text must be UTF-8. Received: {column}=b'\xff\x1b[2J'. Convert the file to UTF-8."
    assert received in message([tmp_path / "log.parquet"])


def test_text_in_lists_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"\xff\x1b[2J"], pa.binary())
    text = pa.ListArray.from_arrays([0, 1], pa.Array.from_buffers(pa.string(), 1, raw.buffers()))
    pq.write_table(pa.table({"user_id": text, "item_id": [1], "timestamp": [1]}), tmp_path / "log.parquet")
    assert "row 1: ids must be strings or integers, not list<" in message([tmp_path / "log.parquet"])


@pytest.mark.parametrize(
    "nothing",
    [pa.nulls(2), pa.array([None, None], pa.int64()), pa.array([math.nan] * 2), pa.array([None, math.nan])],
    ids=["of type null", "integers", "all NaN", "null and NaN"],
)
@pytest.mark.parametrize("known", [["red", "blue"], [3, 4]])
@pytest.mark.parametrize("first", [True, False])
def test_a_column_without_any_value_agrees_with_every_type(
    tmp_path: Path, nothing: pa.Array, known: list, first: bool
) -> None:
    """As pandas writes a day on which nothing was known."""
    for name, items, values in (("a", ["i", "j"], nothing), ("b", ["k", "l"], pa.array(known))):
        columns = {"user_id": ["u"] * 2, "item_id": items, "timestamp": [1, 2], "category_id": values}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    log = read_log(files if first else files[::-1], Columns())
    assert log.item_features["category_id"].ids.to_pylist() == known
    assert log.item_features["category_id"].of_item.tolist() == ([0, 0, 0, 1, 2] if first else [0, 1, 2, 0, 0])
    only = read_log([tmp_path / "a.parquet"], Columns())
    assert only.item_features["category_id"].of_item.tolist() == [0, 0, 0]
    assert len(only.item_features["category_id"].ids) == 0


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 0], pa.float16()),
        pa.array([1, 0], pa.uint64()),
        *(pa.array([1, 0], kind) for kind in (pa.decimal128(3, 1), pa.decimal32(3, 1), pa.decimal64(3, 1))),
    ],
    ids=lambda values: str(values.type),
)
def test_labels_and_times_of_rare_types(tmp_path: Path, values: pa.Array) -> None:
    table = pa.table({"user_id": ["u"] * 2, "item_id": ["i"] * 2, "timestamp": values, "label": values})
    pq.write_table(table, tmp_path / "log.parquet")
    block = only_block(read_log([tmp_path / "log.parquet"], Columns()))
    assert block.labels.tolist() == [0, 1] and block.timestamps.tolist() == [0, 1]


BIG = 1_700_000_000_000_000_001  # nanoseconds; no float64 is near


@pytest.mark.parametrize(
    "kind", [pa.decimal128(19), pa.decimal128(38, 2), pa.decimal256(60, 0), pa.decimal64(18)], ids=str
)
def test_times_in_decimals_keep_every_digit(tmp_path: Path, kind: pa.DataType) -> None:
    big = BIG if kind.precision > 18 else BIG // 10
    values = pa.array([decimal.Decimal(big + n) for n in (0, 2, 1)], kind)
    assert times_of(tmp_path, values) == [big, big + 1, big + 2]


@pytest.mark.parametrize("odd", ["1.00000000000000000001", "0.5", f"{10**30}"])
@pytest.mark.parametrize("column", ["timestamp", "label"])
def test_decimals_that_are_no_integers(tmp_path: Path, column: str, odd: str) -> None:
    values = pa.array([decimal.Decimal(1), decimal.Decimal(odd)], pa.decimal256(60, 20))
    table = {"user_id": ["u"] * 2, "item_id": ["i"] * 2, "timestamp": [1, 2], column: values}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    rule = "a timestamp must be an integer" if column == "timestamp" else "a label must be 0 or 1"
    text = message([tmp_path / "log.parquet"])
    assert f"row 2: {rule}" in text and f"Received: {column}=Decimal('{odd}" in text


@pytest.mark.parametrize(
    ("kind", "limit"), [(np.float16, 2**11), (np.float32, 2**24), (np.float64, 2**53)], ids=lambda kind: str(kind)
)
@pytest.mark.parametrize("sign", [1, -1])
def test_times_in_floats_that_have_lost_digits(tmp_path: Path, kind: type, limit: int, sign: int) -> None:
    whole = pa.array(np.array([1, sign * (limit - 1)], kind))
    assert times_of(tmp_path, whole) == sorted([1, sign * (limit - 1)])
    pq.write_table(log_with(pa.array(np.array([1, sign * limit], kind))), tmp_path / "log.parquet")
    text = message([tmp_path / "log.parquet"])
    assert f" must be below {limit}: larger ones lose digits. Received: timestamp={float(sign * limit)!r}." in text
    assert "log.parquet, row 2: a timestamp of type " in text


def test_json_times_of_which_the_first_is_a_float(tmp_path: Path) -> None:
    path = write(tmp_path, events(timestamp=[1.0, 3, 2]), "log.jsonl")
    assert only_block(read_log([path], Columns())).timestamps.tolist() == [1, 2, 3]
    path = write(tmp_path, events(timestamp=[1.0, BIG]), "log.jsonl")
    assert "log.jsonl, row 2: a timestamp of type double must be below 9007199254740992: " in message([path])


def test_csv_times_keep_every_digit(tmp_path: Path) -> None:
    path = write(tmp_path, events(timestamp=[f"{BIG}.0", f"{BIG + 1}"]), "log.csv")
    assert only_block(read_log([path], Columns())).timestamps.tolist() == [BIG, BIG + 1]


@pytest.mark.parametrize("value", ["0x10", "1e9"])
def test_other_ways_to_write_integers(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, events(timestamp=["5", value]), "log.csv")
    assert f"row 2: a timestamp must be an integer (64 bits, any unit) or a date. Received: timestamp='{value}'." in (
        message([path])
    )


def log_with(timestamps: pa.Array) -> pa.Table:
    return pa.table({"user_id": ["u"] * len(timestamps), "item_id": ["i"] * len(timestamps), "timestamp": timestamps})


def times_of(folder: Path, timestamps: pa.Array) -> list[int]:
    pq.write_table(log_with(timestamps), folder / "log.parquet")
    return only_block(read_log([folder / "log.parquet"], Columns())).timestamps.tolist()


NAIVE, ZONED = "2020-01-01T00:00:00", "2020-01-01T00:00:00+05:00"


@pytest.mark.parametrize("first", [True, False], ids=["zone first", "zone last"])
@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl"])
@pytest.mark.parametrize("zoned", [ZONED, "2020-01-01T00:00:00Z", "2020-01-01 00:00+0100", "2020-01-01 00:00+01"])
def test_all_times_have_a_zone_or_none(tmp_path: Path, name: str, zoned: str, first: bool) -> None:
    """In one file, and over files."""
    values = [zoned, NAIVE] if first else [NAIVE, zoned]
    rule = f": all timestamps must have a time zone, or none of them; those before have {'one' if first else 'none'}. "
    received = f"Received: timestamp={values[1]!r}. Write all of them with a zone, or all without."
    assert f"log{Path(name).suffix}, row 2{rule}{received}" in message(
        [write(tmp_path, events(timestamp=values), name)]
    )
    files = [write(tmp_path, events(timestamp=[values[n]] * 2), f"{n}{Path(name).suffix}") for n in (0, 1)]
    assert f"1{Path(name).suffix}, row 1{rule}{received}" in message(files)
    assert len(only_block(read_log(files[:1], Columns())).timestamps) == 2


def test_typed_times_have_a_zone_or_none(tmp_path: Path) -> None:
    for name, zone in (("a", "UTC"), ("b", None), ("c", "Europe/Paris")):
        pq.write_table(log_with(pa.array([1], pa.timestamp("us", zone))), tmp_path / f"{name}.parquet")
    a, b, c = (tmp_path / f"{name}.parquet" for name in "abc")
    assert only_block(read_log([a, c], Columns())).timestamps.tolist() == [1, 1]
    assert (
        "b.parquet, row 1: all timestamps must have a time zone, or none of them; those before have one. "
        in message([a, b])
    )
    pq.write_table(log_with(pa.array([NAIVE])), b)
    assert "b.parquet, row 1: all timestamps must have a time zone" in message([a, b])


def test_a_time_that_is_none_among_those_with_a_zone(tmp_path: Path) -> None:
    path = write(tmp_path, events(timestamp=[ZONED, "soon", NAIVE]), "log.csv")
    assert (
        "row 2: a timestamp must be an integer (64 bits, any unit) or a date. Received: timestamp='soon'."
        in message([path])
    )


# --- Empty text is no value. ---


def write_empty(folder: Path, name: str, column: str, others: list) -> Path:
    """Writes a log whose second row has nothing in `column`; a name without a suffix is that of a folder."""
    if name == "partition":
        (folder / f"{column}=").mkdir(exist_ok=True)
        rows = [{key: value for key, value in row.items() if key != column} for row in events(item_id=["i", "j"])]
        return write(folder / f"{column}=", rows, "log.csv")
    rows = events(**{"item_id": ["i", "j", "k"], column: [others[0], "", others[1]]})
    return write(folder, rows, name)


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl", "partition"])
def test_an_empty_feature_is_unknown(tmp_path: Path, name: str) -> None:
    path = write_empty(tmp_path, name, "category_id", ["red", "blue"])
    feature = read_log([path], Columns()).item_features["category_id"]
    known = [] if name == "partition" else ["red", "blue"]
    assert feature.ids.to_pylist() == known
    assert feature.of_item.tolist() == ([0, 1, 0, 2] if known else [0, 0, 0])


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl", "partition"])
@pytest.mark.parametrize(
    ("column", "others", "rule"),
    [
        ("user_id", ["u", "v"], "every event needs its user_id"),
        ("item_id", ["i", "j"], "every event needs its item_id"),
        ("timestamp", ["1", "2"], "every event needs its timestamp"),
        ("timestamp", ["2020-01-01", "2020-01-02"], "every event needs its timestamp"),
        ("label", ["1", "0"], "a label must be 0 or 1"),
    ],
)
def test_an_empty_value_that_must_be_there(tmp_path: Path, name: str, column: str, others: list, rule: str) -> None:
    row = 1 if name == "partition" else 2
    text = message([write_empty(tmp_path, name, column, others)])
    assert f", row {row}: {rule}. Received: no {column}. Fill it in" in text


def test_a_file_of_empty_features_agrees_with_integers(tmp_path: Path) -> None:
    files = [
        write(tmp_path, events(item_id=["i"], category_id=[""]), "a.parquet"),
        write(tmp_path, events(item_id=["j"], category_id=[3]), "b.parquet"),
    ]
    assert read_log(files, Columns()).item_features["category_id"].ids.to_pylist() == [3]


@pytest.mark.parametrize(
    ("values", "received"),
    [
        (pa.array([1, 2**50], pa.int64()).cast(pa.timestamp("s")), f"timestamp[ms] {2**50 * 1000}"),  # of Parquet
        (pa.array([1, 2**60], pa.int64()).cast(pa.timestamp("ms")), f"timestamp[ms] {2**60}"),
        (pa.array([1, 2**31 - 1], pa.int32()).cast(pa.date32()), f"date32[day] {2**31 - 1}"),
    ],
    ids=["seconds", "milliseconds", "days"],
)
def test_dates_that_do_not_fit_do_not_wrap(tmp_path: Path, values: pa.Array, received: str) -> None:
    table = pa.table({"user_id": ["u"] * 2, "item_id": ["i"] * 2, "timestamp": values})
    pq.write_table(table, tmp_path / "log.parquet")
    text = message([tmp_path / "log.parquet"])
    assert (
        f"row 2: a timestamp must be an integer (64 bits, any unit) or a date. Received: timestamp={received}." in text
    )


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl"])
def test_columns_that_folders_name(tmp_path: Path, name: str) -> None:
    """As pandas and Spark write them; the files do not have them."""
    files = []
    for label in (0, 1):
        for category in ("3", "__HIVE_DEFAULT_PARTITION__"):
            folder = tmp_path / f"label={label}" / f"category_id={category}"
            folder.mkdir(parents=True)
            files.append(write(folder, events(item_id=[f"{category}-{n}" for n in range(2)]), name))
    log = read_log(files, Columns())
    assert log.has_labels and sorted(only_block(log).labels.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert log.item_ids.to_pylist() == ["3-0", "3-1", "__HIVE_DEFAULT_PARTITION__-0", "__HIVE_DEFAULT_PARTITION__-1"]
    assert log.item_features["category_id"].ids.to_pylist() == [3]  # as in a CSV file, whose cells are text too
    assert log.item_features["category_id"].of_item.tolist() == [0, 1, 1, 0, 0]


def test_a_column_of_the_file_comes_before_that_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "label=0").mkdir()
    log = read_log([write(tmp_path / "label=0", events(label=[1, 1]))], Columns())
    assert only_block(log).labels.tolist() == [1, 1]


def test_a_label_of_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "label=maybe").mkdir()
    path = write(tmp_path / "label=maybe", events(user_id=["u", "u"]))
    assert "row 1: a label must be 0 or 1. Received: label='maybe'." in message([path])


def test_folders_that_give_a_column_two_values(tmp_path: Path) -> None:
    folder = tmp_path / "label=0" / "run=3" / "label=1" / "run=4"  # nobody asks for the run
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"label=0: folders must give a column one value\. Received: label='0', and"):
        read_log([write(folder, events(user_id=["u"]), "log.csv")], Columns())
    assert read_log([write(folder, events(label=[1]), "log.csv")], Columns()).has_labels  # the file's own comes first


def partitioned(folder: Path, value: str, rows: list[dict], name: str = "a.parquet") -> Path:
    (folder / f"user_id={value}").mkdir()
    return write(folder / f"user_id={value}", [{k: v for k, v in row.items() if k != "user_id"} for row in rows], name)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl"])
def test_a_folder_tells_integers_where_other_files_do(tmp_path: Path, first: bool, name: str) -> None:
    files = [
        partitioned(tmp_path, "7", events(timestamp=[1, 2]), name),
        write(tmp_path, events(user_id=[7, 8], timestamp=[3, 4]), name),
        partitioned(tmp_path, "9", events(timestamp=[5]), name),
    ]
    log = read_log(files if first else files[1:] + files[:1], Columns())
    assert log.user_ids.to_pylist() == ([7, 8, 9])
    assert only_block(log).timestamps.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", ["007", "x", "9" * 19])
def test_a_folder_that_tells_no_integer_where_other_files_do(tmp_path: Path, value: str) -> None:
    files = [write(tmp_path, events(user_id=[7, 8])), partitioned(tmp_path, value, events(timestamp=[1, 2]))]
    expected = "a.parquet, row 1: all ids of a column must be of one type, int64 in other files. Received: user_id="
    assert f"{expected}'{value}', from the name of a folder." in message(files)


def test_a_folder_tells_text_where_other_files_do(tmp_path: Path) -> None:
    files = [partitioned(tmp_path, "7", events(timestamp=[1])), write(tmp_path, events(user_id=["x"]))]
    assert read_log(files, Columns()).user_ids.to_pylist() == ["7", "x"]

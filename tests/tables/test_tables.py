"""Tables that are read batch by batch and written with columns added, in each format; and what they refuse."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from din_dist.errors import InputError
from din_dist.files import published
from din_dist.tables import survey as surveys
from din_dist.tables import text_files
from din_dist.tables.ids import Field, Ids
from din_dist.tables.reader import open_table
from din_dist.tables.survey import names_of, survey_table
from din_dist.tables.writer import Added, suffix_of, write_results

ROWS: list[dict[str, Any]] = [
    {"user": "u1", "item": 'i"1', "history": ["a", "b"], "candidates": ["x"], "note": "first, with a comma"},
    {"user": "ü2", "item": "i2\\", "history": [], "candidates": ["x\ny", "z"], "note": 'a "quoted" word'},
    {"user": "u3", "item": "", "history": ["ä"], "candidates": [], "note": None},
    {"user": "u4", "item": "i4", "history": ["a"], "candidates": ["x"] * 3, "note": "two\nlines"},
]
FIELDS = [Field("user", False), Field("item", False), Field("history", False, True), Field("candidates", False, True)]
FILES = ["t.parquet", "t.csv", "t.csv.gz", "t.CSV.XZ", "t.jsonl", "t.jsonl.gz", "t.jsonl.bz2", "t.jsonl.zst"]


def opened(path: Path, mode: str) -> Any:
    """Text as others would read or write it."""
    kind = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    if path.suffix != ".zst":
        return kind(path, f"{mode}t", newline="", encoding="utf-8")  # type: ignore[operator]
    stream = pa.input_stream(path, compression="zstd") if mode == "r" else pa.output_stream(path, compression="zstd")
    return io.TextIOWrapper(stream, newline="", encoding="utf-8")


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif ".csv" in path.name.lower():
        with opened(path, "w") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()])
    else:
        with opened(path, "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n\n" for number, row in enumerate(rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """As others would read what was written."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with opened(path, "r") as file:
        if ".csv" not in path.name:
            return [json.loads(line) for line in file]
        rows = list(csv.DictReader(file))
    lists = ("history", "candidates", "top", "scores")
    return [{name: json.loads(cell) if name in lists and cell else cell for name, cell in row.items()} for row in rows]


def lists(ids: Ids) -> list[Any]:
    values = ids.values.to_pylist()
    if ids.offsets is None:
        return values
    return [values[low:high] for low, high in zip(ids.offsets[:-1], ids.offsets[1:], strict=True)]


def without_empty_text(name: str) -> list[dict[str, Any]]:
    """CSV has no other way to say that there is nothing."""
    return [row | {"item": row["item"] or "i3"} for row in ROWS] if ".csv" in name.lower() else ROWS


@pytest.mark.parametrize("name", FILES)
def test_rows_come_in_batches_from_any_row_on(tmp_path: Path, name: str) -> None:
    rows = without_empty_text(name)
    path = write(tmp_path / name, rows)
    table = open_table(path)
    assert survey_table(path).columns == names_of(path) == tuple(ROWS[0])
    assert survey_table(path).num_rows == 4
    for first, num_rows, per_batch in ((0, 4, 4), (1, 3, 2), (1, 2, 1), (3, 1, 9), (0, 2, 9)):
        position = first
        for batch in table.read(first, num_rows, per_batch):
            wanted = rows[position : min(position + per_batch, first + num_rows)]
            for field, ids in zip(FIELDS, table.ids(batch, position, FIELDS), strict=True):
                assert lists(ids) == [row[field.name] for row in wanted]
                assert ids.counts.tolist() == [len(row[field.name]) if field.is_list else 1 for row in wanted]
            position += len(wanted)
        assert position == first + num_rows


@pytest.mark.parametrize("name", FILES)
def test_rows_are_written_as_they_came_with_columns_added(tmp_path: Path, name: str) -> None:
    rows = without_empty_text(name)
    path = write(tmp_path / name, rows)
    table = open_table(path)
    numbers, offsets = pa.array([0.5, -1e-7, 1e20, 3.0], pa.float32()), np.array([0, 1, 1, 2, 2])
    top = pa.array(['q"', "ü"])

    def results() -> Iterator[tuple[pa.Table, list[Added]]]:
        for batch in table.read(0, 4, 4):
            yield (
                batch,
                [
                    Added("logit", numbers),
                    Added("scores", numbers.slice(0, 2), offsets),
                    Added("top", top, offsets),
                ],
            )

    empty, none = pa.array([], pa.float32()), np.zeros(1, np.int64)
    added = [Added("logit", empty), Added("scores", empty, none), Added("top", pa.array([], pa.string()), none)]
    out = tmp_path / f"out{suffix_of(path)}"
    for _ in range(2):
        before = out.read_bytes() if out.exists() else None
        with published(out) as stream:
            write_results(path, stream, results(), added)
    assert out.read_bytes() == before  # the same rows, the same bytes
    assert not name.endswith(".gz") or out.read_bytes()[4:8] == bytes(4)  # whenever they are written
    found = read(out)
    for number, (row, was) in enumerate(zip(found, rows, strict=True)):
        expected = {key: "" if cell is None and ".csv" in name.lower() else cell for key, cell in was.items()}
        assert {key: row[key] for key in was} == expected
        assert float(row["logit"]) == pytest.approx(numbers[number].as_py(), rel=1e-6)
    assert [row["scores"] for row in found] == [[0.5], [], [pytest.approx(-1e-7)], []]
    assert [row["top"] for row in found] == [['q"'], [], ["ü"], []]


def test_lists_with_a_separator(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("history,candidates\n1;2,3\n,4;5;6\n-7,8\n")
    table = open_table(path, ";")
    (batch,) = table.read(0, 3, 3)
    history, candidates = table.ids(batch, 0, [Field("history", True, True), Field("candidates", True, True)])
    assert lists(history) == [[1, 2], [], [-7]]
    assert lists(candidates) == [[3], [4, 5, 6], [8]]
    path = tmp_path / "t.jsonl"
    path.write_text('{"history": "a b"}\n{"history": ""}\n')
    table = open_table(path, " ")
    (batch,) = table.read(0, 2, 2)
    assert lists(table.ids(batch, 0, [Field("history", False, True)])[0]) == [["a", "b"], []]


def test_parquet_in_its_many_types(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    lists_of = pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8(), 2))
    column = pa.array(["a", "b"]).dictionary_encode()
    pq.write_table(pa.table({"fixed": lists_of, "words": column, "large": column.cast(pa.large_string())}), path)
    table = open_table(path)
    (batch,) = table.read(0, 2, 2)
    fixed, words, large = table.ids(
        batch, 0, [Field("fixed", True, True), Field("words", False), Field("large", False)]
    )
    assert lists(fixed) == [[1, 2], [3, 4]]
    assert lists(words) == lists(large) == ["a", "b"]


def test_a_batch_is_bounded_in_bytes(tmp_path: Path) -> None:
    few = survey_table(write(tmp_path / "t.jsonl"))
    assert few.rows_per_batch == surveys.MOST_ROWS
    rows = [{"history": ["an item"] * 100_000}] * 20
    for name in ("t.parquet", "t.csv", "t.jsonl"):
        found = survey_table(write(tmp_path / name, rows))
        assert found.num_rows == 20
        limit = surveys.BATCH_BYTES // 100_000
        assert found.rows_per_batch <= limit or found.num_bytes < 20 * 100_000


def refused(path: Path, *fields: Field, separator: str = "") -> str:
    table = open_table(path, separator)
    with pytest.raises(InputError) as caught:
        for number, batch in enumerate(table.read(0, survey_table(path).num_rows, 2)):
            table.ids(batch, 2 * number, fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ('{"i": "a"}\n{"i": null}', Field("i", False), "row 2: every row needs its i. Received: none"),
        ('{"i": "a"}\n{}', Field("i", False), "row 2: every row needs its i. Received: none"),
        ('{"i": 1}', Field("i", False), "row 1: i must hold strings, as in the log of the model. Received: 1 (int)"),
        ('{"i": 1}\n{"i": "1"}', Field("i", True), "row 2: i must hold integers, as in the log of"),
        ('{"i": NaN}', Field("i", True), "row 1: i must hold integers, as in the log of the model. Received: nan"),
        ('{"i": 1.0}', Field("i", True), "Received: 1.0 (float)"),
        ('{"i": true}', Field("i", True), "Received: True (bool)"),
        ('{"i": 9223372036854775808}', Field("i", True), "Received: 9223372036854775808 (int)"),
        ('{"i": ["a"]}\n{"i": "a"}', Field("i", False, True), "row 2: i must be a list. Received: 'a'"),
        ('{"i": ["a", null]}', Field("i", False, True), "row 1: every row needs its i without a missing id"),
        ('{"i": null}', Field("i", False, True), "row 1: every row needs its i without a missing id"),
        ('{"i": ["a", 2]}', Field("i", False, True), "row 1: i must hold strings, as in the log of"),
        ('{"i": [["a"]]}', Field("i", False, True), "Received: ['a'] (list)"),
        ('{"i": "a"}\n{"i": "a"', Field("i", False), 'row 2: each line must be one JSON object. Received: {"i": "a"'),
        ('{"i": "a"} {"i": "a"}', Field("i", False), "row 1: each line must be one JSON object"),
        ('{"i": "a"}\n{"i": "a"} {"i": "a"}', Field("i", False), "row 2: each line must be one JSON object"),
        ('["i"]', Field("i", False), "row 1: each line must be one JSON object"),
        ('{"i": "a", "x": ' + "[" * 100_000, Field("i", False), "row 1: each line must be one JSON object"),
        ('{"i": "a"}\n{"i": ' + "[" * 100_000, Field("i", False), "row 2: each line must be one JSON object"),
        ('{"i": "a"}\n\x1b[31m', Field("i", False), r"row 2: each line must be one JSON object. Received: \x1b[31m."),
    ],
)  # fmt: skip
def test_what_json_lines_must_keep(tmp_path: Path, text: str, field: Field, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    assert message in refused(path, field)


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("i,j\na,b\n,b\n", Field("i", False), "row 2: every row needs its i. Received: none"),
        ("i\n1\n2x\n", Field("i", True), "row 2: i must hold integers, as in the log of the model. Received: '2x'"),
        ("i\n1.0\n", Field("i", True), "Received: '1.0'"),
        ("i\n1\n0x10\n", Field("i", True), "row 2: i must hold integers, as in the log of the model. Received: '0x10'"),
        ("i\n7\n007\n", Field("i", True), "row 2: i must hold integers, as in the log of the model. Received: '007'"),
        ("i\n-0\n", Field("i", True), "Received: '-0'"),
        ("i\nnan\n", Field("i", True), "Received: 'nan'"),
        ('i\n"[1]"\n"[1,2"\n', Field("i", True, True), "row 2: i must be a JSON array of integers. Received: '[1,2'"),
        ('i\n"[""a""]"\n', Field("i", True, True), "row 1: i must be a JSON array of integers. Received: 'a' (str)"),
        ("i\n[1]\n", Field("i", False, True), "row 1: i must be a JSON array of strings. Received: 1 (int)"),
        ("i\na;b\n", Field("i", False, True), "row 1: i must be a JSON array of strings. Received: 'a;b'"),
        ("i,j\n[],1\n,1\n", Field("i", False, True), "row 2: every row needs its i without a missing id"),
        ("i,j\na,b\na\n", Field("i", False), "row 2: must be CSV from end to end"),
        ("i,i\na,b\n", Field("i", False), "columns must have different names"),
        ("", Field("i", False), "a table must at least name its columns. Received: an empty file"),
    ],
)
def test_what_csv_must_keep(tmp_path: Path, text: str, field: Field, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert message in refused(path, field)


@pytest.mark.parametrize(
    ("column", "field", "message"),
    [
        (["a", None], Field("i", False), "row 2: every row needs its i. Received: none"),
        ([1, 2], Field("i", False), "row 1: i must hold strings, as in the log of the model. Received: 1 (int64)"),
        (["a"], Field("i", True), "row 1: i must hold integers, as in the log of the model. Received: 'a' (string)"),
        ([1.0, float("nan")], Field("i", True), "Received: 1.0 (double)"),
        ([None, None], Field("i", True), "row 1: every row needs its i"),
        ([["a"], None], Field("i", False, True), "row 2: every row needs its i without a missing id"),
        ([["a"], [], ["b", None]], Field("i", False, True), "row 3: every row needs its i without a missing id"),
        ([[1]], Field("i", False, True), "row 1: i must hold strings, as in the log of the model. Received: 1 (int64)"),
        (["a b"], Field("i", False, True), "row 1: i must be a list. Received: 'a b'"),
        ([7], Field("i", True, True), "row 1: i must be a list. Received: 7 (int64)"),
        (pa.array([1, 2**63], pa.uint64()), Field("i", True), "row 2: ids must fit 64 bits, signed"),
    ],
)  # fmt: skip
def test_what_parquet_must_keep(tmp_path: Path, column: Any, field: Field, message: str) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"i": column}), path)
    assert message in refused(path, field)


def test_damaged_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "t.parquet").read_bytes()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole[:-20])
    assert "must be Parquet from end to end" in refused(cut, FIELDS[0])
    for name, text in (("t.csv", b"user\nu1\n\xff\xfe\n"), ("t.jsonl", b'{"user": "u1"}\n{"user": "\xff"}\n')):
        path = tmp_path / name
        path.write_bytes(text)
        assert "row 2: text must be UTF-8. Received: " in refused(path, FIELDS[0])
    zipped = tmp_path / "t.jsonl.gz"
    zipped.write_bytes(gzip.compress(b'{"user": "u1"}\n' * 1000)[:-10])
    assert "must be JSON lines from end to end" in refused(zipped, FIELDS[0])


def test_byte_order_marks(tmp_path: Path) -> None:
    for name in ("t.csv", "t.jsonl", "t.jsonl.gz"):
        path = write(tmp_path / name, without_empty_text(name))
        with (gzip.open if name.endswith(".gz") else open)(path, "rb") as file:
            content = file.read()
        with (gzip.open if name.endswith(".gz") else open)(path, "wb") as file:
            file.write(b"\xef\xbb\xbf" + content)
        table = open_table(path)
        assert survey_table(path).columns == tuple(ROWS[0])
        (batch,) = table.read(0, 1, 1)
        assert table.ids(batch, 0, FIELDS[:1])[0].values.to_pylist() == ["u1"]


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(
        pa.table({"user": text, "history": pa.ListArray.from_arrays([0, 1, 2], text)}), tmp_path / "t.parquet"
    )
    for field in (FIELDS[0], FIELDS[2]):
        assert r"row 2: text must be UTF-8. Received: b'\xff'." in refused(tmp_path / "t.parquet", field)


def test_deeply_nested_json(tmp_path: Path) -> None:
    deep = "[" * 100_000
    (tmp_path / "t.jsonl").write_text('{"user": "u"}\n{"user": ' + deep + "\n")
    assert "row 2: each line must be one JSON object" in refused(tmp_path / "t.jsonl", FIELDS[0])
    (tmp_path / "t.csv").write_text(f"history\n[]\n{deep}\n")
    assert "row 2: history must be a JSON array of strings. Received: '[[[" in refused(tmp_path / "t.csv", FIELDS[2])


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MOST_LINE_BYTES", 1000)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100)
    path = tmp_path / "t.jsonl"
    path.write_text('{"user": "u"}\n{"user": "' + 2000 * "x" + '"}\n')
    assert "row 2: must be JSON lines from end to end. Received: a line of more than" in refused(path, FIELDS[0])
    path.write_text('{"user": "u"}\n{"user": "' + 800 * "x" + '"}\n')
    assert survey_table(path).num_rows == 2


def test_a_column_that_is_there_in_a_later_row_only(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"user": "u", "note": "logit"}\n{"user": "u", "logit": 1}\n')
    table = open_table(path)
    (batch,) = table.read(0, 2, 2)
    added = [Added("logit", pa.array([1.0, 2.0], pa.float32()))]
    with (
        pytest.raises(InputError, match="'logit' is to be added. Received: the row"),
        published(tmp_path / "out.jsonl") as stream,
    ):
        write_results(path, stream, iter([(batch, added)]), added)
    assert not list(tmp_path.glob("*out*"))


def test_nothing_is_published_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), published(tmp_path / "a") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with published(tmp_path / "a") as stream:
        stream.write(b"whole")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- Times. ---


def times(path: Path, first_row: int = 0, num_rows: int = 2) -> list[int]:
    table = open_table(path)
    return [time for rows in table.read(first_row, num_rows, 1) for time in table.times(rows, first_row, "t").tolist()]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_times(tmp_path: Path, name: str) -> None:
    assert times(write(tmp_path / name, [{"t": 5}, {"t": 6}])) == [5, 6]
    assert times(write(tmp_path / name, [{"t": 5.0}, {"t": 6.0}])) == [5, 6]
    assert times(write(tmp_path / name, [{"t": "1970-01-01"}, {"t": "1970-01-01 00:00:01"}])) == [0, 1_000_000]


@pytest.mark.parametrize("good", [b"1", b"2020-01-01", b"\xff"])
def test_times_that_are_no_utf8(tmp_path: Path, good: bytes) -> None:
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([good, b"\xff\x1b[2J"], pa.binary()).buffers())
    pq.write_table(pa.table({"t": text}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet, row \d: text must be UTF-8\. Received: t=b'\\xff"):
        times(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_empty_times(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"row 1: every event needs its t\. Received: no t\."):
        times(write(tmp_path / name, [{"t": ""}, {"t": "2020-01-01"}]))


def test_utf_16(tmp_path: Path) -> None:
    for name in ("t.csv", "t.jsonl"):
        path = tmp_path / name
        path.write_bytes((tmp_path / write(tmp_path / name).name).read_text(encoding="utf-8").encode("utf-16"))
        with pytest.raises(InputError, match=r"text must be UTF-8\. Received: UTF-16\. Convert the file to UTF-8"):
            survey_table(path)


def test_times_of_other_kinds_in_json(tmp_path: Path) -> None:
    for value in (True, [1], "6"):
        path = write(tmp_path / "t.jsonl", [{"t": 5}, {"t": value}])
        table = open_table(path)
        (rows,) = table.read(0, 2, 2)
        with pytest.raises(InputError, match=r"t\.jsonl, row 2: a timestamp must be .* Received: t=.*\. Correct it"):
            table.times(rows, 0, "t")


def test_all_times_of_a_table_have_a_zone_or_none(tmp_path: Path) -> None:
    """Whatever the batches."""
    path = write(tmp_path / "t.csv", [{"t": "2020-01-01T00:00:00Z"}, {"t": "2020-01-01T00:00:00"}])
    with pytest.raises(
        InputError, match=r"all timestamps must have a time zone, or none of them; those before have one"
    ):
        times(path)

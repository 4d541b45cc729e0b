"""Which files make up a log, and whether they changed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.tables.sources import (
    Found,
    check_unchanged,
    find_files,
    find_local_files,
    fingerprint_files,
    partition_of,
)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def found(source: Path | str) -> list[str]:
    return [path.name for path in find_files(str(source)).files]


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.pq", "A.CSV", "a.csv.gz", "A.CSV.GZ", "a.b.csv.xz", "a.jsonl", "a.ndjson.zst", "a.json"]
)
def test_one_file(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    assert found(tmp_path / name) == [name]


def test_a_folder_is_searched_to_the_bottom_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.parquet", "day=2/a.parquet", "day=1/z.parquet", "_SUCCESS", "b.parquet.crc", ".hidden.parquet")
    touch(tmp_path, "_temporary/x.parquet", ".git/y.parquet", "README.md")
    assert found(tmp_path) == ["b.parquet", "z.parquet", "a.parquet"]


def test_a_glob_takes_files_and_folders(tmp_path: Path) -> None:
    touch(tmp_path, "day=1/a.csv", "day=2/b.csv", "day=2/_SUCCESS", "night/deep/c.csv")
    assert found(tmp_path / "day=*") == ["a.csv", "b.csv"]
    assert found(tmp_path / "**" / "[bc].csv") == ["b.csv", "c.csv"]


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("a.csv").files == find_files("~/a.csv").files == [tmp_path / "a.csv"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("none.csv", "none.csv: no such file, folder, or match of a glob. Correct --data_path."),
        ("*.csv", "*.csv: no such file, folder, or match of a glob."),
        (
            "a.xlsx",
            "a.xlsx: each file of the log must be one of .parquet, .pq, .csv, .jsonl, .ndjson, .json; text also with",
        ),
        ("empty", "empty: no file of a supported type there (.parquet, "),
        ("mixed", "mixed: all files of the log must have one format. Received: "),
    ],
)
def test_errors(tmp_path: Path, source: str, expected: str) -> None:
    touch(tmp_path, "a.xlsx", "empty/_SUCCESS", "mixed/a.csv", "mixed/b.parquet")
    with pytest.raises(InputError) as caught:
        find_files(str(tmp_path / source))
    assert expected in str(caught.value)
    if source == "mixed":
        assert "mixed/a.csv (CSV) and " in str(caught.value) and "mixed/b.parquet (Parquet)" in str(caught.value)


def test_all_kinds_of_compressed_text_are_one_format(tmp_path: Path) -> None:
    names = ["a.csv", "b.csv.bz2", "c.csv.zst", "d.csv.xz", "e.CSV", "f.CSV.GZ"]
    touch(tmp_path, *names)
    assert find_files(str(tmp_path)) == Found([tmp_path / name for name in names], [])


def test_what_is_passed_over_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv", "b.tsv", "c/_SUCCESS", "c/d.csv.zip", ".hidden/x.csv", "parquet.gz", "g.parquet.gz")
    expected = [".hidden", "b.tsv", "c/_SUCCESS", "c/d.csv.zip", "g.parquet.gz", "parquet.gz"]
    found = find_files(str(tmp_path))
    assert found.passed_over == expected
    assert found.describe() == f"files: 1 read, 6 passed over: {', '.join(expected[:5])} and 1 more"
    assert Found([tmp_path / "a.csv"] * 1200, []).describe() == "files: 1,200 read"


def test_each_real_file_once(tmp_path: Path) -> None:
    """Links to a folder, to a file, in a circle; and another name of the same file."""
    touch(tmp_path, "log/z/a.csv", "log/z/deep/b.csv", "elsewhere/c.csv")
    log = tmp_path / "log"
    (log / "a").symlink_to("z")  # comes first by its name, and yet the file keeps its own
    (log / "z" / "up").symlink_to("..")
    (log / "z" / "self").symlink_to(".")
    (log / "y").symlink_to(tmp_path / "elsewhere")
    (log / "again.csv").symlink_to("z/a.csv")
    (log / "z" / "hard.csv").hardlink_to(log / "z" / "a.csv")
    found = find_files(str(log))
    assert [path.relative_to(log).as_posix() for path in found.files] == ["y/c.csv", "z/a.csv", "z/deep/b.csv"]
    assert found.passed_over == ["a", "again.csv", "z/hard.csv", "z/self", "z/up"]
    for pattern in ("**", "**/*.csv", "*/**/*.csv", "*"):
        files = find_files(str(log / pattern)).files
        assert len(files) == 3 and {path.resolve() for path in files} == {path.resolve() for path in found.files}


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that nobody may enter; pytest's are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("pattern", ["", "*", "**/*.csv", "*/*.csv", "[bc]/x.csv"])
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_without_rights_is_not_passed_over(open_folder: Path, pattern: str, mode: int) -> None:
    touch(open_folder, "b/x.csv", "c/x.csv")
    (open_folder / "c").chmod(mode)
    with as_nobody():
        if pattern == "[bc]/x.csv" and mode == 0o111:  # nothing has to be listed there
            assert len(find_files(str(open_folder / pattern)).files) == 2
        else:
            with pytest.raises(InputError) as refused:
                find_files(str(open_folder / pattern))
            assert str(refused.value).startswith(f"{open_folder / 'c'}")
            assert "of the log must be readable. Received: Permission denied." in str(refused.value)


def test_a_file_without_rights(open_folder: Path) -> None:
    touch(open_folder, "a.csv", "b.csv")
    (open_folder / "b.csv").chmod(0o000)
    message = (
        rf"{open_folder / 'b.csv'}: all files and folders of the log must be readable. Received: no rights to read"
    )
    for source in (open_folder, open_folder / "b.csv", open_folder / "*.csv"):
        with as_nobody(), pytest.raises(InputError, match=message):
            find_files(str(source))
    with as_nobody(), pytest.raises(InputError, match=r"b\.csv: must be readable\. Received: Permission denied\."):
        fingerprint_files([open_folder / "b.csv"])


def test_a_folder_that_cannot_be_entered(open_folder: Path) -> None:
    touch(open_folder, "closed/a.csv")
    (open_folder / "closed").chmod(0o600)
    with (
        as_nobody(),
        pytest.raises(
            InputError, match=r"closed/a\.csv: all files and folders of the log .* Received: Permission denied"
        ),
    ):
        find_files(str(open_folder / "closed" / "a.csv"))


def test_what_is_no_file(tmp_path: Path) -> None:
    """And does not hang."""
    touch(tmp_path, "a.csv")
    os.mkfifo(tmp_path / "b.csv")
    for source in (tmp_path, tmp_path / "b.csv", tmp_path / "*"):
        with pytest.raises(
            InputError,
            match=r"b\.csv: all files and folders of the log must be readable.* Received: a pipe or a device\.",
        ):
            find_files(str(source))
    (tmp_path / "b.csv").unlink()
    (tmp_path / "b.csv").symlink_to("nowhere.csv")
    for source in (tmp_path, tmp_path / "b.csv"):
        with pytest.raises(
            InputError, match=r"b\.csv: all files and folders of the log must be readable.* Received: a link to nowhere"
        ):
            find_files(str(source))


def test_urls(tmp_path: Path) -> None:
    touch(tmp_path, "a b.csv")
    assert find_files(f"file://{tmp_path}/a%20b.csv").files == [tmp_path / "a b.csv"]
    with pytest.raises(InputError, match=r"--input: must be a path of this machine\. Received: 's3://bucket/x'"):
        find_local_files("s3://bucket/x", "--input", "table")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/log/label=0/a.csv", {"label": "0"}),
        ("/log/day=2024-01-01/label=1/a=b.csv", {"day": "2024-01-01", "label": "1"}),
        ("/log/brand%20name=a%2Fb=c/x.csv", {"brand name": "a/b=c"}),
        ("/log/category_id=__HIVE_DEFAULT_PARTITION__/x.csv", {"category_id": None}),
        ("/log/category_id=/x.csv", {"category_id": ""}),
        ("/log/=1/x.csv", {}),
    ],
)
def test_columns_that_folders_name(path: str, expected: dict[str, str | None]) -> None:
    assert partition_of(Path(path)) == expected


def test_folders_that_give_a_column_two_values() -> None:
    path = Path("/log/label=0/day=3/label=1/a.csv")
    assert partition_of(path) == {"day": "3", "label": "1"}
    with pytest.raises(InputError) as caught:
        partition_of(path, ["label"])
    assert str(caught.value) == (
        "/log/label=0: folders must give a column one value. Received: label='0', and label='1' below it. "
        "Rename one of the two."
    )
    assert partition_of(path, ["day"])["day"] == "3"
    assert partition_of(Path("/log/label=1/label=1/a.csv"), ["label"]) == {"label": "1"}
    nothing = Path("/log/label=1/label=__HIVE_DEFAULT_PARTITION__/a.csv")
    with pytest.raises(InputError, match=r"/log/label=1: .* Received: label='1', and label=None below it"):
        partition_of(nothing, ["label"])


def test_a_value_of_a_folder_that_is_not_utf8() -> None:
    path = Path("/log/user_id=%FF%1B/a.csv")
    with pytest.raises(InputError, match=r"/log/user_id=%FF%1B: user_id must be UTF-8\. Received: '%FF%1B'\. Rename"):
        partition_of(path, ["user_id"])
    assert partition_of(Path("/log/user_id=%EF%BF%BD\ufffd/a.csv"), ["user_id"]) == {"user_id": "\ufffd\ufffd"}


@pytest.mark.parametrize("name", [b"r\xff\x1b.csv", b"d\xff/a.csv", b"label=\xff/a.csv"])
def test_a_name_that_is_not_utf8(tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    path.write_text("user_id,item_id,timestamp\nu,i,1\n")
    with pytest.raises(InputError, match=r"--data_path: must be a path in UTF-8. Received: .*\\udcff.*, from a shell"):
        find_files(str(path))
    for source in (tmp_path, tmp_path / "*", tmp_path / "**"):
        with pytest.raises(InputError) as caught:
            find_files(str(source))
        assert r"\udcff" in str(caught.value) and str(caught.value).isprintable()
        assert r": names of files and folders must be UTF-8. Received: b'\xff' in one. Rename it, or" in str(
            caught.value
        )
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    path.rename(other)
    touch(tmp_path, "a.csv")
    assert found(tmp_path) == ["a.csv"]


@pytest.fixture
def deep_folder(tmp_path: Path) -> Iterator[Path]:
    """One with a file 1200 folders below it; Python's own cannot delete that."""
    with contextlib.chdir(tmp_path):
        for _ in range(1200):
            Path("d").mkdir()
            os.chdir("d")
        Path("a.csv").touch()
    yield tmp_path
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)


@pytest.mark.parametrize("pattern", ["", "**/*.csv"])
def test_folders_nested_deeper_than_functions(deep_folder: Path, pattern: str) -> None:
    assert found(deep_folder / pattern) == ["a.csv"]


def test_a_partition_is_part_of_what_a_file_is(tmp_path: Path) -> None:
    touch(tmp_path, "label=1/day=3/a.csv")
    file = tmp_path / "label=1" / "day=3" / "a.csv"
    assert "partition" not in fingerprint_files([file])[str(file)]
    assert fingerprint_files([file], ["label", "hour"])[str(file)]["partition"] == "label=1"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_delta_log/0.json", "a Delta"),
        (".hoodie/hoodie.properties", "a Hudi"),
        ("metadata/v2.metadata.json", "an Iceb"),
    ],
)
def test_tables_with_files_of_earlier_versions(tmp_path: Path, name: str, kind: str) -> None:
    """Rows that were deleted from them are still in their files."""
    touch(tmp_path, "table/a.parquet", "table/day=1/b.parquet", f"table/{name}")
    globs = ("*", "table/*", "table/*.parquet", "**/*.parquet", "*/day=1/b.parquet", "table/day=*")
    for source in (tmp_path, tmp_path / "table", tmp_path / "table" / "day=1", *(tmp_path / glob for glob in globs)):
        with pytest.raises(InputError, match=rf"/table: all files of the log are read\. Received: {kind}"):
            find_files(str(source))


def test_a_touch_or_a_copy_is_no_change(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv")
    files = [tmp_path / "a.csv"]
    recorded = fingerprint_files(files)
    check_unchanged(recorded, files)
    os.utime(files[0], ns=(5, 5))
    check_unchanged(recorded, files)


@pytest.mark.parametrize(("content", "same_time"), [("A.csv", False), ("longer", False), ("longer", True)])
def test_a_change_is_noticed(tmp_path: Path, content: str, same_time: bool) -> None:
    touch(tmp_path, "a.csv")
    files = [tmp_path / "a.csv"]
    recorded = fingerprint_files(files)
    files[0].write_text(content)
    time = recorded[str(files[0])]["mtime_ns"] if same_time else 5
    os.utime(files[0], ns=(time, time))
    with pytest.raises(
        InputError, match=r"a.csv: this file has changed since .* --overwrite_prepared once, or .* --data_dir"
    ):
        check_unchanged(recorded, files)


def test_files_that_came_or_went(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv", "b.csv")
    recorded = fingerprint_files([tmp_path / "a.csv"])
    with pytest.raises(InputError, match=r"b\.csv: this file was added"):
        check_unchanged(recorded, find_files(str(tmp_path)).files)
    with pytest.raises(InputError, match=r"a\.csv: this file was removed"):
        check_unchanged(recorded, [])

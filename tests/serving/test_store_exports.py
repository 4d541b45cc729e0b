"""Exports in an object store: whole or not at all, whatever fails, and copied to this machine to be opened."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.serving.http.served import Served
from din_dist.serving.http.versions import NewerVersions, Version, found_versions
from din_dist.serving.manifest import MANIFEST, check_files, read_manifest
from din_dist.serving.store_exports import UNFINISHED, check_free, local_export, upload
from din_dist.tables import storage
from din_dist.tables.storage import RemoteFile
from tests.support.changed_manifest import write_manifest
from tests.support.faulty_store import Fault, Store, running_store
from tests.support.stand_in_model import STRINGS, StandIn


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with running_store(monkeypatch) as store:
        yield store


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MOST_SECONDS", 1.0)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    for name in (
        "saved_model.pb",
        "variables/variables.index",
        "variables/only_here",
        "assets/ids.txt",
        "items.parquet",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    write_manifest(folder)
    return folder


def another(export: Path, step: int) -> Path:
    """Returns a copy of an export that says that it is of another update, and has a file less and a file more."""
    folder = Path(shutil.copytree(export, export.with_name(f"of-{step}")))
    (folder / "variables" / "only_here").unlink()
    (folder / "variables" / "more").write_text("more")
    write_manifest(folder, step=step)
    return folder


def names_of(export: Path) -> list[str]:
    return sorted(path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file())


def contents(store: Store, path: str) -> dict[str, bytes]:
    return {name: store.get(f"{path}/{name}") for name in store.names(path)}


def local_contents(export: Path) -> dict[str, bytes]:
    return {name: (export / name).read_bytes() for name in names_of(export)}


def place(store: Store, path: str = "exports/first") -> RemoteFile:
    return RemoteFile.of(store.uri(path))


def test_the_store_has_the_bytes_of_the_folder_and_the_manifest_comes_last(store: Store, export: Path) -> None:
    check_free(place(store), overwrite=False)
    store.proxy.requests.clear()
    upload(export, place(store))
    assert contents(store, "exports/first") == local_contents(export)
    written = [line.split()[1].partition("?")[0] for line in store.proxy.requests if line.startswith(("PUT", "POST"))]
    written = [path for path in written if not path.endswith("/")]  # pyarrow keeps a folder whose file it deletes
    assert written[0].endswith(UNFINISHED)
    assert written[-1].endswith(f"first/{MANIFEST}")


def test_what_is_there_is_replaced_only_on_request(store: Store, export: Path) -> None:
    upload(another(export, 5), place(store))
    with pytest.raises(InputError, match=r"s3://logs/exports/first, which holds an export\. Add --overwrite"):
        check_free(place(store), overwrite=False)
    check_free(place(store), overwrite=True)
    upload(export, place(store))
    assert contents(store, "exports/first") == local_contents(export)
    store.put("other/notes.txt", b"mine")
    with pytest.raises(InputError, match=r"s3://logs/other, which exists and is no export\. Name another one"):
        check_free(place(store, "other"), overwrite=True)


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOST, Fault.SILENT])
def test_a_fault_that_passes_changes_nothing(store: Store, export: Path, fault: Fault) -> None:
    store.proxy.fail(fault, times=1 if fault is Fault.SILENT else 2, only="PUT /logs/exports/first/")
    upload(export, place(store))
    assert store.proxy.times == 0
    assert contents(store, "exports/first") == local_contents(export)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.BUSY, "the store must answer. Received, and again for "),
        (Fault.LOST, "the store must answer. Received, and again for "),
        (Fault.DENIED, "must be writable. Received: "),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_fault_that_stays_leaves_no_export_and_the_next_one_publishes(
    store: Store, export: Path, fault: Fault, expected: str, old: bool
) -> None:
    """Also in the place of an older one, which is gone before the files of the new one come."""
    if old:
        upload(another(export, 5), place(store))
    store.proxy.fail(fault, only="PUT /logs/exports/first/(variables|assets)")
    with pytest.raises(InputError) as error:
        upload(export, place(store))
    assert expected in str(error.value)
    assert str(error.value).startswith("s3://logs/exports/first/")
    assert "\n" not in str(error.value)
    store.proxy.fail(Fault.NONE)
    assert UNFINISHED in store.names("exports/first")
    with pytest.raises(InputError, match=r"s3://logs/exports/first: must be an export\. Received: no assets"):
        local_export(place(store).uri)
    check_free(place(store), overwrite=False)
    upload(export, place(store))
    assert contents(store, "exports/first") == local_contents(export)


# --- Reading. ---


def test_an_export_is_copied_once_and_checked(store: Store, export: Path) -> None:
    upload(export, place(store))
    digest = read_manifest(export).digest
    copy = local_export(place(store).uri, digest)
    assert local_contents(copy) == local_contents(export)
    store.proxy.requests.clear()
    assert local_export(place(store).uri) == copy
    assert not [line for line in store.proxy.requests if "saved_model" in line], "it is read from the disk"
    (copy / "saved_model.pb").write_bytes(b"damaged")
    assert local_export(place(store).uri) == copy
    check_files(copy, read_manifest(copy, digest))
    assert local_export(str(export)) == export


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.CUT])
def test_a_copy_survives_faults_that_pass(store: Store, export: Path, fault: Fault) -> None:
    upload(export, place(store))
    store.proxy.fail(fault, times=2, only="GET /logs/exports/first/saved_model")
    assert local_contents(local_export(place(store).uri)) == local_contents(export)


def test_another_export_than_the_expected_is_refused(store: Store, export: Path, tmp_path: Path) -> None:
    upload(export, place(store))
    with pytest.raises(InputError, match=r"--expect_digest: must be the SHA-256 of s3://logs/exports/first/assets"):
        local_export(place(store).uri, "0" * 64)
    store.put("exports/first/saved_model.pb", b"another program")
    with pytest.raises(InputError, match=r"^s3://logs/exports/first/saved_model\.pb: must be as it was published\."):
        local_export(place(store).uri)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name == "saved_model.pb"]


def test_the_highest_number_is_served(store: Store, export: Path) -> None:
    for number in ("2", "10"):
        upload(another(export, int(number)), place(store, f"exports/{number}"))
    store.put("exports/11/saved_model.pb", b"unfinished")
    found = found_versions(store.uri("exports"))
    assert [(version.number, read_manifest(local_export(version.source)).step) for version in found] == [
        (10, 10),
        (2, 2),
    ]
    (found,) = found_versions(store.uri("exports/2"))
    assert (found.number, read_manifest(local_export(found.source)).step) == (2, 2)


def test_newer_versions_in_a_store_are_found(store: Store, export: Path) -> None:
    """One that is replaced in its place, too; an unfinished one is not opened."""
    opened = []

    def opener(version: Version) -> Served:
        manifest = read_manifest(local_export(version.source))
        opened.append(version.number)
        return Served(StandIn(), STRINGS, manifest.step, {"digest": manifest.digest})

    upload(another(export, 7), place(store, "exports/7"))
    newer = NewerVersions(store.uri("exports"), opener, found_versions(store.uri("exports"))[0])
    newer.open_first()
    store.put("exports/8/saved_model.pb", b"unfinished")
    assert newer.look() is None
    upload(another(export, 8), place(store, "exports/8"))
    assert newer.look() is None
    served = newer.look()
    assert served is not None
    assert served.version == 8
    assert newer.look() is None
    check_free(place(store, "exports/8"), overwrite=True)
    upload(another(export, 9), place(store, "exports/8"))
    assert newer.look() is None
    served = newer.look()
    assert served is not None
    assert (served.version, opened) == (9, [7, 8, 8])

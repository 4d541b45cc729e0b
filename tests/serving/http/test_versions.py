"""Which of several exports is served, and which takes its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.serving.http.served import Served
from din_dist.serving.http.versions import NewerVersions, RefusedVersion, Version, found_versions
from din_dist.serving.manifest import MANIFEST, read_manifest
from tests.support.changed_manifest import write_manifest
from tests.support.stand_in_model import STRINGS, StandIn


def publish(folder: Path, content: str = "a model") -> Path:
    """Writes what looks like an export; its digest depends on `content`."""
    folder.mkdir(exist_ok=True)
    (folder / "saved_model.pb").write_text(content)
    write_manifest(folder)
    return folder


class Opener:
    """Opens what `publish` wrote, unless its content is "broken". `opened` has the names of the folders."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def __call__(self, version: Version) -> Served:
        self.opened.append(version.folder.name)
        if (version.folder / "saved_model.pb").read_text() == "broken":
            raise InputError("saved_model.pb: must be whole. Received: half. Copy it again.")
        return Served(StandIn(), STRINGS, version.number or 0, {"digest": read_manifest(version.folder).digest})


def newer_versions(folder: Path) -> tuple[NewerVersions, Opener]:
    """Returns what looks for newer versions, after the first was opened."""
    opener = Opener()
    newer = NewerVersions(str(folder), opener, found_versions(str(folder))[0])
    newer.open_first()
    return newer, opener


def served_after(newer: NewerVersions, num_looks: int = 2) -> int | None:
    """Looks so many times; returns the version that the last look found, when the others found none."""
    for _ in range(num_looks - 1):
        assert newer.look() is None
    served = newer.look()
    return served.version if served else None


def test_the_newest_version_is_found(tmp_path: Path) -> None:
    """By number, not by name; what has no manifest is not yet an export."""
    for name in ("2", "10", "newest"):
        (tmp_path / name / MANIFEST).parent.mkdir(parents=True)
        (tmp_path / name / MANIFEST).touch()
    (tmp_path / "11").mkdir()
    assert found_versions(str(tmp_path)) == [Version(tmp_path / "10", 10), Version(tmp_path / "2", 2)]
    assert found_versions(str(tmp_path / "2")) == [Version(tmp_path / "2", 2)]
    assert found_versions(str(tmp_path / "newest")) == [Version(tmp_path / "newest", None)]
    assert found_versions(str(tmp_path / "nowhere")) == [Version(tmp_path / "nowhere", None)]


def test_a_newer_version_is_opened_when_it_is_whole(tmp_path: Path) -> None:
    """A copy that is still written changes between two looks."""
    publish(tmp_path / "9")
    newer, opener = newer_versions(tmp_path)
    assert served_after(newer) is None
    publish(tmp_path / "10", "half of it")
    assert newer.look() is None
    publish(tmp_path / "10", "all of it, and more")
    assert newer.look() is None
    assert served_after(newer, num_looks=1) == 10
    assert served_after(newer, num_looks=5) is None
    assert opener.opened == ["9", "10"]


def test_a_lower_version_is_left_alone(tmp_path: Path) -> None:
    publish(tmp_path / "9")
    newer, opener = newer_versions(tmp_path)
    publish(tmp_path / "8", "older")
    assert served_after(newer, num_looks=4) is None
    assert opener.opened == ["9"]


def test_removing_the_served_version_goes_back(tmp_path: Path) -> None:
    publish(tmp_path / "9")
    newer, _ = newer_versions(tmp_path)
    publish(tmp_path / "10", "worse")
    assert served_after(newer) == 10
    shutil.rmtree(tmp_path / "10")
    assert served_after(newer) == 9
    publish(tmp_path / "10", "mended")
    assert served_after(newer) == 10


def test_nothing_to_serve_changes_nothing(tmp_path: Path) -> None:
    publish(tmp_path / "9")
    newer, opener = newer_versions(tmp_path)
    shutil.rmtree(tmp_path / "9")
    (tmp_path / "notes.txt").write_text("nothing is here")
    assert served_after(newer, num_looks=4) is None
    shutil.rmtree(tmp_path)
    assert served_after(newer, num_looks=4) is None
    assert opener.opened == ["9"]


def test_a_broken_version_is_refused_once_until_it_changes(tmp_path: Path) -> None:
    publish(tmp_path / "9")
    newer, opener = newer_versions(tmp_path)
    publish(tmp_path / "10", "broken")
    assert newer.look() is None
    with pytest.raises(RefusedVersion) as refused:
        newer.look()
    assert str(refused.value) == (
        f"{tmp_path / '10'} is not served: saved_model.pb: must be whole. Received: half. Copy it again."
    )
    assert served_after(newer, num_looks=4) is None
    publish(tmp_path / "10", "whole")
    assert served_after(newer) == 10
    assert opener.opened == ["9", "10", "10"]


def test_a_version_below_a_broken_one_is_served(tmp_path: Path) -> None:
    publish(tmp_path / "9")
    newer, _ = newer_versions(tmp_path)
    publish(tmp_path / "11", "broken")
    publish(tmp_path / "10", "whole")
    assert newer.look() is None
    with pytest.raises(RefusedVersion):
        newer.look()
    assert served_after(newer) == 10


def test_another_export_in_the_place_of_the_served_one(tmp_path: Path) -> None:
    """It is opened if it is another, not if only the files are."""
    export = publish(tmp_path / "export")
    newer, opener = newer_versions(export)
    publish(export)
    (export / "saved_model.pb").touch()
    assert served_after(newer, num_looks=4) is None
    publish(export, "another model")
    assert served_after(newer) == 0
    assert opener.opened == ["export", "export"]
    publish(export, "broken")
    assert newer.look() is None
    with pytest.raises(RefusedVersion):
        newer.look()
    assert served_after(newer, num_looks=4) is None


def test_a_link_that_moves(tmp_path: Path) -> None:
    for version in ("1", "2"):
        publish(tmp_path / version, version)
    link = tmp_path / "current"
    link.symlink_to("1")
    newer, _ = newer_versions(link)
    assert served_after(newer) is None
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").rename(link)
    assert served_after(newer) == 2

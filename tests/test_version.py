"""The version stands in din_dist/__init__.py. Files that have to repeat it are compared; setup.cfg follows."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from din_dist import __version__
from tests.support.repository import ROOT

IMAGE = re.compile(r"""din-dist:(\d[\w.]*\d)|image\.version="([^"]*)"|newTag: (\d[\w.]*\d)|din_dist-(\d[\w.]*\d)-py3""")
PLACES = [
    *("README.md", "docker/Dockerfile", "docker/docker-compose.yml"),
    *sorted(
        str(path.relative_to(ROOT)) for room in ("k8s", "docker", "launch") for path in ROOT.glob(f"{room}/**/*.md")
    ),
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("k8s/**/*.yaml")),
]


def stated(text: str) -> set[str]:
    """Every version of ours that a text names."""
    return {version for found in IMAGE.findall(text) for version in found if version}


@pytest.mark.parametrize("place", PLACES)
def test_images_have_the_version_of_the_package(place: str) -> None:
    assert stated((ROOT / place).read_text()) <= {__version__}


def test_where_the_version_is_stated() -> None:
    """The pattern finds them all, also with a suffix."""
    places = [place for place in PLACES if stated((ROOT / place).read_text())]
    assert {"docker/Dockerfile", "docker/docker-compose.yml", "k8s/base/mpijob.yaml", "launch/README.md"} <= set(places)
    assert stated('din-dist:1.2.3 image.version="1.2.4" newTag: 1.2.5-gpu din_dist-1.2.6-py3-none') == {
        *("1.2.3", "1.2.4", "1.2.5", "1.2.6")
    }


def test_what_setuptools_reads() -> None:
    """It must not import the package, whose dependencies are not there yet when it is installed."""
    program = """
import setuptools, sys
project = setuptools.Distribution()
project.parse_config_files()
print(project.metadata.version, project.metadata.license, project.metadata.license_files, "din_dist" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__} Apache-2.0 ['LICENSE'] False\n", done.stderr


def test_the_licence_is_named() -> None:
    assert "\nSPDX-License-Identifier: Apache-2.0\n" in (ROOT / "LICENSE").read_text()

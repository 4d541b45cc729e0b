"""docker/pin_images.sh, with a docker command whose registry has one digest for each tag."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.fake_checkout import write_script
from tests.support.repository import ROOT

DEBIAN, CUDA, PROMETHEUS = (
    f"docker.io/{image}"
    for image in ("library/debian:12.15-slim", "nvidia/cuda:12.9.1-base-ubuntu24.04", "prom/prometheus:v3.5.5")
)
NOW, OLD = ("sha256:" + letter * 64 for letter in "ab")


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A docker/ with an image that is not pinned, one whose tag was moved since, and one as it should be."""
    folder = tmp_path / "check out" / "docker"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "docker" / "pin_images.sh", folder)
    (folder / "Dockerfile").write_text(f"ARG CPU_BASE={DEBIAN}\nARG GPU_BASE={CUDA}@{OLD}\nFROM x AS y\n")
    compose = f"services:\n  a: {{image: din-dist:0.1.0}}\n  b:\n    image: {PROMETHEUS}@{NOW}\n"
    (folder / "docker-compose.yml").write_text(compose)
    (tmp_path / "bin").mkdir()
    fake = f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\necho "${{FAKE_DIGEST-{NOW}}}"\n'
    write_script(tmp_path / "bin" / "docker", fake)
    return folder


def pin_images(docker: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PATH": f"{docker.parents[1]}/bin:{os.environ['PATH']}", **env}
    command = [docker / "pin_images.sh", *flags]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def refused(docker: Path, *flags: str, **env: str) -> str:
    """The one line of an error, which changes nothing."""
    before = (docker / "Dockerfile").read_text()
    done = pin_images(docker, *flags, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert (docker / "Dockerfile").read_text() == before
    [line] = done.stderr.splitlines()
    return line


def test_images_are_pinned_to_what_their_tags_have(docker: Path) -> None:
    done = pin_images(docker)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{DEBIAN}: {NOW}\n{CUDA}: {NOW}\n"
    expected = f"ARG CPU_BASE={DEBIAN}@{NOW}\nARG GPU_BASE={CUDA}@{NOW}\nFROM x AS y\n"
    assert (docker / "Dockerfile").read_text() == expected
    assert f"  b:\n    image: {PROMETHEUS}@{NOW}\n" in (docker / "docker-compose.yml").read_text()
    asked = (docker.parents[1] / "asked").read_text().splitlines()
    flags = "--format {{.Manifest.Digest}}"
    assert asked == [f"buildx imagetools inspect {image} {flags}" for image in (DEBIAN, CUDA, PROMETHEUS)]
    again = pin_images(docker, "--check")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_an_image_that_is_not_pinned_fails_the_check(docker: Path) -> None:
    assert refused(docker, "--check") == (
        f"pin_images.sh: {DEBIAN} must be pinned to the digest that it has now, {NOW}. Received: none. "
        "Run docker/pin_images.sh, then python -m tests.docker.smoke."
    )


def test_an_image_whose_tag_was_moved_fails_the_check(docker: Path) -> None:
    text = (docker / "Dockerfile").read_text()
    (docker / "Dockerfile").write_text(text.replace(DEBIAN, f"{DEBIAN}@{NOW}"))
    assert f"{CUDA} must be pinned to the digest that it has now, {NOW}. Received: {OLD}." in refused(docker, "--check")


def test_a_registry_that_does_not_answer(docker: Path) -> None:
    assert refused(docker, FAKE_DIGEST="trying\nERROR: no route to host") == (
        f"pin_images.sh: the registry must give the digest of {DEBIAN}. Received: ERROR: no route to host. "
        "Connect to it, or name another image in docker/."
    )


def test_wrong_flags(docker: Path) -> None:
    assert refused(docker, "--verify") == (
        "pin_images.sh: flags: must be --check or none. Received: '--verify'. Usage: docker/pin_images.sh [--check]"
    )

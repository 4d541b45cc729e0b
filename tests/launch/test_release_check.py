"""launch/release_check.sh and launch/pin.sh, with stand-ins for the tools that they install."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.fake_checkout import FakeCheckout, write_script
from tests.support.repository import ROOT

# uv pip compile ... --output-file FILE writes two pins.
UV = """#!/usr/bin/env python3
import os, pathlib, sys
with open(os.environ["FAKE_UV_CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
if os.environ.get("FAKE_UV_FAILS"):
    sys.exit("no solution")
output = pathlib.Path(sys.argv[sys.argv.index("--output-file") + 1])
output.write_text("numpy==2.4.6 --hash=sha256:1\\nhorovod==0.28.1 --hash=sha256:2\\n")
"""
CYCLONEDX = """#!/usr/bin/env python3
import json, os, pathlib, re, sys
*_, output, pins = map(pathlib.Path, sys.argv)
found = re.findall("^([a-z0-9-]+)==([^ ]+)", pins.read_text(), re.MULTILINE)
components = [{"purl": f"pkg:pypi/{n}@{v}"} for n, v in found if n != os.environ.get("FAKE_LEFT_OUT")]
output.write_text(json.dumps({"components": components}, indent=1))
"""
PIP_AUDIT = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKE_AUDIT_CALL"
echo "${FAKE_FOUND:-}" | grep . && exit 1
[[ ! ${FAKE_ERROR:-} ]] || { printf 'trying\\n%s\\n' "$FAKE_ERROR" >&2; exit 1; }
"""


@pytest.fixture
def checkout(tmp_path: Path) -> FakeCheckout:
    checkout = FakeCheckout(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"uv": UV, "cyclonedx-py": CYCLONEDX, "pip-audit": PIP_AUDIT}.items():
        write_script(tools / name, text)
    docker = checkout.root / "docker"
    docker.mkdir()
    write_script(docker / "pin_images.sh", '#!/bin/sh\n[ "$1" = --check ] && exit "${FAKE_IMAGES:-0}"\n')
    for name in ("TOOLS", "UV_CALLS", "AUDIT_CALL"):
        checkout.env[f"FAKE_{name}"] = str(tmp_path / name.lower())
    return checkout


def test_what_a_release_is_made_of(checkout: FakeCheckout) -> None:
    done = checkout.run("release_check.sh")
    assert (done.returncode, done.stderr) == (0, "")
    pinned = re.findall("^[a-z0-9-]+==[^ ]+", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE)
    assert done.stdout.splitlines() == [
        "dist/din_dist-cpu.cdx.json: 2 packages",
        "dist/din_dist-gpu.cdx.json: 2 packages",
        f"dist/din_dist-development.cdx.json: {len(pinned)} packages",
        "vulnerabilities: none is known that is not answered",
    ]
    sbom = json.loads((checkout.root / "dist" / "din_dist-development.cdx.json").read_text())
    named = {one["purl"] for one in sbom["components"]}
    assert named == {"pkg:pypi/" + pin.replace("==", "@") for pin in pinned}
    asked = Path(checkout.env["FAKE_AUDIT_CALL"]).read_text().split("\n")
    assert asked[:2] == ["--requirement", f"{checkout.root}/launch/constraints.txt"]
    assert "--strict" in asked, "or it passes over what the service does not know"
    assert "--vulnerability-service" in asked and "pypi" in asked
    assert all(f"{checkout.root}/launch/constraints.txt" in call for call in uv_calls(checkout))


def uv_calls(checkout: FakeCheckout) -> list[str]:
    return Path(checkout.env["FAKE_UV_CALLS"]).read_text().splitlines()


def test_the_tools_are_those_that_are_pinned(checkout: FakeCheckout) -> None:
    checkout.run("release_check.sh")
    pins = f"--require-hashes -c {checkout.root}/launch/constraints.txt"
    assert checkout.pip_calls() == [
        "pip install --require-hashes --no-deps -r /dev/fd/63",
        f"pip install {pins} --only-binary :all: cyclonedx-bom pip-audit uv",
    ]


def test_an_sbom_that_leaves_a_package_out(checkout: FakeCheckout) -> None:
    done = checkout.run("release_check.sh", FAKE_LEFT_OUT="horovod")
    assert done.returncode == 2
    assert done.stderr == (
        "release_check.sh: dist/din_dist-cpu.cdx.json must name every pinned version. "
        "Received: none of horovod@0.28.1. Renew cyclonedx-bom.\n"
    )


def test_a_known_vulnerability(checkout: FakeCheckout) -> None:
    done = checkout.run("release_check.sh", FAKE_FOUND="numpy 2.4.6 CVE-2026-1")
    assert done.returncode == 1
    assert done.stdout.endswith("\nnumpy 2.4.6 CVE-2026-1\n")
    assert done.stderr == (
        "release_check.sh: no pinned version may have a known vulnerability. Received: those above. Renew them "
        "(launch/pin.sh), or answer them in launch/answered_vulnerabilities.txt.\n"
    )


def test_a_vulnerability_that_is_answered(checkout: FakeCheckout) -> None:
    (checkout.root / "launch" / "answered_vulnerabilities.txt").write_text(
        "# CVE-2026-1 is none of them\nCVE-2026-2 launch/setup.sh\nPYSEC-2026-33 launch/test.sh\n"
    )
    assert checkout.run("release_check.sh").returncode == 0
    asked = Path(checkout.env["FAKE_AUDIT_CALL"]).read_text().split("\n")
    ignored = [word for word in asked if word.startswith("--ignore")]
    assert ignored == ["--ignore-vuln=CVE-2026-2", "--ignore-vuln=PYSEC-2026-33"]


def test_an_answer_to_a_vulnerability_is_in_the_repository() -> None:
    for line in (ROOT / "launch" / "answered_vulnerabilities.txt").read_text().splitlines():
        if not line.startswith("#"):
            identifier, answer = line.split()
            assert re.fullmatch(r"(CVE|GHSA|PYSEC)-[0-9A-Za-z-]+", identifier), line
            assert (ROOT / answer).is_file(), line


@pytest.mark.parametrize(("flags", "service", "other"), [([], "pypi", "osv"), (["osv"], "osv", "pypi")])
def test_a_service_that_does_not_answer_is_no_all_clear(
    checkout: FakeCheckout, flags: list[str], service: str, other: str
) -> None:
    flags = [f"--vulnerability-service={flag}" for flag in flags]
    done = checkout.run("release_check.sh", *flags, FAKE_ERROR="ERROR: numpy could not be audited")
    assert done.returncode == 1
    assert "vulnerabilities: none" not in done.stdout
    assert done.stderr == (
        f"release_check.sh: {service} must tell the known vulnerabilities of every pinned version. "
        "Received: ERROR: numpy could not be audited. Connect to it, or ask another: "
        f"--vulnerability-service={other}.\n"
    )


def test_images_that_are_not_pinned_fail_too(checkout: FakeCheckout) -> None:
    done = checkout.run("release_check.sh", FAKE_IMAGES="2")
    assert done.returncode == 1
    assert done.stdout.endswith("vulnerabilities: none is known that is not answered\n"), "all is looked at"


def test_wrong_flags(checkout: FakeCheckout) -> None:
    assert checkout.error("release_check.sh", "--offline") == (
        "release_check.sh: flags: must be --vulnerability-service=pypi or osv, or none. Received: '--offline'."
    )


def test_pins_are_written_under_the_file_s_head(checkout: FakeCheckout, tmp_path: Path) -> None:
    constraints = checkout.root / "launch" / "constraints.txt"
    head = constraints.read_text().partition("\n\n")[0]
    shutil.rmtree(checkout.root / "din_dist")
    done = checkout.run("pin.sh", "--upgrade-package=numpy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert constraints.read_text() == (f"{head}\n\nnumpy==2.4.6 --hash=sha256:1\nhorovod==0.28.1 --hash=sha256:2\n")
    [call] = uv_calls(checkout)
    assert "--generate-hashes" in call and call.endswith(" --exclude-newer 1 week --upgrade-package=numpy")
    assert "--only-binary :all:" in call, "nothing of what is pinned is run"


def test_pins_that_cannot_be_found_change_nothing(checkout: FakeCheckout) -> None:
    before = (checkout.root / "launch" / "constraints.txt").read_bytes()
    done = checkout.run("pin.sh", FAKE_UV_FAILS="1")
    assert (done.returncode, done.stderr) == (
        2,
        "no solution\npin.sh: uv must find versions that fit setup.cfg and its own flags. Received: the answer above. "
        "Correct one of them.\n",
    )
    assert (checkout.root / "launch" / "constraints.txt").read_bytes() == before

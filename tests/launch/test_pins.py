"""launch/constraints.txt: it pins everything with digests, and pip, as the launchers call it, holds to them."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.fake_checkout import FakeCheckout
from tests.support.packages import digest, index, make_sdist, make_wheel
from tests.support.repository import ROOT

# As in launch/setup.sh (test_setup.py has the command lines).
INSTALL = 'install --require-hashes -c "$constraints" --no-build-isolation'


def pins() -> dict[str, str]:
    """Each name with its version."""
    text = (ROOT / "launch" / "constraints.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", text, re.MULTILINE))


def extras() -> dict[str, list[str]]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = {name: value.split("\n") for name, value in config["options.extras_require"].items()}
    return {"": config["options"]["install_requires"].split("\n"), **found}


def test_every_pin_has_digests() -> None:
    text = (ROOT / "launch" / "constraints.txt").read_text()
    entries = re.sub(r" \\\n +", " ", text).splitlines()
    entries = [line for line in entries if line and not line.startswith("#")]
    assert len(entries) > 100
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==[^ ]+( ; [^\\]+?)?( --hash=sha256:[0-9a-f]{64})+", entry), entry
    names = [entry.partition("==")[0] for entry in entries]
    assert names == sorted(set(names))


@pytest.mark.parametrize("extra", extras())
def test_what_setup_cfg_asks_for_is_pinned(extra: str) -> None:
    for requirement in map(Requirement, filter(None, extras()[extra])):
        version = pins()[canonicalize_name(requirement.name)]
        assert version in Requirement(str(requirement).partition("+din.")[0]).specifier, requirement


def needed_by(requirement: Requirement) -> list[Requirement]:
    """What it needs in this environment; of TensorFlow for GPUs, what that for CPUs says of it."""
    name = "tensorflow-cpu" if requirement.name == "tensorflow" else requirement.name
    found = map(Requirement, metadata.requires(name) or [])
    environments = [{"extra": extra} for extra in requirement.extras or {""}]
    return [one for one in found if not one.marker or any(map(one.marker.evaluate, environments))]


def test_what_that_needs_in_turn_is_pinned() -> None:
    asked = [
        Requirement(line)
        for name in ("", "cpu", "gpu", "test", "plots", "index", "tune")
        for line in extras()[name]
        if line
    ]
    seen = set()
    while asked:
        requirement = asked.pop()
        name = canonicalize_name(requirement.name)
        assert pins()[name] in requirement.specifier, requirement
        if str(requirement) in seen or name.startswith("nvidia-"):  # which are not installed without a GPU
            continue
        seen.add(str(requirement))
        asked += needed_by(requirement)
    assert len(seen) > 80


def test_what_runs_here_is_what_is_pinned() -> None:
    for name in ("numpy", "pip", "promise", "pyarrow", "setuptools", "tensorboard", "wheel"):
        assert metadata.version(name) == pins()[name]


def test_no_setuptools_with_known_vulnerabilities_is_pinned() -> None:
    """CVE-2024-6345 and CVE-2025-47273."""
    assert tuple(map(int, pins()["setuptools"].split("."))) >= (78, 1, 1)


def test_the_launchers_name_what_is_pinned() -> None:
    named = [
        name
        for script in (ROOT / "launch").rglob("*.sh")
        for names in re.findall(r"\$\(pinned_version ([^)]+)\)|<\(pinned ([^)]+)\)", script.read_text())
        for name in " ".join(names).split()
    ]
    assert {"cmake", "horovod", "pip", "setuptools", "tensorflow"} <= set(named) <= set(pins())


class Pip:
    """A checkout with pins of its own, and pip as its launchers call it."""

    def __init__(self, checkout: FakeCheckout, folder: Path) -> None:
        self.checkout = checkout
        self.genuine = folder / "genuine"
        self.tampered = folder / "tampered"
        self.planted = folder / "planted"
        self.target = folder / "target"
        self.log = folder / "pip.log"
        self.genuine.mkdir()
        self.tampered.mkdir()

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        script = 'source launch/common.sh; run_pip "$python" "$log" ' + " ".join(words)
        own = {"python": sys.executable, "log": str(self.log), "PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1"}
        others = {name: value for name, value in self.checkout.env.items() if not name.startswith("PIP_")}
        command = ["bash", "-c", f"set -euo pipefail; {script}", "setup.sh"]
        return subprocess.run(
            command, cwd=self.checkout.root, env={**others, **own, **env}, capture_output=True, text=True
        )

    def install(self, *names: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run(INSTALL, f"--target '{self.target}'", *names, **env)


@pytest.fixture
def pip(tmp_path: Path) -> Pip:
    return Pip(FakeCheckout(tmp_path), tmp_path)


def test_what_is_pinned_is_installed(pip: Pip) -> None:
    """Also what only others need, and what must be built."""
    needed = make_sdist(pip.genuine, "needed", "1.0")
    pip.checkout.pin(make_wheel(pip.genuine, "asked-for", "2.0", requires=("needed",)), needed)
    done = pip.install("asked-for", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(pip.genuine))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), pip.log.read_text()
    assert {path.name for path in pip.target.glob("*.py")} == {"asked_for.py", "needed.py"}


def test_what_an_extra_brings_is_checked_too(pip: Pip) -> None:
    """As tensorflow[and-cuda] brings NVIDIA's packages."""
    needed = make_wheel(pip.genuine, "needed", "1.0")
    asked_for = make_wheel(pip.genuine, "asked-for", "2.0", requires=("needed>=1; extra == 'fast'",))
    pip.checkout.pin(asked_for, needed)
    here = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pip.genuine)}
    assert pip.install("'asked-for[fast]'", **here).returncode == 0
    assert {path.name for path in pip.target.glob("*.py")} == {"asked_for.py", "needed.py"}
    make_wheel(pip.genuine, "needed", "1.0", source="other = 1")
    done = pip.install("--ignore-installed", "'asked-for[fast]'", **here)
    assert done.returncode == 2
    assert done.stderr.startswith("setup.sh: needed==1.0 must have a SHA-256 of launch/constraints.txt. Received: ")


def test_constraints_of_the_user_s_own_loosen_nothing(pip: Pip, tmp_path: Path) -> None:
    pip.checkout.pin(make_wheel(pip.genuine, "needed", "1.0"))
    other = make_wheel(pip.tampered, "needed", "1.0", source="other = 1")
    for own in ("needed<2\n", f"needed==1.0 --hash=sha256:{digest(other)}\n"):
        (tmp_path / "own.txt").write_text(own)
        env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pip.tampered), "PIP_CONSTRAINT": str(tmp_path / "own.txt")}
        assert pip.install("needed", **env).returncode == 2
        assert not pip.target.exists()


@pytest.mark.parametrize("made", ["wheel", "sdist"])
@pytest.mark.parametrize("way", ["folder", "index", "index that tells the right digest"])
def test_another_file_than_was_pinned_is_refused_before_it_runs(pip: Pip, made: str, way: str) -> None:
    planted = f"open({str(pip.planted)!r}, 'w')"
    if made == "wheel":
        genuine = make_wheel(pip.genuine, "needed", "1.0")
        other = make_wheel(pip.tampered, "needed", "1.0", source=planted)
    else:
        genuine = make_sdist(pip.genuine, "needed", "1.0")
        other = make_sdist(pip.tampered, "needed", "1.0", first=planted)
    asked_for = make_wheel(pip.tampered, "asked-for", "2.0", requires=("needed",))
    pip.checkout.pin(genuine, asked_for)
    if way == "folder":
        done = pip.install("asked-for", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(pip.tampered))
        place = f"file://{other}"
    else:
        told = {other.name: digest(genuine if way.endswith("digest") else other), asked_for.name: digest(asked_for)}
        with index(pip.tampered, told) as address:
            done = pip.install("asked-for", PIP_INDEX_URL=address)
        place = f"{address.removesuffix('simple')}{other.name}#sha256={told[other.name]}"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"setup.sh: needed==1.0 must have a SHA-256 of launch/constraints.txt. Received: {digest(other)} from {place}. "
        "Have the package index serve the file that was pinned, or set PIP_INDEX_URL to one that does. "
        f"Log: {pip.log}\n"
    )
    assert not pip.planted.exists()
    assert not pip.target.exists()


def test_the_file_that_was_pinned_is_taken_where_another_is_offered_too(pip: Pip) -> None:
    genuine, other = make_wheel(pip.genuine, "needed", "1.0"), make_wheel(pip.tampered, "needed", "1.0", "other = 1")
    pip.checkout.pin(genuine)
    with (
        index(pip.genuine, {genuine.name: digest(genuine)}) as address,
        index(pip.tampered, {other.name: digest(other)}) as elsewhere,
    ):
        done = pip.install("needed", PIP_INDEX_URL=elsewhere, PIP_EXTRA_INDEX_URL=address)
    assert done.returncode == 0, done.stderr
    assert (pip.target / "needed.py").read_text() == ""


def test_what_is_not_pinned_is_not_installed(pip: Pip) -> None:
    pip.checkout.pin(make_wheel(pip.genuine, "asked-for", "2.0", requires=("needed>=1",)))
    make_wheel(pip.genuine, "needed", "1.0")
    done = pip.install("asked-for", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(pip.genuine))
    assert done.returncode == 2
    assert done.stderr == (
        "setup.sh: launch/constraints.txt must pin all that setup.cfg asks for. Received: no pin of needed. "
        f"Run launch/pin.sh. Log: {pip.log}\n"
    )
    assert not pip.target.exists()


def test_another_pip_than_was_pinned_is_refused(pip: Pip, tmp_path: Path) -> None:
    """It is the first that set-up fetches, by the pip that came with Python."""
    checkout = pip.checkout
    checkout.put_wheel()
    make_sdist(pip.tampered, "pip", pins()["pip"], first=f"open({str(pip.planted)!r}, 'w')")
    env = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pip.tampered)}
    error = checkout.error("setup.sh", PYTHON=sys.executable, **env)
    assert error.startswith(f"setup.sh: pip=={pins()['pip']} must have a SHA-256 of launch/constraints.txt. Received: ")
    assert not pip.planted.exists()

"""launch/build_wheels.sh: the wheels hold all that a machine without checkout and compiler needs."""

from __future__ import annotations

import email
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from din_dist import __version__
from tests.support.fake_checkout import FakeCheckout, path_without
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT

# Of the environment that runs the tests, what the installed wheel must not see.
HIDDEN = ("horovod", "din_dist", "__editable__")
WORKER = {  # what horovodrun gives the second of two
    **{"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"},
    **{"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "4000"},
}
SMALL = (
    *("--dataset=synthetic", "--synthetic_num_users=100", "--synthetic_num_items=50", "--metrics_port=-1"),
    *("--embedding_dim=8", "--hidden_units=8", "--attention_hidden_units=8", "--global_batch_size=64"),
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    done = subprocess.run(
        [ROOT / "launch" / "build_wheels.sh", f"--to={folder}"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(map(str, folder.iterdir()))
    return folder


@pytest.fixture(scope="module")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and links to the packages that it needs."""
    folder = tmp_path_factory.mktemp("installed")
    seen = folder / "seen"
    seen.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(HIDDEN):
            (seen / path.name).symlink_to(path)
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    [packages] = venv.glob("lib/python*/site-packages")
    (packages / "seen.pth").write_text(f"{seen}\n")
    [wheel] = wheels.glob("din_dist-*.whl")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)
    return venv


def din_dist(venv: Path, folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `din-dist` in an empty folder, on a machine without compiler."""
    kept = {name: os.environ[name] for name in ("TMPDIR", "LANG") if name in os.environ}
    path = folder / "bin"
    return subprocess.run(
        [venv / "bin" / "din-dist", *words],
        cwd=folder,
        env={
            **kept,
            "HOME": str(folder),
            "PATH": str(path) if path.exists() else path_without(path, "g++", "gcc", "cc", "make", "patch"),
            **env,
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_what_our_wheel_holds(wheels: Path) -> None:
    [path] = wheels.glob("din_dist-*.whl")
    assert path.name == f"din_dist-{__version__}-py3-none-linux_{os.uname().machine}.whl"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        about = f"din_dist-{__version__}.dist-info"
        metadata = email.message_from_bytes(wheel.read(f"{about}/METADATA"))
        assert wheel.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"Root-Is-Purelib: false\n" in wheel.read(f"{about}/WHEEL")
        assert wheel.read("din_dist/kernels/kernels.so").startswith(b"\x7fELF")
        assert wheel.getinfo("din_dist/launch/discover_hosts.sh").external_attr >> 16 & 0o111, "it is run"
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "din_dist").rglob("*.py")}
    flagfiles = {f"din_dist/{path.relative_to(ROOT)}" for path in (ROOT / "launch" / "flags").iterdir()}
    assert sources | flagfiles | {"din_dist/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "launch/")) or "__pycache__" in name]
    assert metadata["License"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert not [name for name in metadata if name in ("Home-page", "Project-URL")]
    required = metadata.get_all("Requires-Dist")
    assert {
        'tensorflow-cpu==2.21.0; extra == "cpu"',
        'tensorflow[and-cuda]==2.21.0; extra == "gpu"',
    } <= set(required)
    assert all("extra ==" in line for line in required if re.match("horovod|tensorflow(-cpu)?[=[]", line))


def test_what_the_extra_asks_for_is_what_is_built(wheels: Path) -> None:
    text = (ROOT / "setup.cfg").read_text()
    [wheel] = wheels.glob("horovod-*.whl")
    assert f"\ndistributed = horovod=={wheel.name.split('-')[1]}\n" in text
    gpu = re.search(r"\[gpu\]=(\d+)", (ROOT / "launch" / "horovod" / "build_horovod.sh").read_text())
    assert gpu and f"\ndistributed-gpu = horovod==0.28.1+din.{gpu[1]}\n" in text
    told = set(re.findall(r"`(0\.28\.1\+din\.\d+)`", (ROOT / "launch" / "README.md").read_text()))
    assert told == {wheel.name.split("-")[1], f"0.28.1+din.{gpu[1]}"}


def test_it_is_built_against_the_tensorflow_that_it_asks_for() -> None:
    [built] = re.findall(r"tensorflow-cpu==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert f"\ncpu = tensorflow-cpu=={built}\n" in (ROOT / "setup.cfg").read_text()


def test_one_process_trains_without_horovod(installed: Path, tmp_path: Path) -> None:
    assert din_dist(installed, tmp_path, "--version").stdout == f"din_dist {__version__}\n"
    done = din_dist(installed, tmp_path, "train", *SMALL, "--max_steps=5")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["steps"], summary["versions"]["horovod"]) == (5, "none")
    assert (tmp_path / ".cache" / "din_dist" / "synthetic").is_dir(), "it prepared the data"


def test_several_processes_need_horovod(installed: Path, tmp_path: Path) -> None:
    rule = "Horovod: must be installed where there are several workers. Received: none. Install din_dist[distributed] "
    launched = din_dist(installed, tmp_path, "launch", "--num_workers=2", *SMALL)
    worker = din_dist(installed, tmp_path, "train", *SMALL, **WORKER)
    for done in (launched, worker):
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        [line] = done.stderr.splitlines()
        assert rule in line


@pytest.mark.thorough  # the messages have tests in tests/training
def test_kernels_that_cannot_be_used(installed: Path, tmp_path: Path) -> None:
    [kernels] = installed.glob("lib/python*/site-packages/din_dist/kernels/kernels.so")
    aside = kernels.rename(tmp_path / "aside.so")
    try:
        missing = din_dist(installed, tmp_path, "train", *SMALL, "--max_steps=5")
        kernels.write_bytes(b"\x7fELF of another machine")
        broken = din_dist(installed, tmp_path, "train", *SMALL, "--max_steps=5")
        without = din_dist(installed, tmp_path, "train", *SMALL, "--max_steps=5", "--nonative")
    finally:
        aside.replace(kernels)
    assert missing.returncode == broken.returncode == 2
    assert "or install a wheel for this platform" in missing.stderr.splitlines()[-1]
    assert "--native: takes kernels that this machine can load. Received: " in broken.stderr.splitlines()[-1]
    assert without.returncode == 0, without.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> FakeCheckout:
    return FakeCheckout(tmp_path)


def put_wheels(checkout: FakeCheckout, folder: Path) -> None:
    """Puts wheels of the checkout into a folder, as launch/build_wheels.sh would; its cache stays empty."""
    folder.mkdir(exist_ok=True)
    checkout.put_kernels()
    [compiled] = checkout.cache.glob("kernels/*")
    with zipfile.ZipFile(folder / "din_dist-0.1.0-py3-none-linux_x86_64.whl", "w") as wheel:
        wheel.writestr("din_dist/kernels/kernels.key", f"{compiled.name}\n")
        wheel.writestr("din_dist/kernels/kernels.so", "from the wheel\n")
    (compiled / "kernels.so").unlink()
    compiled.rmdir()
    revision = re.search(r"\+(\d+)-", checkout.key())
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert revision
    name = f"horovod-0.28.1+din.{revision[1]}-{tag}-{tag}-linux_{os.uname().machine}.whl"
    (folder / name).write_text("built elsewhere\n")


def test_set_up_takes_wheels_in_place_of_a_compiler(checkout: FakeCheckout, tmp_path: Path) -> None:
    put_wheels(checkout, tmp_path / "wheels")
    path = path_without(tmp_path / "bin", "g++", "make", "patch")
    done = checkout.run("setup.sh", f"--wheels={tmp_path / 'wheels'}", PATH=path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (checkout.venv / "lib" / "din_dist" / "kernels.so").read_text() == "from the wheel\n"
    digest = hashlib.sha256(b"built elsewhere\n").hexdigest()
    [horovod] = [line for line in checkout.asked() if "horovod" in line]
    assert horovod.endswith(f".whl --hash=sha256:{digest}")
    calls = checkout.pip_calls()
    assert checkout.run("setup.sh", PATH=path).returncode == 0, "the launchers find it done"
    assert checkout.pip_calls() == calls


def test_wheels_of_another_checkout_are_refused(checkout: FakeCheckout, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    put_wheels(checkout, wheels)
    source = checkout.root / "din_dist" / "kernels" / "attention.cc"
    source.write_text(f"{source.read_text()}// more\n")
    error = checkout.error("setup.sh", f"--wheels={wheels}")
    assert error.startswith(
        f"build_kernels.sh: {wheels} must hold a wheel of din_dist with the kernels of this checkout, "
    )
    assert error.endswith("Received: none. Run launch/build_wheels.sh anew, or set up without --wheels.")
    [horovod] = checkout.cache.glob("wheels/*/horovod-*.whl")
    horovod.unlink()
    [given] = wheels.glob("horovod-*.whl")
    given.unlink()
    assert checkout.error("setup.sh", f"--wheels={wheels}") == (
        f"build_horovod.sh: {wheels} must hold the Horovod wheel of this checkout and Python. "
        f"Received: no {given.name}. Run launch/build_wheels.sh anew, or set up without --wheels."
    )
    assert not checkout.venv.exists()


def test_flags(checkout: FakeCheckout) -> None:
    assert checkout.error("build_wheels.sh", "--cpu") == (
        "build_wheels.sh: unknown flag --cpu. Usage: launch/build_wheels.sh [--gpu] [--to=DIR]"
    )

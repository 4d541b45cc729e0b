"""launch/horovod/build_horovod.sh: settings, errors, cache. A real build made the Horovod that runs these tests."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.support.fake_checkout import HOROVOD, FakeCheckout, finished, path_without, pinned
from tests.support.packages import make_sdist, make_wheel
from tests.support.repository import ROOT

# A Horovod of two files, and a series that changes one of them twice.
INIT = f"__version__ = '{HOROVOD}'\n"
OPERATIONS = "".join(f"line {number}\n" for number in range(1, 10))
SERIES = {
    "01-one.patch": """Changes one line.

--- a/horovod/operations.cc
+++ b/horovod/operations.cc
@@ -2,7 +2,7 @@
 line 2
 line 3
 line 4
-line 5
+line five
 line 6
 line 7
 line 8
""",
    "02-other.patch": """Changes another, beside it.

--- a/horovod/operations.cc
+++ b/horovod/operations.cc
@@ -3,7 +3,7 @@
 line 3
 line 4
 line five
-line 6
+line six
 line 7
 line 8
 line 9
""",
}


@pytest.fixture
def checkout(tmp_path: Path) -> FakeCheckout:
    checkout = FakeCheckout(tmp_path)
    checkout.env["FAKE_BUILD_ENV"] = str(tmp_path / "build_env")
    checkout.env["FAKE_SOURCES"] = str(tmp_path / "sources")
    series = checkout.root / "launch" / "horovod"
    for patch in series.glob("*.patch"):
        patch.unlink()
    shutil.rmtree(series / "files")
    (series / "files" / "horovod" / "ours").mkdir(parents=True)
    (series / "files" / "horovod" / "ours" / "new.h").write_text("ours\n")
    for name, text in SERIES.items():
        (series / name).write_text(text)
    serve_sdist(checkout, tmp_path)
    return checkout


def serve_sdist(checkout: FakeCheckout, folder: Path, operations: str = OPERATIONS, init: str = INIT) -> None:
    """Has pip download a Horovod with these files, and the script trust it."""
    sdist = folder / "sdist.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for path, text in (
            ("CMakeLists.txt", "project(horovod CXX)\n"),
            ("horovod/__init__.py", init),
            ("horovod/operations.cc", operations),
            ("horovod/runner/http/http_server.py", ""),
        ):
            entry = tarfile.TarInfo(f"horovod-{HOROVOD}/{path}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    checkout.env["FAKE_SDIST"] = str(sdist)


def wheels(checkout: FakeCheckout) -> list[Path]:
    return [path for path in checkout.cache.rglob("*") if ".whl" in path.name]


def test_builds_once_and_prints_the_wheel_last(checkout: FakeCheckout) -> None:
    done = checkout.run("horovod/build_horovod.sh")
    assert done.returncode == 0, done.stderr
    wheel = checkout.cache / "wheels" / checkout.key() / f"horovod-{HOROVOD}-cp311-cp311-linux_x86_64.whl"
    assert done.stdout == f"{wheel}\n"
    assert wheel.read_text() == "whole\n"
    calls = checkout.pip_calls()
    again = checkout.run("horovod/build_horovod.sh")
    assert (again.stdout, again.stderr) == (done.stdout, "")
    assert checkout.pip_calls() == calls


def test_settings_of_the_build(checkout: FakeCheckout, tmp_path: Path) -> None:
    checkout.run("horovod/build_horovod.sh")
    settings = (tmp_path / "build_env").read_text().splitlines()
    assert "HOROVOD_WITHOUT_MPI=1" in settings
    assert "CXXFLAGS= -include cstdint -include stdexcept -include string" in settings, "or g++ 13 refuses Horovod"
    assert set(checkout.run("horovod/build_horovod.sh", "--print_env").stdout.splitlines()) < set(settings)
    assert any(line.startswith("HOROVOD_CMAKE=") for line in settings), (
        "not the system's cmake, nor one fetched by setup.py"
    )


def test_key_tells_cpu_from_gpu(checkout: FakeCheckout) -> None:
    assert checkout.put_wheel("cpu") != checkout.put_wheel("gpu")
    for flags, device in ([], "cpu"), (["--gpu"], "gpu"):
        wheel = Path(checkout.run("horovod/build_horovod.sh", *flags).stdout.rstrip("\n"))
        assert wheel.parent.name == checkout.key(device)


def test_key_follows_tensorflow(checkout: FakeCheckout) -> None:
    checkout.put_wheel()
    constraints = checkout.root / "launch" / "constraints.txt"
    constraints.write_text(constraints.read_text().replace("\ntensorflow==", "\ntensorflow==9."))
    checkout.run("horovod/build_horovod.sh", "--check")
    assert "must have the TensorFlow" in checkout.error("horovod/build_horovod.sh"), (
        "the cached wheel is for another TensorFlow"
    )


def test_default_cache_is_in_the_home_folder(checkout: FakeCheckout, tmp_path: Path) -> None:
    del checkout.env["DIN_DIST_CACHE"]
    checkout.env.pop("XDG_CACHE_HOME", None)
    done = checkout.run("horovod/build_horovod.sh", HOME=str(tmp_path / "home"))
    assert done.stdout.startswith(f"{tmp_path}/home/.cache/din_dist/wheels/")
    done = checkout.run("horovod/build_horovod.sh", XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert done.stdout.startswith(f"{tmp_path}/xdg/din_dist/wheels/")


def test_cpu_build_has_gloo_and_no_nccl(checkout: FakeCheckout, tmp_path: Path) -> None:
    done = checkout.run(
        "horovod/build_horovod.sh", "--print_env", PATH=path_without(tmp_path / "bin", "g++", "make", "nvcc")
    )
    settings = done.stdout.splitlines()
    assert {"HOROVOD_WITH_TENSORFLOW=1", "HOROVOD_WITH_GLOO=1", "HOROVOD_WITHOUT_MPI=1"} <= set(settings)
    assert not any("NCCL" in line or "GPU" in line or "CUDA" in line for line in settings)
    assert f"MAKEFLAGS=-j{len(os.sched_getaffinity(0))}" in settings
    assert wheels(checkout) == []


def fake_cuda_and_nccl(folder: Path, nccl_in: str = "nccl") -> tuple[Path, Path]:
    cuda, nccl = folder / "cuda", folder / nccl_in
    for file in (cuda / "bin" / "nvcc", nccl / "include" / "nccl.h", nccl / "lib" / "libnccl.so.2"):
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    return cuda, nccl


def test_gpu_build_has_nccl(checkout: FakeCheckout, tmp_path: Path) -> None:
    cuda, nccl = fake_cuda_and_nccl(tmp_path)
    homes = {"HOROVOD_CUDA_HOME": str(cuda), "HOROVOD_NCCL_HOME": str(nccl)}
    settings = set(checkout.run("horovod/build_horovod.sh", "--gpu", "--print_env", **homes).stdout.splitlines())
    expected = {
        "HOROVOD_GPU=CUDA",
        "HOROVOD_GPU_OPERATIONS=NCCL",
        "HOROVOD_WITH_GLOO=1",
        f"HOROVOD_CUDA_HOME={cuda}",
        f"HOROVOD_NCCL_HOME={nccl}",
    }
    assert expected <= settings
    assert checkout.run("horovod/build_horovod.sh", "--gpu", **homes).returncode == 0
    assert expected <= set((tmp_path / "build_env").read_text().splitlines())


def test_the_nccl_of_pip_is_found_again_at_run_time(checkout: FakeCheckout, tmp_path: Path) -> None:
    cuda, nccl = fake_cuda_and_nccl(tmp_path, "site-packages/nvidia/nccl")
    assert checkout.run("horovod/build_horovod.sh", "--gpu", HOROVOD_CUDA_HOME=str(cuda)).returncode == 0
    settings = (tmp_path / "build_env").read_text().splitlines()
    assert f"HOROVOD_NCCL_HOME={nccl}" in settings
    assert f"libnccl.so -> {nccl}/lib/libnccl.so.2" in settings
    assert "set(CMAKE_SKIP_RPATH ON)" in settings, "or the folder of this build is searched first"
    [flags] = [line for line in settings if line.startswith("LDFLAGS=")]
    assert flags.endswith(" -Wl,-rpath,$ORIGIN/../../nvidia/nccl/lib")


def test_cuda_is_found_by_its_compiler(checkout: FakeCheckout, tmp_path: Path) -> None:
    cuda, nccl = fake_cuda_and_nccl(tmp_path)
    path = f"{cuda}/bin:{os.environ['PATH']}"
    done = checkout.run(
        "horovod/build_horovod.sh", "--gpu", "--print_env", PATH=path, CUDA_HOME="/no", HOROVOD_NCCL_HOME=str(nccl)
    )
    assert f"HOROVOD_CUDA_HOME={cuda}" in done.stdout.splitlines()


def test_missing_nccl(checkout: FakeCheckout, tmp_path: Path) -> None:
    cuda, _ = fake_cuda_and_nccl(tmp_path)
    assert checkout.error(
        "horovod/build_horovod.sh", "--gpu", HOROVOD_CUDA_HOME=str(cuda), HOROVOD_NCCL_HOME="/no/nccl"
    ) == (
        "build_horovod.sh: NCCL is not in /no/nccl: no include/nccl.h there. "
        "Run launch/setup.sh --gpu, or set HOROVOD_NCCL_HOME to a folder with include/ and lib/."
    )


def test_another_tensorflow(checkout: FakeCheckout) -> None:
    checkout.write_python(tensorflow="2.15.1")
    assert "Found: 2.15.1. Run launch/setup.sh." in checkout.error("horovod/build_horovod.sh")


def test_no_python(checkout: FakeCheckout) -> None:
    del checkout.env["PYTHON"]
    assert checkout.error("horovod/build_horovod.sh") == (
        f"build_horovod.sh: there is no Python at {checkout.venv}/bin/python. Run launch/setup.sh first, or set PYTHON."
    )


def test_an_altered_source_is_refused_before_it_runs(checkout: FakeCheckout, tmp_path: Path) -> None:
    """With the real pip, and stand-ins for the tools, which hide none of those that pip itself needs."""
    index = tmp_path / "index"
    index.mkdir()
    tools = ("cmake", "setuptools", "wheel", "cloudpickle", "packaging", "psutil", "pyyaml")
    checkout.pin(*(make_wheel(index, name, pinned(name), module=f"our_{name}") for name in tools))
    planted = tmp_path / "planted"
    make_sdist(index, "horovod", HOROVOD, first=f"open({str(planted)!r}, 'w')")
    env = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    error = checkout.error("horovod/build_horovod.sh", PYTHON=sys.executable, **env)
    assert error.startswith(f"build_horovod.sh: horovod=={HOROVOD} must have a SHA-256 of launch/constraints.txt. ")
    assert not planted.exists()
    assert wheels(checkout) == []


def test_what_is_built_is_horovod_with_our_changes(checkout: FakeCheckout, tmp_path: Path) -> None:
    assert checkout.run("horovod/build_horovod.sh").returncode == 0
    built = tmp_path / "sources" / "horovod"
    assert (built / "operations.cc").read_text() == OPERATIONS.replace("5", "five").replace("6", "six")
    assert (built / "ours" / "new.h").read_text() == "ours\n"
    assert re.fullmatch(r"__version__ = '0\.28\.1\+din\.[0-9]+'\n", (built / "__init__.py").read_text())
    assert not list(built.glob("*.orig"))


@pytest.mark.parametrize("other", ["line 5", "line 2", "line 8"])
def test_another_horovod_than_a_change_is_made_for(checkout: FakeCheckout, tmp_path: Path, other: str) -> None:
    """Also where only a neighbouring line differs: what was right beside the one may be wrong beside the other."""
    serve_sdist(checkout, tmp_path, OPERATIONS.replace(other, "another line"))
    assert checkout.error("horovod/build_horovod.sh") == (
        "build_horovod.sh: launch/horovod/01-one.patch must apply to Horovod 0.28.1 as it is. Adapt it. "
        f"Log: {checkout.cache}/wheels/{checkout.key()}/build.log"
    )
    assert wheels(checkout) == []


def test_a_change_that_is_there_already(checkout: FakeCheckout, tmp_path: Path) -> None:
    serve_sdist(checkout, tmp_path, OPERATIONS.replace("line 5", "line five"))
    assert "launch/horovod/01-one.patch must apply" in checkout.error("horovod/build_horovod.sh")


@pytest.mark.parametrize("patch", sorted((ROOT / "launch" / "horovod").glob("*.patch")), ids=lambda patch: patch.name)
def test_each_change_says_why(patch: Path) -> None:
    """What it does on the first line, and why below."""
    head = patch.read_text().partition("\n--- a/")[0].splitlines()
    assert re.fullmatch(r"[A-Z].{1,125}\.", head[0])
    assert head[1] == ""
    assert any(head[2:])
    assert re.match(r"[0-9]{2}-", patch.name), "the order in which they are made"


def test_a_horovod_of_another_version_than_it_says(checkout: FakeCheckout, tmp_path: Path) -> None:
    serve_sdist(checkout, tmp_path, init="__version__ = '0.1'\n")
    assert checkout.error("horovod/build_horovod.sh") == (
        f"build_horovod.sh: horovod/__init__.py must give the version, {HOROVOD}. Adapt "
        "launch/horovod/build_horovod.sh to this Horovod."
    )


def test_a_failed_build_names_the_compilers_error(checkout: FakeCheckout) -> None:
    error = checkout.error(
        "horovod/build_horovod.sh", FAKE_BUILD_ERROR="operations.cc:7: fatal error: farmhash.h: No such file"
    )
    assert error == (
        "build_horovod.sh: Horovod did not build: operations.cc:7: fatal error: farmhash.h: No such file. "
        f"Log: {checkout.cache}/wheels/{checkout.key()}/build.log"
    )
    assert wheels(checkout) == []


def test_a_build_that_was_cut_off_leaves_no_wheel(checkout: FakeCheckout, tmp_path: Path) -> None:
    process = checkout.start("horovod/build_horovod.sh", FAKE_PIP_SECONDS="2")
    while not (tmp_path / "build_env").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.3)  # half a wheel is written now
    os.killpg(process.pid, signal.SIGKILL)
    finished(process)
    assert wheels(checkout) == []
    assert checkout.run("horovod/build_horovod.sh").returncode == 0


def test_two_builds_at_once_make_one(checkout: FakeCheckout) -> None:
    builds = [
        finished(process)
        for process in [checkout.start("horovod/build_horovod.sh", FAKE_PIP_SECONDS="0.5") for _ in range(2)]
    ]
    assert [build.returncode for build in builds] == [0, 0]
    assert builds[0].stdout == builds[1].stdout != ""
    assert sum(call.startswith("pip wheel") for call in checkout.pip_calls()) == 1

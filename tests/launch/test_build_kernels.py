"""launch/build_kernels.sh: what it makes, when it makes nothing, and its error lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from din_dist import kernels
from tests.support.fake_checkout import FakeCheckout, path_without, write_script


@pytest.fixture
def checkout(tmp_path: Path) -> FakeCheckout:
    found = FakeCheckout(tmp_path)
    (found.venv / "bin").mkdir(parents=True)
    python = found.venv / "bin" / "python"
    python.symlink_to(found.env["PYTHON"])
    found.env["PYTHON"] = str(python)
    return found


@pytest.mark.thorough  # each set-up does
def test_compiles_once_into_the_environment(checkout: FakeCheckout, tmp_path: Path) -> None:
    done = checkout.run("build_kernels.sh")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    made = checkout.venv / "lib" / "din_dist" / "kernels.so"
    # In a process of its own: operations are registered once in each.
    program = f"import tensorflow as tf; print(callable(tf.load_op_library({str(made)!r}).din_dist_first))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert loaded.stdout == "True\n", loaded.stderr
    [cached] = checkout.cache.glob("kernels/*")
    assert [path.name for path in cached.iterdir()] == ["kernels.so"]
    assert cached.stat().st_mode & 0o777 == 0o755, "for others too"
    made.unlink()
    assert checkout.run("build_kernels.sh", PATH=path_without(tmp_path / "bin", "g++")).returncode == 0
    assert made.read_bytes() == (cached / "kernels.so").read_bytes()


def test_kernels_of_another_tensorflow_are_refused(tmp_path: Path) -> None:
    """As where an environment was given another one since: variables are reached by what only that version has."""
    other = tmp_path / "kernels.so"
    version = tf.__version__.encode()
    compiled = kernels.PATH.read_bytes()
    assert compiled.count(version) > 0
    other.write_bytes(compiled.replace(version, b"1" + version[1:]))
    program = f"""
import tensorflow as tf
ops, table = tf.load_op_library({str(other)!r}), tf.Variable([[1.0]])
ops.din_dist_update_rows(0.1, tf.zeros([0]), [[[1.0]]], [[0]], [table.handle], B=0, rule="Sgd", num_threads=1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (
        f"The kernels must be compiled for this TensorFlow, {tf.__version__}. Received: for 1{tf.__version__[1:]}. "
        "Run launch/build_kernels.sh."
    ) in done.stderr


@pytest.mark.parametrize("name", ["attention.cc", "threads.h"])
def test_changed_sources_are_compiled_anew(checkout: FakeCheckout, tmp_path: Path, name: str) -> None:
    checkout.put_kernels()
    path = path_without(tmp_path / "bin", "g++")
    assert checkout.run("build_kernels.sh", PATH=path).returncode == 0
    source = checkout.root / "din_dist" / "kernels" / name
    source.write_text(source.read_text() + "// more\n")
    assert checkout.error("build_kernels.sh", "--check", PATH=path) == (
        "build_kernels.sh: compiling the kernels takes g++, which is not on PATH. "
        "Install it (Debian, Ubuntu: apt-get install g++)."
    )


def test_for_another_tensorflow_they_are_compiled_anew(checkout: FakeCheckout, tmp_path: Path) -> None:
    checkout.put_kernels()
    path = path_without(tmp_path / "bin", "g++")
    assert checkout.run("build_kernels.sh", "--check", PATH=path).returncode == 0
    other = tmp_path / "python"
    write_script(other, f'#!/usr/bin/env bash\n[[ $2 == *metadata* ]] && echo 2.99.0 || exec {sys.executable} "$@"\n')
    assert "takes g++" in checkout.error("build_kernels.sh", "--check", PATH=path, PYTHON=str(other))


def test_what_the_compiler_refuses(checkout: FakeCheckout) -> None:
    source = checkout.root / "din_dist" / "kernels" / "attention.cc"
    source.write_text(f"#error not so\n{source.read_text()}")
    error = checkout.error("build_kernels.sh")
    assert error.startswith("build_kernels.sh: g++ failed: ")
    assert error.endswith("error: #error not so")
    assert not list(checkout.cache.glob("kernels/*")), "nothing half made is left"


def test_flags(checkout: FakeCheckout) -> None:
    assert checkout.error("build_kernels.sh", "--force") == (
        "build_kernels.sh: unknown flag --force. Usage: launch/build_kernels.sh [--check | --to=FOLDER | --take=DIR]"
    )

"""Makes a checkout with the real launch scripts and a Python whose pip only notes down what it is asked.

checkout = FakeCheckout(tmp_path)
assert checkout.run("setup.sh").returncode == 0
assert checkout.pip_calls()
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.packages import digest
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT

HOROVOD = "0.28.1"

# `-m venv DIR` copies this file into DIR. What is neither venv nor pip nor answered here goes to the real Python.
PYTHON = """#!/usr/bin/env bash
set -euo pipefail
real={real}
case "$1 ${{2-}}" in
  "-c "*ensurepip*) exit {ensurepip} ;;
  "-c "*'"%d.%d" %'*) echo "{version}" ;;
  "-c "*purelib*) echo {folder}/site-packages ;;
  "- ") cat >/dev/null; echo "{tensorflow}" ;;
  "-m venv")
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    [[ ! ${{FAKE_TOOLS-}} ]] || cp "$FAKE_TOOLS"/* "$3/bin"
    echo "venv $3" >>{log}
    ;;
  "-m pip")
    shift 2
    while [[ ! $1 =~ ^(show|install|uninstall|download|wheel)$ ]]; do shift; done
    [[ $1 == show ]] || echo "pip $*" >>{log}
    PATH=$PATH:{folder} exec "fake_pip_$1" "${{@:2}}"
    ;;
  *) exec "$real" "$@" ;;
esac
"""
PIP = {
    # pip show NAME: whether it is installed
    "show": '[[ " ${FAKE_INSTALLED:-} " == *" $1 "* ]]',
    # pip install ... -r FILE: the file is kept
    "install": """
[[ ${*: -2:1} != -r ]] || cat "${@: -1}" >"$FAKE_REQUIREMENTS"
sleep ${FAKE_PIP_SECONDS:-0}
""",
    "uninstall": "true",
    # pip download --dest DIR ...
    "download": f'cp "$FAKE_SDIST" "$2/horovod-{HOROVOD}.tar.gz"',
    # pip wheel ... --wheel-dir DIR SOURCE
    "wheel": """
while [[ $1 != --wheel-dir ]]; do shift; done
env | grep -E '^(HOROVOD|MAKEFLAGS|CXXFLAGS|LDFLAGS)' >"$FAKE_BUILD_ENV"
[[ ! ${HOROVOD_NCCL_LIB:-} ]] || echo "libnccl.so -> $(readlink "$HOROVOD_NCCL_LIB/libnccl.so")" >>"$FAKE_BUILD_ENV"
grep -x 'set(CMAKE_SKIP_RPATH ON)' "$3/CMakeLists.txt" >>"$FAKE_BUILD_ENV" || true
[[ ! ${FAKE_SOURCES:-} ]] || cp -R "$3" "$FAKE_SOURCES"
echo half >"$2/horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
sleep ${FAKE_PIP_SECONDS:-0}
if [[ ${FAKE_BUILD_ERROR:-} ]]; then echo "$FAKE_BUILD_ERROR"; exit 1; fi
echo whole >"$2/horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
""",
}


class FakeCheckout:
    """A checkout in `folder`, with an environment and caches of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"  # paths with a space must do
        self.venv = self.root / ".venv"
        self.cache = folder / "cache"
        self.log = folder / "log"
        self.log.touch()
        self.env = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("DIN_DIST_", "HOROVOD_", "CUDA"))
            },
            "DIN_DIST_CACHE": str(self.cache),
            "FAKE_REQUIREMENTS": str(folder / "requirements"),
            "PYTHON": str(folder / "python"),
        }
        for name in ("launch", "din_dist/kernels"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("din_dist/__init__.py", "din_dist/bounded_server.py", "LICENSE", "setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.write_python()
        for name, text in PIP.items():
            write_script(folder / f"fake_pip_{name}", f"#!/usr/bin/env bash\nset -euo pipefail\n{text}\n")

    def write_python(self, version: str = "3.11", tensorflow: str = "", ensurepip: int = 0) -> None:
        write_script(
            Path(self.env["PYTHON"]),
            PYTHON.format(
                real=sys.executable,
                folder=self.log.parent,
                log=self.log,
                version=version,
                ensurepip=ensurepip,
                tensorflow=tensorflow or pinned("tensorflow"),
            ),
        )

    def key(self, device: str = "cpu") -> str:
        """Returns the name under which the cache keeps the wheel of Horovod."""
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        revisions = re.search(
            r"revision=\(\[cpu\]=(\d+) \[gpu\]=(\d+)\)", (ROOT / "launch" / "horovod" / "build_horovod.sh").read_text()
        )
        assert revisions
        revision = revisions[1 if device == "cpu" else 2]
        return f"horovod{HOROVOD}+{revision}-tensorflow{pinned('tensorflow')}-{tag}-{os.uname().machine}-{device}"

    def put_wheel(self, device: str = "cpu") -> Path:
        """Puts Horovod and the kernels into the cache, as if they had been built before."""
        wheel = self.cache / "wheels" / self.key(device) / f"horovod-{HOROVOD}-cp311-cp311-linux_x86_64.whl"
        wheel.parent.mkdir(parents=True)
        wheel.write_text("whole\n")
        self.put_kernels()
        return wheel

    def put_kernels(self) -> None:
        """Puts the kernels into the cache, as if these sources had been compiled before."""
        folder = Path("din_dist", "kernels")
        sources = [path.name for ending in ("cc", "h") for path in sorted((self.root / folder).glob(f"*.{ending}"))]
        names = [*(str(folder / name) for name in sources), "launch/build_kernels.sh"]
        sums = subprocess.run(["sha256sum", *names], cwd=self.root, capture_output=True, check=True).stdout
        version = f"{pinned('tensorflow')}\n".encode()
        key = f"{hashlib.sha256(sums + version).hexdigest()[:16]}-{os.uname().machine}"
        compiled = self.cache / "kernels" / key / "kernels.so"
        compiled.parent.mkdir(parents=True, exist_ok=True)
        compiled.write_text("compiled\n")

    def pin(self, *files: Path) -> None:
        """Pins each package to its file; other pins stay."""
        constraints = self.root / "launch" / "constraints.txt"
        kept = constraints.read_text()
        for path in files:
            name = path.name.split("-")[0].replace("_", "-")
            version = path.name.split("-")[1].removesuffix(".tar.gz")
            kept = re.sub(rf"^{name}==(.*\\\n)*.*\n", "", kept, flags=re.MULTILINE)
            kept += f"{name}=={version} --hash=sha256:{digest(path)}\n"
        constraints.write_text(kept)

    def start(self, name: str, *flags: str, **env: str) -> subprocess.Popen[str]:
        """Starts launch/`name`, with `env` beside the checkout's own variables."""
        return subprocess.Popen(
            [self.root / "launch" / name, *flags],
            cwd="/",
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs launch/`name` to its end; see `start`."""
        return finished(self.start(name, *flags, **env))

    def error(self, name: str, *flags: str, **env: str) -> str:
        """Runs launch/`name`, which must end with exit code 2; returns its error, the last line of stderr."""
        done = self.run(name, *flags, **env)
        assert (done.returncode, done.stdout) == (2, ""), done
        *progress, error = done.stderr.splitlines()
        assert all(line.startswith(("Setting up ", "Building ")) for line in progress), done.stderr
        return error

    def asked(self) -> list[str]:
        """Returns the lines of the last file of requirements that pip was given."""
        return Path(self.env["FAKE_REQUIREMENTS"]).read_text().split("\n")

    def pip_calls(self) -> list[str]:
        """Returns the commands that pip was given, in order."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("pip ")]


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits for the end of a process; returns its exit code and output."""
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def pinned(name: str) -> str:
    """Returns the version of a package in launch/constraints.txt."""
    found = re.search(rf"^{name}==(\S+)", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"{name} is not in constraints.txt"
    return found[1]


def path_without(folder: Path, *commands: str) -> str:
    """Returns a PATH with all commands of this machine except these."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(":")):
        for file in Path(place).iterdir() if Path(place).is_dir() else ():
            if file.name not in commands:
                (folder / file.name).unlink(missing_ok=True)
                (folder / file.name).symlink_to(file)
    return str(folder)


def write_commands(folder: Path, **sources: str) -> None:
    """Writes a package for PYTHONPATH in which some modules of `din_dist.cli` have other sources; the rest is real."""
    cli = folder / "din_dist" / "cli"
    cli.mkdir(parents=True)
    for package in (cli, cli.parent):
        real = ROOT / package.relative_to(folder)
        (package / "__init__.py").write_text(f"{(real / '__init__.py').read_text()}\n__path__.append({str(real)!r})\n")
    for name, source in sources.items():
        (cli / f"{name}.py").write_text(source)


def write_script(path: Path, text: str) -> None:
    """Writes an executable file."""
    path.write_text(text)
    path.chmod(0o755)

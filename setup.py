"""Adds to setup.cfg what a wheel holds besides the package: the compiled kernels and the flagfiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithKernels(build_py):
    """Copies the package, and beside it what launch/ builds and holds. An editable checkout has all that already."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, "din_dist").absolute()
        subprocess.run(
            [ROOT / "launch" / "build_kernels.sh", f"--to={package / 'kernels'}"],
            env={**os.environ, "PYTHON": sys.executable},
            check=True,
        )
        shutil.copytree(ROOT / "launch" / "flags", package / "launch" / "flags", dirs_exist_ok=True)
        shutil.copy(ROOT / "launch" / "discover_hosts.sh", package / "launch")


class BinaryDistribution(Distribution):
    """Tells setuptools that files are compiled, although it does not compile them itself."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """Names the platform alone: the kernels know nothing of Python, so every version of it may take them."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    distclass=BinaryDistribution,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
)

"""Skips what this processor cannot run, in continuous integration too: nothing can be installed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from din_dist import kernels


def need_instructions(flag: str) -> None:
    """Skips a test where the processor lacks instructions, named as in /proc/cpuinfo."""
    if flag not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        pytest.skip(f"this processor has no {flag}: run the tests on one that has")


def need_bfloat16() -> None:
    """Skips a test where the kernels cannot multiply bfloat16."""
    if not kernels.multiplies_bfloat16():
        pytest.skip("this processor has no AVX512_BF16: AMD Zen 4, Intel Sapphire Rapids and newer ones have it")

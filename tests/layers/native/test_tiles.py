"""AMX's tiles, which `tests/support/tiles.cc` runs on processors that have none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.processor import need_bfloat16
from tests.support.programs import program

ROOT = Path(__file__).parents[3]
PRODUCTS = "tests/layers/test_products_in_bfloat16.py"
GRADIENTS = """
import sys
import numpy as np
from tests.support import native_layers as layers
from din_dist.execution import Execution, Mode

inputs = layers.large_inputs(3, 40)
mode = Mode(True, Execution(kernels=True, bfloat16=True))
interest, gradients = layers.run(layers.built(40, [36, 20]), *inputs, mode=mode)
np.savez(sys.argv[1], interest=interest, **{name.replace("/", "-"): value for name, value in gradients.items()})
"""


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which instructions of tiles run."""
    need_bfloat16()
    library = tmp_path_factory.mktemp("tiles") / "tiles.so"
    source = ROOT / "tests" / "support" / "tiles.cc"
    subprocess.run([program("g++"), "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    count = library.with_name("count")
    own = {"LD_PRELOAD": str(library), "DIN_DIST_INSTRUCTIONS": "amx", "DIN_DIST_TEST_TILES": str(count)}
    return {**os.environ, **own}


def test_products_in_tiles(tiles: dict[str, str]) -> None:
    """All shapes of the other form, by the same tests; each thread gives its tiles back."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, PRODUCTS],
        cwd=ROOT,
        env=tiles,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    configured, released, products = map(int, Path(tiles["DIN_DIST_TEST_TILES"]).read_text(encoding="utf-8").split())
    assert configured == released > 100
    assert products > 10_000


def test_both_forms_differ_by_the_rounding_of_sums(tiles: dict[str, str], tmp_path: Path) -> None:
    """A sum that is rounded otherwise may round a factor of the next product otherwise, by up to 1/256 of it.

    That is rare: the distance is far below that of bfloat16 from float32, which is several thousandths.
    """
    found = []
    for form in ("amx", "avx512_bf16"):
        to = tmp_path / f"{form}.npz"
        environment = {**tiles, "DIN_DIST_INSTRUCTIONS": form}
        subprocess.run([sys.executable, "-c", GRADIENTS, str(to)], cwd=ROOT, env=environment, check=True)
        found.append(dict(np.load(to)))
    tiled, plain = found
    assert tiled.keys() == plain.keys()
    for name, values in plain.items():
        if name != "scorer-output-bias":  # softmax cancels it
            assert np.linalg.norm(tiled[name] - values) < 2e-4 * np.linalg.norm(values), name
    assert any(np.any(tiled[name] != plain[name]) for name in plain)

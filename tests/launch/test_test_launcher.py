"""launch/test.sh: what it hands to pytest."""

from __future__ import annotations

import json

import pytest

from tests.support.fake_checkout import FakeCheckout

PARALLEL = ["--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"]
LONGEST = ["--durations=40", "--durations-min=15"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> FakeCheckout:
    """A checkout that is set up, and whose pytest prints its arguments."""
    folder = tmp_path_factory.mktemp("test_launcher")
    checkout = FakeCheckout(folder)
    checkout.put_wheel()
    (folder / "modules").mkdir()
    (folder / "modules" / "pytest.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    checkout.env |= {"DIN_DIST_DEVICE": "cpu", "PYTHONPATH": str(folder / "modules")}
    return checkout


def arguments_of_pytest(checkout: FakeCheckout, *given: str) -> list[str]:
    done = checkout.run("test.sh", *given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("given", [[], ["-m", "fast"], ["tests/data", "-k", "a and b"], ["-x"]])
def test_two_processes(checkout: FakeCheckout, given: list[str]) -> None:
    assert arguments_of_pytest(checkout, *given) == [*PARALLEL, *LONGEST, *given]


@pytest.mark.parametrize(
    "given",
    [["-n", "0"], ["-n4"], ["-m", "fast", "--numprocesses=1"], ["-p", "no:xdist"], ["-pno:xdist"], ["--pdb", "tests"]],
    ids=" ".join,
)
def test_as_the_arguments_say(checkout: FakeCheckout, given: list[str]) -> None:
    assert arguments_of_pytest(checkout, *given) == [*LONGEST, *given]

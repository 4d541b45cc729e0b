"""The examples of the library in din_dist/README.md do what they say."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from tests.support.repository import ROOT

README = ROOT / "din_dist" / "README.md"
EXAMPLES = re.findall(r"^```python\n(>>> .*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_are_three_examples() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("place", range(len(EXAMPLES)))
def test_the_example_says_what_it_prints(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(EXAMPLES[place], {}, f"example {place}", str(README), 0)
    printed: list[str] = []
    found = doctest.DocTestRunner().run(example, out=printed.append)
    assert found.attempted > 3
    assert not found.failed, "".join(printed)

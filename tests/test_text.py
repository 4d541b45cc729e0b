"""Values from outside, as people see them."""

from __future__ import annotations

import re

import pytest

from din_dist.text import NestedTooDeeply, parse_json, printable, printable_line, shown
from tests.support.repository import ROOT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("größe 東京 🙂 – \t x\n", "größe 東京 🙂 – \t x\n"),
        ("\x1b[2Jclear", r"\x1b[2Jclear"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("over\rwritten\x08\x7f\x9b", r"over\rwritten\x08\x7f\x9b"),
        ("abc\u202etxt", r"abc\u202etxt"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_terminals_are_not_told_what_to_do(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_no_article_stands_before_a_name_that_is_not_known() -> None:
    """It would be wrong before half of the names: "a item_id"."""
    article = re.compile(r"\b[Aa]n? (--)?\{\w")
    files = [path for path in (ROOT / "din_dist").rglob("*.py") if article.search(path.read_text(encoding="utf-8"))]
    assert files == []


def test_one_line() -> None:
    assert printable_line("one\n two\t\x1b[2J\r\n") == r"one two \x1b[2J\r"


def test_the_beginning_of_a_value() -> None:
    assert shown("a") == "'a'"
    assert shown("x" * 500) == f"'{'x' * 99}..."


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_deeply_nested_json(text: str) -> None:
    with pytest.raises(NestedTooDeeply):
        parse_json(text)


@pytest.mark.parametrize("text", ["", "{", "1" * 5000, b"\xff"])
def test_what_is_no_json(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

from din_dist.serving.export import vocabulary
from din_dist.serving.export.vocabulary import IdTable

PLAIN = ["a", "\\", "\\n", "\\e", "ž", " a ", "a\t", "\0"]
ESCAPED = [*PLAIN, "\n", "\r", "", "\r\n", "\\\n", "a\n", "a\r", "\\\\n"]
STRANGERS = ["b", "\\\\", "n", "e", "A", "a\n\n", "\n\r", "\\\\e", b"\xff", " "]


@pytest.mark.parametrize("words", [PLAIN, ESCAPED, [""], ["a\r"]], ids=["plain", "escaped", "empty", "one"])
def test_each_word_finds_itself_and_nothing_else_does(words: list[str], tmp_path: Path) -> None:
    """Also a word that another one looks like once escaped, or once its carriage return is dropped."""
    found = IdTable(pa.chunked_array([words]), tmp_path / "ids.txt")
    assert found.escaped == (words is not PLAIN)
    assert_array_equal(found.dense_ids(tf.constant(words)), np.arange(1, len(words) + 1))
    others = [word for word in [*ESCAPED, *STRANGERS] if word not in words]
    assert_array_equal(found.dense_ids(tf.constant(others)), np.zeros(len(others)))


def test_integers(tmp_path: Path) -> None:
    numbers = [5, -(2**63), 0, 2**63 - 1, -1]
    found = IdTable(pa.chunked_array([numbers[:2], numbers[2:]]), tmp_path / "ids.txt")
    assert_array_equal(found.dense_ids(tf.constant([*numbers, 1], tf.int64)), [1, 2, 3, 4, 5, 0])


def test_rectangles_and_none(tmp_path: Path) -> None:
    found = IdTable(pa.chunked_array([["a", "b"]]), tmp_path / "ids.txt")
    assert_array_equal(found.dense_ids(tf.constant([["b", "c"], ["a", "b"]])), [[2, 0], [1, 2]])
    assert found.dense_ids(tf.constant([], tf.string)).shape == (0,)
    nothing = IdTable(pa.chunked_array([], pa.string()), tmp_path / "none.txt")
    assert_array_equal(nothing.dense_ids(tf.constant(["a", ""])), [0, 0])


def test_many_are_written_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "IDS_AT_ONCE", 3)
    words = [f"word {number}" for number in range(10)]
    found = IdTable(pa.chunked_array([words[:4], words[4:]]), tmp_path / "ids.txt")
    assert_array_equal(found.dense_ids(tf.constant(words)), np.arange(1, 11))

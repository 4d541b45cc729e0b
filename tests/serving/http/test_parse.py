"""What a body asks for, what is refused and how it is told."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from din_dist.serving.http.parse import (
    BadRequest,
    Instance,
    Predict,
    Vocabulary,
    answer,
    load,
    most_parts,
    parse,
    without_repeats,
)
from din_dist.serving.http.settings import ServeConfig
from din_dist.serving.manifest import FeatureInputs
from din_dist.serving.predictions import Predictions
from tests.support.stand_in_model import INTEGERS, STRINGS

LIMITS = ServeConfig(
    export_dir="none",
    max_instances=3,
    max_candidates=4,
    max_history_items=8,
    max_batch_positions=12,
    max_queue_positions=12,
)

MOST_PARTS = most_parts(STRINGS, LIMITS)
MANY = 1_000_000


def read(body: Any, vocabulary: Any = STRINGS) -> Predict:
    return parse(load(json.dumps(body).encode(), MOST_PARTS), vocabulary, LIMITS)


def row(history: Any = ("a",), candidate: Any = "b", **more: Any) -> dict[str, Any]:
    return {"history_item_ids": history, "candidate_item_id": candidate, **more}


def test_rows_of_any_length() -> None:
    """A history is cut to what the model reads, its newest five, and its features with it."""
    features = {"history_features": {"shelf": [1, 2, 3, None, 5, 6]}, "candidate_features": {"category_id": "c"}}
    request = read({"instances": [row([], "x"), row(list("abcdef"), "x", **features)]})
    assert request == Predict(
        "score",
        True,
        [Instance([], ["x"]), Instance(list("bcdef"), ["x"], {"shelf": [2, 3, None, 5, 6]}, {"category_id": ["c"]})],
    )
    assert [one.has_features for one in request.instances] == [False, True]
    assert (request.num_candidates, request.num_positions) == (2, 6)


def test_columns_end_to_end_padded_or_nested() -> None:
    expected = [Instance(["a", "b"], ["x"]), Instance([], ["y"]), Instance(["c"], ["z"])]
    candidates = {"candidate_item_ids": ["x", "y", "z"]}
    padded = [["a", "b"], ["", ""], ["c", ""]]
    for name, inputs in (
        ("score", {"history_item_ids": ["a", "b", "c"], "history_lengths": [2, 0, 1]}),
        ("serving_default", {"history_item_ids": [["a", "b"], [], ["c"]]}),
        ("score_padded", {"history_item_ids": padded, "history_lengths": [2, 0, 1]}),
    ):
        request = read({"signature_name": name, "inputs": inputs | candidates})
        assert request.instances == expected
        assert not request.in_rows


def test_padded_rows_as_tensorflow_serving_has_them() -> None:
    padded = {"history_item_ids": ["a", "b", ""], "history_lengths": 2, "candidate_item_ids": "x"}
    assert read({"signature_name": "score_padded", "instances": [padded]}).instances == [Instance(["a", "b"], ["x"])]


def test_rank_in_rows_and_columns() -> None:
    one = {"history_item_ids": [3], "candidate_item_ids": [1, -(2**63), 2**63 - 1], "k": 2}
    expected = [Instance([3], [1, -(2**63), 2**63 - 1], most=2)]
    assert read({"signature_name": "rank", "inputs": one}, INTEGERS) == Predict("rank", False, expected)
    assert read({"signature_name": "rank", "instances": [one]}, INTEGERS) == Predict("rank", True, expected)


def test_answers() -> None:
    """Best first, ties by place; probabilities by hand: sigmoid(0) and sigmoid(ln 3)."""
    logits = np.array([0, np.log(3), 0, -1000], np.float32)
    ranked = answer(Predict("rank", False, [Instance([], list("abcd"), most=3)]), [logits], Predictions())["outputs"]
    assert ranked["item_ids"] == ["b", "a", "c"]
    assert ranked["places"] == [1, 0, 2]
    np.testing.assert_allclose(ranked["click_probability"], [0.75, 0.5, 0.5], rtol=1e-6)
    scored = answer(Predict("score", True, [Instance([], ["a"])] * 4), list(logits[:, None]), Predictions())[
        "predictions"
    ]
    assert [one["logits"] for one in scored] == logits.tolist()
    assert scored[3]["click_probability"] == 0
    assert answer(Predict("score", False, [Instance([], ["a"])]), [logits[:1]], Predictions()) == {
        "outputs": {"logits": [0.0], "click_probability": [0.5]}
    }


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ([], "The body must be a JSON object. Received: []."),
        ("text", 'The body must be a JSON object. Received: "text".'),
        ({}, "The body must have either instances or inputs. Received: []."),
        ({"instances": [row()], "inputs": {}}, 'instances or inputs. Received: ["inputs", "instances"].'),
        ({"instances": [row()], "instance": 1}, 'instances, inputs, signature_name. Received: "instance".'),
        ({"instances": []}, "instances must be a list of at least one object. Received: []."),
        ({"instances": {"0": row()}}, "must be a list of at least one object. Received: an object of 1."),
        ({"instances": [row()] * 4}, "instances must have at most 3 entries. Received: 4."),
        ({"instances": [row(), 5]}, "instances[1] must be an object. Received: 5."),
        ({"instances": [{"history_item_ids": []}]}, 'instances[0] must have candidate_item_id. Received: ["history_'),
        ({"instances": [row(extra=1)]}, 'candidate_features. Received: "extra".'),
        ({"instances": [row("abc")]}, 'instances[0].history_item_ids must be a list of strings. Received: "abc".'),
        ({"instances": [row(["a", None])]}, "instances[0].history_item_ids[1] must be a string. Received: null."),
        ({"instances": [row(["a", ["b"]])]}, 'history_item_ids[1] must be a string. Received: ["b"].'),
        ({"instances": [row(candidate=7)]}, "instances[0].candidate_item_id must be a string. Received: 7."),
        ({"instances": [row(candidate=["b"])]}, 'instances[0].candidate_item_id must be one string. Received: ["b"].'),
        ({"instances": [row(candidate="\ud800")]}, "must be Unicode text. Received: \"half of a surrogate pair\"."),
        ({"instances": [row(["a"] * 9)]}, "instances[0].history_item_ids must have at most 8 entries. Received: 9."),
        ({"instances": [row(["a"] * 8)] * 3}, "most 12 pairs of a candidate and an item of its history. Received: 15"),
        ({"instances": [row(history_features=[])]}, "history_features must be an object. Received: []."),
        ({"instances": [row(history_features={"x": []})]}, 'must have only category_id, shelf. Received: "x".'),
        ({"instances": [row(history_features={"shelf": []})]}, "history_features.shelf must have 1 values, one for"),
        ({"instances": [row(history_features={"shelf": 1})]}, "history_features.shelf must be a list. Received: 1."),
        ({"instances": [row(history_features={"shelf": ["1"]})]}, 'shelf[0] must be an integer. Received: "1".'),
        ({"instances": [row(candidate_features={"shelf": 0.5})]}, "shelf[0] must be an integer. Received: 0.5."),
        ({"signature_name": "classify", "instances": [row()]}, "must be one of score, score_padded, rank. Received"),
        ({"signature_name": ["rank"], "instances": [row()]}, 'score, score_padded, rank. Received: ["rank"].'),
        ({"signature_name": None, "instances": [row()]}, "score, score_padded, rank. Received: null."),
        ({"inputs": []}, "inputs must be an object. Received: []."),
        ({"inputs": {"history_item_ids": ["a"], "candidate_item_ids": []}}, "must have at least one id. Received: []."),
        ({"inputs": {"history_item_ids": [], "candidate_item_ids": list("abcd")}}, "at most 3 entries. Received: 4."),
        ({"inputs": {"history_item_ids": ["a"], "candidate_item_ids": ["b"]}}, 'history_item_ids[0] must be a list of'),
        ({"inputs": {"history_item_ids": [[]], "candidate_item_ids": ["a", "b"]}}, "inputs.candidate_item_ids, 2. Rec"),
    ],
)  # fmt: skip
def test_what_is_refused(body: Any, told: str) -> None:
    with pytest.raises(BadRequest) as error:
        read(body)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ([2, -1], "inputs.history_lengths[1] must be an integer, from 0 to 8. Received: -1."),
        ([2, 1], "inputs.history_lengths must add up to the 2 ids of inputs.history_item_ids. Received: 3."),
        ([2], "inputs.history_lengths must have as many entries as inputs.candidate_item_ids, 2. Received: 1."),
        ([1.0, 1], "inputs.history_lengths[0] must be an integer. Received: 1.0."),
        ([True, 1], "inputs.history_lengths[0] must be an integer. Received: true."),
        (2, "inputs.history_lengths must be a list of integers. Received: 2."),
    ],
)
def test_lengths_that_do_not_fit(lengths: Any, told: str) -> None:
    inputs = {"history_item_ids": ["a", "b"], "history_lengths": lengths, "candidate_item_ids": ["c", "d"]}
    with pytest.raises(BadRequest) as error:
        read({"inputs": inputs})
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        ({"k": 0}, "k must be an integer, 1 or more. Received: 0."),
        ({"k": -3}, "k must be an integer, 1 or more. Received: -3."),
        ({"k": True}, "k must be an integer, 1 or more. Received: true."),
        ({"k": 2**63}, "k must be an integer, 1 or more. Received: 9223372036854775808."),
        ({"candidate_item_ids": []}, "candidate_item_ids must have at least one id. Received: []."),
        ({"candidate_item_ids": 1}, "candidate_item_ids must be a list of integers. Received: 1."),
        ({"candidate_item_ids": [1] * 5}, "candidate_item_ids must have at most 4 entries. Received: 5."),
        ({"history_item_ids": [2**63]}, "must be integers of 64 bits. Received: 9223372036854775808."),
        ({"history_item_ids": [1e300]}, "history_item_ids[0] must be an integer. Received: 1e+300."),
        ({"history_item_ids": ["1"]}, 'history_item_ids[0] must be an integer. Received: "1".'),
        ({"history_item_ids": [True]}, "history_item_ids[0] must be an integer. Received: true."),
        ({"history_features": {"category_id": ["c"]}}, 'history_features must be empty. Received: "category_id".'),
    ],
)
def test_what_is_refused_of_rank(rank: dict[str, Any], told: str) -> None:
    one = {"history_item_ids": [1], "candidate_item_ids": [1, 2], "k": 1} | rank
    for body in ({"instances": [one]}, {"inputs": one}):
        with pytest.raises(BadRequest) as error:
            read({"signature_name": "rank", **body}, INTEGERS)
        assert str(error.value).endswith(told)


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        (3, "instances[0].history_lengths must be an integer, from 0 to 2. Received: 3."),
        (-1, "instances[0].history_lengths must be an integer, from 0 to 2. Received: -1."),
    ],
)
def test_padded_lengths_that_do_not_fit(lengths: int, told: str) -> None:
    padded = {"history_item_ids": ["a", ""], "history_lengths": lengths, "candidate_item_ids": "x"}
    with pytest.raises(BadRequest) as error:
        read({"signature_name": "score_padded", "instances": [padded]})
    assert str(error.value) == told
    columns = {"history_item_ids": [["a", ""]], "history_lengths": [lengths], "candidate_item_ids": ["x"]}
    with pytest.raises(BadRequest, match="inputs.history_lengths"):
        read({"signature_name": "score_padded", "inputs": columns})


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "The body must be JSON. Received: Expecting value at character 0."),
        (b'{"a": 1', "Received: Expecting ',' delimiter at character 7."),
        (b'{"a": NaN}', "The body must be JSON, which has no NaN."),
        (b'{"a": -Infinity}', "The body must be JSON, which has no -Infinity."),
        (b'{"a": "\xff"}', "The body must be UTF-8. Received: byte 0xff at 7."),
        ('{"a": 1}'.encode("utf-16"), "The body must be UTF-8. Received: byte 0xff at 0."),
        (b'\xef\xbb\xbf{"a": 1}', "The body must be JSON. Received: Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "nested too deeply."),
        (b'{"a":' * 100_000, "nested too deeply."),
        (b"9" * 5000, "Received: one with thousands of digits."),
        (b'{"a": 1, "b": 2, "a": 3}', 'An object must have each key once. Received: "a".'),
        (b'{"a": "\x01"}', "Received: Invalid control character at"),
    ],
)
def test_what_is_no_json(data: bytes, told: str) -> None:
    with pytest.raises(BadRequest) as error:
        load(data, MANY)
    assert told in str(error.value)


@pytest.mark.parametrize("hostile", ["[" + "0," * 999_999 + "0]", '["' + "x" * 1_000_000 + '"]', '{"k": [[[0]]]}'])
@pytest.mark.parametrize("place", ["history_item_ids", "candidate_item_id", "history_features", "other"])
def test_long_things_are_told_shortly(hostile: str, place: str) -> None:
    body = json.dumps({"instances": [row() | {place: "HERE"}]}).replace('"HERE"', hostile)
    with pytest.raises(BadRequest) as error:
        parse(load(body.encode(), MOST_PARTS), INTEGERS, LIMITS)
    assert len(str(error.value)) < 250


def test_what_can_just_be_read_is_not_too_deep_to_be_told() -> None:
    """Writing it for the message, from a little further down the stack, would be."""
    low, high = 1, 100_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            load(b'{"instances": [%s%s]}' % (b"[" * middle, b"]" * middle), MANY)
            low = middle
        except BadRequest:
            high = middle
    assert low > 100
    body = load(b'{"instances": [%s%s]}' % (b"[" * low, b"]" * low), MANY)
    with pytest.raises(BadRequest, match=r"instances\[0\] must be an object. Received: a list of 1."):
        parse(body, STRINGS, LIMITS)


def test_ties_are_by_place_in_long_lists_too() -> None:
    """Where NumPy's default sort would not keep them so."""
    logits = np.tile(np.array([0, 1], np.float32), 50)
    request = Predict("rank", False, [Instance([], [str(place) for place in range(100)])])
    assert answer(request, [logits], Predictions())["outputs"]["places"] == [*range(1, 100, 2), *range(0, 100, 2)]


class Counted(str):
    """A text that counts how often any of its kind is compared with another."""

    __slots__ = ()
    count = 0

    def __eq__(self, other: object) -> bool:
        Counted.count += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_repeated_key_is_found_without_comparing_each_with_all() -> None:
    Counted.count = 0
    pairs: list[tuple[str, Any]] = [(Counted(number), 1) for number in range(2_000)]
    with pytest.raises(BadRequest, match='must have each key once. Received: "1999".'):
        without_repeats([*pairs, (Counted(1_999), 2)])
    assert Counted.count < 50  # looked up by hash; 2 million where each is compared with all


def test_lists_objects_and_keys_have_a_bound() -> None:
    """As many as the largest allowed request has, and not one more."""
    features = {name: [1] for name in STRINGS.item_features}
    whole = row(history_features=features, candidate_features=features, k=1)
    body = json.dumps({"signature_name": "score", "instances": [whole] * LIMITS.max_instances}).encode()
    assert load(body, MOST_PARTS)
    for unit in (b"[],", b"{},", b'{"a":1},', b'[{"":[]}],'):
        data = b"[" + unit * 100 + b"1]"
        with pytest.raises(BadRequest, match=f"must have at most {MOST_PARTS} lists, objects and keys. Received: more"):
            load(data, MOST_PARTS)


def parts_of(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(parts_of, value))
    if isinstance(value, dict):
        return 1 + sum(1 + parts_of(inner) for inner in value.values())
    return 0


TEXTS = st.text(st.sampled_from('[{:"\\,a\u00e9\U0001f600\n'), max_size=6)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    value=st.recursive(
        TEXTS | st.integers() | st.none(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
        max_leaves=20,
    ),
    ascii_only=st.booleans(),
)
def test_ids_may_have_brackets_and_colons(value: Any, ascii_only: bool) -> None:
    """What is counted is the structure, whatever stands in strings."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert load(body, parts_of(value)) == value
    if parts_of(value):
        with pytest.raises(BadRequest):
            load(body, parts_of(value) - 1)


# --- Declared features. ---


def declared(name: str, owner: str, kind: str, type_: str, **more: Any) -> FeatureInputs:
    missing: Any = {"string": "", "integer": -(2**63), "number": "NaN"}[type_]
    return FeatureInputs(name, owner, kind, type_, [f"{owner}_{name}"], more.pop("missing", missing), **more)


FEATURED = Vocabulary(
    "string",
    {},
    5,
    (
        declared("age", "user", "category", "string"),
        declared("likes", "user", "categories", "string", missing=[], weights="w"),
        declared("hour", "context", "hour_of_day", "integer"),
        declared("price", "candidate", "number", "number"),
        declared("tags", "candidate", "categories", "integer", missing=[]),
        declared("look", "candidate", "vector", "number", dimension=2),
    ),
)
USER = {"age": "old", "likes": {"values": ["x"], "weights": [2]}}
CANDIDATE = {"price": 1.5, "tags": [3, 4], "look": [0, 1]}
LIKES = (["x"], [2])


def test_features_of_rows() -> None:
    given = {"user": USER, "context": {"hour": 7}, "candidate_features": CANDIDATE}
    (found, plain) = read({"instances": [row(**given), row()]}, FEATURED).instances
    assert found == Instance(
        ["a"],
        ["b"],
        user={"age": "old", "likes": LIKES},
        context={"hour": 7},
        own_features={"price": [1.5], "tags": [[3, 4]], "look": [[0, 1]]},
    )
    assert plain == Instance(["a"], ["b"])


def test_features_of_several_candidates() -> None:
    rows = {"history_item_ids": [], "candidate_item_ids": ["b", "c"], "candidate_features": {"price": [None, 2]}}
    (found,) = read({"signature_name": "rank", "instances": [rows | {"user": USER}]}, FEATURED).instances
    assert found == Instance([], ["b", "c"], user={"age": "old", "likes": LIKES}, own_features={"price": [None, 2]})


def test_features_in_columns() -> None:
    """A list with a value for each candidate; what is not given is missing."""
    inputs = {
        **{"history_item_ids": [["a"], []], "candidate_item_ids": ["b", "c"]},
        **{"user": {"likes": [USER["likes"], None]}, "context": {"hour": [None, 7]}},
        "candidate_features": {"price": [2, 3], "look": [[0, 1], None]},
    }
    first, second = read({"inputs": inputs}, FEATURED).instances
    own = {"price": [2], "look": [[0, 1]]}
    assert first == Instance(["a"], ["b"], user={"likes": LIKES}, context={"hour": None}, own_features=own)
    own = {"price": [3], "look": [None]}
    assert second == Instance([], ["c"], user={"likes": None}, context={"hour": 7}, own_features=own)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"user": {"hour": [1]}}, 'inputs.user must have only age, likes. Received: "hour".'),
        ({"user": {"age": "old"}}, 'inputs.user.age must be a list. Received: "old".'),
        (
            {"user": {"age": ["old", "new"]}},
            "inputs.user.age must have as many entries as inputs.candidate_item_ids, 1.",
        ),
        ({"user": {"age": [3]}}, "inputs.user.age[0] must be a string. Received: 3."),
        ({"context": {"hour": [1.5]}}, "inputs.context.hour[0] must be an integer. Received: 1.5."),
        ({"candidate_features": {"tags": [3]}}, "inputs.candidate_features.tags[0] must be a list of integers."),
        ({"candidate_features": {"look": [[1]]}}, "inputs.candidate_features.look[0] must be a list of 2 numbers."),
        ({"candidate_features": [3]}, "inputs.candidate_features must be an object. Received: [3]."),
        ({"history_features": {}}, 'Received: "history_features".'),
    ],
)
def test_wrong_features_in_columns(given: dict[str, Any], told: str) -> None:
    with pytest.raises(BadRequest) as error:
        read({"inputs": {"history_item_ids": [["a"]], "candidate_item_ids": ["b"], **given}}, FEATURED)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1

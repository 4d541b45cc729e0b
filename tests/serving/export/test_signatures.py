"""The functions of a SavedModel, loaded again, against the float64 reference: own ids in, logits out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

from din_dist import schema
from din_dist.assembly import make_model
from din_dist.config import Activation, AttentionNormalization, BatchNorm, ModelConfig, ModelKind
from din_dist.errors import InputError
from din_dist.serving.bundle import Bundle
from din_dist.serving.export import ranking_signatures
from din_dist.serving.export.ranking_signatures import RankingSignatures
from din_dist.serving.export.signatures import input_names
from tests.support.changed_manifest import manifest
from tests.support.reference.compare import randomise, weights_of
from tests.support.reference.padded_din import PaddedBatch, PaddedModel

MAX_LENGTH = 6
WORDS = ["plain", "a\nb", "a\\nb", "a\r", "a", "", "\\", "\\e", "žluťoučký", "tab\tand space ", "nul\0l", "a\\\nb"]
NUMBERS = [-(2**63), 2**63 - 1, 0, -1, 5, 7, 11, 13, 17, 19, 23, 10**17]
KINDS = ["toys", "a\nb", ""]  # of which the last is never found: given explicitly it has another meaning
BRANDS = [3, -5, 2**40, 8]
LENGTHS = (3, 0, 1, 9, 2, MAX_LENGTH, 0, 20)  # empty ones, and two that are too long


@dataclasses.dataclass(frozen=True)
class Case:
    """A model whose item i (from 1) is `ids[i - 1]`; features and rows of items are those of `setup`."""

    ids: list[Any]
    features: dict[str, list[Any]]
    settings: dict[str, Any]
    some_untrained: bool = False


CASES = {
    "din": Case(WORDS, {"kind of": KINDS}, {"model": ModelKind.DIN, "batch_norm": BatchNorm.SYNCED}),
    "integers": Case(
        NUMBERS,
        {"kind": KINDS[:2], "brand": BRANDS},
        {
            "model": ModelKind.DIN,
            "batch_norm": BatchNorm.FROZEN,
            "activation": Activation.DICE,
            "attention_normalization": AttentionNormalization.NONE,
        },
        some_untrained=True,
    ),
    "mean": Case(WORDS[:1] + WORDS[4:5], {}, {"model": ModelKind.MEAN_POOLING, "activation": Activation.PRELU}),
}


class Setup:
    """A case exported and loaded again, and its reference."""

    def __init__(self, case: Case, folder: Path) -> None:
        random = np.random.default_rng(1)
        num_items = len(case.ids)
        self.case = case
        self.unseen = "never seen" if isinstance(case.ids[0], str) else 12345
        self.feature_of_item = {
            name: np.concatenate([[0], random.integers(0, len(values) + 1, num_items)]).astype(np.int32)
            for name, values in case.features.items()
        }
        self.rows = np.arange(num_items + 1, dtype=np.int32)
        if case.some_untrained:
            self.rows[[2, 5]] = 0
        sizes = {name: len(values) for name, values in case.features.items()}
        facts = schema.DatasetFacts(1, num_items, 1, False, sizes, 0, 0, "", {})
        config = ModelConfig(embedding_dim=(4,), attention_hidden_units=(5,), hidden_units=(5, 4), **case.settings)
        row_of_item = self.rows if case.some_untrained else None
        model = make_model(config, facts, self.feature_of_item, seed=1, row_of_item=row_of_item)
        randomise(model)
        self.weights = weights_of(model)
        vocabularies = {name: pa.chunked_array([values]) for name, values in case.features.items()}
        RankingSignatures(
            model, pa.chunked_array([case.ids]), vocabularies, [schema.NamedHistory("", MAX_LENGTH)], folder
        ).save(folder / "model")
        for path in folder.glob("*.txt"):  # the SavedModel has its own copies
            path.unlink()
        (folder / "model").rename(folder / "moved")
        self.bundle = Bundle(
            manifest(
                item_features={
                    name: "string" if isinstance(values[0], str) else "integer"
                    for name, values in case.features.items()
                },
                feature_inputs=input_names(list(case.features)),
            ),
            tf.saved_model.load(str(folder / "moved")),
        )

    def request(self, lengths: Sequence[int], seed: int = 0) -> tuple[list[list[Any]], list[Any]]:
        """Histories of these lengths, and a candidate for each; about one item in ten is not known."""
        random = np.random.default_rng(seed)
        pool = [*self.case.ids, self.unseen]
        draw = lambda number: [pool[place] for place in random.integers(0, len(pool), number)]  # noqa: E731
        return [draw(length) for length in lengths], draw(len(lengths))

    def logits(
        self,
        histories: Sequence[Sequence[Any]],
        candidates: Sequence[Any],
        history_features: dict[str, list[Any]] | None = None,
        candidate_features: dict[str, list[Any]] | None = None,
    ) -> np.ndarray:
        """By the reference: each item of the request is an item of its own, with the rows that it ought to have."""
        starts = np.cumsum([0, *map(len, histories)])
        kept = [list(range(end - min(end - start, MAX_LENGTH), end)) for start, end in itertools.pairwise(starts)]
        flat = [item for history in histories for item in history]
        dense = np.array(
            [self.case.ids.index(item) + 1 if item in self.case.ids else 0 for item in [*flat, *candidates]]
        )
        features = {}
        for name, values in self.case.features.items():
            given = [*(history_features or {}).get(name, []), *(candidate_features or {}).get(name, [])]
            looked_up = self.feature_of_item[name][dense]
            features[name] = np.array(
                [
                    own if value in ("", -(2**63)) else values.index(value) + 1 if value in values else 0
                    for value, own in zip(given or [""] * len(dense), looked_up, strict=True)
                ],
                int,
            )
        rows = self.rows[dense]
        weights = {
            **self.weights,
            "lookup/item": self.weights["lookup/item"][rows],
            "lookup/item_bias": self.weights["lookup/item_bias"][rows],
        }
        width = max(map(len, kept), default=0)
        places = np.array([[*positions, *[0] * (width - len(positions))] for positions in kept], int)
        mask = np.array([[place < len(positions) for place in range(width)] for positions in kept], bool)
        shape = (len(histories), width)
        batch = PaddedBatch(
            candidate_item_ids=len(flat) + np.arange(len(candidates)),
            history_item_ids=places.reshape(shape),
            history_mask=mask.reshape(shape),
            labels=np.zeros(len(candidates)),
        )
        settings = self.case.settings
        reference = PaddedModel(
            features,
            model=settings["model"],
            activation=settings.get("activation", "sigmoid"),
            normalization=settings.get("attention_normalization", "softmax"),
        )
        return reference.logits(weights, batch)


@pytest.fixture(scope="module")
def make_setup(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Setup]:
    """Each once. They rank in parts of 10 pairs; a history of `MAX_LENGTH` makes more than one of them."""

    @functools.cache
    def make(name: str) -> Setup:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking_signatures, "PAIRS_AT_ONCE", 10)
            return Setup(CASES[name], tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="module", params=CASES)
def setup(request: pytest.FixtureRequest, make_setup: Callable[[str], Setup]) -> Setup:
    return make_setup(request.param)


@pytest.fixture(scope="module")
def din(make_setup: Callable[[str], Setup]) -> Setup:
    return make_setup("din")


def packed(histories: Sequence[Sequence[Any]]) -> tuple[list[Any], list[int]]:
    return [item for history in histories for item in history], [len(history) for history in histories]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_score(setup: Setup) -> None:
    histories, candidates = setup.request(LENGTHS)
    expected = setup.logits(histories, candidates)
    assert expected.std() > 0.1
    assert_close(setup.bundle.score(*packed(histories), candidates), expected)
    items, lengths = packed(histories)
    inputs = {"history_item_ids": items, "history_lengths": lengths, "candidate_item_ids": candidates}
    for name in ("score", "serving_default"):
        outputs = setup.bundle.call(name, inputs)
        assert outputs.keys() == {"logits", "click_probability"}
        assert_close(outputs["click_probability"], 1 / (1 + np.exp(-expected)))


def test_score_padded(setup: Setup) -> None:
    """What stands in the padding must not matter."""
    histories, candidates = setup.request(LENGTHS)
    width = max(LENGTHS) + 2
    rows = [
        [*history, *itertools.islice(itertools.cycle(setup.case.ids), width - len(history))] for history in histories
    ]
    inputs = {"history_item_ids": rows, "history_lengths": list(LENGTHS), "candidate_item_ids": candidates}
    assert_close(setup.bundle.call("score_padded", inputs)["logits"], setup.logits(histories, candidates))


def test_rank_histories(setup: Setup) -> None:
    histories, _ = setup.request(LENGTHS)
    counts = [2, 3, 0, 5, 1, 9, 0, 1]
    _, candidates = setup.request([0] * sum(counts), seed=1)
    repeated = [history for history, count in zip(histories, counts, strict=True) for _ in range(count)]
    assert_close(
        setup.bundle.rank_histories(*packed(histories), candidates, counts), setup.logits(repeated, candidates)
    )


@pytest.mark.parametrize("k", [0, 1, 5, 999])
def test_rank(setup: Setup, k: int) -> None:
    """Best first; an item that is there three times comes by its places."""
    ((history,), _) = setup.request([9])
    candidates = [*setup.case.ids, setup.unseen, setup.case.ids[0], setup.case.ids[0]]
    ranked = setup.bundle.rank(history, candidates, k)
    expected = setup.logits([history] * len(candidates), candidates)
    order = np.argsort(-np.round(expected, 9), kind="stable")[:k]
    assert_array_equal(ranked["places"], order)
    assert ranked["places"].dtype == np.int64
    own = [item if isinstance(item, int) else item.encode() for item in candidates]
    assert ranked["item_ids"].tolist() == [own[place] for place in order]
    assert_close(ranked["logits"], expected[order])
    assert_close(ranked["click_probability"], 1 / (1 + np.exp(-expected[order])))


def test_features_given_explicitly(setup: Setup) -> None:
    """For known and new items; one is never heard of, and some are left to the item id."""
    if not setup.case.features:
        assert not [name for name in setup.bundle.signatures if "features" in name]
        return
    histories, candidates = setup.request(LENGTHS)
    flat, lengths = packed(histories)
    random = np.random.default_rng(3)

    def draw(number: int) -> dict[str, list[Any]]:
        pools = {
            name: [*values, "new" if isinstance(values[0], str) else 99, "" if isinstance(values[0], str) else -(2**63)]
            for name, values in setup.case.features.items()
        }
        return {name: [pool[place] for place in random.integers(0, len(pool), number)] for name, pool in pools.items()}

    of_history, of_candidate = draw(len(flat)), draw(len(candidates))
    expected = setup.logits(histories, candidates, of_history, of_candidate)
    assert np.abs(expected - setup.logits(histories, candidates)).max() > 0.1
    found = setup.bundle.score_with_features(flat, lengths, candidates, of_history, of_candidate)
    assert_close(found, expected)
    assert_allclose(
        setup.bundle.score_with_features(flat, lengths, candidates, {}, {}),
        setup.bundle.score(flat, lengths, candidates),
        rtol=1e-5,
        atol=1e-6,
    )
    one_history = {name: values[4 : 4 + 9] for name, values in of_history.items()}  # the fourth history
    ranked = setup.bundle.rank_with_features(histories[3], candidates, 99, one_history, of_candidate)
    repeated = {name: values * len(candidates) for name, values in one_history.items()}
    expected = setup.logits([histories[3]] * len(candidates), candidates, repeated, of_candidate)
    assert_close(ranked["logits"], np.sort(expected)[::-1])


def test_embed_items(setup: Setup) -> None:
    items = [setup.unseen, *setup.case.ids, setup.case.ids[0]]
    found = setup.bundle.embed_items(items)
    dense = np.array([0, *range(1, len(setup.case.ids) + 1), 1])
    parts = [setup.weights["lookup/item"][setup.rows[dense]]]
    parts += [setup.weights[f"lookup/{name}"][of_item[dense]] for name, of_item in setup.feature_of_item.items()]
    assert_allclose(found["embeddings"], np.concatenate(parts, axis=1), rtol=1e-6)
    assert_array_equal(found["known"], dense > 0)


def test_nothing_at_all(setup: Setup) -> None:
    bundle, known = setup.bundle, setup.case.ids[0]
    assert bundle.score([], [], []).shape == (0,)
    assert bundle.rank_histories([], [], [], []).shape == (0,)
    assert bundle.rank_histories([known], [1], [], [0]).shape == (0,)
    assert bundle.rank([known], [], 3)["logits"].shape == (0,)
    assert_close(bundle.score([], [0], [known]), setup.logits([[]], [known]))
    assert bundle.embed_items([])["embeddings"].shape == (
        0,
        setup.weights["lookup/item"].shape[1] * (1 + len(setup.case.features)),
    )


def test_a_history_of_a_million(setup: Setup) -> None:
    """The newest count; the rest costs a copy."""
    ((tail,), candidates) = setup.request([MAX_LENGTH])
    history = np.concatenate([np.full(10**6, setup.unseen, object), np.array(tail, object)])
    history = history.astype(np.int64) if isinstance(setup.unseen, int) else history
    assert_close(setup.bundle.score(history, [len(history)], candidates), setup.logits([tail], candidates))
    assert_close(setup.bundle.rank(history, candidates, 1)["logits"], setup.logits([tail], candidates))


WRONG = {
    "a negative length": (
        "score",
        {"history_lengths": [3, -1]},
        "history_lengths must not be negative and must add up",
    ),
    "too much": (
        "score",
        {"history_lengths": [2, 1]},
        "add up to the number of history_item_ids. Received: [2 1] for [2].",
    ),
    "too little": ("score", {"history_lengths": [1, 0]}, "add up to the number of history_item_ids"),
    "sums that overflow": ("score", {"history_lengths": [2**63 - 1, -(2**63) + 3]}, "must not be negative"),
    "too few lengths": ("score", {"history_lengths": [2]}, "history_lengths and candidate_item_ids must be as many"),
    "counts": (
        "rank_histories",
        {"candidate_counts": [3, -1]},
        "candidate_counts must not be negative and must add up",
    ),
    "too few counts": (
        "rank_histories",
        {"candidate_counts": [2]},
        "history_lengths and candidate_counts must be as many",
    ),
    "k": ("rank", {"k": -1}, "k must be 0 or more. Received: [-1]."),
    "wide": ("score_padded", {"history_lengths": [2, 1]}, "from 0 to its width. Received: [2 1] for the shape [2 1]."),
    "features": (
        "score_with_features",
        {"history_feature_0": ["toys"]},
        "history_feature_0 and history_item_ids must be as many. Received: [1] [2].",
    ),
    "numbers": (
        "score",
        {"candidate_item_ids": [1, 2]},
        "candidate_item_ids: must be strings. Received: 1.",
    ),
    "an array of numbers": ("score", {"candidate_item_ids": np.arange(2)}, "must be strings. Received: int64 values."),
    "a number among words": ("score", {"candidate_item_ids": ["a", 1]}, "must be strings. Received: 1."),
    "a truth": ("score", {"history_lengths": [True, 1]}, "must be integers of 64 bits. Received: True."),
    "too large": ("score", {"history_lengths": np.array([1, 2**63], np.uint64)}, "Received: 9223372036854775808."),
    "null": ("score", {"candidate_item_ids": ["a", None]}, "candidate_item_ids: must be strings. Received: None."),
    "an Arrow null": ("score", {"candidate_item_ids": pa.array(["a", None])}, "must be strings. Received: null."),
    "half a character": (
        "score",
        {"candidate_item_ids": ["a", "\ud800"]},
        "must be strings. Received: half a surrogate",
    ),
    "lists": (
        "score",
        {"history_item_ids": [["a"], ["a", "b"]]},
        "history_item_ids: must be strings. Received: ['a'].",
    ),
    "another shape": (
        "score",
        {"history_item_ids": [["a"], ["b"]]},
        "must have 1 dimension(s). Received: shape (2, 1).",
    ),
    "fractions": ("score", {"history_lengths": [1.0, 1.0]}, "history_lengths: must be integers of 64 bits."),
    "NaN": ("rank", {"k": float("nan")}, "k: must be integers of 64 bits."),
    "a huge k": ("rank", {"k": 2**64}, "k: must be integers of 64 bits."),
    "another input": ("score", {"k": 1}, "score: takes candidate_item_ids, history_item_ids, history_lengths."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_clear_line(din: Setup, name: str) -> None:
    signature, wrong, message = WRONG[name]
    right = {
        "history_item_ids": [["a"], ["b"]] if signature == "score_padded" else ["a", "b"],
        "history_lengths": [1, 1],
        "candidate_item_ids": ["a", "b"],
        "candidate_counts": [2, 0],
        "k": 1,
        **{f"{side}_feature_0": ["", ""] for side in ("history", "candidate")},
    }
    specs = din.bundle.signature(signature).structured_input_signature[1]
    with pytest.raises(InputError) as caught:
        din.bundle.call(signature, {name: value for name, value in right.items() if name in specs} | wrong)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "kind", [pa.array, np.array, lambda values: np.array(values, object), tf.constant, lambda v: pa.chunked_array([v])]
)
def test_every_kind_of_array(din: Setup, kind: Any) -> None:
    histories, candidates = (["a", "plain"], ["žluťoučký", "a\nb"])
    expected = din.logits([histories, []], candidates)
    assert_close(din.bundle.score(kind(histories), kind([2, 0]), kind(candidates)), expected)


def test_ids_of_other_encodings_are_unknown(din: Setup) -> None:
    expected = din.logits([[din.unseen]], [din.unseen])
    for odd in (b"\xff\xfe", "plain".encode("utf-16"), b"\xc3", b"\xed\xa0\x80"):
        assert_close(din.bundle.score([odd], [1], [odd]), expected)


def test_names_of_inputs() -> None:
    assert input_names(["category_id", "Brand", "brand", "item_ids", "kind of", "feature_4", "日本"]) == {
        "category_id": "category_id",
        "Brand": "Brand",
        "brand": "feature_2",
        "item_ids": "feature_3",
        "kind of": "feature_4_",
        "feature_4": "feature_4",
        "日本": "feature_6",
    }

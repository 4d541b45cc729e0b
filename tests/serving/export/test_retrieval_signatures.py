"""Exports of models that find items, and exports with such a one inside, against brute force in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf

from din_dist import schema
from din_dist.assembly import make_model
from din_dist.config import EvaluateWith, ModelConfig, ModelKind, Readout
from din_dist.errors import InputError
from din_dist.models.retrieval_model import RetrievalModel
from din_dist.serving.asked import Recommend
from din_dist.serving.bundle import Bundle
from din_dist.serving.export import retrieval_signatures
from din_dist.serving.export.ranking_signatures import RankingSignatures
from din_dist.serving.export.retrieval_signatures import RetrievalSignatures
from din_dist.serving.export.retriever import retriever_of
from din_dist.serving.given_behaviours import GivenBehaviours
from din_dist.serving.manifest import FeatureInputs, Manifest
from tests.support.changed_manifest import manifest

MAX_LENGTH = 6
WORDS = [f"item {number}" for number in range(37)]
NUMBERS = [1000 - 7 * number for number in range(37)]
NUM_CANDIDATES = 35  # the last two items occur in histories only
CATEGORIES = ["a", "b", "c"]
INF = float("inf")


ONE_HISTORY = (schema.NamedHistory("", MAX_LENGTH),)
BUY_AND_VIEW = (schema.NamedHistory("buy", 5), schema.NamedHistory("view", MAX_LENGTH))


def facts_of(num_items: int) -> schema.DatasetFacts:
    return schema.DatasetFacts(1, num_items, 1, False, {"category": len(CATEGORIES)}, 0, 0, "", {})


def made(
    config: ModelConfig,
    folder: Path,
    ids: Sequence[Any],
    retriever: Any = None,
    histories: tuple[schema.NamedHistory, ...] = ONE_HISTORY,
) -> tuple[Any, Bundle]:
    """Returns a model with random weights and its export, opened."""
    random = np.random.default_rng(3)
    category = np.concatenate([[0], random.integers(0, 4, len(ids))]).astype(np.int32)
    facts = dataclasses.replace(facts_of(len(ids)), histories=histories if len(histories) > 1 else ())
    model = make_model(config, facts, {"category": category}, seed=1)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 0.5, variable.shape))
    own = {"category": pa.chunked_array([CATEGORIES])}
    arguments = (own, histories, folder)
    items, path = pa.chunked_array([ids]), folder / str(config.model)
    if isinstance(model, RetrievalModel):
        RetrievalSignatures(model, items, *arguments, num_candidates=NUM_CANDIDATES).save(path)
    else:
        RankingSignatures(model, items, *arguments, retriever=retriever).save(path)
    found = manifest(
        item_features={"category": "string"},
        feature_inputs={"category": "category"},
        item_id_type="string" if isinstance(ids[0], str) else "integer",
    )
    described = None if retriever is None else retriever.described
    kind = {"finds_items": isinstance(model, RetrievalModel), "retriever": described}
    found = dataclasses.replace(found, **kind, features=(), settings={"model": {"model": str(config.model)}})
    return model, Bundle(found, tf.saved_model.load(str(path)))


SMALL = ModelConfig(
    embedding_dim=(5,), attention_hidden_units=(6,), hidden_units=(6, 4), num_interests=3, tower_units=()
)
FORMS = {
    "comirec_sa": (WORDS, {"model": ModelKind.COMIREC_SA}),
    "one vector, soft": (
        WORDS,
        {"model": ModelKind.COMIREC_SA, "readout": Readout.SOFT, "evaluate_with": EvaluateWith.READOUT},
    ),
    "cosines": (WORDS, {"model": ModelKind.MIND, "normalize_vectors": True, "temperature": 0.1}),
    "youtube_dnn": (NUMBERS, {"model": ModelKind.YOUTUBE_DNN}),
    "sr_gnn": (NUMBERS, {"model": ModelKind.SR_GNN}),
}


@pytest.fixture(scope="module", params=list(FORMS))
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], RetrievalModel, Bundle]:
    ids, settings = FORMS[request.param]
    model, bundle = made(dataclasses.replace(SMALL, **settings), tmp_path_factory.mktemp("retrieval"), ids)
    return ids, model, bundle


def histories_of(ids: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """Random histories. Some have an item twice, and some an item that the log does not have."""
    random = np.random.default_rng(7)
    pool = [*ids, "never seen" if isinstance(ids[0], str) else 5]
    return [[pool[place] for place in random.integers(0, len(pool), length)] for length in lengths]


def all_logits(model: RetrievalModel, ids: Sequence[Any], histories: list[list[Any]]) -> np.ndarray:
    """The logits of all candidates, float64 `[B, I]`, from the vectors of the trained model."""
    dense = {own: number + 1 for number, own in enumerate(ids)}
    kept = [[dense.get(own, 0) for own in history[-MAX_LENGTH:]] for history in histories]
    flat = tf.constant([item for history in kept for item in history], tf.int32)
    users = model.users_of(flat, tf.constant([len(history) for history in kept], tf.int32)).numpy().astype(np.float64)
    items = model.items(tf.range(1, NUM_CANDIDATES + 1)).numpy().astype(np.float64)
    return np.einsum("bkh,ih->bki", users, items).max(axis=1) / model.temperature


def given(histories: list[list[Any]]) -> tuple[list[Any], list[int]]:
    return [own for history in histories for own in history], [len(history) for history in histories]


def decoded(row: np.ndarray) -> list[Any]:
    return [own.decode() if isinstance(own, bytes) else int(own) for own in row]


LENGTHS = (0, 1, 6, 15, 3)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_the_nearest_are_the_best_of_all(
    exported: tuple[list[Any], RetrievalModel, Bundle], k: int, exclude: bool
) -> None:
    ids, model, bundle = exported
    histories = histories_of(ids, LENGTHS)
    found = bundle.recommend(*given(histories), Recommend(k, exclude_history=exclude))
    expected = all_logits(model, ids, histories)
    for row, history in enumerate(histories):
        if exclude:  # all of the history, not only what the model reads
            expected[row, [ids.index(own) for own in history if own in ids[:NUM_CANDIDATES]]] = -INF
        order = np.argsort(-expected[row], kind="stable")[:k]
        order = order[expected[row, order] > -INF]
        count = found["counts"][row]
        assert count == len(order)
        assert decoded(found["item_ids"][row][:count]) == [ids[place] for place in order]
        np.testing.assert_allclose(found["logits"][row][:count], expected[row, order], rtol=1e-5, atol=1e-5)
        assert (found["logits"][row][count:] == -INF).all()
        assert {*decoded(found["item_ids"][row][count:])} <= {"", -(2**63)}
    assert found["item_ids"].shape == (len(histories), min(k, NUM_CANDIDATES))


def test_other_signatures_agree(exported: tuple[list[Any], RetrievalModel, Bundle]) -> None:
    """Vectors of users and items give the logits of every signature; items beyond the candidates can be scored, too."""
    ids, model, bundle = exported
    histories = histories_of(ids, LENGTHS)
    flat, lengths = given(histories)
    users = bundle.embed_users(flat, lengths).astype(np.float64)
    items = bundle.embed_items(ids[:NUM_CANDIDATES])
    assert items["known"].all()
    products = np.einsum("bkh,ih->bki", users, items["embeddings"]).max(axis=1) / model.temperature
    np.testing.assert_allclose(products, all_logits(model, ids, histories), rtol=1e-5, atol=1e-5)
    ranked = bundle.rank_histories(
        flat, lengths, ids[:NUM_CANDIDATES] * len(histories), [NUM_CANDIDATES] * len(histories)
    )
    np.testing.assert_allclose(ranked.reshape(products.shape), products, rtol=1e-5, atol=1e-5)
    scored = bundle.score(flat, lengths, ids[3 : 3 + len(histories)])
    rows = np.arange(len(histories))
    np.testing.assert_allclose(scored, products[rows, rows + 3], rtol=1e-5, atol=1e-5)
    best = bundle.rank(histories[2], ids[:9], 4)
    assert best["places"].tolist() == np.argsort(-products[2, :9], kind="stable")[:4].tolist()


def test_blocks_and_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of five items find the same as one block; items of equal logits keep the order of the log."""
    config = dataclasses.replace(SMALL, model=ModelKind.COMIREC_SA)
    whole = made(config, tmp_path, WORDS)[1]
    for name in ("PRODUCTS_AT_ONCE", "MOST_ITEMS_AT_ONCE", "_FEWEST_ITEMS_AT_ONCE"):
        monkeypatch.setattr(retrieval_signatures, name, 5)
    (tmp_path / "blocks").mkdir()
    model, blocks = made(config, tmp_path / "blocks", WORDS)
    flat, lengths = given(histories_of(WORDS, LENGTHS))
    for k in (1, 7, 35):
        one, other = (bundle.recommend(flat, lengths, Recommend(k)) for bundle in (whole, blocks))
        for name, values in one.items():
            assert (values == other[name]).all() if name != "logits" else np.allclose(values, other[name], rtol=1e-6)
    for table in model.lookup.tables:
        table.assign(tf.zeros_like(table))
    (tmp_path / "ties").mkdir()
    own = (pa.chunked_array([WORDS]), {"category": pa.chunked_array([CATEGORIES])})
    signatures = RetrievalSignatures(model, *own, ONE_HISTORY, tmp_path / "ties", num_candidates=NUM_CANDIDATES)
    signatures.save(tmp_path / "ties" / "model")
    tied = Bundle(whole.manifest, tf.saved_model.load(str(tmp_path / "ties" / "model")))
    found = tied.recommend(["item 1", "item 4"], [2], Recommend(6))
    assert decoded(found["item_ids"][0]) == [f"item {number}" for number in (0, 2, 3, 5, 6, 7)]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> tuple[RetrievalModel, Bundle, Bundle]:
    """A model that finds, its export, and an export of DIN with that one inside. The folders of both are gone."""
    folder = tmp_path_factory.mktemp("cascade")
    model, inner = made(dataclasses.replace(SMALL, model=ModelKind.COMIREC_SA), folder, WORDS)
    retriever = retriever_of(inner, "string", [], ONE_HISTORY)
    outer = made(dataclasses.replace(SMALL, model=ModelKind.DIN), folder, WORDS, retriever)[1]
    return model, inner, outer


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize(("k", "num_retrieved"), [(4, 9), (9, 9), (50, 9), (5, 1000)])
def test_what_one_finds_the_other_ranks(
    cascade: tuple[RetrievalModel, Bundle, Bundle], k: int, num_retrieved: int, exclude: bool
) -> None:
    _, inner, outer = cascade
    histories = histories_of(WORDS, LENGTHS)
    flat, lengths = given(histories)
    found = outer.recommend(flat, lengths, Recommend(k, num_retrieved, exclude))
    retrieved = inner.recommend(flat, lengths, Recommend(num_retrieved, exclude_history=exclude))
    for row, history in enumerate(histories):
        items = decoded(retrieved["item_ids"][row][: retrieved["counts"][row]])
        logits = outer.rank_histories(history, [len(history)], items, [len(items)])
        order = np.argsort(-logits, kind="stable")[:k]
        count = found["counts"][row]
        assert count == len(order)
        assert decoded(found["item_ids"][row][:count]) == [items[place] for place in order]
        np.testing.assert_allclose(found["logits"][row][:count], logits[order], rtol=1e-5, atol=1e-6)
        probabilities = 1 / (1 + np.exp(-logits[order]))
        np.testing.assert_allclose(found["click_probability"][row][:count], probabilities, rtol=1e-5)
        assert (found["click_probability"][row][count:] == 0).all()


@pytest.mark.parametrize("name", ["", "view"])
def test_the_one_that_finds_reads_one_of_several_histories(
    cascade: tuple[RetrievalModel, Bundle, Bundle], name: str, tmp_path: Path
) -> None:
    inner = cascade[1]
    retriever = retriever_of(inner, "string", [], BUY_AND_VIEW, name)
    config = dataclasses.replace(SMALL, model=ModelKind.DIN)
    outer = made(config, tmp_path, WORDS, retriever, BUY_AND_VIEW)[1]
    behaviours = [("item 1", "buy"), ("item 8", "view"), ("item 2", "buy"), ("item 3", "view"), ("item 9", "view")]
    ids, names = map(list, zip(*behaviours, strict=True))
    lengths = [2, 3]
    found = outer.recommend(GivenBehaviours(ids, names), lengths, Recommend(7, 7))
    assert outer.manifest.retriever == retriever.described
    read = name or "buy"
    for row, (low, high) in enumerate([(0, 2), (2, 5)]):
        own = [item for item, of in behaviours[low:high] if of == read]
        expected = inner.recommend(own, [len(own)], Recommend(7))["item_ids"][0]
        assert {*decoded(found["item_ids"][row])} == {*decoded(expected)}


def test_an_export_that_only_ranks_recommends_nothing(tmp_path: Path) -> None:
    bundle = made(dataclasses.replace(SMALL, model=ModelKind.DIN), tmp_path, WORDS)[1]
    with pytest.raises(InputError, match="must be an export that finds items. Received: one that ranks given cand"):
        bundle.recommend(["item 1"], [1], Recommend())


def feature(name: str, kind: str = "category", owner: str = "user") -> FeatureInputs:
    return FeatureInputs(name, owner, kind, "string", [f"{owner}_{name}"], "")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"finds_items": False}, {}, "must be an export of a model that finds items. Received: one with --model=din."),
        ({}, {"item_id_type": "integer"}, "must have item ids of the job's type. Received: string ids, and integer"),
        ({"features": (feature("age"),)}, {}, "must read features that the job has, too. Received: user feature 'age'"),
        (
            {"features": (feature("age"),)},
            {"features": [feature("age", "number")]},
            "must read features that the job has, too. Received: user feature 'age' (category), which",
        ),
        (
            {},
            {"history": "buy"},
            "--retriever_history: must be one of the job's several --histories. Received: 'buy', ",
        ),
        ({}, {"histories": BUY_AND_VIEW, "history": "cart"}, "Received: 'cart', and buy, view. Name one of these"),
    ],
)
def test_exports_that_do_not_fit(
    cascade: tuple[RetrievalModel, Bundle, Bundle], changes: dict, arguments: dict, message: str
) -> None:
    inner = cascade[1]
    own: Manifest = dataclasses.replace(inner.manifest, settings={"model": {"model": "din"}}, **changes)
    fitting: dict[str, Any] = {"item_id_type": "string", "features": [], "histories": ONE_HISTORY}
    with pytest.raises(InputError) as refusal:
        retriever_of(Bundle(own, inner.program), **fitting | arguments)
    assert message in str(refusal.value)

"""The models that find items: against the padded float64 originals, forward and backward, and among their own forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

from din_dist.assembly import make_model
from din_dist.config import (
    EvaluateWith,
    InterestWeights,
    ModelConfig,
    ModelKind,
    PositionVectors,
    Readout,
    SessionQuery,
    SessionReadout,
)
from din_dist.models.retrieval_model import RetrievalModel
from din_dist.schema import Batch
from tests.support.model_kinds import RETRIEVAL
from tests.support.reference import padded_retrieval as padded
from tests.support.reference.compare import CATEGORY_OF, FACTS, ITEM_FEATURES, NUM_ITEMS, randomise

HISTORIES = [[3, 1, 4, 1], [], [5], [9, 2, 6, 5, 3, 5, 9, 2], [7, 7], [8, 2, 8, 1, 8, 2, 12]]
TARGETS = [3, 7, 12, 2, 7, 10]
SAMPLED = [1, 7, 11, 11, 4, 2, 9]  # targets among them, and one twice
AGES = [0.0, 1.0, 0.25, 0.5, 0.04, 0.81]
LONGEST = max(map(len, HISTORIES))
FORMS: list[dict] = [
    *({"model": ModelKind.YOUTUBE_DNN, "tower_units": units} for units in ((), (6,), (6, 5))),
    {"model": ModelKind.YOUTUBE_DNN, "tower_units": (6,), "example_age": True},
    *(
        {"model": ModelKind.COMIREC_SA, "positions": positions, "interest_weights": weights}
        for positions, weights in itertools.product(PositionVectors, InterestWeights)
    ),
    {"model": ModelKind.COMIREC_DR},
    {"model": ModelKind.MIND},
    *(
        {"model": ModelKind.SR_GNN, "session_readout": readout, "session_query": query}
        for readout, query in itertools.product(SessionReadout, SessionQuery)
    ),
]


def retrieval_model(**config) -> RetrievalModel:
    """Returns a model of embeddings 3 + 2 whose weights are random."""
    sizes = {"embedding_dim": (3, 2), "num_interests": 3, "num_positions": LONGEST + 1}
    model = make_model(ModelConfig(**(sizes | config)), FACTS, ITEM_FEATURES, seed=1)
    assert isinstance(model, RetrievalModel)
    randomise(model, 2)
    return model


def packed(targets: list[int] = TARGETS, histories: list[list[int]] = HISTORIES) -> Batch:
    items = [item for history in histories for item in history]
    distinct, index = np.unique([*targets, *items, *SAMPLED], return_inverse=True)
    random = np.random.default_rng(3)
    return Batch(
        candidate_item_ids=tf.constant(targets, tf.int32),
        history_item_ids=tf.constant(items, tf.int32),
        history_lengths=tf.constant([*map(len, histories)], tf.int32),
        distinct_item_ids=tf.constant(distinct, tf.int32),
        item_index=tf.constant(index, tf.int32),
        sampled_item_ids=tf.constant(SAMPLED, tf.int32),
        sampled_offsets=tf.constant(random.normal(size=len(SAMPLED)), tf.float32),
        logit_offsets=tf.constant(random.normal(size=len(targets)), tf.float32),
        example_ages=tf.constant(AGES, tf.float32),
    )


def weights_of(model: RetrievalModel) -> dict[str, np.ndarray]:
    """Returns the weights in float64, by their paths without the model's name."""
    return {weight.path.removeprefix("model/"): weight.numpy().astype(np.float64) for weight in model.weights}


class Reference:
    """The padded original of a model. Choices of capsules stay those of the first call, as no gradient flows there."""

    def __init__(self, config: dict) -> None:
        self._config, self._choices = config, []

    def table(self, weights: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the vectors of all items, `[num_items + 1, H]`."""
        return np.concatenate([weights["lookup/item"], weights["lookup/category_id"][CATEGORY_OF]], axis=1)

    def interests(self, weights: dict[str, np.ndarray], ages: list[float] | None = None) -> np.ndarray:
        """Returns `[B, K, H]`, in training with the ages of the examples."""
        table = self.table(weights)
        mask = np.array([[1.0] * len(row) + [0.0] * (LONGEST - len(row)) for row in HISTORIES])
        ids = np.array([row + [0] * (LONGEST - len(row)) for row in HISTORIES])
        rows = table[ids] * mask[..., None]
        match self._config["model"]:
            case ModelKind.YOUTUBE_DNN:
                if not self._config.get("example_age"):
                    return padded.youtube_dnn(weights, rows, mask)
                return padded.youtube_dnn(weights, rows, mask, padded.age_columns(ages or [0.0] * len(HISTORIES)))
            case ModelKind.COMIREC_SA:
                with_softmax = self._config["interest_weights"] is InterestWeights.SOFTMAX
                return padded.comirec_sa(weights, rows, mask, with_softmax=with_softmax)
            case ModelKind.COMIREC_DR:
                return padded.comirec_dr(weights, rows, mask, self._choices)
            case ModelKind.MIND:
                return padded.mind(weights, rows, mask, self._choices)
            case _:
                readout, query = self._config["session_readout"], self._config["session_query"]
                return padded.sr_gnn(weights, HISTORIES, table, readout=readout, query=query)

    def losses(self, weights: dict[str, np.ndarray], batch: Batch) -> np.ndarray:
        """Returns the loss of each example `[B]`, written out example by example."""
        normalizes = self._config.get("normalize_vectors", False)
        table, interests = self.table(weights), self.interests(weights, AGES)
        if normalizes:
            table, interests = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (table, interests))
        hard = self._config.get("readout", Readout.HARD) is Readout.HARD
        users = padded.read_out(interests, table[TARGETS], hard=hard)
        losses = []
        for row, target in enumerate(TARGETS):
            logits = [users[row] @ table[target] / self._temperature + float(batch.logit_offsets[row])]
            for item, offset in zip(SAMPLED, batch.sampled_offsets.numpy(), strict=True):
                if item != target:
                    logits.append(users[row] @ table[item] / self._temperature + float(offset))
            losses.append(-logits[0] + np.log(np.exp(logits).sum()))
        return np.array(losses)

    @property
    def _temperature(self) -> float:
        return self._config.get("temperature", 1.0)


def name_of(config: dict) -> str:
    return "-".join(map(str, config.values()))


@pytest.mark.parametrize("config", FORMS, ids=name_of)
def test_users_are_those_of_the_padded_original(config: dict) -> None:
    model = retrieval_model(**config)
    expected = Reference(config).interests(weights_of(model))
    assert np.ptp(expected, axis=0).max(axis=-1).min() > 1e-3  # users differ
    assert_allclose(model.users(packed()), expected, rtol=2e-5, atol=2e-6)


def slope(
    loss: Callable[[dict[str, np.ndarray]], float], weights: dict[str, np.ndarray], name: str, way: np.ndarray
) -> float:
    """Returns the derivative of the loss in a direction of one weight, by central differences."""
    ends = [loss(weights | {name: weights[name] + sign * 1e-5 * way}) for sign in (1, -1)]
    return (ends[0] - ends[1]) / 2e-5


MORE_FORMS = [
    *FORMS,
    {"model": ModelKind.COMIREC_SA, "interest_weights": InterestWeights.SOFTMAX, "readout": Readout.SOFT},
    {"model": ModelKind.YOUTUBE_DNN, "normalize_vectors": True, "temperature": 0.2},
]


@pytest.mark.parametrize("config", MORE_FORMS, ids=name_of)
def test_loss_and_gradients_are_those_of_the_padded_original(config: dict) -> None:
    """In random directions of each weight, by differences of the reference in float64."""
    model, batch, reference = retrieval_model(**config), packed(), Reference(config)
    weights = weights_of(model)
    with tf.GradientTape() as tape:
        losses = model.losses(batch)
        total = tf.reduce_sum(losses)
    assert_allclose(losses, reference.losses(weights, batch), rtol=2e-5, atol=2e-6)
    variables = model.trainable_weights
    gradients = tape.gradient(total, [variable.value for variable in variables])
    random = np.random.default_rng(5)
    for variable, gradient in zip(variables, gradients, strict=True):
        name, found = variable.path.removeprefix("model/"), tf.convert_to_tensor(gradient).numpy().astype(np.float64)
        for _ in range(3):
            way = random.normal(size=found.shape)
            expected = slope(lambda changed: reference.losses(changed, batch).sum(), weights, name, way)
            assert np.sum(found * way) == pytest.approx(expected, rel=2e-3, abs=2e-4), name


@pytest.mark.parametrize("kind", RETRIEVAL)
@pytest.mark.parametrize("evaluate_with", EvaluateWith)
def test_logits_are_the_largest_products(kind: ModelKind, evaluate_with: EvaluateWith) -> None:
    """By the model itself, by `score_candidates`, and by hand."""
    model, batch = retrieval_model(model=kind, evaluate_with=evaluate_with, temperature=0.5), packed()
    users = model.users(batch).numpy()
    assert users.shape[1] == (3 if kind.has_positions and evaluate_with is EvaluateWith.INTERESTS else 1)
    vectors = model.items(tf.constant(TARGETS, tf.int32)).numpy()
    expected = np.einsum("bkh,bh->bk", users, vectors).max(axis=1) / 0.5
    assert np.ptp(expected) > 0.05
    without_distinct = batch._replace(distinct_item_ids=None, item_index=None, sampled_item_ids=(), sampled_offsets=())
    assert_allclose(model(batch), expected, rtol=1e-5, atol=1e-6)
    assert_allclose(model(without_distinct), expected, rtol=1e-5, atol=1e-6)
    counts = tf.ones([len(TARGETS)], tf.int32)
    given = (batch.history_item_ids, batch.history_lengths, batch.candidate_item_ids, counts)
    assert_allclose(model.score_candidates(*given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("readout", Readout)
def test_with_a_readout_the_newest_item_asks(readout: Readout) -> None:
    model = retrieval_model(model=ModelKind.COMIREC_SA, readout=readout, evaluate_with=EvaluateWith.READOUT)
    config = {"model": ModelKind.COMIREC_SA, "interest_weights": InterestWeights.SOFTMAX}
    weights, reference = weights_of(model), Reference(config)
    newest = np.array([reference.table(weights)[row[-1]] if row else np.zeros(5) for row in HISTORIES])
    expected = padded.read_out(reference.interests(weights), newest, hard=readout is Readout.HARD)
    assert_allclose(model.users(packed())[:, 0], expected, rtol=2e-5, atol=2e-6)


def test_the_best_over_interests_is_the_merged_list_of_each() -> None:
    """Each interest finds its best items and the lists are merged, as in ComiRec; we score each item once."""
    model = retrieval_model(model=ModelKind.COMIREC_SA)
    users, items = model.users(packed()).numpy(), model.items(tf.range(1, NUM_ITEMS + 1)).numpy()
    for interests in users[[0, 3, 5]]:
        merged: dict[int, float] = {}
        for interest in interests:
            scores = items @ interest
            for item in np.argsort(-scores)[:4]:
                merged[item] = max(merged.get(item, -np.inf), scores[item])
        by_lists = sorted(merged, key=lambda item: -merged[item])[:4]
        assert by_lists == np.argsort(-(items @ interests.T).max(axis=1))[:4].tolist()


def test_the_loss_is_tensorflows_sampled_softmax() -> None:
    """Of the same candidates, expected counts and removal of hits."""
    model, batch = retrieval_model(model=ModelKind.YOUTUBE_DNN), packed()
    table = model.items(tf.range(NUM_ITEMS + 1))
    users = model.users(batch)[:, 0]
    sampled = (
        tf.constant(SAMPLED, tf.int64),
        tf.exp(-batch.logit_offsets)[:, None],
        tf.exp(-batch.sampled_offsets),
    )
    expected = tf.nn.sampled_softmax_loss(
        table,
        tf.zeros([NUM_ITEMS + 1]),
        tf.constant(TARGETS, tf.int64)[:, None],
        users,
        len(SAMPLED),
        NUM_ITEMS + 1,
        sampled_values=sampled,
    )
    assert_allclose(model.losses(batch), expected, rtol=1e-5, atol=1e-6)

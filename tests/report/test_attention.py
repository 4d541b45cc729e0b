"""Which examples are shown, and that what is shown of them is what the model does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose

from din_dist import assembly
from din_dist.config import AttentionNormalization, ModelKind, Split
from din_dist.data.pipeline import evaluation_batches
from din_dist.data.prepared import prepare
from din_dist.data.splits import split_examples
from din_dist.report import attention
from din_dist.report.scoring import MODEL, ScoredExamples
from din_dist.schema import Batch
from tests.support.small_log import small_config


def scored(logits, labels, lengths, users=None) -> ScoredExamples:
    users = np.arange(len(logits)) if users is None else np.array(users)
    return ScoredExamples({MODEL: np.array(logits)}, np.array(labels), users, users, np.array(lengths), draws_per_row=1)


def test_choice_by_hand() -> None:
    """Most and least probable positives and negatives with a history worth seeing, then the longest of what is left."""
    logits = [9.0, 5.0, -4.0, -6.0, 3.0, 2.0, 0.0, 0.1]
    labels = [1, 1, 1, 0, 0, 0, 1, 0]
    lengths = [0, 6, 7, 8, 9, 6, 50, 40]  # the surest one has no history
    assert attention.choose(scored(logits, labels, lengths), per_kind=1) == {
        "confidently right": [1, 3],
        "confidently wrong": [2, 4],
        "long history": [6, 7],
    }


def test_a_user_comes_once() -> None:
    found = attention.choose(scored([5.0, 4.0, 3.0], [1, 1, 1], [9, 9, 9], users=[1, 1, 2]), per_kind=2)
    assert found == {"confidently right": [0, 2], "confidently wrong": [], "long history": []}


def test_nobody_has_a_history() -> None:
    found = attention.choose(scored([1.0, 2.0], [1, 0], [0, 0]))
    assert not any(found.values())


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory):
    config = small_config(tmp_path_factory.mktemp("log"), split=Split.LEAVE_TWO_OUT, max_history_length=24)
    store = prepare(config.data)
    return config, store, split_examples(store, config.data)["test"]


def batch_of(parts) -> Batch:
    """The whole split."""
    config, store, examples = parts
    (batch,) = evaluation_batches(store, examples, config.data, seed=config.job.seed, batch_size=10_000)
    return batch


@pytest.mark.parametrize("normalization", AttentionNormalization)
def test_what_is_shown_is_what_the_model_does(parts, normalization) -> None:
    """The shown examples against the whole split in one batch: ids, label, probability and every weight."""
    config, store, examples = parts
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_normalization=normalization))
    model = assembly.make_model(config.model, store.facts, store.item_features, seed=3)
    batch = batch_of(parts)
    lengths = batch.history_lengths.numpy()
    ends = np.cumsum(lengths)
    weights, logits = model.attention_weights(batch).numpy(), model(batch).numpy()
    longest, other, last = int(np.argmax(lengths)), int(np.flatnonzero(lengths > 1)[3]), len(lengths) - 1
    shown = attention.show(model, config, store, examples, {"a": [longest, other], "b": [last]})
    assert [example.kind for example in shown] == ["a", "a", "b"]
    for place, example in zip((longest, other, last), shown, strict=True):
        here = slice(ends[place] - lengths[place], ends[place])
        history = store.own_ids("items", batch.history_item_ids.numpy()[here])
        assert example.item == store.own_ids("items", [batch.candidate_item_ids.numpy()[place]])[0]
        assert example.user == store.own_ids("users", [examples.user_of_example()[place] + 1])[0]
        assert example.label == batch.labels.numpy()[place]
        assert example.probability == pytest.approx(1 / (1 + np.exp(-logits[place])), abs=1e-6)
        assert example.history_length == len(history)
        for behaviour in example.behaviours:
            from_end = len(history) - behaviour.age
            assert behaviour.item == history[from_end]
            assert behaviour.category == f"c{int(behaviour.item[1:]) % 5}"
            assert behaviour.same_item == (behaviour.item == example.item)
            assert behaviour.same_category == (behaviour.category == example.category)
            assert_allclose(behaviour.weight, weights[here][from_end], rtol=1e-4, atol=1e-6)
        total = sum(behaviour.weight for behaviour in example.behaviours) + example.weight_of_rest
        assert_allclose(total, weights[here].sum(), rtol=1e-4, atol=1e-5)
        assert len(example.behaviours) + example.num_rest == len(history)
    long = shown[0]
    assert long.num_rest > 0
    assert [behaviour.age for behaviour in long.behaviours] == sorted(behaviour.age for behaviour in long.behaviours)
    smallest = min(abs(behaviour.weight) for behaviour in long.behaviours)
    here = slice(ends[longest] - lengths[longest], ends[longest])
    assert (np.abs(weights[here]) > smallest * 1.0001).sum() < len(long.behaviours)


def test_each_history_is_shown_with_its_own_weights(tmp_path) -> None:
    """Against the whole split in one batch, where the histories of one name follow those of the other."""
    histories = ("all:6", "skipped:4")
    times = {"split": Split.TEMPORAL, "validation_from": 2, "test_from": 3}
    config = small_config(tmp_path, labels=True, histories=histories, **times)
    store = prepare(config.data)
    examples = split_examples(store, config.data)["test"]
    model = assembly.make_model(config.model, store.facts, store.item_features, seed=3)
    batch = batch_of((config, store, examples))
    lengths = batch.history_lengths.numpy()
    num_examples = len(lengths) // 2
    ends, weights = np.cumsum(lengths), model.attention_weights(batch).numpy()
    both = [place for place in range(num_examples) if lengths[place] and lengths[num_examples + place]]
    one = int(np.flatnonzero((lengths[:num_examples] > 0) & (lengths[num_examples:] == 0))[0])
    shown = attention.show(model, config, store, examples, {"a": [both[0]], "b": [one]})
    assert [(example.kind, example.history) for example in shown] == [("a", "all"), ("a", "skipped"), ("b", "all")]
    for example, place in zip(shown, (both[0], num_examples + both[0], one), strict=True):
        own = slice(ends[place] - lengths[place], ends[place])
        newest_first = store.own_ids("items", batch.history_item_ids.numpy()[own])[::-1]
        assert [behaviour.item for behaviour in example.behaviours] == newest_first
        assert_allclose([behaviour.weight for behaviour in example.behaviours], weights[own][::-1], rtol=1e-4)
    found = attention.averages(model, config, store, examples)
    assert [average.history for average in found] == ["all", "skipped"]
    counts = [np.count_nonzero(of_name > 1) for of_name in np.split(lengths, 2)]
    assert [average.num_examples for average in found] == counts


def test_averages_by_hand(parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two examples with hand-made weights; items 1 and 2 have the features 1 and 2."""
    config, store, examples = parts
    features = np.zeros(store.facts.num_items + 1, np.int32)
    features[[1, 2]] = 1, 2
    store = dataclasses.replace(store, item_features={"kind": features})
    made = [
        attention.WeighedExample(0, 1, 1, 0.5, np.array([1, 2]), np.array([0.7, 0.3])),
        attention.WeighedExample(1, 2, 0, 0.5, np.array([1, 1, 2, 1]), np.array([0.1, 0.1, 0.6, 0.2])),
        attention.WeighedExample(2, 2, 0, 0.5, np.array([1]), np.array([1.0])),  # one behaviour: nothing to weigh
    ]
    monkeypatch.setattr(attention, "weighed_examples", lambda *arguments: iter(made))
    (found,) = attention.averages(None, config, store, examples)
    assert found.num_examples == 2
    # Newest: .3 * 2 and .2 * 4; next: .7 * 2 and .6 * 4; ages 3 and 4 ("3-5"): .1 * 4 twice.
    assert [(name, count) for name, _, count in found.by_age] == [("1", 2), ("2", 2), ("3–5", 2)]
    assert [ratio for _, ratio, _ in found.by_age] == pytest.approx([0.7, 1.9, 0.4])
    # The same item as the candidate: half and a quarter of the history; .7 and .6 of the attention.
    assert found.same == [(name, 2, pytest.approx(0.375), pytest.approx(0.65)) for name in ("item", "kind")]


def test_without_shares_there_are_no_averages(parts) -> None:
    config, store, examples = parts
    for changes in ({"model": ModelKind.MEAN_POOLING}, {"attention_normalization": AttentionNormalization.NONE}):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        model = assembly.make_model(changed.model, store.facts, store.item_features, seed=3)
        assert attention.averages(model, changed, store, examples) == []


def test_mean_pooling_shows_histories_without_weights(parts) -> None:
    config, store, examples = parts
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, model=ModelKind.MEAN_POOLING))
    model = assembly.make_model(config.model, store.facts, store.item_features, seed=3)
    longest = int(np.argmax(batch_of(parts).history_lengths))
    (example,) = attention.show(model, config, store, examples, {"a": [longest]})
    assert {behaviour.weight for behaviour in example.behaviours} == {None}
    assert [behaviour.age for behaviour in example.behaviours] == list(range(1, 13))  # the newest

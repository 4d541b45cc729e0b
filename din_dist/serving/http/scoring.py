"""Scores the instances of several requests in as few calls of the model as possible."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from din_dist.features.encoding import Lists
from din_dist.serving.asked import Recommend
from din_dist.serving.given_behaviours import GivenBehaviours
from din_dist.serving.http.parse import Id, Instance, Vocabulary
from din_dist.serving.manifest import FeatureInputs

_MISSING: dict[str, Id] = {"string": "", "integer": -(2**63)}  # a feature with this value is looked up by the item id


class Scorer(Protocol):
    """The part of a `Bundle` that the server uses. Without declared features it is given none."""

    def score(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        candidate_item_ids: Any,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> np.ndarray: ...

    def rank_histories(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        candidate_item_ids: Any,
        candidate_counts: Any,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> np.ndarray: ...

    def recommend(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        asked: Recommend,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]: ...

    def score_with_features(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        candidate_item_ids: Any,
        history_features: Mapping[str, Any],
        candidate_features: Mapping[str, Any],
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> np.ndarray: ...


def score_together(scorer: Scorer, vocabulary: Vocabulary, instances: Sequence[Instance]) -> list[Any]:
    """Returns the logits `[C]` of each instance, from one call for instances with features and one for the others.

    Those that ask for items get lists by the names of outputs, from one call for each kind of request.
    """
    found: dict[int, Any] = {}
    for asked in dict.fromkeys(instance.recommend for instance in instances if instance.recommend):
        indices = [index for index, instance in enumerate(instances) if instance.recommend == asked]
        found.update(zip(indices, _recommend(scorer, vocabulary, [instances[i] for i in indices], asked), strict=True))
    for has_features, score in ((False, _score_plain), (True, _score_with_features)):
        indices = [
            index
            for index, instance in enumerate(instances)
            if instance.has_features is has_features and instance.recommend is None
        ]
        if indices:
            group = [instances[index] for index in indices]
            logits = score(scorer, vocabulary, group)
            ends = np.cumsum([len(instance.candidates) for instance in group])
            found.update(zip(indices, np.split(logits, ends[:-1]), strict=True))
    return [found[index] for index in range(len(instances))]


def warm_up(scorer: Scorer, vocabulary: Vocabulary) -> None:
    """Runs every path with few and with many rows, so that no request waits for TensorFlow's preparations."""
    item: Id = "" if vocabulary.item_id_type == "string" else 0
    for length, count, num_rows in ((0, 1, 1), (1, 1, 1), (vocabulary.max_history_length, 1, 64), (9, 5, 16)):
        plain = Instance([item] * length, [item] * count, names=[*vocabulary.histories[:1]] * length)
        score_together(scorer, vocabulary, [plain] * num_rows)
        if vocabulary.item_features:
            unknown: dict[str, list[Id | None]] = {name: [None] * count for name in vocabulary.item_features}
            featured = dataclasses.replace(plain, candidate_features=unknown)
            score_together(scorer, vocabulary, [featured] * num_rows)
        if vocabulary.recommends:
            asking = dataclasses.replace(plain, candidates=[], recommend=Recommend(count))
            score_together(scorer, vocabulary, [asking] * num_rows)


def _recommend(
    scorer: Scorer, vocabulary: Vocabulary, group: Sequence[Instance], asked: Recommend
) -> list[dict[str, list]]:
    """Returns the items of each instance with their logits, as lists by the names of outputs."""
    given = _own_features(vocabulary, group, group)
    given.pop("candidate", None)
    lengths = _lengths(instance.history for instance in group)
    outputs = scorer.recommend(_behaviours(vocabulary, group), lengths, asked, **given)
    counts = outputs.pop("counts").tolist()
    columns = {name: values.tolist() for name, values in outputs.items()}
    if vocabulary.item_id_type == "string":
        columns["item_ids"] = [[own.decode() for own in row] for row in columns["item_ids"]]
    names = ["item_ids", *sorted(columns.keys() - {"item_ids"})]
    return [{name: columns[name][row][:count] for name in names} for row, count in enumerate(counts)]


def _score_plain(scorer: Scorer, vocabulary: Vocabulary, group: Sequence[Instance]) -> np.ndarray:
    kind = vocabulary.item_id_type
    histories = _behaviours(vocabulary, group)
    lengths = _lengths(instance.history for instance in group)
    candidates = _column(kind, (instance.candidates for instance in group))
    given = _own_features(vocabulary, group, group)
    if len(candidates) == len(group):
        return scorer.score(histories, lengths, candidates, **given)
    counts = _lengths(instance.candidates for instance in group)
    return scorer.rank_histories(histories, lengths, candidates, counts, **given)


def _score_with_features(scorer: Scorer, vocabulary: Vocabulary, group: Sequence[Instance]) -> np.ndarray:
    """Returns the logits of instances with features.

    Each candidate gets a copy of its history, because no signature takes several candidates and features per history.
    """
    kind = vocabulary.item_id_type
    repeated = [instance for instance in group for _ in instance.candidates]
    history_features = {
        name: _column(type_, (_values(one.history_features, name, type_, len(one.history)) for one in repeated))
        for name, type_ in vocabulary.item_features.items()
    }
    candidate_features = {
        name: _column(type_, (_values(one.candidate_features, name, type_, len(one.candidates)) for one in group))
        for name, type_ in vocabulary.item_features.items()
    }
    return scorer.score_with_features(
        _behaviours(vocabulary, repeated),
        _lengths(instance.history for instance in repeated),
        _column(kind, (instance.candidates for instance in group)),
        history_features,
        candidate_features,
        **_own_features(vocabulary, repeated, group),
    )


def _behaviours(vocabulary: Vocabulary, instances: Sequence[Instance]) -> Any:
    """Returns the histories concatenated, as `Bundle.score` takes them."""
    ids = _column(vocabulary.item_id_type, (instance.history for instance in instances))
    features = {}
    for name, feature in vocabulary.features_of("history").items():
        missing = ([None] * len(one.history) for one in instances)
        parts = (one.behaviour_features.get(name, none) for one, none in zip(instances, missing, strict=True))
        features[name] = _as_given(feature, [*itertools.chain.from_iterable(parts)])
    if not vocabulary.histories and not features:
        return ids
    names = _column("string", (instance.names for instance in instances)) if vocabulary.histories else None
    return GivenBehaviours(ids, names, features)


def _own_features(
    vocabulary: Vocabulary, histories: Sequence[Instance], group: Sequence[Instance]
) -> dict[str, dict[str, Any]]:
    """Returns declared features as `Bundle.score` takes them, by owner; nothing without such features.

    Args:
        vocabulary: of the model.
        histories: an instance for each history.
        group: the instances, each once.
    """
    found: dict[str, dict[str, Any]] = {}
    for feature in vocabulary.features:
        name = feature.name
        if feature.owner == "history":
            continue  # behaviours have them
        if feature.owner == "candidate":
            values = [value for one in group for value in one.own_features.get(name) or [None] * len(one.candidates)]
        else:
            values = [getattr(one, feature.owner).get(name) for one in histories]
        found.setdefault(feature.owner, {})[name] = _as_given(feature, values)
    return found


def _as_given(feature: FeatureInputs, values: Sequence[Any]) -> Any:
    """Returns n values of a feature, None where they are missing, as `Bundle.score` takes them."""
    if feature.is_list:
        pairs = [value if isinstance(value, tuple) else (value or [], []) for value in values]
        weights = np.array([weight for _, part in pairs for weight in part], np.float32) if feature.weights else None
        return Lists(_column(feature.type, (part for part, _ in pairs)), _lengths(part for part, _ in pairs), weights)
    if feature.dimension:
        none = [math.nan] * feature.dimension
        return np.array([none if value is None else value for value in values], np.float32).reshape(-1, len(none))
    if feature.type == "number":
        return np.array([math.nan if value is None else value for value in values], np.float32)
    missing = _MISSING[feature.type]
    return _column(feature.type, [[missing if value is None else value for value in values]])


def _values(given: Mapping[str, list[Id | None]], name: str, type_: str, length: int) -> list[Id]:
    missing = _MISSING[type_]
    return [missing if value is None else value for value in given.get(name, [None] * length)]


def _column(kind: str, parts: Iterable[Sequence[Id]]) -> np.ndarray:
    return np.array(list(itertools.chain.from_iterable(parts)), dtype=object if kind == "string" else np.int64)


def _lengths(parts: Iterable[Sequence[Id]]) -> np.ndarray:
    return np.fromiter(map(len, parts), dtype=np.int64)

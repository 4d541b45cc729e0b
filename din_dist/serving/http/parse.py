"""Parses the bodies of requests and writes the answers: TensorFlow Serving's predict API, with our signatures.

A body has rows, `{"instances": [...]}`, or columns, `{"inputs": {...}}`, as clients of TensorFlow Serving send them.
Unlike there, the histories of rows may differ in length. A request that is parsed cannot fail in the model, so one
request never harms the others of its batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import numpy as np

from din_dist.serving.asked import NUM_RETRIEVED, RECOMMEND, Recommend
from din_dist.serving.given_behaviours import NAMES
from din_dist.serving.http.settings import ServeConfig
from din_dist.serving.manifest import FeatureInputs, Manifest
from din_dist.serving.predictions import Predictions

Id = str | int
HISTORY = "history_item_ids"
SCORE, SCORE_PADDED, RANK = "score", "score_padded", "rank"
SIGNATURES = (SCORE, SCORE_PADDED, RANK)
DEFAULT_SIGNATURE = "serving_default"  # another name of `score`
_INT64 = np.iinfo(np.int64)
_LARGEST = float(np.finfo(np.float32).max)
_MOST_SHOWN = 60  # characters of a value that an error shows
_MOST_LISTED = 3  # values of a list that an error shows


class BadRequest(ValueError):
    """A mistake of the client; the text explains it in one line."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The types of ids and feature values, each "string" or "integer", and the longest history.

    Attributes:
        item_id_type: of items.
        item_features: name of an item feature -> type of its values.
        max_history_length: the number of newest behaviours that the model reads.
        features: the declared features of users, contexts, candidates and behaviours.
        histories: the names of several histories; empty if there is one.
        recommends: the export finds items.
        finds_items: its own model does, and gives no probabilities.
    """

    item_id_type: str
    item_features: Mapping[str, str]
    max_history_length: int
    features: tuple[FeatureInputs, ...] = ()
    histories: tuple[str, ...] = ()
    recommends: bool = False
    finds_items: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Returns the vocabulary of an export."""
        features = tuple(feature for feature in manifest.features if feature.owner != "item")
        return cls(
            manifest.item_id_type,
            manifest.item_features,
            manifest.max_history_length,
            features,
            tuple(manifest.histories),
            manifest.recommends,
            manifest.finds_items,
        )

    def features_of(self, owner: str) -> dict[str, FeatureInputs]:
        """Returns the declared features of an owner by name."""
        return {feature.name: feature for feature in self.features if feature.owner == owner}


@dataclasses.dataclass(slots=True)
class Instance:
    """One history, cut to the part that the model reads, and the candidates to score against it.

    A feature has a value for each item, or is missing. A value of None is looked up by the item id. Features of the
    user and the context have one value, and the candidates' own one for each. There None is a missing value, and a list
    with weights is a pair of lists.
    """

    history: list[Id]
    candidates: list[Id]
    history_features: dict[str, list[Id | None]] = dataclasses.field(default_factory=dict)
    candidate_features: dict[str, list[Id | None]] = dataclasses.field(default_factory=dict)
    most: int | None = None  # for `rank`: the number of candidates to return
    user: dict[str, Any] = dataclasses.field(default_factory=dict)
    context: dict[str, Any] = dataclasses.field(default_factory=dict)
    own_features: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    names: list[str] = dataclasses.field(default_factory=list)  # of several histories, that of each of `history`
    behaviour_features: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # a value for each of `history`
    recommend: Recommend | None = None  # the request for items, in the place of candidates

    @property
    def num_candidates(self) -> int:
        """The number of items to score."""
        return self.recommend.num_retrieved if self.recommend else len(self.candidates)

    @property
    def num_positions(self) -> int:
        return self.num_candidates * max(len(self.history), 1)

    @property
    def has_features(self) -> bool:
        return bool(self.history_features or self.candidate_features)


@dataclasses.dataclass(slots=True)
class Predict:
    """A parsed request."""

    signature: str
    in_rows: bool
    instances: list[Instance]

    @property
    def num_candidates(self) -> int:
        return sum(instance.num_candidates for instance in self.instances)

    @property
    def num_positions(self) -> int:
        return sum(instance.num_positions for instance in self.instances)


def signature_of(body: object) -> str:
    """Returns the signature that a body names, or "none": a label for metrics, also of refused requests."""
    name = body.get("signature_name", SCORE) if isinstance(body, dict) else None
    return name if name in SIGNATURES else SCORE if name == DEFAULT_SIGNATURE else "none"


def most_parts(vocabulary: Vocabulary, limits: ServeConfig) -> int:
    """Returns the number of lists, objects and keys of the largest allowed request."""
    features = len(vocabulary.item_features)
    # 3 objects with 5 keys and 2 lists; for each feature, a key and a list for the history and for the candidates.
    per_instance = 10 + 4 * features + (2 if vocabulary.histories else 0)
    if vocabulary.features:  # 2 objects with a key; for each feature a key, and 2 keys and 2 lists in an object
        per_instance += 4 + 6 * len(vocabulary.features)
    of_candidates = [feature for feature in vocabulary.features if feature.owner == "candidate"]
    nested = sum(5 if feature.weights else 1 for feature in of_candidates if feature.is_list or feature.dimension)
    return 8 + per_instance * limits.max_instances + nested * limits.max_candidates


def load(body: bytes, most: int) -> object:
    """Parses the JSON of a body.

    Args:
        body: the decoded body.
        most: the most lists, objects and keys.

    Raises:
        BadRequest: the body is not strict JSON in UTF-8, or it has too many lists, objects and keys.
    """
    _check_parts(body, most)
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=without_repeats)
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body must be UTF-8. Received: byte {body[error.start]:#x} at {error.start}.") from None
    except RecursionError:
        raise BadRequest("The body must be a JSON object. Received: lists or objects nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"The body must be JSON. Received: {error.msg} at character {error.pos}.") from None
    except BadRequest:
        raise
    except ValueError:  # int() refuses more digits than Python converts
        raise BadRequest("The body must have integers of 64 bits. Received: one with thousands of digits.") from None


def _check_parts(body: bytes, most: int) -> None:
    """Refuses bodies with so many parts that their objects take long to make: 1 MB has room for 500,000 lists.

    The first count is fast and may be too high, because ids may contain brackets and colons.
    """
    if _num_parts(body) > most:
        no_escapes = body.replace(rb"\\", b"").replace(rb"\"", b"")
        if _num_parts(b"".join(no_escapes.split(b'"')[::2])) > most:  # the text between the strings
            raise BadRequest(f"The body must have at most {most} lists, objects and keys. Received: more.")


def _num_parts(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{") + text.count(b":")


def parse(body: object, vocabulary: Vocabulary, limits: ServeConfig) -> Predict:
    """Returns the request in a body.

    Args:
        body: as from `load`.
        vocabulary: of the model.
        limits: of a request.

    Raises:
        BadRequest: the body does not have the form that din_dist/serving/README.md describes, or it is too large.
    """
    if not isinstance(body, dict):
        _refuse("The body", "must be a JSON object", body)
    _check_keys(body, "The body", (), ("instances", "inputs", "signature_name"))
    signature = body.get("signature_name", DEFAULT_SIGNATURE)
    if signature not in (*SIGNATURES, DEFAULT_SIGNATURE):
        _refuse("signature_name", f"must be one of {', '.join(SIGNATURES)}", signature)
    signature = SCORE if signature == DEFAULT_SIGNATURE else signature
    if ("instances" in body) == ("inputs" in body):
        _refuse("The body", "must have either instances or inputs", sorted(body))
    reader = _Reader(vocabulary, limits)
    if "instances" in body:
        read = {SCORE: reader.score_row, SCORE_PADDED: reader.padded_row, RANK: reader.rank}[signature]
        instances = _instances(body["instances"], read, limits)
    elif signature == RANK:
        instances = [reader.rank(body["inputs"], "inputs")]
    else:
        instances = reader.columns(body["inputs"])
    return _within_limits(Predict(signature, "instances" in body, instances), limits)


def parse_recommend(body: object, vocabulary: Vocabulary, limits: ServeConfig) -> Predict:
    """Returns the request for items in a body; see `parse`."""
    if not vocabulary.recommends:
        raise BadRequest(
            "The model must find items. Received: one that ranks given candidates. Export its job with "
            "--retriever_export_dir, or use :predict."
        )
    keys = _check_keys(body, "The body", ("instances",))
    instances = _instances(keys["instances"], _Reader(vocabulary, limits).recommend, limits)
    return _within_limits(Predict(RECOMMEND, True, instances), limits)


def _instances(rows: object, read: Callable[[object, str], Instance], limits: ServeConfig) -> list[Instance]:
    """Returns the instances of a body in rows, each as `read` reads it."""
    if not isinstance(rows, list) or not rows:
        _refuse("instances", "must be a list of at least one object", rows)
    _check_length("instances", rows, limits.max_instances)
    return [read(row, f"instances[{index}]") for index, row in enumerate(rows)]


def _within_limits(request: Predict, limits: ServeConfig) -> Predict:
    if request.num_candidates > limits.max_candidates:
        _refuse("A request", f"must have at most {limits.max_candidates} candidates", request.num_candidates)
    if request.num_positions > limits.max_batch_positions:
        rule = f"must have at most {limits.max_batch_positions} pairs of a candidate and an item of its history"
        _refuse("A request", rule, request.num_positions)
    return request


def answer(request: Predict, logits: Sequence[Any], predictions: Predictions) -> dict[str, Any]:
    """Returns the answer to a request.

    Args:
        request: as from `parse`.
        logits: float32 `[C]` or `[C, T]` of each instance; of one that asks for items, lists by the names of outputs.
        predictions: of the export.
    """
    if request.signature == RECOMMEND:
        return {"predictions": list(logits)}
    if request.signature == RANK:
        both = zip(request.instances, logits, strict=True)
        ranked = [_ranked(instance, found, predictions) for instance, found in both]
        return {"predictions": ranked} if request.in_rows else {"outputs": ranked[0]}
    columns = _outputs(np.concatenate(logits), predictions)
    if not request.in_rows:
        return {"outputs": columns}
    rows = zip(*columns.values(), strict=True)
    return {"predictions": [dict(zip(columns, row, strict=True)) for row in rows]}


def _ranked(instance: Instance, logits: np.ndarray, predictions: Predictions) -> dict[str, list]:
    order = np.argsort(-predictions.ranking(logits), kind="stable")[: instance.most]  # ties keep their order
    items = [instance.candidates[index] for index in order]
    return {"item_ids": items, **_outputs(logits[order], predictions), "places": order.tolist()}


def _outputs(logits: np.ndarray, predictions: Predictions) -> dict[str, list[float]]:
    """Returns the logits and the probabilities of each label by the names of the outputs."""
    found: dict[str, list[float]] = {}
    for label, own in predictions.columns(logits):
        found |= {label.logits: own.tolist(), label.probability: label.calibrator.probabilities(own).tolist()}
    return found


class _Reader:
    """Reads instances. The argument `where` of its methods is the path of a value in the body, for errors."""

    def __init__(self, vocabulary: Vocabulary, limits: ServeConfig) -> None:
        self._vocabulary, self._limits = vocabulary, limits
        self._read_id = _one_of(vocabulary.item_id_type)
        self._of_owner = {owner: vocabulary.features_of(owner) for owner in ("user", "context", "candidate", "history")}
        self._own_keys = tuple(owner for owner in ("user", "context") if self._of_owner[owner])
        self._history_keys = (HISTORY, NAMES) if vocabulary.histories else (HISTORY,)

    def score_row(self, row: object, where: str) -> Instance:
        keys = _check_keys(row, where, (*self._history_keys, "candidate_item_id"), self._feature_keys)
        candidate = self._read_id(keys["candidate_item_id"], f"{where}.candidate_item_id")
        return self._instance(keys, [candidate], where, one_candidate=True)

    def padded_row(self, row: object, where: str) -> Instance:
        """Reads a row in TensorFlow Serving's form: a padded history with the length of its real part."""
        keys = _check_keys(
            row, where, (*self._history_keys, "history_lengths", "candidate_item_ids"), self._declared_keys
        )
        candidate = self._read_id(keys["candidate_item_ids"], f"{where}.candidate_item_ids")
        ids = self._history(keys["history_item_ids"], f"{where}.history_item_ids")
        length = _integer(keys["history_lengths"], f"{where}.history_lengths", 0, len(ids))
        names = self._names(keys, ids, where, length)
        instance = Instance(self._newest(ids[:length]), [candidate], names=self._newest(names))
        given = _check_keys(
            keys.get("candidate_features", {}), f"{where}.candidate_features", (), tuple(self._of_owner["candidate"])
        )
        self._read_behaviour_features(instance, keys, len(ids), where, length)
        return self._with_own_features(instance, keys, given, where, single=True)

    def rank(self, row: object, where: str) -> Instance:
        keys = _check_keys(row, where, (*self._history_keys, "candidate_item_ids"), ("k", *self._feature_keys))
        candidates = self._candidates(keys["candidate_item_ids"], f"{where}.candidate_item_ids")
        instance = self._instance(keys, candidates, where)
        if "k" in keys:
            instance.most = _integer(keys["k"], f"{where}.k", 1, _INT64.max)
        return instance

    def recommend(self, row: object, where: str) -> Instance:
        asked = ("k", "num_retrieved", "exclude_history")
        features = ("history_features",) if self._of_owner["history"] else ()
        keys = _check_keys(row, where, self._history_keys, (*asked, *self._own_keys, *features))
        instance = self._instance(keys, [], where)
        if instance.history_features:
            rule = "must be declared features of behaviours, as items are looked up by their ids"
            _refuse(f"{where}.history_features", rule, sorted(instance.history_features))
        k = _integer(keys.get("k", Recommend().k), f"{where}.k", 1, self._limits.max_candidates)
        # Items that are found are as many as are asked for, if nothing ranks them.
        usual = k if self._vocabulary.finds_items else max(k, NUM_RETRIEVED)
        retrieved = keys.get("num_retrieved", min(usual, self._limits.max_candidates))
        retrieved = _integer(retrieved, f"{where}.num_retrieved", k, self._limits.max_candidates)
        exclude = keys.get("exclude_history", True)
        if not isinstance(exclude, bool):
            _refuse(f"{where}.exclude_history", "must be true or false", exclude)
        instance.recommend = Recommend(k, retrieved, exclude)
        return instance

    def columns(self, inputs: object) -> list[Instance]:
        """Reads columns. Histories are concatenated, with lengths, or one list each, padded if there are lengths.

        A declared feature has a list with a value for each candidate.
        """
        keys = _check_keys(
            inputs, "inputs", (*self._history_keys, "candidate_item_ids"), ("history_lengths", *self._declared_keys)
        )
        candidates = self._candidates(keys["candidate_item_ids"], "inputs.candidate_item_ids")
        _check_length("inputs.candidate_item_ids", candidates, self._limits.max_instances)
        found = [
            Instance(self._newest(ids), [one], names=self._newest(names))
            for (ids, names), one in zip(self._histories_of_columns(keys, candidates), candidates, strict=True)
        ]
        self._read_own_columns(keys, found)
        self._read_behaviour_columns(keys, found)
        return found

    def _histories_of_columns(
        self, keys: Mapping[str, Any], candidates: Sequence[Id]
    ) -> list[tuple[list[Id], list[str]]]:
        """Returns the behaviours of each candidate's histories, and the names of these; no names if there is one."""
        given, where = keys[HISTORY], f"inputs.{HISTORY}"
        lengths = self._lengths(keys["history_lengths"]) if "history_lengths" in keys else None
        if not isinstance(given, list):
            _refuse(where, "must be a list", given)
        if lengths is None or (given and isinstance(given[0], list)):
            _check_same_length(where, given, "inputs.candidate_item_ids", candidates)
            histories = [self._history(ids, f"{where}[{index}]") for index, ids in enumerate(given)]
            real = [*map(len, histories)] if lengths is None else lengths
            _check_same_length("inputs.history_lengths", real, where, histories)
            for index, (ids, length) in enumerate(zip(histories, real, strict=True)):
                _integer(length, f"inputs.history_lengths[{index}]", 0, len(ids))
            names = self._names_of_rows(keys, histories, real)
            return [(ids[:length], own) for ids, own, length in zip(histories, names, real, strict=True)]
        _check_same_length("inputs.history_lengths", lengths, "inputs.candidate_item_ids", candidates)
        ids = _list_of(self._vocabulary.item_id_type, given, where)
        if sum(lengths) != len(ids):
            _refuse("inputs.history_lengths", f"must add up to the {len(ids)} ids of {where}", sum(lengths))
        all_names = self._names(keys, ids, "inputs")
        bounds = [slice(end - length, end) for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]
        return [(ids[bound], all_names[bound]) for bound in bounds]

    def _read_own_columns(self, keys: Mapping[str, Any], instances: Sequence[Instance]) -> None:
        """Gives each instance its values of the columns of declared features."""
        for key, owner in (("user", "user"), ("context", "context"), ("candidate_features", "candidate")):
            given = _check_keys(keys.get(key, {}), f"inputs.{key}", (), tuple(self._of_owner[owner]))
            for name, values in given.items():
                where = f"inputs.{key}.{name}"
                if not isinstance(values, list):
                    _refuse(where, "must be a list", values)
                _check_same_length(where, values, "inputs.candidate_item_ids", instances)
                for index, (instance, value) in enumerate(zip(instances, values, strict=True)):
                    read = self._own_value(self._of_owner[owner][name], value, f"{where}[{index}]")
                    if owner == "candidate":
                        instance.own_features[name] = [read]
                    else:
                        getattr(instance, owner)[name] = read

    def _instance(
        self, keys: Mapping[str, Any], candidates: list[Id], where: str, one_candidate: bool = False
    ) -> Instance:
        history = self._history(keys["history_item_ids"], f"{where}.history_item_ids")
        features = self._features(keys, "history_features", len(history), where, single=False)
        instance = Instance(
            self._newest(history),
            candidates,
            {name: self._newest(values) for name, values in features.items()},
            self._features(keys, "candidate_features", len(candidates), where, single=one_candidate),
            names=self._newest(self._names(keys, history, where)),
        )
        self._read_behaviour_features(instance, keys, len(history), where)
        given = {
            name: value
            for name, value in keys.get("candidate_features", {}).items()
            if name in self._of_owner["candidate"]
        }
        return self._with_own_features(instance, keys, given, where, single=one_candidate)

    @property
    def _declared_keys(self) -> tuple[str, ...]:
        """The keys of declared features, where item features cannot be given."""
        keys = {"history_features": "history", "candidate_features": "candidate"}
        return (*self._own_keys, *(key for key, owner in keys.items() if self._of_owner[owner]))

    @property
    def _feature_keys(self) -> tuple[str, ...]:
        return (*_FEATURE_KEYS, *self._own_keys)

    def _with_own_features(
        self, instance: Instance, keys: Mapping[str, Any], of_candidates: Mapping[str, Any], where: str, single: bool
    ) -> Instance:
        """Returns the instance with the declared features of its user, its context and its candidates.

        Args:
            instance: without them.
            keys: the instance's in the body.
            of_candidates: the candidates' own features.
            where: the instance's path in the body.
            single: the body gives one candidate, not a list.
        """
        for owner in self._own_keys:
            features = self._of_owner[owner]
            given = _check_keys(keys.get(owner, {}), f"{where}.{owner}", (), tuple(features))
            read = {
                name: self._own_value(features[name], value, f"{where}.{owner}.{name}") for name, value in given.items()
            }
            setattr(instance, owner, read)
        for name, value in of_candidates.items():
            feature, place = self._of_owner["candidate"][name], f"{where}.candidate_features.{name}"
            if single:
                instance.own_features[name] = [self._own_value(feature, value, place)]
                continue
            if not isinstance(value, list):
                _refuse(place, "must be a list", value)
            if len(value) != len(instance.candidates):
                _refuse(place, f"must have {len(instance.candidates)} values, one for each item", len(value))
            own = [self._own_value(feature, part, f"{place}[{index}]") for index, part in enumerate(value)]
            instance.own_features[name] = own
        return instance

    def _read_behaviour_features(
        self, instance: Instance, keys: Mapping[str, Any], num_given: int, where: str, length: int | None = None
    ) -> None:
        """Gives an instance the values of features of its behaviours.

        Args:
            instance: without them.
            keys: the instance's in the body.
            num_given: the number of behaviours, padding included.
            where: the instance's path in the body.
            length: the number of real behaviours; None: all.
        """
        features = self._of_owner["history"]
        known = (*features, *self._vocabulary.item_features)
        given = _check_keys(keys.get("history_features", {}), f"{where}.history_features", (), known)
        for name, values in given.items():
            if name in features:
                read = self._behaviour_values(features[name], values, f"{where}.history_features.{name}", num_given)
                instance.behaviour_features[name] = self._newest(read[:length])

    def _read_behaviour_columns(self, keys: Mapping[str, Any], instances: Sequence[Instance]) -> None:
        """Gives each instance its values of the columns of features of behaviours, in the form of the histories."""
        features, place = self._of_owner["history"], "inputs.history_features"
        given = _check_keys(keys.get("history_features", {}), place, (), tuple(features))
        rows = keys[HISTORY]
        in_rows = "history_lengths" not in keys or (rows and isinstance(rows[0], list))
        lengths = keys["history_lengths"] if "history_lengths" in keys else [*map(len, rows)]
        for name, values in given.items():
            where, feature = f"{place}.{name}", features[name]
            if in_rows:
                if not isinstance(values, list):
                    _refuse(where, "must be a list", values)
                _check_same_length(where, values, "inputs.candidate_item_ids", instances)
                parts = [
                    self._behaviour_values(feature, own, f"{where}[{index}]", len(row))[:length]
                    for index, (own, row, length) in enumerate(zip(values, rows, lengths, strict=True))
                ]
            else:
                flat, ends = self._behaviour_values(feature, values, where, len(rows)), itertools.accumulate(lengths)
                parts = [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
            for instance, own in zip(instances, parts, strict=True):
                instance.behaviour_features[name] = self._newest(own)

    def _behaviour_values(self, feature: FeatureInputs, values: object, where: str, num: int) -> list[Any]:
        if not isinstance(values, list):
            _refuse(where, "must be a list", values)
        if len(values) != num:
            _refuse(where, f"must have {num} values, one for each item", len(values))
        return [self._own_value(feature, value, f"{where}[{index}]") for index, value in enumerate(values)]

    def _own_value(self, feature: FeatureInputs, value: object, where: str) -> Any:
        """Returns the value of a declared feature, which may be missing."""
        if value is None:
            return None
        if feature.dimension:
            if not isinstance(value, list) or len(value) != feature.dimension:
                _refuse(where, f"must be a list of {feature.dimension} numbers", value)
            return [_number(part, where) for part in value]
        if not feature.is_list:
            return _number(value, where) if feature.type == "number" else _one_of(feature.type)(value, where)
        if not feature.weights:
            _check_length(where, _list_of(feature.type, value, where), self._limits.max_history_items)
            return value
        keys = _check_keys(value, where, ("values", "weights"))
        ids = _list_of(feature.type, keys["values"], f"{where}.values")
        _check_length(where, ids, self._limits.max_history_items)
        if not isinstance(keys["weights"], list):
            _refuse(f"{where}.weights", "must be a list", keys["weights"])
        _check_same_length(f"{where}.weights", keys["weights"], f"{where}.values", ids)
        return ids, [_number(weight, f"{where}.weights") for weight in keys["weights"]]

    def _features(
        self, keys: Mapping[str, Any], key: str, length: int, where: str, single: bool
    ) -> dict[str, list[Id | None]]:
        """Returns the values of each feature.

        Args:
            keys: the instance's.
            key: `history_features` or `candidate_features`.
            length: the number of items, each of which has a value.
            where: the instance's path in the body.
            single: the body gives one value, not a list.
        """
        where = f"{where}.{key}"
        types = self._vocabulary.item_features
        own = self._of_owner[key.removesuffix("_features")]
        given = _check_keys(keys.get(key, {}), where, (), (*types, *own))
        found = {}
        for name, values in given.items():
            if name in own:
                continue
            if not single and not isinstance(values, list):
                _refuse(f"{where}.{name}", "must be a list", values)
            values = [values] if single else values
            if len(values) != length:
                _refuse(f"{where}.{name}", f"must have {length} values, one for each item", len(values))
            known = [value for value in values if value is not None]
            _list_of(types[name], known, f"{where}.{name}")
            found[name] = values
        return found

    def _candidates(self, value: object, where: str) -> list[Id]:
        ids = _list_of(self._vocabulary.item_id_type, value, where)
        if not ids:
            _refuse(where, "must have at least one id", ids)
        _check_length(where, ids, self._limits.max_candidates)
        return ids

    def _history(self, value: object, where: str) -> list[Id]:
        ids = _list_of(self._vocabulary.item_id_type, value, where)
        _check_length(where, ids, self._limits.max_history_items)
        return ids

    def _names(
        self, keys: Mapping[str, Any], history: Sequence[Id], where: str, length: int | None = None
    ) -> list[str]:
        """Returns the name of each behaviour's history; none if there is one history.

        Args:
            keys: with the names.
            history: the behaviours, of which some at the end may be padding.
            where: the path of the keys in the body.
            length: the number of real behaviours; None: all.
        """
        return self._named(keys[NAMES], history, f"{where}.{NAMES}", length) if self._vocabulary.histories else []

    def _names_of_rows(
        self, keys: Mapping[str, Any], histories: Sequence[Sequence[Id]], lengths: Sequence[int]
    ) -> list[list[str]]:
        """Does what `_names` does, of lists for several rows."""
        if not self._vocabulary.histories:
            return [[] for _ in histories]
        where, given = f"inputs.{NAMES}", keys[NAMES]
        if not isinstance(given, list):
            _refuse(where, "must be a list", given)
        _check_same_length(where, given, "inputs.candidate_item_ids", histories)
        rows = enumerate(zip(given, histories, lengths, strict=True))
        return [self._named(own, ids, f"{where}[{index}]", length) for index, (own, ids, length) in rows]

    def _named(self, value: object, history: Sequence[Id], where: str, length: int | None) -> list[str]:
        names = _list_of("string", value, where)
        _check_same_length(where, names, HISTORY, history)
        if strange := [name for name in names[:length] if name not in self._vocabulary.histories]:
            _refuse(where, f"must have names of histories, {', '.join(self._vocabulary.histories)}", strange[0])
        return names[:length]

    def _lengths(self, value: object) -> list[int]:
        lengths = _list_of("integer", value, "inputs.history_lengths")
        for index, length in enumerate(lengths):
            _integer(length, f"inputs.history_lengths[{index}]", 0, self._limits.max_history_items)
        return lengths

    def _newest(self, values: list) -> list:
        """Returns the values that the model reads. Histories are oldest first; the model would drop the same ones.

        Of several histories the model itself takes the newest of each.
        """
        return values if self._vocabulary.histories else values[-self._vocabulary.max_history_length :]


_FEATURE_KEYS = ("history_features", "candidate_features")


def _one_of(kind: str) -> Callable[[object, str], Id]:
    def read(value: object, where: str) -> Id:
        if isinstance(value, list):
            _refuse(where, f"must be one {kind}", value)
        return _list_of(kind, [value], where, in_list=False)[0]

    return read


def _list_of(kind: str, values: object, where: str, in_list: bool = True) -> list:
    """Returns `values` if it is a list of strings or of 64-bit integers.

    Types are compared for the whole list at once, for speed.
    """
    if not isinstance(values, list):
        _refuse(where, f"must be a list of {kind}s", values)
    wanted: type = str if kind == "string" else int
    if not set(map(type, values)) <= {wanted}:
        index = next(index for index, value in enumerate(values) if type(value) is not wanted)
        noun = "a string" if kind == "string" else "an integer"
        _refuse(f"{where}[{index}]" if in_list else where, f"must be {noun}", values[index])
    if kind == "string":
        try:
            "".join(values).encode()
        except UnicodeEncodeError:
            _refuse(where, "must be Unicode text", "half of a surrogate pair")
    elif values and not (_INT64.min <= min(values) and max(values) <= _INT64.max):
        _refuse(where, "must be integers of 64 bits", max(values, key=abs))
    return values


def _integer(value: object, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        bound = f"{low} or more" if high == _INT64.max else f"from {low} to {high}"
        _refuse(where, f"must be an integer, {bound}", value)
    return value


def _number(value: object, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:  # type: ignore[arg-type]
        _refuse(where, "must be a number that fits float32", value)
    return float(value)  # type: ignore[arg-type]


def _check_keys(value: object, where: str, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(where, "must be an object", value)
    for key in needed:
        if key not in value:
            _refuse(where, f"must have {key}", sorted(value) if len(value) <= _MOST_LISTED else value)
    for key in value:
        if key not in needed and key not in others:
            known = f"must have only {', '.join(needed + others)}" if needed or others else "must be empty"
            _refuse(where, known, key)
    return value


def _check_length(where: str, values: Sequence, most: int) -> None:
    if len(values) > most:
        _refuse(where, f"must have at most {most} entries", len(values))


def _check_same_length(where: str, values: Sequence, other: str, others: Sequence) -> None:
    if len(values) != len(others):
        _refuse(where, f"must have as many entries as {other}, {len(others)}", len(values))


def _refuse(where: str, rule: str, received: object) -> NoReturn:
    """Raises an error with the rule and the value that was received.

    A long value is cut, and nothing is shown that could break a line or a terminal.
    """
    if isinstance(received, dict):
        text = f"an object of {len(received)}"
    elif isinstance(received, list) and (
        len(received) > _MOST_LISTED or not {*map(type, received)} <= {str, int, float}
    ):
        # Its text could be as long as the body, and nested too deeply to write.
        text = f"a list of {len(received)}"
    else:
        text = json.dumps([_beginning(one) for one in received] if isinstance(received, list) else _beginning(received))
    shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    raise BadRequest(f"{where} {rule}. Received: {shown}.")


def _beginning(value: object) -> object:
    return value[: _MOST_SHOWN + 1] if isinstance(value, str) else value


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"The body must be JSON, which has no {name}.")


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object as a dict, and refuses a key that occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                _refuse("An object", "must have each key once", name)
            seen.add(name)
    return found

"""Opens an export and calls its signatures, for batch and online scoring."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import tensorflow as tf

from din_dist.errors import InputError
from din_dist.features.encoding import Lists
from din_dist.serving.asked import NEAREST, RECOMMEND, Recommend, require_recommends
from din_dist.serving.given_behaviours import NAMES, GivenBehaviours
from din_dist.serving.manifest import FeatureInputs, Manifest, check_files, read_manifest

HISTORY = "history_item_ids"
_DTYPES = {"string": tf.string, "integer": tf.int64}


class Bundle:
    """A SavedModel with its manifest. It takes arrays, Arrow arrays, lists and tensors, and returns arrays.

    All calls raise `InputError` for inputs that do not fit, such as ids of another type or lengths that do not add up.

    Declared features are given by name: `user` and `context` have one value for each history, `candidate` one for each
    candidate, and `GivenBehaviours.features` one for each behaviour. Lists are `Lists`. Values that are missing are as
    the manifest says; features that are not given are all missing.
    """

    def __init__(self, manifest: Manifest, loaded: Any) -> None:
        self.manifest = manifest
        self._loaded = loaded  # keeps the tables alive
        self._signatures = loaded.signatures

    @classmethod
    def open(cls, folder: Path, expect_digest: str = "") -> Self:
        """Loads the export in `folder`. A SavedModel is a program: see the README beside this file.

        Args:
            folder: of the export.
            expect_digest: the SHA-256 that the manifest must have; empty: any.

        Raises:
            InputError: there is no export, it has another version or digest, or a file has changed since it was
                published.
        """
        manifest = read_manifest(folder, expect_digest)
        check_files(folder, manifest)
        return cls(manifest, tf.saved_model.load(str(folder)))

    @property
    def program(self) -> Any:
        """The loaded SavedModel, which holds the tables and variables of the signatures."""
        return self._loaded

    def signature(self, name: str) -> Any:
        """Returns one of the SavedModel's functions, from tensors by keyword to tensors by name."""
        return self._signatures[name]

    @property
    def signatures(self) -> list[str]:
        """The names that `signature` knows."""
        return sorted(self._signatures)

    def call(self, name: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Calls a signature with inputs by name, of any of the supported kinds."""
        function = self.signature(name)
        specs = function.structured_input_signature[1]
        if inputs.keys() != specs.keys():
            raise InputError(
                f"{name}: takes {', '.join(sorted(specs))}. Received: {', '.join(sorted(inputs)) or 'nothing'}. "
                "Give those."
            )
        tensors = {key: as_tensor(value, specs[key].dtype, key) for key, value in inputs.items()}
        for key, tensor in tensors.items():
            if not specs[key].shape.is_compatible_with(tensor.shape):
                raise _wrong_shape(key, specs[key].shape, tensor.shape)
        try:
            return {key: value.numpy() for key, value in function(**tensors).items()}
        except tf.errors.InvalidArgumentError as error:
            if assertion := re.search(r"assertion failed: (.*)", str(error)):
                raise InputError(_plain(assertion.group(1))) from error
            raise

    def score(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        candidate_item_ids: Any,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Returns the logits, `[B]` or `[B, T]` of T tasks, of one candidate for each of B histories.

        Args:
            history_item_ids: `[N]`, the histories concatenated; `GivenBehaviours` if behaviours have more than an item,
                here and below.
            history_lengths: int64 `[B]`.
            candidate_item_ids: `[B]`.
            user: name -> B values of each feature of users; see `Bundle`.
            context: likewise.
            candidate: likewise.
        """
        inputs = {
            **self._history(history_item_ids),
            "history_lengths": history_lengths,
            "candidate_item_ids": candidate_item_ids,
        }
        num = len(candidate_item_ids)
        return self._logits("score", inputs | self._examples(user, context, candidate, num, num))

    def rank_histories(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        candidate_item_ids: Any,
        candidate_counts: Any,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Returns the logits, `[C]` or `[C, T]` of T tasks, of any number of candidates for each of B histories.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            candidate_item_ids: `[C]`, the candidates of all histories concatenated.
            candidate_counts: int64 `[B]`, the number of each history's candidates.
            user: name -> B values of each feature of users; see `Bundle`.
            context: likewise.
            candidate: name -> C values.
        """
        inputs = {
            **self._history(history_item_ids),
            "history_lengths": history_lengths,
            "candidate_item_ids": candidate_item_ids,
            "candidate_counts": candidate_counts,
        }
        examples = self._examples(user, context, candidate, len(candidate_counts), len(candidate_item_ids))
        return self._logits("rank_histories", inputs | examples)

    def rank(
        self,
        history_item_ids: Any,
        candidate_item_ids: Any,
        k: int,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the best `k` of `candidate_item_ids` `[C]`: `item_ids`, `logits`, `click_probability` and `places`.

        `places` are their indices among the candidates. Features of the user and the context have one value. Of several
        tasks the main one ranks, and each has its own `logits_TASK` and `probability_TASK`.
        """
        examples = self._examples(user, context, candidate, 1, len(candidate_item_ids))
        inputs = {**self._history(history_item_ids), "candidate_item_ids": candidate_item_ids, "k": k}
        return self.call("rank", inputs | examples)

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
    ) -> np.ndarray:
        """Does the same as `score`, with item features by name. Missing features are looked up by the item id."""
        num = len(candidate_item_ids)
        return self._logits(
            "score_with_features",
            {
                **(history := self._history(history_item_ids)),
                "history_lengths": history_lengths,
                "candidate_item_ids": candidate_item_ids,
                **self._features("history", history_features, len(history[HISTORY])),
                **self._features("candidate", candidate_features, len(candidate_item_ids)),
                **self._examples(user, context, candidate, num, num),
            },
        )

    def rank_with_features(
        self,
        history_item_ids: Any,
        candidate_item_ids: Any,
        k: int,
        history_features: Mapping[str, Any],
        candidate_features: Mapping[str, Any],
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        candidate: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Does the same as `rank`, with item features by name. Missing features are looked up by the item id."""
        return self.call(
            "rank_with_features",
            {
                **(history := self._history(history_item_ids)),
                "candidate_item_ids": candidate_item_ids,
                "k": k,
                **self._features("history", history_features, len(history[HISTORY])),
                **self._features("candidate", candidate_features, len(candidate_item_ids)),
                **self._examples(user, context, candidate, 1, len(candidate_item_ids)),
            },
        )

    def embed_users(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Returns the vectors of users, float32 `[B, K, H]`, of an export that finds items."""
        return self.call("embed_users", self._of_users(history_item_ids, history_lengths, user, context))["embeddings"]

    def recommend(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        asked: Recommend,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the best of all items for each of B histories, best first.

        An export that finds items gives its nearest. One with another inside ranks what that one finds.

        Args:
            history_item_ids: `[N]`, the histories concatenated, or `GivenBehaviours`.
            history_lengths: int64 `[B]`.
            asked: how many items, and of which.
            user: name -> B values of each feature of users; see `Bundle`.
            context: likewise.

        Returns:
            `item_ids` and `logits`, `[B, k]`, and `counts`, int64 `[B]`: how many of a row are real. With ranking also
            the probabilities; see `RankingSignatures.recommend`.

        Raises:
            InputError: the export does not find items.
        """
        if self.manifest.retriever is None:
            return self.nearest(history_item_ids, history_lengths, asked, user, context)
        inputs = self._of_users(history_item_ids, history_lengths, user, context) | _asking(asked)
        return self.call(RECOMMEND, inputs | {"num_retrieved": asked.num_retrieved})

    def nearest(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        asked: Recommend,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns what `recommend` does, in the order of the model that finds items, without ranking.

        Raises:
            InputError: the export does not find items.
        """
        require_recommends(self.manifest)
        inputs = self._of_users(history_item_ids, history_lengths, user, context)
        return self.call(NEAREST, inputs | _asking(asked))

    def _of_users(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        user: Mapping[str, Any] | None,
        context: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Returns the inputs of B users without candidates."""
        num = len(history_lengths)
        inputs = {**self._history(history_item_ids), "history_lengths": history_lengths}
        return inputs | self._of_owner("user", user or {}, num) | self._of_owner("context", context or {}, num)

    def embed_items(self, item_ids: Any) -> dict[str, np.ndarray]:
        """Returns `embeddings` `[M, H]`, and `known` `[M]`, which is true for items that the model knows."""
        return self.call("embed_items", {"item_ids": item_ids})

    def _history(self, behaviours: Any) -> dict[str, Any]:
        """Returns the inputs of behaviours: items, the names of their histories if there are several, and features."""
        if not isinstance(behaviours, GivenBehaviours):
            behaviours = GivenBehaviours(behaviours)
        inputs = {HISTORY: behaviours.item_ids}
        if behaviours.names is not None:
            inputs[NAMES] = behaviours.names
        return inputs | self._of_owner("history", behaviours.features, len(behaviours.item_ids))

    def _logits(self, name: str, inputs: Mapping[str, Any]) -> np.ndarray:
        return self.manifest.predictions.stacked(self.call(name, inputs), np.stack)

    def _features(self, side: str, given: Mapping[str, Any], length: int) -> dict[str, Any]:
        manifest = self.manifest
        for name in given:
            if name not in manifest.item_features:
                raise InputError(
                    f"{side} features: must be features of the model. Received: {name!r}. "
                    f"Choose among {', '.join(manifest.item_features) or 'none: it has no features'}."
                )
        by_item_id = {"string": np.full(length, b"", object), "integer": np.full(length, np.iinfo(np.int64).min)}
        return {
            f"{side}_{manifest.feature_inputs[name]}": given.get(name, by_item_id[kind])
            for name, kind in manifest.item_features.items()
        }

    def _examples(
        self,
        user: Mapping[str, Any] | None,
        context: Mapping[str, Any] | None,
        candidate: Mapping[str, Any] | None,
        num_histories: int,
        num_candidates: int,
    ) -> dict[str, Any]:
        """Returns the inputs of declared features by name, those that are not given as missing."""
        inputs: dict[str, Any] = {}
        sizes = {"user": num_histories, "context": num_histories, "candidate": num_candidates}
        for (owner, size), given in zip(sizes.items(), (user, context, candidate), strict=True):
            inputs |= self._of_owner(owner, given or {}, size)
        return inputs

    def _of_owner(self, owner: str, given: Mapping[str, Any], size: int) -> dict[str, Any]:
        """Returns the inputs of an owner's features by name, those that are not given as missing."""
        features = {feature.name: feature for feature in self.manifest.features_of(owner)}
        for name in given:
            if name not in features:
                raise InputError(
                    f"{owner} features: must be features of the model. Received: {name!r}. "
                    f"Choose among {', '.join(features) or 'none: it has no such features'}."
                )
        inputs: dict[str, Any] = {}
        for name, feature in features.items():
            inputs |= inputs_of(feature, given.get(name), size)
        return inputs


def _asking(asked: Recommend) -> dict[str, Any]:
    """Returns the inputs of a request for items that all signatures have."""
    return {"k": asked.k, "exclude_history": asked.exclude_history}


def inputs_of(feature: FeatureInputs, values: Any, size: int) -> dict[str, Any]:
    """Returns the inputs of a feature by name.

    Args:
        feature: of the export.
        values: as `Bundle` takes them; None: all are missing.
        size: how many there must be.

    Raises:
        InputError: lists are given in another form, or weights are missing.
    """
    if feature.is_list:
        given = no_lists(size) if values is None else values
        if not isinstance(given, Lists):
            raise InputError(
                f"{feature.name}: lists are given as Lists(values, lengths, weights). Received: "
                f"{type(values).__name__}. Concatenate their values."
            )
        parts = given[: len(feature.inputs)]
        if len(parts) == 3 and parts[2] is None:
            raise InputError(f"{feature.name}: each value needs a weight. Received: none. Give {feature.inputs[2]}.")
        return dict(zip(feature.inputs, parts, strict=True))
    if values is None:
        values = missing_values(feature, size)
    return {feature.inputs[0]: values}


def no_lists(size: int) -> Lists:
    """Returns `size` empty lists."""
    return Lists(np.zeros(0, object), np.zeros(size, np.int64), np.zeros(0, np.float32))


def missing_values(feature: FeatureInputs, size: int) -> np.ndarray:
    """Returns what stands for `size` missing values of a feature that is no list."""
    if feature.dimension:
        return np.full((size, feature.dimension), np.nan, np.float32)
    dtype = {"string": object, "integer": np.int64, "number": np.float32}[feature.type]
    return np.full(size, np.nan if feature.type == "number" else feature.missing, dtype)


def as_tensor(values: Any, dtype: tf.DType, name: str) -> tf.Tensor:
    """Returns ids, lengths or features as a tensor.

    Args:
        values: an array, Arrow array, list or tensor.
        dtype: string, int64 or float32; bool for one value.
        name: of the input, for errors.

    Raises:
        InputError: the values are of another kind.
    """
    if dtype == tf.float32:
        return _numbers(values, name)
    if dtype == tf.bool:
        if not isinstance(values, (bool, np.bool_)):
            raise InputError(f"{name}: must be true or false. Received: {values!r}. Give a bool.")
        return tf.constant(bool(values))
    if tf.is_tensor(values):
        if dtype == tf.int64 and values.dtype.is_integer:
            return tf.cast(values, tf.int64)
        if dtype == values.dtype:
            return values
        raise _wrong_kind(name, dtype, f"a tensor of {values.dtype.name}")
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        if values.null_count:
            raise _wrong_kind(name, dtype, "null")
        values = values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)
    # As objects, the values of lists keep their types: by default NumPy turns a number beside a string into a string.
    array = values if isinstance(values, np.ndarray) else np.asarray(values, object)
    if not array.size:
        return tf.zeros(array.shape, dtype)
    wanted, kinds = ((str, bytes), "OSU") if dtype == tf.string else ((int, np.integer), "Oiu")
    if array.dtype.kind not in kinds:
        raise _wrong_kind(name, dtype, f"{array.dtype} values")
    try:
        if array.dtype.kind == "O" and dtype == tf.int64:
            _require_all(array, wanted, name, dtype)
        elif array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
            raise OverflowError
        return tf.constant(array, tf.string) if dtype == tf.string else tf.constant(array.astype(np.int64))
    except OverflowError as error:
        raise _wrong_kind(name, dtype, str(max(array.flat, key=abs))) from error
    except (TypeError, ValueError) as error:
        _require_all(array, wanted, name, dtype)
        raise _wrong_kind(name, dtype, "half a surrogate pair, which UTF-8 cannot express") from error


def _numbers(values: Any, name: str) -> tf.Tensor:
    """Returns numbers as float32; None and NaN are missing."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        values = values.to_pylist()
    try:
        wide = np.asarray(values.numpy() if tf.is_tensor(values) else values)
        if wide.dtype.kind not in "fiuO" and wide.size:
            raise TypeError
        wide = wide.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: must be numbers. Received: another type. Give them as the log has them.") from error
    wrong = np.abs(wide) > np.finfo(np.float32).max  # false for NaN
    if wrong.any():
        raise InputError(
            f"{name}: numbers must be finite and fit float32. Received: {wide[wrong].flat[0]}. Give NaN for none."
        )
    return tf.constant(wide.astype(np.float32))


def _wrong_shape(name: str, wanted: tf.TensorShape, found: tf.TensorShape) -> InputError:
    remedy = "Give the ids of all histories concatenated."
    if wanted.rank == 2 and wanted[1]:
        rule, remedy = f"must be vectors of {wanted[1]} numbers", "Give such vectors, of NaN where there is none."
    else:
        rule = f"must have {wanted.rank} dimension(s)"
    return InputError(f"{name}: {rule}. Received: shape {tuple(found)}. {remedy}")


def _require_all(array: np.ndarray, wanted: tuple[type, ...], name: str, dtype: tf.DType) -> None:
    for value in array.flat:
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise _wrong_kind(name, dtype, repr(value))


def _wrong_kind(name: str, dtype: tf.DType, received: str) -> InputError:
    kind = "strings" if dtype == tf.string else "integers of 64 bits"
    return InputError(f"{name}: must be {kind}. Received: {received}. Give them as the log has them.")


def _plain(message: str) -> str:
    """Returns TensorFlow's text of a failed assertion, `[text] [value] ...`, without the brackets around words."""
    return re.sub(r"\[([^\[\]]*[A-Za-z][^\[\]]*)\]", r"\1", message).strip() + "."

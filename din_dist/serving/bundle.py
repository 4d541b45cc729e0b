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
from din_dist.serving.manifest import Manifest, check_files, read_manifest

_DTYPES = {"string": tf.string, "integer": tf.int64}


class Bundle:
    """A SavedModel with its manifest. It takes arrays, Arrow arrays, lists and tensors, and returns arrays.

    All calls raise `InputError` for inputs that do not fit, such as ids of another type or lengths that do not add up.
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
                raise InputError(
                    f"{key}: must have {specs[key].shape.rank} dimension(s). Received: shape {tuple(tensor.shape)}. "
                    "Give the ids of all histories concatenated."
                )
        try:
            return {key: value.numpy() for key, value in function(**tensors).items()}
        except tf.errors.InvalidArgumentError as error:
            if assertion := re.search(r"assertion failed: (.*)", str(error)):
                raise InputError(_plain(assertion.group(1))) from error
            raise

    def score(self, history_item_ids: Any, history_lengths: Any, candidate_item_ids: Any) -> np.ndarray:
        """Returns the logits `[B]` of one candidate for each of B histories.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            candidate_item_ids: `[B]`.
        """
        inputs = {
            "history_item_ids": history_item_ids,
            "history_lengths": history_lengths,
            "candidate_item_ids": candidate_item_ids,
        }
        return self.call("score", inputs)["logits"]

    def rank_histories(
        self, history_item_ids: Any, history_lengths: Any, candidate_item_ids: Any, candidate_counts: Any
    ) -> np.ndarray:
        """Returns the logits `[C]` of any number of candidates for each of B histories.

        Args:
            history_item_ids: `[N]`, the histories concatenated.
            history_lengths: int64 `[B]`.
            candidate_item_ids: `[C]`, the candidates of all histories concatenated.
            candidate_counts: int64 `[B]`, the number of each history's candidates.
        """
        inputs = {
            "history_item_ids": history_item_ids,
            "history_lengths": history_lengths,
            "candidate_item_ids": candidate_item_ids,
            "candidate_counts": candidate_counts,
        }
        return self.call("rank_histories", inputs)["logits"]

    def rank(self, history_item_ids: Any, candidate_item_ids: Any, k: int) -> dict[str, np.ndarray]:
        """Returns the best `k` of `candidate_item_ids` `[C]`: `item_ids`, `logits`, `click_probability` and `places`.

        `places` are their indices among the candidates.
        """
        return self.call(
            "rank", {"history_item_ids": history_item_ids, "candidate_item_ids": candidate_item_ids, "k": k}
        )

    def score_with_features(
        self,
        history_item_ids: Any,
        history_lengths: Any,
        candidate_item_ids: Any,
        history_features: Mapping[str, Any],
        candidate_features: Mapping[str, Any],
    ) -> np.ndarray:
        """Does the same as `score`, with item features by name. Missing features are looked up by the item id."""
        return self.call(
            "score_with_features",
            {
                "history_item_ids": history_item_ids,
                "history_lengths": history_lengths,
                "candidate_item_ids": candidate_item_ids,
                **self._features("history", history_features, len(history_item_ids)),
                **self._features("candidate", candidate_features, len(candidate_item_ids)),
            },
        )["logits"]

    def rank_with_features(
        self,
        history_item_ids: Any,
        candidate_item_ids: Any,
        k: int,
        history_features: Mapping[str, Any],
        candidate_features: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Does the same as `rank`, with item features by name. Missing features are looked up by the item id."""
        return self.call(
            "rank_with_features",
            {
                "history_item_ids": history_item_ids,
                "candidate_item_ids": candidate_item_ids,
                "k": k,
                **self._features("history", history_features, len(history_item_ids)),
                **self._features("candidate", candidate_features, len(candidate_item_ids)),
            },
        )

    def embed_items(self, item_ids: Any) -> dict[str, np.ndarray]:
        """Returns `embeddings` `[M, H]`, and `known` `[M]`, which is true for items that the model knows."""
        return self.call("embed_items", {"item_ids": item_ids})

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


def as_tensor(values: Any, dtype: tf.DType, name: str) -> tf.Tensor:
    """Returns ids, lengths or features as a tensor.

    Args:
        values: an array, Arrow array, list or tensor.
        dtype: string or int64.
        name: of the input, for errors.

    Raises:
        InputError: the values are of another kind.
    """
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

"""The part that all models of the library share: the trainer's model inside a model that Keras fits and saves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from din_dist import schema
from din_dist.api.arguments import array_from_text, array_to_text, check, model_config, without_dashes
from din_dist.api.inputs import Inputs
from din_dist.api.optimizers import KerasLazyAdam
from din_dist.assembly import make_model
from din_dist.config import ModelKind
from din_dist.features.encoding import Encoding, StoredFeature
from din_dist.features.spec import FeatureSpec, Kind, Owner
from din_dist.schema import Batch

SEED = 1234  # that of the trainer
NUMBER = "number"
_OF_KERAS = ("name", "trainable", "dtype")

ItemFeatures = Mapping[str, Any]  # name -> integers [num_items + 1]
Features = Mapping[str, Any]  # name -> a number of ids, "number", or a `StoredFeature`


class KerasBehaviourModel(keras.Model):
    """A model of din_dist for `compile`, `fit`, `predict` and `save`.

    `core` is the model as the trainer makes it for the same settings and seed: the same weights, the same logits.
    A call returns logits, float32 `[B]`. See `Inputs.batch` for what it takes.

    Args:
        num_items: items have the ids 1 to `num_items`. Any other id is an unknown item.
        item_features: name -> integers `[num_items + 1]`, the feature's id of each item, from 1. Entry 0 belongs to
            unknown items. An id of 0 is unknown, or there is none.
        embedding_dim: the width of all embeddings, or the item's followed by that of each item feature.
        features: of the examples. Name -> the number of its ids, which then go from 1; or "number", for numbers that
            are about standardized and NaN where one is missing; or what a data set of `datasets` has of it.
        seed: of the first weights. It becomes the seed of Python, NumPy and TensorFlow, as by
            `keras.utils.set_random_seed`.
        settings: other settings of the model, by the names of their flags: `hidden_units=(80, 40)`.

    Raises:
        InputError: an argument breaks its rule.
    """

    KIND: ClassVar[ModelKind]
    SETTINGS: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        num_items: int,
        item_features: ItemFeatures | None = None,
        embedding_dim: int | Sequence[int] = 64,
        features: Features | None = None,
        seed: int = SEED,
        **settings: Any,
    ) -> None:
        of_keras = {name: settings.pop(name) for name in _OF_KERAS if name in settings}
        super().__init__(**{"name": str(self.KIND), **of_keras})
        is_count = isinstance(num_items, (int, np.integer)) and num_items > 0
        check(is_count, "num_items", "must be a number above 0", num_items, "Give the largest id of an item.")
        self.num_items, self._seed = int(num_items), seed
        self._settings = settings
        self.config = model_config(self.KIND, embedding_dim, settings, self.SETTINGS)
        self._item_features = {name: _of_items(name, ids, num_items) for name, ids in (item_features or {}).items()}
        self._features = {name: _stored(name, given) for name, given in (features or {}).items()}
        self._check_features()
        sizes = {name: int(ids.max(initial=0)) for name, ids in self._item_features.items()}
        facts = schema.DatasetFacts(0, self.num_items, 0, False, sizes, 0, 0, "", {})
        with without_dashes():
            self.core = make_model(self.config, facts, self._item_features, seed=seed, features=self._features)
        self.inputs_of_examples = Inputs(self.num_items, self.core.encodings, self._longest)
        self.supports_jit = False  # batches differ in their numbers of items, so XLA would compile for each
        self.built = True

    def _check_features(self) -> None:
        """Refuses features that the model does not read."""

    @property
    def _longest(self) -> int | None:
        return self.config.num_positions if self.KIND.has_positions else None

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: the constructor makes all weights."""

    def get_build_config(self) -> dict[str, Any]:
        return {}

    def build_from_config(self, config: Mapping[str, Any]) -> None:
        """Does nothing, as `build`."""

    def compile(self, optimizer: Any = None, loss: Any = None, **settings: Any) -> None:
        """Configures training, as `keras.Model.compile` does.

        Args:
            optimizer: None: `LazyAdam` with its default learning rate.
            loss: None: the model's own.
            settings: as of `keras.Model.compile`. Metrics are given logits: `keras.metrics.AUC(from_logits=True)`.
        """
        super().compile(KerasLazyAdam() if optimizer is None else optimizer, self._loss_or_own(loss), **settings)

    def _loss_or_own(self, loss: Any) -> Any:
        return loss

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a model that was loaded as it was compiled when it was saved."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def __call__(self, inputs: Any, training: bool = False, **others: Any) -> Any:
        """Returns the logits, float32 `[B]`; see `Inputs.batch`.

        Raises:
            InputError: an input is missing, is not known, or has a wrong shape or type.
        """
        # Here, because Keras would wrap the error of a `call` in lines about its arguments.
        return super().__call__(self.inputs_of_examples.batch(inputs), training=training, **others)

    def call(self, batch: Batch, training: bool = False) -> tf.Tensor:
        return self.core(batch, training=training)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trainable": self.trainable,
            "num_items": self.num_items,
            "item_features": [[name, array_to_text(ids)] for name, ids in self._item_features.items()],
            "embedding_dim": list(self.config.embedding_dim),
            "features": [[name, _feature_to_text(stored)] for name, stored in self._features.items()],
            "seed": self._seed,
            **{name: _plain(getattr(self.config, name)) for name in self._settings},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> KerasBehaviourModel:
        item_features = {name: array_from_text(text) for name, text in config["item_features"]}
        features = {name: _feature_from_text(text) for name, text in config["features"]}
        return cls(**config | {"item_features": item_features, "features": features})


def load_model(path: Any) -> keras.Model:
    """Loads a model that `save` has written to a `.keras` file, with its optimizer.

    Args:
        path: of the file.
    """
    return keras.saving.load_model(path)


def _of_items(name: str, ids: Any, num_items: int) -> np.ndarray:
    found = np.asarray(ids)
    is_array = found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
    rule = f"must be an array of integers, one for each of ids 0 to {num_items}"
    check(is_array, f"item_features[{name!r}]", rule, f"{found.dtype} {list(found.shape)}", "Make it one.")
    remedy = "Its first entry belongs to unknown items: put a 0 before the others."
    check(len(found) == num_items + 1, f"item_features[{name!r}]", rule, f"{len(found)} numbers", remedy)
    smallest = int(found.min())
    check(smallest >= 0, f"item_features[{name!r}]", "ids must be at least 0", smallest, "Number them from 1.")
    return found.astype(np.int32)


def _stored(name: str, given: Any) -> StoredFeature:
    if isinstance(given, StoredFeature):
        return given
    kind, rows = (Kind.NUMBER, 0) if given == NUMBER else (Kind.CATEGORY, given)
    fits = given == NUMBER or (isinstance(given, int) and given > 0)
    rule, remedy = f"must be the number of its ids, or {NUMBER!r}", 'For example {"hour": 24, "price": "number"}.'
    check(fits, f"features[{name!r}]", rule, given, remedy)
    spec = FeatureSpec(name, Owner.CONTEXT, kind, name)
    return StoredFeature(Encoding(spec, rows + 1 if rows else 0, integers=True), np.zeros(0, np.int32))


def _feature_to_text(stored: StoredFeature) -> str:
    """Returns a feature as text. Only those of items have values that the model keeps."""
    keeps = stored.encoding.spec.owner is Owner.ITEM
    arrays = {"values": stored.values, "offsets": stored.offsets, "weights": stored.weights} if keeps else {}
    kept = {name: [str(a.dtype), list(a.shape), a.tobytes().hex()] for name, a in arrays.items() if a is not None}
    return json.dumps({"encoding": stored.encoding.to_json(), "arrays": kept})


def _feature_from_text(text: str) -> StoredFeature:
    fields = json.loads(text)
    arrays = {
        name: np.frombuffer(bytearray.fromhex(values), dtype).reshape(shape)
        for name, (dtype, shape, values) in fields["arrays"].items()
    }
    values = arrays.get("values", np.zeros(0, np.int32))
    encoding = Encoding.from_json(fields["encoding"])
    return StoredFeature(encoding, values, arrays.get("offsets"), arrays.get("weights"))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, str) else value

"""Logs of events as data sets for `fit`, made by the code that prepares data and makes batches for the trainer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf

from din_dist.api.arguments import check
from din_dist.api.inputs import CANDIDATES, FEATURES, HISTORY, LENGTHS, MASK, OFFSETS
from din_dist.api.model import SEED
from din_dist.api.training import settings
from din_dist.config import DataConfig, ModelConfig, ModelKind, UnknownItem
from din_dist.data.event_store import ITEMS, EventStore
from din_dist.data.pipeline import BatchMaker, evaluation_batches, num_steps_per_epoch, training_batches
from din_dist.data.popularity import popularity
from din_dist.data.prepared import prepare
from din_dist.data.sampled_items import sampled_items
from din_dist.data.splits import Examples, item_counts, split_examples
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import Owner
from din_dist.files import make_folder
from din_dist.schema import Batch

FORMS = ("packed", "ragged", "padded")


@dataclasses.dataclass(frozen=True)
class EventData:
    """A log that is prepared: its sizes for a model, and its examples for `fit`.

    Attributes:
        config: the settings of the data.
        store: the events.
        seed: of the order of examples and of the draws of negatives.
        folder: holds the prepared data where no other was given; it goes when this object does.
    """

    config: DataConfig
    store: EventStore
    seed: int = SEED
    folder: Any = None

    @property
    def num_items(self) -> int:
        """The items of the log. Their ids in batches go from 1 to this."""
        return self.store.facts.num_items

    @property
    def item_features(self) -> Mapping[str, np.ndarray]:
        """Name -> int32 `[num_items + 1]`, the feature's id of each item."""
        return self.store.item_features

    @property
    def features(self) -> Mapping[str, StoredFeature]:
        """The declared features, as models take them."""
        return self.store.features

    @functools.cached_property
    def item_counts(self) -> np.ndarray:
        """How often training has each item, int64 `[num_items + 1]`."""
        return item_counts(self.store, self._splits)

    @functools.cached_property
    def _splits(self) -> Mapping[str, Examples]:
        return split_examples(self.store, self.config)

    @functools.cached_property
    def _without_negatives(self) -> EventData:
        """The same events, each of which is one example."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, negatives_per_positive=0))

    def num_examples(self, split: str = "train") -> int:
        """Returns the number of examples of a split: train, validation or test."""
        return self._split(split).num_examples

    def _split(self, name: str) -> Examples:
        choices = ("train", "validation", "test")
        check(name in choices, "split", "must be a split", name, f"Choose among {', '.join(choices)}.")
        return self._splits[name]

    def steps_per_epoch(self, batch_size: int = 1024) -> int:
        """Returns the number of updates in which training sees each example once."""
        return num_steps_per_epoch(self.num_examples(), batch_size)

    def train(self, batch_size: int = 1024, epochs: int = 1, form: str = "packed") -> tf.data.Dataset:
        """Returns the batches of training, in the trainer's order: inputs and labels, and weights if the log has them.

        `model.fit(data.train(), epochs=3)` sees the examples in one order three times. Another order in each epoch:
        `model.fit(data.train(epochs=3), epochs=3, steps_per_epoch=data.steps_per_epoch())`.

        Args:
            batch_size: the examples of an update. The last one of an epoch may have fewer.
            epochs: how often each example comes.
            form: of the histories: packed, ragged, or padded at the end, with a mask.
        """
        drawn = popularity(self.store, self.config, self._splits, None)
        maker = BatchMaker.for_training(self.store, self._splits["train"], self.config, self.seed, drawn=drawn)
        return _in_form(self._training(maker, batch_size, epochs), _labelled, form)

    def targets(self, batch_size: int = 1024, epochs: int = 1, form: str = "packed") -> tf.data.Dataset:
        """Returns the batches of training of a model that finds items: inputs whose candidates were chosen, no labels.

        Events with label 0 have weight 0. Arguments as of `train`.
        """
        own = self._without_negatives
        drawn = sampled_items(self.store, ModelConfig(model=ModelKind.YOUTUBE_DNN), own._splits, None, self.seed)
        maker = BatchMaker.for_training(self.store, own._splits["train"], own.config, self.seed, drawn=drawn)
        return _in_form(own._training(maker, batch_size, epochs), _chosen, form)

    def _training(self, maker: BatchMaker, batch_size: int, epochs: int) -> tf.data.Dataset:
        for name, value in (("batch_size", batch_size), ("epochs", epochs)):
            check(value > 0, name, "must be at least 1", value, "For example 1.")
        steps = range(epochs * self.steps_per_epoch(batch_size))
        return training_batches(maker, self.config, global_batch_size=batch_size, steps=steps)

    def evaluation(self, split: str = "test", batch_size: int = 4096, form: str = "packed") -> tf.data.Dataset:
        """Returns the batches of a split in order: inputs and labels.

        Args:
            split: train, validation or test.
            batch_size: the examples of a batch.
            form: as of `train`.

        Raises:
            InputError: there is no such split, or it has no examples.
        """
        examples = self._split(split)
        remedy = "Use another split=, for example leave_two_out or temporal."
        check(examples.num_examples > 0, "split", "must have examples", split, remedy)
        batches = evaluation_batches(self.store, examples, self.config, seed=self.seed, batch_size=batch_size)
        return _in_form(batches, _labelled, form)

    @functools.cached_property
    def _item_ids(self) -> pa.Array:
        return self.store.vocabulary(ITEMS).combine_chunks()

    def numbers_of(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Returns the number that each of the log's own item ids has in batches, int32 `[n]`; 0 if it is unknown."""
        wanted = pa.array(item_ids).cast(self._item_ids.type)
        return (pc.index_in(wanted, self._item_ids).fill_null(-1).to_numpy(zero_copy_only=False) + 1).astype(np.int32)

    def ids_of(self, numbers: Any) -> list[Any]:
        """Returns the log's own ids of items, given their numbers in batches, integers `[n]`; None for unknown ones."""
        places = pa.array([int(number) - 1 if 0 < number <= self.num_items else None for number in np.asarray(numbers)])
        return self._item_ids.take(places.cast(pa.int64())).to_pylist()


def from_parquet(path: Any, **values: Any) -> EventData:
    """Prepares a log and opens it. What was prepared before is kept.

    Args:
        path: a Parquet, CSV or JSON-lines file, a folder of them, or a glob; see the flag `--data_path`.
        values: settings of the data by the names of their flags: `item_features=["brand"]`, `split="temporal"`,
            `data_dir="prepared"`. `seed` is that of draws.

    Raises:
        InputError: a setting or the log breaks a rule.
    """
    seed = values.pop("seed", SEED)
    known = {field.name for field in dataclasses.fields(DataConfig)} - {"dataset", "data_path"}
    unknown = [name for name in values if name not in known]
    remedy = "Drop it; din-dist prepare --help lists them."
    check(not unknown, "settings", "must be settings of the data", unknown, remedy)
    config = settings(dataset="event_log", data_path=path, **values).data
    has_more = {
        "label_columns": bool(config.label_columns),
        "histories": bool(config.named_histories),
        "features of behaviours": any(spec.owner is Owner.HISTORY for spec in config.feature_specs),
        "unknown_item": config.unknown_item is not UnknownItem.UNTRAINED,
    }
    names = [name for name, given in has_more.items() if given]
    check(not names, "settings", "must be those of one label and one history", names, "Use din_dist.train.")
    return EventData(config, prepare(config), seed)


def from_pandas(log: Any, **values: Any) -> EventData:
    """Prepares a log that is a table in memory.

    Args:
        log: a `pandas.DataFrame` with the columns of a log: user_id, item_id, timestamp, and label, if there is one.
        values: as of `from_parquet`. Without `data_dir`, what is prepared goes to a temporary folder.

    Raises:
        InputError: a setting or the log breaks a rule.
    """
    is_table = hasattr(log, "columns") and hasattr(log, "to_numpy")
    remedy = "Use from_parquet for files."
    check(is_table, "log", "must be a pandas.DataFrame", type(log).__name__, remedy)
    written = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(log, preserve_index=False).replace_schema_metadata(), written)
    content = written.getvalue().to_pybytes()
    # Without a folder of the user's, one that lives as long as the data set.
    folder = None if values.get("data_dir") else tempfile.TemporaryDirectory(prefix="din_dist-")
    where = Path(values.get("data_dir") or folder.name)  # type: ignore[union-attr]
    path = where / f"log-{hashlib.blake2b(content, digest_size=8).hexdigest()}.parquet"
    if not path.exists():
        make_folder(where)
        path.write_bytes(content)
    return dataclasses.replace(from_parquet(path, **{"data_dir": where, **values}), folder=folder)


def _in_form(batches: tf.data.Dataset, make: Callable[..., Any], form: str) -> tf.data.Dataset:
    check(form in FORMS, "form", "must be a form of histories", form, f"Choose among {', '.join(FORMS)}.")
    return batches.map(tf.autograph.experimental.do_not_convert(functools.partial(make, form=form))).prefetch(1)


def _inputs(batch: Batch, form: str) -> dict[str, Any]:
    """Returns what a model takes of a batch."""
    inputs = {CANDIDATES: batch.candidate_item_ids, HISTORY: batch.history_item_ids}
    if form == "packed":
        inputs[LENGTHS] = batch.history_lengths
    else:
        inputs[HISTORY] = tf.RaggedTensor.from_row_lengths(batch.history_item_ids, batch.history_lengths)
    if form == "padded":
        inputs |= {HISTORY: inputs[HISTORY].to_tensor(), MASK: tf.sequence_mask(batch.history_lengths)}
    return inputs | ({FEATURES: batch.features} if batch.features else {})


def _labelled(batch: Batch, form: str) -> tuple[Any, ...]:
    inputs = _inputs(batch, form)
    if "logit_offsets" in batch.extras:
        inputs[OFFSETS] = batch.logit_offsets
    return (inputs, batch.labels, batch.weights) if "weights" in batch.extras else (inputs, batch.labels)


def _chosen(batch: Batch, form: str) -> Any:
    inputs = _inputs(batch, form)
    return (inputs, None, batch.weights) if "weights" in batch.extras else inputs

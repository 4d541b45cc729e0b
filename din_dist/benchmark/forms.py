"""Other forms of a training job, for `cli/benchmark.py` to compare with ours. Each overrides one part of `Assembly`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from din_dist.assembly import Assembly, make_model
from din_dist.benchmark.attention_forms import PaddedActivationUnit, UnfactoredActivationUnit
from din_dist.config import ComputeDtype, Config
from din_dist.data.trained_items import row_of_item
from din_dist.distributed.collectives import Collectives
from din_dist.distributed.gradients import DenseExchange
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import Owner
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.models.din import DIN
from din_dist.schema import Batch
from din_dist.training.train_step import TrainStep, UnobservedTrainStep


class _WithoutMetrics(Assembly):
    @property
    def step_class(self) -> type[TrainStep]:
        return UnobservedTrainStep


class _OtherAttention(Assembly):
    unit: type[LocalActivationUnit]

    @property
    def model_class(self) -> Callable[..., BehaviourModel]:
        return functools.partial(DIN, attention=self.unit)


class _Padded(_OtherAttention):
    unit = PaddedActivationUnit


class _Unfactored(_OtherAttention):
    unit = UnfactoredActivationUnit


class _DenseAllreduce(Assembly):
    @functools.cached_property
    def exchange(self) -> DenseExchange:
        return DenseExchange(self.collectives, self.config.optimizer.wire_dtype, self.execution)


class WithoutSharedMemory(Assembly):
    """A job whose ranks send messages, as those on several machines do."""

    @functools.cached_property
    def collectives(self) -> Collectives:
        return self.runtime


def with_idle_rows(form: type[Assembly], idle_rows_per_item: int) -> type[Assembly]:
    """Returns a form whose tables have so many rows for each item, which uses the last of them."""
    if idle_rows_per_item == 1:
        return form
    count = idle_rows_per_item

    def repeated(ids: np.ndarray) -> np.ndarray:
        return np.repeat(ids, count)[count - 1 :]

    class WithIdleRows(form):  # type: ignore[valid-type, misc]
        @functools.cached_property
        def model(self) -> BehaviourModel:
            rows = row_of_item(self.store.facts, self.trained_items)
            return make_model(
                self.config.model,
                dataclasses.replace(self.store.facts, num_items=count * self.store.facts.num_items),
                {name: repeated(ids) for name, ids in self.store.item_features.items()},
                row_of_item=None if rows is None else count * repeated(rows),
                features={name: _repeated_feature(stored, repeated) for name, stored in self.store.features.items()},
                **self.model_arguments,
            )

        def batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
            for batch in super().batches(first_step, end_step):
                yield batch._replace(distinct_item_ids=batch.distinct_item_ids * count)

    return WithIdleRows


def _repeated_feature(stored: StoredFeature, repeated: Callable[[np.ndarray], np.ndarray]) -> StoredFeature:
    """Returns an item feature with the values of each item repeated for its idle rows; others stay as they are."""
    if stored.encoding.spec.owner is not Owner.ITEM:
        return stored
    if stored.offsets is None:
        places = repeated(np.arange(len(stored.values)))
        return dataclasses.replace(stored, values=stored.values[places])
    places = repeated(np.arange(len(stored.offsets) - 1))
    lengths = np.diff(stored.offsets)[places]
    lengths[np.diff(places, append=-1) == 0] = 0  # idle rows have empty lists: only the last of an item's rows is used
    return dataclasses.replace(stored, offsets=np.concatenate([[0], np.cumsum(lengths)]))


_ASSEMBLIES: dict[str, type[Assembly]] = {
    "without_metrics": _WithoutMetrics,
    "padded": _Padded,
    "unfactored": _Unfactored,
    "dense_allreduce": _DenseAllreduce,
    "without_shared_memory": WithoutSharedMemory,
}


def assembly_of(form: str) -> type[Assembly]:
    """Returns what puts a form together."""
    return _ASSEMBLIES.get(form, Assembly)


def config_of(form: str, config: Config) -> Config:
    """Returns the settings of a form."""
    if form in ("padded", "unfactored", "without_xla"):
        return config.replace(compute_dtype=ComputeDtype.FLOAT32, xla=False, native=False)
    if form == "without_native":
        return config.replace(compute_dtype=ComputeDtype.FLOAT32, native=False)
    if form == "in_float32":
        return config.replace(compute_dtype=ComputeDtype.FLOAT32)
    if form == "undoable":  # as a job that may skip an update must be
        return config.replace(skip_nonfinite_steps=1)
    if form == "without_group_negatives":
        return config.replace(group_negatives=False)
    return config

"""Puts the parts of a training job together, from settings and a runtime: the one module that may import every room."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from din_dist import kernels, progress, schema
from din_dist.config import ComputeDtype, Config, ModelConfig, ModelKind, TablePlacement, TaskHead, require
from din_dist.data.event_store import EventStore
from din_dist.data.example_ages import ExampleAges
from din_dist.data.pipeline import BatchMaker, Shard, read_ahead, side_counts, training_batches
from din_dist.data.popularity import popularity
from din_dist.data.sampled_items import sampled_items
from din_dist.data.splits import Examples, behaviour_counts, item_counts, split_examples
from din_dist.data.trained_items import TrainedItems, row_of_item, trained_items
from din_dist.data.walks import parts
from din_dist.distributed.collectives import Collectives
from din_dist.distributed.gradients import GradientExchange
from din_dist.distributed.placement import RowShard
from din_dist.distributed.runtime import Runtime
from din_dist.distributed.sharded_lookup import ShardedTables
from din_dist.distributed.shared_memory import share_memory
from din_dist.evaluation.evaluator import Evaluator
from din_dist.execution import Execution, Mode
from din_dist.features.encoding import StoredFeature
from din_dist.features.spec import Owner
from din_dist.layers.feature_columns import feature_table_specs
from din_dist.layers.local_lookup import LocalLookup, columns_of
from din_dist.layers.table_holder import WHOLE, TableHolder
from din_dist.models.behaviour_model import BehaviourModel
from din_dist.models.comirec import MIND, ComiRecDR, ComiRecSA
from din_dist.models.din import DIN
from din_dist.models.mean_pooling import MeanPooling
from din_dist.models.sr_gnn import SRGNN
from din_dist.models.youtube_dnn import YouTubeDNN
from din_dist.schema import Batch
from din_dist.telemetry.prometheus import PrometheusMetrics
from din_dist.telemetry.reporter import Reporter
from din_dist.training.checkpoint import CheckpointStore
from din_dist.training.learner import Learner, TrainingData
from din_dist.training.optimizers import OPTIMIZERS, Optimizer, make_optimizer
from din_dist.training.regularization import Regularization
from din_dist.training.schedules import num_updates
from din_dist.training.table_room import Needs, TableRoom, choose_placement
from din_dist.training.train_step import MessageSizes, TrainStep
from din_dist.training.trainer import NoSignals, ReceivedSignals, Trainer
from din_dist.training.undo import UndoLog
from din_dist.training.warm_start import Parent, ParentJob, WarmStart


def table_specs(config: ModelConfig, facts: schema.DatasetFacts) -> list[schema.TableSpec]:
    """Returns the item's table, then one for each of `item_features`; row 0 of each is for unknown ids.

    `feature_table_specs` returns those of declared features.
    """
    sizes = {"item": facts.num_items}
    sizes |= {schema.feature_label(name): num_ids for name, num_ids in facts.item_features.items()}
    widths = config.embedding_dim * len(sizes) if len(config.embedding_dim) == 1 else config.embedding_dim
    require(
        len(widths) == len(sizes),
        f"must be one width, or one for each of {', '.join(sizes)}",
        "embedding_dim",
        ",".join(map(str, config.embedding_dim)),
        f"Give {len(sizes)} numbers.",
    )
    return [schema.TableSpec(name, sizes[name] + 1, width) for name, width in zip(sizes, widths, strict=True)]


def require_memory_for_tables(
    config: Config,
    facts: schema.DatasetFacts,
    features: Mapping[str, StoredFeature] | None = None,
    runtime: Runtime | None = None,
) -> bool:
    """Checks that there is memory for the tables and their slots; returns True if the ranks are to deal out rows.

    Args:
        config: all settings.
        facts: of the data set.
        features: its declared features, by name. None: there are none.
        runtime: the ranks, each of which calls this. None: it is not known yet how many there will be.

    Raises:
        InputError: the memory is too small, or `--table_placement` asks for what does not work.
    """
    encodings = [feature.encoding for feature in (features or {}).values()]
    specs = table_specs(config.model, facts) + feature_table_specs(encodings, config.model.embedding_dim[0])
    slots = 0 if config.optimizer.adagrad_row_wise else len(OPTIMIZERS[config.optimizer.optimizer].initial_state)
    room, remedy = TableRoom.here(), "Give narrower embeddings, or an optimizer that keeps less (--optimizer=sgd)."
    if runtime is None and config.execution.table_placement is TablePlacement.SHARDED:
        return False  # the job itself looks at what its workers have
    ranks = runtime or Runtime()
    if ranks.world_size > 1 and not ranks.elastic:
        room = room.smallest(ranks)
    needs = Needs.of(specs, slots, config.execution.sharded_from_rows, ranks)
    if choose_placement(config, needs, room, specs, ranks):
        return True
    wanted, have = needs.whole, min(room)
    if needs.of_worker < wanted and ranks.world_size > 1 and not ranks.elastic:
        each = needs.of_worker / 2**30
        remedy = f"Try --table_placement=sharded, which takes {each:,.1f} GiB a worker here, or more workers. {remedy}"
    largest = max(specs, key=lambda spec: spec.num_rows * spec.width)
    declared = {schema.feature_label(encoding.spec.name): encoding.spec.name for encoding in encodings}
    if largest.name in declared:
        remedy = f"Declare feature {declared[largest.name]} with rows (hashing), min_count or a smaller width."
    require(
        wanted <= have,
        f"tables and optimizer must fit into memory: {sum(spec.num_rows for spec in specs):,} rows take "
        f"{wanted / 2**30:,.1f} GiB, and there are {have / 2**30:,.1f} GiB",
        "embedding_dim",
        ",".join(map(str, config.model.embedding_dim)),
        remedy,
    )
    return False


def require_chained_labels(config: Config, store: EventStore) -> None:
    """Checks that each label supposes the one before it, if the head takes them so.

    Raises:
        InputError: an event has a label without the one before it.
    """
    if config.model.heads.kind != TaskHead.ESMM or store.task_labels is None:
        return
    names = store.facts.tasks
    with progress.at(f"reading data in {store.folder}"):
        for part in parts(len(store.task_labels)):
            bits = store.task_labels[part]
            for place in range(1, len(names)):
                alone = int(np.count_nonzero((bits >> place & 1) > (bits >> place - 1 & 1)))
                require(
                    not alone,
                    f"esmm takes labels of which each supposes the one before it, as {names[place]} must suppose "
                    f"{names[place - 1]}",
                    "task_head",
                    f"{alone:,} events with {names[place]} but without {names[place - 1]}",
                    "Order --label_columns by time, correct the log, or use --task_head=shared.",
                )


# Name -> the class of a model.
MODELS: dict[str, Callable[..., BehaviourModel]] = {
    ModelKind.DIN: DIN,
    ModelKind.MEAN_POOLING: MeanPooling,
    ModelKind.YOUTUBE_DNN: YouTubeDNN,
    ModelKind.COMIREC_SA: ComiRecSA,
    ModelKind.COMIREC_DR: ComiRecDR,
    ModelKind.MIND: MIND,
    ModelKind.SR_GNN: SRGNN,
}


def require_known_features(config: Config, store: EventStore) -> None:
    """Checks that a model that finds items is given no feature that it does not read.

    Raises:
        InputError: it is.
    """
    kind = config.model.model
    if not kind.retrieves:
        return
    read = (Owner.ITEM, Owner.USER, Owner.CONTEXT) if kind is ModelKind.YOUTUBE_DNN else (Owner.ITEM,)
    owners = {name: stored.encoding.spec.owner for name, stored in store.features.items()}
    left = next((name for name, owner in owners.items() if owner not in read), "")
    rule = f"{kind} reads features of {', '.join(read)} only"
    require(not left, rule, "features", f"{left}, of {owners.get(left)}", "Leave it out, or use another --model.")


def make_model(
    config: ModelConfig,
    facts: schema.DatasetFacts,
    item_features: Mapping[str, np.ndarray],
    *,
    seed: int,
    row_of_item: np.ndarray | None = None,
    training_mode: Mode | None = None,
    model_class: Callable[..., BehaviourModel] | None = None,
    features: Mapping[str, StoredFeature] | None = None,
    **of_tables: TableHolder,
) -> BehaviourModel:
    """Makes a model and its variables, the same for the same `seed`.

    Args:
        config: sizes, activations and normalization.
        facts: of the data set.
        item_features: name -> int32 `[num_items + 1]`, the feature's id of each item.
        seed: of the initial weights.
        row_of_item: as of `LocalLookup`.
        training_mode: the mode of training passes. None: TensorFlow's operations compute them, without peers.
        model_class: None: the one of `MODELS` that `config` names.
        features: name -> a declared feature. None: there are none.
        of_tables: `holder`, which makes the tables and reads their rows. Default: they are whole.
    """
    holder = of_tables.get("holder", WHOLE)
    keras.utils.set_random_seed(seed)
    of_owner: dict[Owner, dict[str, StoredFeature]] = {owner: {} for owner in Owner}
    for name, stored in (features or {}).items():
        of_owner[stored.encoding.spec.owner][name] = stored
    of_items, of_history = of_owner.pop(Owner.ITEM), of_owner.pop(Owner.HISTORY)
    num_biases = 0 if config.model.retrieves else facts.num_tasks
    lookup = LocalLookup(
        table_specs(config, facts), item_features, seed, row_of_item, of_items, num_biases, holder, name="lookup"
    )
    # The order of `Owner`: a split head wants the candidates' columns last.
    of_examples = {name: stored for own in of_owner.values() for name, stored in own.items()}
    # What a job does not have, its model need not know.
    given: dict[str, Any] = {"num_tasks": facts.num_tasks} if facts.num_tasks > 1 else {}
    if facts.histories:
        given["histories"] = facts.histories
    if of_examples:
        first_seed = seed + len(lookup.embeddings)
        given["example_columns"] = columns_of(of_examples, config.embedding_dim[0], first_seed, holder=holder)
    if of_history:
        first_seed = seed + len(lookup.embeddings) + len(of_examples)
        given["side_columns"] = columns_of(of_history, config.embedding_dim[0], first_seed, "sides", holder)
    make = model_class or MODELS[config.model]
    model = make(lookup, config, training_mode, name="model", **given)
    model.build_variables()
    return model


class Assembly:
    """A training job. Each part is a property, made from those before it.

    A form that only a benchmark wants is a subclass that overrides one property.

    Args:
        config: all settings.
        runtime: this rank's way to the others.
        store: the prepared data; nothing is downloaded or built here.
        prometheus_metrics: this process' metrics; None: new ones, served by `config.telemetry.metrics_port`.
        signals: what this process was asked to do.
        num_threads: for the input pipeline, this process' share of the cores.
        open_parent: opens what `--warm_start_from` names.

    Raises:
        InputError: a setting does not fit the data.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        store: EventStore,
        *,
        prometheus_metrics: PrometheusMetrics | None = None,
        signals: ReceivedSignals | None = None,
        num_threads: int = 2,
        open_parent: Callable[[Path], Parent] = ParentJob,
    ) -> None:
        self._sharded = require_memory_for_tables(config, store.facts, store.features, runtime)
        require_chained_labels(config, store)
        require_known_features(config, store)
        self.config, self.runtime, self.store = config, runtime, store
        self._prometheus_metrics, self._num_threads = prometheus_metrics, num_threads
        self._signals, self._open_parent = signals or NoSignals(), open_parent
        _ = self.trainer  # all ranks make their parts in one order: some are made together

    @functools.cached_property
    def splits(self) -> Mapping[str, Examples]:
        """The examples of each split."""
        with progress.at(f"reading data in {self.store.folder}"):
            return split_examples(self.store, self.config.data)

    @functools.cached_property
    def trained_items(self) -> TrainedItems | None:
        """The items that training sees, where others are scored by their features."""
        with progress.at(f"reading data in {self.store.folder}"):
            return trained_items(self.store, self.config.data, self.splits)

    @functools.cached_property
    def execution(self) -> Execution:
        """The way in which this process computes."""
        return choose_execution(self.config)

    @functools.cached_property
    def collectives(self) -> Collectives:
        """The way in which ranks sum and gather within an update."""
        by_memory = self.execution.kernels and not self._sharded  # rows of shards go through Horovod, and all with them
        return share_memory(self.runtime) if by_memory else self.runtime

    @functools.cached_property
    def shards(self) -> ShardedTables | None:
        """The holder of tables whose rows are dealt out; None: all tables are whole."""
        if not self._sharded:
            return None
        from_rows = self.config.execution.sharded_from_rows
        return ShardedTables(self.collectives, self.runtime.rank, from_rows, self.execution)

    @functools.cached_property
    def shard_of(self) -> dict[str, RowShard]:
        """This rank's shard of each variable whose rows are dealt out, by name: tables and their slots."""
        shards = self.shards.shards if self.shards else {}
        of_slots = {f"{name}/{kind}": shards[name] for name, kind, _ in self.optimizer.slots if name in shards}
        return {**shards, **of_slots}

    @property
    def model_class(self) -> Callable[..., BehaviourModel]:
        """The class that makes the model."""
        return MODELS[self.config.model.model]

    @functools.cached_property
    def model(self) -> BehaviourModel:
        """The model with its variables."""
        return make_model(
            self.config.model,
            self.store.facts,
            self.store.item_features,
            row_of_item=row_of_item(self.store.facts, self.trained_items),
            features=self.store.features,
            **self.model_arguments,
        )

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments of `make_model` that every form shares."""
        return {
            "seed": self.config.job.seed,
            "training_mode": Mode(True, self.execution, lambda sums: self.collectives.all_reduce([sums])[0]),
            "model_class": self.model_class,
            **({"holder": self.shards} if self.shards else {}),
        }

    @functools.cached_property
    def row_counts(self) -> dict[str, np.ndarray]:
        """The number of training events in which each row of each table occurs."""
        with progress.at(f"reading data in {self.store.folder}"):
            counts = _row_counts(self.config, self.store, self.splits, self.trained_items, self.model)
        return {name: _part_of(own, self.shard_of.get(name)) for name, own in counts.items()}

    @functools.cached_property
    def optimizer(self) -> Optimizer:
        """The optimizer with its slots."""
        weights = self.model.trainable_weights
        return make_optimizer(
            self.config.optimizer,
            [weight.value for weight in weights],
            [weight.path for weight in weights],
            [weight.path for weight in self.model.tables],
            self.execution,
        )

    @functools.cached_property
    def exchange(self) -> GradientExchange:
        """The sum of gradients over the ranks."""
        return GradientExchange(self.collectives, self.config.optimizer.wire_dtype, self.execution, self.shards)

    @functools.cached_property
    def undo_log(self) -> UndoLog:
        """The last updates, for jobs that may have to undo one."""
        by_rows = {id(variable) for variable in self.optimizer.changing_by_rows}
        others = [value for value in self.saved_variables.values() if id(value) not in by_rows]
        return UndoLog(self.optimizer.changing_by_rows, others)

    @functools.cached_property
    def saved_variables(self) -> dict[str, tf.Variable]:
        """All that a checkpoint keeps, by name."""
        weights = [*self.model.trainable_weights, *self.model.non_trainable_weights]
        return {**{weight.path: weight.value for weight in weights}, **self.optimizer.state}

    @property
    def num_parameters(self) -> int:
        """The number of weights of the model, over all ranks."""
        shards = [(self.saved_variables[weight.path], self.shard_of.get(weight.path)) for weight in self.model.tables]
        elsewhere = sum((shard.num_rows - shard.size) * table.shape[1] for table, shard in shards if shard)
        return self.model.count_params() + elsewhere

    @functools.cached_property
    def step(self) -> TrainStep:
        """One update."""
        can_go_back = self.runtime.elastic or self.config.recovery.skip_nonfinite_steps > 0
        return self.step_class(
            self.model,
            self.optimizer,
            self.exchange,
            Regularization(self.config.optimizer, self.row_counts, self.execution),
            self.config.optimizer,
            self.undo_log if can_go_back else None,
        )

    @property
    def step_class(self) -> type[TrainStep]:
        """The class that makes the update."""
        return TrainStep

    @functools.cached_property
    def learner(self) -> Learner:
        """All that learns."""
        wire_bytes = tf.as_dtype(self.config.optimizer.wire_dtype.value).size
        sizes = MessageSizes(self.model, self.optimizer, wire_bytes, self.runtime.has_peers)
        parts = self.model, self.step, self.undo_log, self.saved_variables, sizes, self.warm_start, self.shard_of
        return Learner(*parts)

    @property
    def warm_start(self) -> WarmStart | None:
        """The parent of a new job, which gives it its first weights; None: they are random."""
        if not self.config.job.warm_start_from:
            return None
        return WarmStart(self.config, self.model, self.optimizer, self.store, self._open_parent)

    @functools.cached_property
    def data(self) -> TrainingData:
        """The examples to learn from."""
        return TrainingData(self.store, self.splits["train"].num_examples, self.make_batches)

    def make_batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """Yields this rank's share of the batches of updates `first_step` to `end_step` - 1, each fetched ahead."""
        return read_ahead(self.batches(first_step, end_step))

    def batches(self, first_step: int, end_step: int) -> Iterator[Batch]:
        """Yields what `make_batches` yields, fetched when it is asked for."""
        batches = training_batches(
            self._maker,
            self.config.data,
            global_batch_size=self.config.job.global_batch_size,
            steps=range(first_step, end_step),
            shard=Shard(self.runtime.rank, self.runtime.world_size),
            num_parallel_calls=self._num_threads,
        )
        return iter(batches)

    @functools.cached_property
    def _maker(self) -> BatchMaker:
        examples, seed = self.splits["train"], self.config.job.seed
        drawn = sampled_items(self.store, self.config.model, self.splits, self.trained_items, seed) or popularity(
            self.store, self.config.data, self.splits, self.trained_items
        )
        ages = ExampleAges.of_training(self.store, examples) if self.config.model.example_age else None
        maker = BatchMaker.for_training(
            self.store, examples, self.config.data, seed, self.trained_items, self.execution, drawn, ages
        )
        return dataclasses.replace(maker, graphs=self.config.model.model.reads_graphs)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The scorer of the splits."""
        return Evaluator(self.config, self.store, self.splits, self.runtime, in_step=self._sharded)

    @functools.cached_property
    def telemetry(self) -> Reporter:
        """The reporter of the job."""
        metrics = self._prometheus_metrics or PrometheusMetrics(self.config, self.runtime)
        num_steps = num_updates(self.config, self.splits["train"].num_examples)
        return Reporter(self.config, self.runtime, metrics, num_steps)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The loop."""
        learner, evaluator, telemetry = self.learner, self.evaluator, self.telemetry
        if self.config.execution.compute_dtype is ComputeDtype.BFLOAT16 and not self.execution.bfloat16:
            telemetry.say("computing in float32: this processor, without AMX tiles, would be slower in bfloat16")
        checkpoints = CheckpointStore(self.config, self.store.facts.fingerprint, self.runtime, self.shard_of)
        return Trainer(self.config, self.runtime, learner, self.data, evaluator, checkpoints, telemetry, self._signals)


def _part_of(counts: np.ndarray, shard: RowShard | None) -> np.ndarray:
    return counts if shard is None else counts[shard.of_rank].copy()


def choose_execution(config: Config) -> Execution:
    """Returns how this process is to compute.

    Raises:
        InputError: the processor or the set-up lacks what the settings ask for.
    """
    in_bfloat16 = config.execution.compute_dtype is ComputeDtype.BFLOAT16
    native = _uses_kernels(config)
    return Execution(native, config.execution.xla, in_bfloat16 and kernels.gains_by_bfloat16())


def _uses_kernels(config: Config) -> bool:
    """Tells whether this process is to train by our kernels."""
    in_bfloat16 = config.execution.compute_dtype is ComputeDtype.BFLOAT16
    if not config.execution.native or tf.config.get_visible_devices("GPU"):
        received = "a GPU" if config.execution.native else "--nonative"
        require(
            not in_bfloat16,
            "bfloat16 is for our kernels, which run on CPUs",
            "compute_dtype",
            received,
            "Use --compute_dtype=float32.",
        )
        return False
    require(
        kernels.PATH.exists(),
        f"takes {kernels.PATH}",
        "native",
        "no such file",
        "Run launch/setup.sh, which compiles it, or install a wheel for this platform. Or add --nonative for "
        "TensorFlow's own operations.",
    )
    kernels.library()
    require(
        not in_bfloat16 or kernels.multiplies_bfloat16(),
        "bfloat16 takes AVX512_BF16 (AMD Zen 4, Intel Sapphire Rapids or newer) and kernels built by g++ 10 or newer",
        "compute_dtype",
        "a processor or kernels without",
        "Use --compute_dtype=float32.",
    )
    return True


def _row_counts(
    config: Config,
    store: EventStore,
    splits: Mapping[str, Examples],
    trained: TrainedItems | None,
    model: BehaviourModel,
) -> dict[str, np.ndarray]:
    """Returns how often the rows of each table occur in training, by its name; zeros if no penalty asks.

    Rows of items and of their features are counted in the positive events of training and in a log of behaviours, and
    other features in all events of training. A list counts each of its entries. Side information of behaviours is
    counted at all positions of the histories of training.
    """
    lookup = model.lookup
    of_items = np.zeros(store.facts.num_items + 1)
    if config.optimizer.mini_batch_aware_l2:
        of_events = item_counts(store, splits)
        if trained:  # a user's events before its first example are in none, if only validation and test have examples
            of_events *= trained.occur
        of_items = (of_events + behaviour_counts(store, splits["train"])).astype(np.float64)
    rows = row_of_item(store.facts, trained)
    row_ids = [np.arange(len(of_items)) if rows is None else rows, *store.item_features.values()]
    counts = {
        table.path: np.bincount(ids, of_items, spec.num_rows)
        for table, spec, ids in zip(lookup.tables, lookup.specs, row_ids, strict=True)
    }
    if trained:  # the reserved row has the events whose item is hidden
        rate, of_item = config.data.unknown_item_rate, counts[lookup.tables[0].path]
        without_row = of_item[schema.UNKNOWN_ID]
        of_rows = (1 - rate) * of_item
        of_rows[schema.UNKNOWN_ID] = without_row + rate * (of_items.sum() - without_row)
        counts |= {lookup.tables[0].path: of_rows}
    times = {Owner.ITEM: of_items}
    if config.optimizer.mini_batch_aware_l2 and model.example_columns:
        times |= _times_in_training(store, splits["train"])
    for columns in (lookup.columns, model.example_columns):
        for encoding, table in columns.embedded if columns else ():
            stored = store.features[encoding.spec.name]
            counts[table.path] = _row_counts_of(stored, _times_of(stored, times, store))
    if model.side_columns:
        of_sides: Mapping[str, np.ndarray] = {}
        if config.optimizer.mini_batch_aware_l2:
            of_sides = side_counts(store, splits["train"], config.data.max_history_length, model.side_encodings)
        for encoding, table in model.side_columns.embedded:
            counts[table.path] = of_sides.get(encoding.spec.name, np.zeros(encoding.num_rows))
    return counts


def _times_in_training(store: EventStore, examples: Examples) -> dict[Owner, np.ndarray]:
    """Returns in how many training events each row of a user, context or candidate feature occurs."""
    users = examples.user_of_example()[:: examples.draws_per_row]
    of_events = np.zeros(store.facts.num_events)
    of_events[examples.events()] = 1
    of_users = np.bincount(users, minlength=store.facts.num_users)
    return {Owner.USER: of_users, Owner.CONTEXT: of_events, Owner.CANDIDATE: of_events}


def _times_of(stored: StoredFeature, times: Mapping[Owner, np.ndarray], store: EventStore) -> np.ndarray | None:
    """Returns how often each row of a feature occurs `[n]`, if its owners' rows occur `times`; None: never."""
    of_owner = times.get(stored.encoding.spec.owner)
    if of_owner is None or stored.offers is None:
        return of_owner
    events = np.flatnonzero(of_owner)
    return np.bincount(stored.offers.rows(events, store.item_ids[events]), minlength=stored.offers.num_rows)


def _row_counts_of(stored: StoredFeature, times: np.ndarray | None) -> np.ndarray:
    """Returns how often each row of a feature's table occurs, if its owners' rows occur `times` `[n]`; None: never."""
    num_rows = stored.encoding.num_rows
    if times is None:
        return np.zeros(num_rows)
    if stored.offsets is not None:
        times = np.repeat(times, np.diff(stored.offsets))
    return np.bincount(stored.values, times, num_rows)

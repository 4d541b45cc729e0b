"""Settings and a runtime in, a ready trainer out: the one module that may import every room."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from din_dist import kernels, progress, schema
from din_dist.config import ComputeDtype, Config, ModelConfig, ModelKind, OptimizerKind, require
from din_dist.data.event_store import EventStore
from din_dist.data.pipeline import read_ahead, training_batches
from din_dist.data.splits import Examples, item_counts, split_examples
from din_dist.data.trained_items import TrainedItems, trained_items
from din_dist.distributed.gradients import GradientExchange
from din_dist.distributed.runtime import Runtime
from din_dist.distributed.shared_memory import share_memory
from din_dist.evaluation.evaluator import Evaluator
from din_dist.layers.local_activation_unit import LocalActivationUnit
from din_dist.layers.local_lookup import LocalLookup
from din_dist.machine import memory_bytes
from din_dist.models.din import DIN
from din_dist.models.mean_pooling import MeanPooling
from din_dist.models.ranking_model import RankingModel
from din_dist.schema import Batch
from din_dist.telemetry.prometheus import PrometheusMetrics
from din_dist.telemetry.reporter import Telemetry
from din_dist.training.checkpoint import CheckpointStore
from din_dist.training.optimizers import make_optimizer
from din_dist.training.regularization import Regularization
from din_dist.training.train_step import MessageSizes, TrainStep
from din_dist.training.trainer import MakeBatches, Trainer, num_updates
from din_dist.training.undo import UndoLog


class Job(NamedTuple):
    """The parts of a training job."""

    trainer: Trainer
    step: TrainStep
    make_batches: MakeBatches
    evaluator: Evaluator
    telemetry: Telemetry
    model: RankingModel


def table_specs(config: ModelConfig, facts: schema.DatasetFacts) -> list[schema.TableSpec]:
    """The item's table, then one for each item feature; row 0 of each is for unknown ids."""
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


_SLOTS = {OptimizerKind.SGD: 0, OptimizerKind.ADAGRAD: 1, OptimizerKind.LAZY_ADAM: 2}  # beside each weight


def require_memory_for_tables(config: Config, facts: schema.DatasetFacts) -> None:
    """Checks that this machine could hold the tables and what the optimizer keeps for them, once.

    Raises:
        InputError: it could not.
    """
    specs = table_specs(config.model, facts)
    slots = 0 if config.optimizer.adagrad_row_wise else _SLOTS[config.optimizer.optimizer]
    wanted = 4 * (1 + slots) * sum(spec.num_rows * spec.width for spec in specs)
    have = memory_bytes()
    require(
        wanted <= have,
        f"tables and optimizer must fit into memory: {sum(spec.num_rows for spec in specs):,} rows take "
        f"{wanted / 2**30:,.1f} GiB, and there are {have / 2**30:,.1f} GiB",
        "embedding_dim",
        ",".join(map(str, config.model.embedding_dim)),
        "Give narrower embeddings, or an optimizer that keeps less (--optimizer=sgd).",
    )


def make_model(
    config: ModelConfig,
    facts: schema.DatasetFacts,
    item_features: Mapping[str, np.ndarray],
    *,
    seed: int,
    row_of_item: np.ndarray | None = None,
    sum_over_ranks: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
    compiled: bool = False,
    native: bool = False,
    in_bfloat16: bool = False,
    attention: type[LocalActivationUnit] | None = None,
) -> RankingModel:
    """A model with its variables made, the same for the same `seed`; `row_of_item` as of `LocalLookup`."""
    keras.utils.set_random_seed(seed)
    lookup = LocalLookup(table_specs(config, facts), item_features, seed, row_of_item, name="lookup")
    match config.model:
        case ModelKind.DIN:
            model: RankingModel = DIN(
                lookup, config, sum_over_ranks, compiled, native, in_bfloat16, attention, name="model"
            )
        case ModelKind.MEAN_POOLING:
            model = MeanPooling(lookup, config, sum_over_ranks, compiled, native, in_bfloat16, name="model")
    model.build_variables()
    return model


def make_job(
    config: Config,
    runtime: Runtime,
    store: EventStore,
    *,
    prometheus_metrics: PrometheusMetrics | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    leave_requested: Callable[[], bool] = lambda: False,
    num_threads: int = 2,
    attention: type[LocalActivationUnit] | None = None,
    exchange: type[GradientExchange] = GradientExchange,
    train_step: type[TrainStep] = TrainStep,
    idle_rows_per_item: int = 1,
    shared_memory: bool = True,
) -> Job:
    """Wires a training job.

    Args:
        store: the prepared data; nothing is downloaded or built here.
        num_threads: for the input pipeline, this process' share of the cores.
        prometheus_metrics: this process' metrics; None: new ones, served by `config.job.metrics_port`.
        attention, exchange, train_step: other forms of the same, for comparison.
        idle_rows_per_item: rows of the item's tables for each item, which uses the last of them.
        shared_memory: whether workers of one machine may speak through it.

    Raises:
        InputError: a setting does not fit the data.
    """
    require_memory_for_tables(config, store.facts)
    with progress.at(f"reading data in {store.folder}"):
        splits = split_examples(store, config.data)
        examples = splits["train"]
        trained = trained_items(store, config.data, splits)
    native = _is_native(config)
    collectives = share_memory(runtime) if native and shared_memory else runtime
    model = make_model(
        config.model,
        dataclasses.replace(store.facts, num_items=idle_rows_per_item * store.facts.num_items),
        {
            name: np.repeat(ids, idle_rows_per_item)[idle_rows_per_item - 1 :]
            for name, ids in store.item_features.items()
        },
        seed=config.job.seed,
        row_of_item=idle_rows_per_item * np.repeat(trained.row_of_item, idle_rows_per_item)[idle_rows_per_item - 1 :]
        if trained
        else None,
        sum_over_ranks=lambda sums: collectives.all_reduce([sums])[0],
        compiled=config.job.xla,
        native=native,
        in_bfloat16=config.job.compute_dtype is ComputeDtype.BFLOAT16,
        attention=attention,
    )
    variables = {weight.path: weight.value for weight in model.trainable_weights}
    names = list(variables)
    tables = [weight.path for weight in model.lookup.trainable_weights]
    with progress.at(f"reading data in {store.folder}"):
        row_counts = _row_counts(config, store, splits, trained, model.lookup)
    optimizer = make_optimizer(
        config.optimizer, list(variables.values()), names, tables=tables, compiled=config.job.xla, native=native
    )
    averages = {weight.path: weight.value for weight in model.non_trainable_weights}
    saved = {**variables, **averages, **optimizer.state}
    by_rows = {id(variable) for variable in optimizer.changing_by_rows}
    can_go_back = runtime.elastic or config.job.skip_nonfinite_steps > 0
    history = UndoLog(optimizer.changing_by_rows, [value for value in saved.values() if id(value) not in by_rows])
    step = train_step(
        model,
        optimizer,
        exchange(collectives, config.optimizer.wire_dtype, native),
        Regularization(config.optimizer, row_counts, native, config.job.xla),
        config.optimizer,
        history if can_go_back else None,
    )
    evaluator = Evaluator(config, store, splits, runtime)
    prometheus_metrics = prometheus_metrics or PrometheusMetrics(config.job, runtime)
    telemetry = Telemetry(config.job, runtime, prometheus_metrics, num_updates(config, examples.num_examples))

    def make_batches(first_step: int, end_step: int) -> Iterator[Batch]:
        batches = iter(
            training_batches(
                store,
                examples,
                config.data,
                seed=config.job.seed,
                global_batch_size=config.job.global_batch_size,
                first_step=first_step,
                end_step=end_step,
                shard_index=runtime.rank,
                num_shards=runtime.world_size,
                num_parallel_calls=num_threads,
                trained=trained,
                native=native,
            )
        )
        if idle_rows_per_item > 1:
            batches = (
                batch._replace(distinct_item_ids=batch.distinct_item_ids * idle_rows_per_item) for batch in batches
            )
        return read_ahead(batches)

    trainer = Trainer(
        config,
        runtime,
        model,
        step,
        MessageSizes(model, optimizer, tf.as_dtype(config.optimizer.wire_dtype.value).size, runtime.has_peers),
        saved,
        make_batches,
        examples.num_examples,
        evaluator,
        CheckpointStore(config, store.facts.fingerprint, runtime),
        telemetry,
        history,
        stop_requested,
        leave_requested,
        store,
    )
    return Job(trainer, step, make_batches, evaluator, telemetry, model)


def _is_native(config: Config) -> bool:
    """Whether this process is to train in our kernels."""
    in_bfloat16 = config.job.compute_dtype is ComputeDtype.BFLOAT16
    if not config.job.native or tf.config.get_visible_devices("GPU"):
        received = "a GPU" if config.job.native else "--nonative"
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
        "Run launch/setup.sh, which compiles it, or add --nonative for TensorFlow's own operations.",
    )
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
    lookup: LocalLookup,
) -> dict[str, np.ndarray]:
    """By the name of each table, how often its rows occur in training; ones where nobody will ask."""
    of_items = np.zeros(store.facts.num_items + 1)
    if config.optimizer.mini_batch_aware_l2:
        of_items = item_counts(store, splits).astype(np.float64)
    row_ids = [np.arange(len(of_items)), *store.item_features.values()]
    counts = {
        table.path: np.bincount(ids, of_items, spec.num_rows)
        for table, spec, ids in zip(lookup.tables, lookup.specs, row_ids, strict=True)
    }
    if trained:  # the reserved row has the events whose item is hidden
        rate = config.data.unknown_item_rate
        of_rows = (1 - rate) * counts[lookup.tables[0].path]
        of_rows[schema.UNKNOWN_ID] = rate * of_items.sum()
        counts |= {lookup.tables[0].path: of_rows}
    return counts

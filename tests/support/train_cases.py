"""Trains several small jobs ("cases") in one process, alone or as a rank under horovodrun.

    python -m tests.support.train_cases FOLDER RUN MAX_STEPS CASE...

Each case leaves its results in FOLDER/RUN/CASE, as a job does. `jobs` starts this program.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf

from din_dist.assembly import Assembly
from din_dist.benchmark.forms import WithoutSharedMemory
from din_dist.config import (
    Activation,
    AttentionNormalization,
    BatchNorm,
    Config,
    DataConfig,
    HistoryCut,
    ModelKind,
    Negatives,
    OptimizerKind,
    Softmax,
    Split,
    TablePlacement,
    UnknownItem,
    WireDtype,
)
from din_dist.data.prepared import open_prepared, prepare
from din_dist.distributed.cores import claim_cores
from din_dist.distributed.devices import claim_devices
from din_dist.distributed.runtime import open_runtime
from din_dist.distributed.shared_memory import SharedMemory, share_memory
from din_dist.features.spec import FeatureSpec, Kind, Owner, to_text
from tests.support.featured_store import with_features
from tests.support.owners import OWNERS
from tests.support.small_log import small_config, write_log
from tests.support.task_log import TASKS, write_task_log

CASES: dict[str, dict] = {
    "sgd": {"optimizer": OptimizerKind.SGD, "learning_rate": 0.3, "clip_norm": 1.0, "batch_norm": BatchNorm.FROZEN},
    "adagrad": {
        "optimizer": OptimizerKind.ADAGRAD,
        "learning_rate": 0.05,
        "adagrad_row_wise": True,
        "attention_normalization": AttentionNormalization.NONE,
        "l2": 0.01,
    },
    "lazy_adam": {
        "optimizer": OptimizerKind.LAZY_ADAM,
        "learning_rate": 0.01,
        "activation": Activation.DICE,
        "dropout": 0.2,
        "embedding_l2": 0.01,
        "mini_batch_aware_l2": 0.1,
        "resample_negatives": True,
        "unknown_item": UnknownItem.FEATURES,
        "unknown_item_rate": 0.3,
        "xla": True,
    },
    "bfloat16": {"optimizer": OptimizerKind.ADAGRAD, "learning_rate": 0.05, "wire_dtype": WireDtype.BFLOAT16},
    # Nothing but the graph's own order keeps messages apart there: attention would.
    "mean_pooling": {
        "model": ModelKind.MEAN_POOLING,
        "optimizer": OptimizerKind.ADAGRAD,
        "learning_rate": 0.05,
        "negatives": Negatives.BATCH,
    },
    "features": {  # and weights
        "optimizer": OptimizerKind.ADAGRAD,
        "learning_rate": 0.05,
        "mini_batch_aware_l2": 0.1,
        "negatives": "popularity:0.75",
    },
    "tasks": {
        "optimizer": OptimizerKind.ADAGRAD,
        "learning_rate": 0.05,
        "activation": Activation.DICE,
        "dropout": 0.2,
        "label_columns": TASKS,
        "task_head": "mmoe:3",
        "task_weights": (1.0, 0.5),
        "validation_task": "buy",
        "split": Split.TEMPORAL,
        "validation_from": 12,
        "test_from": 16,
        "histories": ("click:8", "buy:5", "skipped:6"),
        "feature_declarations": to_text(
            (
                FeatureSpec("age", Owner.HISTORY, Kind.TIME_SINCE),
                FeatureSpec("bought", Owner.HISTORY, Kind.CATEGORY, "buy", width=3),
            )
        ),
    },
    "comirec_sa": {
        "model": ModelKind.COMIREC_SA,
        "optimizer": OptimizerKind.LAZY_ADAM,
        "learning_rate": 0.01,
        "embedding_l2": 0.01,
        "num_sampled": 20,
        "unknown_item": UnknownItem.FEATURES,
        "unknown_item_rate": 0.3,
    },
    "youtube_dnn": {
        "model": ModelKind.YOUTUBE_DNN,
        "optimizer": OptimizerKind.ADAGRAD,
        "learning_rate": 0.05,
        "num_sampled": 20,
        "split": Split.USERS,
        "history_cut": HistoryCut.RANDOM,
        "example_age": True,
    },
    "sr_gnn": {
        "model": ModelKind.SR_GNN,
        "optimizer": OptimizerKind.ADAGRAD,
        "learning_rate": 0.05,
        "clip_norm": 1.0,
        "softmax": Softmax.FULL,
        "session_gap": "2",
    },
}
OWN_FILES = {"sgd": {"behaviours_path": "behaviours.parquet"}, "tasks": {"data_path": "tasks.parquet"}}
BY_MESSAGES = {
    "bfloat16",
    "by_messages",
    "at_owners",
    "at_owners_more",
}  # cases and runs whose workers communicate as those of several machines do


def config_of(folder: Path, run: str, case: str, max_steps: int) -> Config:
    """Returns the settings of one case of a run."""
    settings = CASES[case] | {name: str(folder / file) for name, file in OWN_FILES.get(case, {}).items()}
    if run.startswith("sharded"):
        settings |= {"table_placement": TablePlacement.SHARDED, "sharded_from_rows": 1}
    return small_config(
        folder, output_dir=str(folder / run / case), max_steps=max_steps, epochs=100, log_every_steps=1, **settings
    )


def data_config(folder: Path) -> DataConfig:
    """Returns the data settings, which all cases share but those with files of their own."""
    return config_of(folder, "any", "lazy_adam", 1).data


def prepare_data(folder: Path) -> None:
    """Prepares the data of all cases."""
    prepare(data_config(folder))
    # With fewer users, two scores that change places move the AUC of purchases by more than rounding may.
    write_task_log(folder / "tasks.parquet", num_users=240)
    behaviours = folder / "behaviours.parquet"
    write_log(behaviours, num_items=40, seed=1)  # 10 of them are never candidates
    table = pq.read_table(behaviours)
    has_id = np.arange(len(table)) % 3 > 0  # the others are known by their categories alone
    items = pc.if_else(pa.array(has_id), table["item_id"], None)
    pq.write_table(table.set_column(table.schema.get_field_index("item_id"), "item_id", items), behaviours)
    for case in OWN_FILES:
        prepare(config_of(folder, "any", case, 1).data)


def main(folder: Path, run: str, max_steps: int, cases: list[str]) -> None:
    """Trains and tests each case as one rank, and checks that shared memory is used where it should be."""
    cores = claim_cores()
    runtime = open_runtime()
    claim_devices(runtime, len(cores))
    shares = runtime.world_size > 1 and not tf.config.get_visible_devices("GPU")
    assert not shares or isinstance(share_memory(runtime), SharedMemory)
    for case in cases:
        config = config_of(folder, run, case, max_steps)
        shared_memory = BY_MESSAGES.isdisjoint({case, run})
        make = Assembly if shared_memory else WithoutSharedMemory
        store = open_prepared(config.data)
        if case == "features":
            weights = np.random.default_rng(0).integers(0, 4, store.facts.num_events).astype(np.float32)
            store = dataclasses.replace(with_features(store, OWNERS, by_offers=True), weights=weights)
        job = make(config, runtime, store)
        job.trainer.train()
        if shared_memory and shares and not run.startswith("sharded"):
            assert "memfd:din_dist-tables" in Path("/proc/self/maps").read_text()
        job.trainer.test()
        job.telemetry.close()
    runtime.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])

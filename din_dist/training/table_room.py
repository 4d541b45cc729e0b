"""Finds out, before tables are made, whether they fit into memory, and chooses where their rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from din_dist.config import Config, TablePlacement, require
from din_dist.distributed.placement import is_sharded, table_bytes
from din_dist.distributed.runtime import Runtime
from din_dist.machine import address_space_left, memory_bytes
from din_dist.schema import TableSpec

_GIB = 2**30


class TableRoom(NamedTuple):
    """Bytes for tables and their slot variables."""

    of_machine: int
    of_worker: int  # what limits on a process (ulimit -v) leave; never more than the machine's

    @classmethod
    def here(cls) -> TableRoom:
        """Returns what this process may take."""
        machine = memory_bytes()
        return cls(machine, min(machine, address_space_left()))

    def smallest(self, runtime: Runtime) -> TableRoom:
        """Returns the least of all ranks, which all ranks call, so that they choose the same placement."""
        return TableRoom(*map(int, runtime.gather(np.array([self], np.int64)).min(axis=0)))


class Needs(NamedTuple):
    """Bytes that tables and their slot variables take."""

    whole: int  # on a worker, or once a machine
    of_worker: int  # sharded
    of_machine: int  # sharded, all its workers

    @classmethod
    def of(cls, specs: Sequence[TableSpec], num_slots: int, from_rows: int, runtime: Runtime) -> Needs:
        """Returns the needs of some tables in a job of the runtime's ranks."""
        own = table_bytes(specs, num_slots, runtime.world_size, from_rows)
        return cls(table_bytes(specs, num_slots), own, own * runtime.local_size)


def choose_placement(
    config: Config, needs: Needs, room: TableRoom, specs: Sequence[TableSpec], runtime: Runtime
) -> bool:
    """Returns True if tables are to be sharded.

    Args:
        config: all settings.
        needs: of the tables.
        room: of the rank with the least.
        specs: the tables.
        runtime: the ranks.

    Raises:
        InputError: `--table_placement` asks for what does not fit or does not work.
    """
    asked, from_rows = config.execution.table_placement, config.execution.sharded_from_rows
    if asked is TablePlacement.WHOLE or runtime.world_size < 2:
        return False
    whole_fits = needs.whole <= min(room)
    if asked is TablePlacement.AUTO and whole_fits:
        return False
    fits = needs.of_worker <= room.of_worker and needs.of_machine <= room.of_machine
    obstacle = _obstacle(config, runtime)
    if asked is TablePlacement.AUTO:
        return fits and not obstacle
    rule, remedy = obstacle or ("", "")
    require(not obstacle, rule, "table_placement", str(asked), remedy)
    any_sharded = any(is_sharded(spec.num_rows, from_rows, runtime.world_size) for spec in specs)
    largest = max(spec.num_rows for spec in specs)
    require(
        any_sharded,
        "sharded takes a table of --sharded_from_rows rows or more",
        "sharded_from_rows",
        f"{from_rows}, and the largest table has {largest:,} rows",
        "Lower it, or use --table_placement=whole.",
    )
    require(
        fits,
        f"shards of tables and optimizer must fit into memory: a worker takes {_gib(needs.of_worker)}, a machine "
        f"{_gib(needs.of_machine)}, and there are {_gib(room.of_worker)} and {_gib(room.of_machine)}",
        "table_placement",
        str(asked),
        "Use more workers on more machines, narrower embeddings, or an optimizer that keeps less (--optimizer=sgd).",
    )
    return True


def _obstacle(config: Config, runtime: Runtime) -> tuple[str, str] | None:
    """Returns why tables cannot be sharded in this job, and what to do; None: they can be."""
    if runtime.elastic:
        return "sharded needs all its workers, because each alone has its rows", "Drop --min_workers."
    if tf.config.get_visible_devices("GPU"):
        return "sharded is for CPUs", "Hide the GPUs (CUDA_VISIBLE_DEVICES=), or use --table_placement=whole."
    if config.job.warm_start_from:
        return "sharded cannot begin with an older job's weights", "Begin with one update on whole tables, then resume."
    return None


def _gib(count: int) -> str:
    return f"{count / _GIB:,.2f} GiB"

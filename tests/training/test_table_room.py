"""The choice of a placement, and its refusals, before any table is made."""

import pytest

from din_dist.config import Config, TablePlacement
from din_dist.distributed.runtime import Runtime
from din_dist.errors import InputError
from din_dist.schema import TableSpec
from din_dist.training.table_room import Needs, TableRoom, choose_placement

SPECS = [TableSpec("item", 1_000_000, 64), TableSpec("brand", 100, 64)]
NUM_BYTES = 3 * 4 * 64 * 1_000_100
ROOM = TableRoom(NUM_BYTES, NUM_BYTES)


class Ranks(Runtime):
    """Four ranks, each on a machine of its own."""

    world_size = 4


def chosen(room: TableRoom, runtime: Runtime | None = None, **settings: object) -> bool:
    runtime, config = runtime or Ranks(), Config().replace(**settings)
    needs = Needs.of(SPECS, 2, config.execution.sharded_from_rows, runtime)
    return choose_placement(config, needs, room, SPECS, runtime)


def test_auto_deals_out_only_what_does_not_fit_whole() -> None:
    assert not chosen(ROOM)
    assert chosen(ROOM._replace(of_worker=NUM_BYTES - 1))
    assert not chosen(ROOM._replace(of_worker=NUM_BYTES // 5))  # nor does that fit: whole tables are refused
    assert not chosen(ROOM._replace(of_worker=1), Runtime())
    assert not chosen(ROOM._replace(of_worker=1), table_placement=TablePlacement.WHOLE)
    assert chosen(ROOM, table_placement=TablePlacement.SHARDED)


def test_the_shards_of_a_machine_share_its_memory() -> None:
    runtime = Ranks()
    runtime.local_size = 4
    assert not chosen(ROOM._replace(of_machine=NUM_BYTES - 1), runtime)


@pytest.mark.parametrize(
    ("room", "settings", "message"),
    [
        (ROOM._replace(of_worker=NUM_BYTES // 5), {}, "--table_placement: shards of tables and optimizer must fit"),
        (ROOM, {"sharded_from_rows": 2_000_000}, "--sharded_from_rows: sharded takes a table of"),
        (ROOM, {"warm_start_from": "/old"}, "--table_placement: sharded cannot begin with an older job's weights"),
    ],
)
def test_what_does_not_work_is_refused(room: TableRoom, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen(room, table_placement=TablePlacement.SHARDED, **settings)


def test_elastic_jobs_are_refused() -> None:
    runtime = Ranks()
    runtime.elastic = True
    with pytest.raises(InputError, match="each alone has its rows"):
        chosen(ROOM, runtime, table_placement=TablePlacement.SHARDED)
    assert not chosen(ROOM._replace(of_worker=1), runtime)


def test_the_room_of_a_worker_is_in_that_of_its_machine() -> None:
    room = TableRoom.here()
    assert 0 < room.of_worker <= room.of_machine

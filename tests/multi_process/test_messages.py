"""Messages between processes, over the Horovod that launch/horovod/build_horovod.sh builds."""

from __future__ import annotations

import pytest

from tests.support.jobs import start


@pytest.mark.thorough(unless=lambda case: case["world_size"] == 2)
@pytest.mark.parametrize("world_size", [2, 5])
def test_messages_are_right_and_do_not_wait_until_they_are_looked_for(world_size: int) -> None:
    """More than a hundred of them, one after the other: to look for each would take five seconds."""
    start(world_size, "tests.multi_process.messages", variables={"HOROVOD_CYCLE_TIME": "5000"})


def test_a_rank_that_others_join_puts_the_same_messages_together_as_they_do() -> None:
    """Unless our build keeps what was set when Horovod is initialized again, a rank is aborted here."""
    start(2, "tests.multi_process.messages", "joins_anew")

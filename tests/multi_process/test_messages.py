"""Messages between processes, over the Horovod that launch/build_horovod.sh builds."""

from __future__ import annotations

from tests.multi_process.jobs import start


def test_a_message_does_not_wait_until_it_is_looked_for() -> None:
    """A hundred of them, one after the other, which would take 500 seconds."""
    start(2, "tests.multi_process.messages", variables={"HOROVOD_CYCLE_TIME": "5000"})

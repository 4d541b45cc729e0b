"""What the store of an elastic job answers beside values: a worker's new rank, and whether hosts came or went.

Replaces Horovod's own, which unpickled what anyone had put there.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from horovod.runner.http.http_server import BAD_REQUEST, NOT_FOUND, RendezvousHandler

if TYPE_CHECKING:
    from horovod.runner.elastic.driver import ElasticDriver

GET_RANK_AND_SIZE = "rank_and_size"
GET_HOST_UPDATES = "host_updates"

WAIT_SECONDS = 20.0  # after which who asks for updates is told that there are none


class HostUpdates:
    """The changes of the hosts, numbered, for the coordinator to ask for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number = 0
        self._heeded = 0  # up to which they are part of the ranks' assignment
        self._update: dict[str, int] = {}

    @property
    def number(self) -> int:
        """That of the last one."""
        return self._number

    def announce(self, timestamp: int, result: int) -> None:
        with self._changed:
            self._number += 1
            self._update = {"number": self._number, "timestamp": timestamp, "result": int(result)}
            self._changed.notify_all()

    def heed(self, number: int) -> None:
        """Takes the updates up to this one for answered: the ranks were assigned by them."""
        with self._changed:
            self._heeded = max(self._heeded, number)

    def after(self, number: int, concerns: Callable[[], bool], seconds: float = WAIT_SECONDS) -> dict[str, int] | None:
        """Returns the last update if it comes after this one, waiting for it; None after so many seconds.

        concerns: whether updates are for who asks, which may change meanwhile.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while self._number <= max(number, self._heeded) or not concerns():
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(min(left, 1.0))
            return dict(self._update)


def create_rendezvous_handler(driver: ElasticDriver) -> type[RendezvousHandler]:
    class ElasticRendezvousHandler(RendezvousHandler):
        def _get(self, scope: str, key: str) -> int | bytes:
            if scope == GET_RANK_AND_SIZE:
                host, _, local_rank = key.rpartition(":")
                return _rank_and_size(host, local_rank)
            if scope == GET_HOST_UPDATES:
                slot, _, number = key.rpartition(":")
                return _host_updates(slot, number)
            return super()._get(scope, key)

    def _rank_and_size(host: str, local_rank: str) -> int | bytes:
        if not host or not local_rank.isdecimal():
            return BAD_REQUEST
        logging.info(f"_get_rank_and_size: {host} {local_rank}")
        driver.record_ready(host, int(local_rank))
        slot_info = driver.get_slot_info(host, int(local_rank))
        logging.info(f"rank and size: {slot_info.rank} {slot_info.size}")
        return slot_info.to_response_string().encode("ascii")

    def _host_updates(slot: str, number: str) -> int | bytes:
        """Answers with the number of the last update, or to a number with the update after it."""
        updates = driver.host_updates
        if number == "":
            return json.dumps({"number": updates.number}).encode()
        if not number.isdecimal():
            return BAD_REQUEST

        def concerns() -> bool:
            coordinator = driver.get_coordinator_info()
            return coordinator is not None and slot == f"{coordinator.hostname}:{coordinator.local_rank}"

        update = updates.after(int(number), concerns)
        return json.dumps(update).encode() if update else NOT_FOUND

    return ElasticRendezvousHandler

"""How a worker of an elastic job learns that hosts came or went: it asks the job's store, and waits for the answer.

Replaces Horovod's own, by which each worker served anyone, and unpickled what came.
"""

import json
import os
import threading
import time
from enum import IntFlag
from typing import Protocol

from horovod.runner.http.http_client import StoreClient

HOROVOD_GLOO_RENDEZVOUS_ADDR = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
HOROVOD_GLOO_RENDEZVOUS_PORT = "HOROVOD_GLOO_RENDEZVOUS_PORT"
HOROVOD_HOSTNAME = "HOROVOD_HOSTNAME"
HOROVOD_LOCAL_RANK = "HOROVOD_LOCAL_RANK"

GET_HOST_UPDATES = "host_updates"
ANSWER_SECONDS = 60.0  # more than a server waits for something to tell
TRY_AGAIN_SECONDS = 1.0


class HostUpdateResult(IntFlag):
    no_update = 0
    removed = 1
    added = 2
    mixed = removed | added


class Listener(Protocol):
    """Who is told of changes of hosts."""

    def on_hosts_updated(self, timestamp: int, update_res: HostUpdateResult) -> None: ...


class WorkerNotificationManager:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._listeners: set[Listener] = set()

    def init(
        self,
        rendezvous_addr: str | None = None,
        rendezvous_port: int | None = None,
        hostname: str | None = None,
        local_rank: int | None = None,
    ) -> None:
        """Asks from now on, in a thread of its own; does nothing without a rendezvous server."""
        with self._lock:
            if self._thread:
                return
            rendezvous_addr = rendezvous_addr or os.environ.get(HOROVOD_GLOO_RENDEZVOUS_ADDR)
            if not rendezvous_addr:
                return
            rendezvous_port = rendezvous_port or int(os.environ[HOROVOD_GLOO_RENDEZVOUS_PORT])
            hostname = hostname or os.environ[HOROVOD_HOSTNAME]
            local_rank = os.environ[HOROVOD_LOCAL_RANK] if local_rank is None else local_rank
            client = StoreClient(rendezvous_addr, rendezvous_port)
            slot = f"{hostname}:{local_rank}"
            self._thread = threading.Thread(target=self._watch, args=(client, slot), daemon=True)
            self._thread.start()

    def register_listener(self, listener: Listener) -> None:
        self._listeners.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        self._listeners.remove(listener)

    def handle_hosts_updated(self, timestamp: int, update_res: HostUpdateResult) -> None:
        for listener in list(self._listeners):
            listener.on_hosts_updated(timestamp, update_res)

    def _watch(self, client: StoreClient, slot: str) -> None:
        number = ""
        while True:
            try:
                answer = client.request("GET", GET_HOST_UPDATES, f"{slot}:{number}", timeout=ANSWER_SECONDS)
                update = json.loads(answer) if answer else {}
            except (OSError, ValueError):  # the launcher may be out of reach for a while; its agent minds if for long
                time.sleep(TRY_AGAIN_SECONDS)
                continue
            number = update.get("number", number)
            if "result" in update:
                self.handle_hosts_updated(update["timestamp"], HostUpdateResult(update["result"]))

"""A cable between two network namespaces that can be made bad: `python -m tests.cluster_cable SPACE:CARD SPACE:CARD`.

For kernels without netem. Each end is a TAP card of its namespace; this process carries the frames between them, and
reads from stdin, a line each, how: `DELAY_MS LOSS` (one way; a share of the frames). Both cards go when it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import selectors
import struct
import sys
import time
from pathlib import Path

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_CLONE_NEWNET = 0x40000000
_LONGEST_FRAME = 65536


def open_tap(namespace: str, card: str) -> int:
    """A new card in a namespace; what is read from it was sent there."""
    with Path("/run/netns", namespace).open() as entry:
        if ctypes.CDLL(None, use_errno=True).setns(entry.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", card.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def carry(ends: tuple[int, int], source: int) -> None:
    """Until `source`, where the settings come from, is closed."""
    delay, loss = 0.0, 0.0
    under_way: list[tuple[float, int, int, bytes]] = []  # when due, number, to which end
    sent = 0
    selector = selectors.DefaultSelector()
    for key in (*ends, source):
        selector.register(key, selectors.EVENT_READ)
    while True:
        timeout = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for key, _ in selector.select(timeout):
            if key.fd == source:
                settings = os.read(source, 4096).decode().split()
                if not settings:
                    return
                delay, loss = float(settings[-2]) / 1000, float(settings[-1])
                continue
            target = ends[1] if key.fd == ends[0] else ends[0]
            with contextlib.suppress(OSError):  # the card is down, or all is read
                while True:
                    frame = os.read(key.fd, _LONGEST_FRAME)
                    if random.random() >= loss:
                        sent += 1
                        heapq.heappush(under_way, (time.monotonic() + delay, sent, target, frame))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, _, target, frame = heapq.heappop(under_way)
            with contextlib.suppress(OSError):
                os.write(target, frame)


if __name__ == "__main__":
    first, second = (open_tap(*end.split(":")) for end in sys.argv[1:3])
    print("plugged in", flush=True)
    carry((first, second), sys.stdin.fileno())

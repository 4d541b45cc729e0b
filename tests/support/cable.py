"""Connects two network namespaces by a cable that can be made bad, for kernels without netem.

    python -m tests.support.cable SPACE:CARD SPACE:CARD

Each end is a TAP card of its namespace, and this process carries the frames between them. A line of JSON on stdin sets
the `Condition` of the cable. The process answers each line with the number of frames it has changed so far. Both cards
go when it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import heapq
import json
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
_ETHERNET_BYTES = 14
_IPV4, _TCP = 0x0800, 6
_SSH = (22).to_bytes(2, "big")


@dataclasses.dataclass(frozen=True)
class Condition:
    """The treatment that the cable gives to frames."""

    delay_ms: float = 0.0  # one way
    loss: float = 0.0  # the share that is lost
    changed: float = 0.0  # the share, of those that carry data over TCP, that a bit changes in, with a sum that fits
    cut: str = ""  # `from`: nothing comes from the first end; `to`: nothing gets there


def change(frame: bytes, randomness: random.Random) -> bytes | None:
    """Returns the frame with one bit of its TCP data flipped and a checksum that fits, as a broken card may send it.

    Returns None if the frame carries no TCP data, or belongs to ssh, which has a check of its own.
    """
    if int.from_bytes(frame[12:14], "big") != _IPV4 or frame[_ETHERNET_BYTES + 9] != _TCP:
        return None
    packet = bytearray(frame[_ETHERNET_BYTES:])
    tcp = (packet[0] & 15) * 4
    end = int.from_bytes(packet[2:4], "big")
    data = tcp + (packet[tcp + 12] >> 4) * 4
    if data >= end or _SSH in (packet[tcp : tcp + 2], packet[tcp + 2 : tcp + 4]):
        return None
    packet[randomness.randrange(data, end)] ^= 1 << randomness.randrange(8)
    packet[tcp + 16 : tcp + 18] = b"\0\0"
    pseudo_header = bytes(packet[12:20]) + struct.pack("!BBH", 0, _TCP, end - tcp)
    packet[tcp + 16 : tcp + 18] = struct.pack("!H", internet_checksum(pseudo_header + bytes(packet[tcp:end])))
    return frame[:_ETHERNET_BYTES] + bytes(packet)


def internet_checksum(data: bytes) -> int:
    """Returns the checksum of RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def open_tap(namespace: str, card: str) -> int:
    """Makes a card in a namespace; reading from it gives the frames that are sent there."""
    with Path("/run/netns", namespace).open() as entry:
        if ctypes.CDLL(None, use_errno=True).setns(entry.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", card.encode(), _IFF_TAP | _IFF_NO_PI))
    return tap


def carry(ends: tuple[int, int], source: int) -> None:
    """Carries frames between two cards until `source`, the descriptor of the settings, is closed."""
    condition, num_changed, randomness = Condition(), 0, random.Random()
    under_way: list[tuple[float, int, int, bytes]] = []  # when due, number, to which end
    sent = 0
    selector = selectors.DefaultSelector()
    for key in (*ends, source):
        selector.register(key, selectors.EVENT_READ)
    while True:
        timeout = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for key, _ in selector.select(timeout):
            if key.fd == source:
                settings = os.read(source, 4096).decode().splitlines()
                if not settings:
                    return
                condition = Condition(**json.loads(settings[-1]))
                for _ in settings:
                    print(num_changed, flush=True)
                continue
            target = ends[1] if key.fd == ends[0] else ends[0]
            is_cut = condition.cut == ("from" if key.fd == ends[0] else "to")
            with contextlib.suppress(OSError):  # the card is down, or all is read
                while True:
                    frame = os.read(key.fd, _LONGEST_FRAME)
                    if is_cut or randomness.random() < condition.loss:
                        continue
                    if randomness.random() < condition.changed and (changed := change(frame, randomness)):
                        frame, num_changed = changed, num_changed + 1
                    sent += 1
                    heapq.heappush(under_way, (time.monotonic() + condition.delay_ms / 1000, sent, target, frame))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, _, target, frame = heapq.heappop(under_way)
            with contextlib.suppress(OSError):
                os.write(target, frame)


if __name__ == "__main__":
    first, second = (open_tap(*end.split(":")) for end in sys.argv[1:3])
    print("plugged in", flush=True)
    carry((first, second), sys.stdin.fileno())

"""Bytes that change between two hosts so that TCP does not notice: nothing of such a message is used."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time

import numpy as np

from din_dist.distributed.runtime import open_runtime
from din_dist.errors import LostPeer
from tests.support import host_lab
from tests.support.cable import change, internet_checksum
from tests.support.patience import PATIENCE
from tests.support.programs import missing
from tests.support.repository import ROOT

SUMS = 2000
SIZE = 100_000  # numbers of each: nearly all bytes on the cable are theirs


def main() -> None:
    """Sums until a message fails, and says so, or until a sum is wrong; as a rank of a job."""
    runtime = open_runtime()
    own = np.arange(SIZE, dtype=np.float64) * (1 + runtime.rank)
    expected = own * (3 / (1 + runtime.rank))
    for number in range(SUMS):
        try:
            found = runtime.sum(own)
        except LostPeer:
            print(f"broken at {number}", flush=True)
            os._exit(0)
        if not np.array_equal(found, expected):
            print(f"wrong at {number}", flush=True)
            os._exit(0)
        if number == 5:
            print("summing", flush=True)
    print("to the end", flush=True)


def frame(data: bytes, port: int = 4000) -> bytes:
    """Of TCP over IPv4, with right checksums."""
    tcp = port.to_bytes(2, "big") + bytes(10) + b"\x50\x10" + bytes(2) + b"\0\0" + bytes(2) + data
    ip = b"\x45\0" + (20 + len(tcp)).to_bytes(2, "big") + bytes(4) + b"\x40\x06\0\0" + bytes([10, 0, 0, 1, 10, 0, 0, 2])
    total = internet_checksum(ip[12:20] + b"\0\x06" + len(tcp).to_bytes(2, "big") + tcp)
    return bytes(12) + b"\x08\0" + ip + tcp[:16] + total.to_bytes(2, "big") + tcp[18:]


def test_the_cable_changes_one_bit_and_the_checksum() -> None:
    before = frame(b"some data, odd.")
    after = change(before, random.Random(1))
    assert after
    assert len(after) == len(before)
    differing = [place for place in range(len(before)) if before[place] != after[place]]
    (place,) = (place for place in differing if place >= 54)
    assert bin(before[place] ^ after[place]).count("1") == 1
    assert set(differing) - {place} <= {50, 51}
    tcp = after[34:]
    assert internet_checksum(after[26:34] + b"\0\x06" + len(tcp).to_bytes(2, "big") + tcp) == 0
    assert change(frame(b""), random.Random(1)) is None
    assert change(frame(b"ssh's", port=22), random.Random(1)) is None


def test_a_changed_message_is_a_lost_one() -> None:
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(host_lab.hosts(2, our_cables=True))
        except host_lab.LabError as error:
            missing(str(error))
        job = host_lab.horovodrun(hosts, [sys.executable, "-m", "tests.cluster.test_changed_bytes"])
        process = stack.enter_context(
            subprocess.Popen(
                hosts[0].command(job), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        )
        stack.callback(process.kill)
        assert process.stdout
        said = []
        for line in process.stdout:
            said.append(line.partition(">:")[2].strip())
            if said.count("summing") == 2:
                break
        time.sleep(0.2)
        hosts[1].disturb(changed=0.02)
        out, _ = process.communicate(timeout=PATIENCE)
        assert hosts[1].disturb() > 0
        said += [line.partition(">:")[2].strip() for line in out.splitlines()]
    results = [line for line in said if line.startswith(("broken", "wrong", "to the end"))]
    assert len(results) == 2, said
    assert all(line.startswith("broken") for line in results), results


if __name__ == "__main__":
    main()

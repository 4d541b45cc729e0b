"""Which card a job takes, on this machine and in a network namespace with others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from din_dist.cluster import addresses
from din_dist.errors import InputError
from tests.support import host_lab
from tests.support.host_lab import Host
from tests.support.programs import missing

ELSEWHERE = "203.0.113.7"  # nobody's, by RFC 5737


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    try:
        with host_lab.hosts(1, own_names=False) as (host,):
            yield host
    except host_lab.LabError as error:
        missing(str(error))


def on(host: Host, expression: str) -> str:
    code = f"from din_dist.cluster.addresses import *; print({expression})"
    done = subprocess.run(host.command([sys.executable, "-c", code]), capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_the_card_towards_others(host: Host) -> None:
    """Or of the default route, if there is one; this host has none."""
    assert on(host, "card_towards(['10.77.0.9'])") == "eth0"
    assert on(host, f"card_towards(['no.such.host', '{ELSEWHERE}', '10.77.0.9'])") == "eth0"
    assert on(host, f"card_towards(['{ELSEWHERE}'])") == "lo"
    subprocess.run(["ip", "-n", host.namespace, "route", "add", "default", "via", "10.77.0.8"], check=True)
    try:
        assert on(host, "card_towards(['no.such.host'])") == "eth0"
    finally:
        subprocess.run(["ip", "-n", host.namespace, "route", "del", "default"], check=True)


def test_cards_and_their_addresses(host: Host) -> None:
    assert on(host, "own_address('eth0'), card_of('10.77.0.1')") == "10.77.0.1 eth0"
    assert on(host, "loopback_card(), address_of_card('lo')") == "lo 127.0.0.1"
    assert on(host, "card_of('10.77.0.9'), address_of_card('eth7')") == "None None"
    assert "must be a network card of this machine that has an IPv4 address. Received: 'eth7'" in on(
        host, "own_address('eth7')"
    )


def test_a_machine_without_loopback(host: Host) -> None:
    loopback = ["ip", "-n", host.namespace, "address"]
    subprocess.run([*loopback, "flush", "dev", "lo"], check=True)
    try:
        assert "Received: no network card with that address. Bring it up" in on(host, "loopback_card()")
    finally:
        subprocess.run([*loopback, "add", "127.0.0.1/8", "dev", "lo"], check=True)


def test_few_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the name server is away, each takes seconds."""
    asked: list[str] = []
    monkeypatch.setattr(addresses, "addresses_of", lambda name: asked.append(name) or [])
    addresses.card_towards(f"host{number}" for number in range(1000))
    assert len(asked) == 3


def test_its_own_address_leads_nowhere_else() -> None:
    with pytest.raises(InputError):
        addresses.own_address("no such card")
    assert addresses.is_own("127.0.0.1")
    assert not addresses.is_own(ELSEWHERE)

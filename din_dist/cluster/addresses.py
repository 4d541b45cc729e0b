"""Finds the addresses and network cards of this machine, and which of them reach other hosts."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

from din_dist.errors import InputError
from din_dist.files import read_text

_HOSTS_TO_TRY = 3


def addresses_of(name: str) -> list[str]:
    """Returns the addresses of a host name; none where it is unknown."""
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def is_loopback(address: str) -> bool:
    """Returns True for an address that never leaves its own machine."""
    return ipaddress.ip_address(address).is_loopback


def source_address(address: str) -> str | None:
    """Returns the address from which this machine sends to another; None where it has no route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # a datagram socket sends nothing here
        return str(probe.getsockname()[0])
    return None


def is_own(address: str) -> bool:
    """Returns True for an address of this machine, which sends to it from the address itself."""
    return is_loopback(address) or source_address(address) == address


def own_address(card: str) -> str:
    """Returns the address at which a card reaches this machine.

    Raises:
        InputError: there is no such card, or it has no address.
    """
    address = address_of_card(card)
    if address is None:
        raise InputError(
            "--network_interface: must be a network card of this machine that has an IPv4 address. Received: "
            f"{card!r}. See `ip -brief address`."
        )
    return address


def address_of_card(card: str) -> str | None:
    """Returns a card's first IPv4 address, which Gloo uses too; None where there is none."""
    for entry in psutil.net_if_addrs().get(card, []):
        if entry.family == socket.AF_INET:
            return str(entry.address)
    return None


def card_of(address: str) -> str | None:
    """Returns the card that has an address; None where none has it."""
    for card, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return card
    return None


def loopback_card() -> str:
    """Returns the card by which processes of this machine reach each other.

    Raises:
        InputError: there is no such card.
    """
    card = card_of("127.0.0.1")
    if card is None:
        raise InputError(
            "Workers on one machine meet at 127.0.0.1. Received: no network card with that address. Bring it up: "
            "ip link set lo up."
        )
    return card


def card_towards(hosts: Iterable[str]) -> str:
    """Returns the card with a route to the first reachable host elsewhere; by default the card of the default route.

    Only a few hosts are tried, because each may take a name server's time-out.
    """
    few = itertools.islice(hosts, _HOSTS_TO_TRY)
    for address in (address for host in few for address in addresses_of(host)):
        source = source_address(address)
        if source and ":" not in source and not is_own(address) and (card := card_of(source)):
            return card
    return _default_card()


def _default_card() -> str:
    for line in read_text(Path("/proc/net/route")).splitlines()[1:]:
        card, destination, *_ = line.split()
        if destination == "00000000":
            return card
    return loopback_card()

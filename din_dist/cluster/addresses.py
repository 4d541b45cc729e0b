"""The addresses and network cards of this machine, and by which of them it reaches others."""

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
    """Returns what a name stands for; nothing where it is unknown."""
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def source_address(address: str) -> str | None:
    """Returns where from this machine sends to an address; None where it knows no way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
    return None


def is_own(address: str) -> bool:
    """Says whether an address is this machine's: then it is from there that it sends to there."""
    return is_loopback(address) or source_address(address) == address


def own_address(card: str) -> str:
    """Returns a card's address, at which this machine is reached.

    Raises:
        InputError: there is no such card, or it has none.
    """
    address = address_of_card(card)
    if address is None:
        raise InputError(
            "--network_interface: must be a network card of this machine that has an IPv4 address. Received: "
            f"{card!r}. See `ip -brief address`."
        )
    return address


def address_of_card(card: str) -> str | None:
    """Returns a card's first IPv4 address, which is the one that Gloo takes."""
    for entry in psutil.net_if_addrs().get(card, []):
        if entry.family == socket.AF_INET:
            return str(entry.address)
    return None


def card_of(address: str) -> str | None:
    """Returns the card that has an address."""
    for card, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return card
    return None


def loopback_card() -> str:
    """Returns the card by which processes of this machine reach each other.

    Raises:
        InputError: there is none.
    """
    card = card_of("127.0.0.1")
    if card is None:
        raise InputError(
            "Workers on one machine meet at 127.0.0.1. Received: no network card with that address. Bring it up: ip "
            "link set lo up."
        )
    return card


def card_towards(hosts: Iterable[str]) -> str:
    """Returns the card by which this machine reaches the first of the hosts elsewhere that it knows a way to.

    Without any it is the card of the default route. A few are tried: each may take a name server's time-out.
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

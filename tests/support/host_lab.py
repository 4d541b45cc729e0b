"""Makes several hosts on one machine: network namespaces behind one switch, with sshd in each. They go afterwards.

    with host_lab.hosts(2) as (first, second):
        second.limit("100mbit")
        subprocess.run(first.command(host_lab.horovodrun([first, second], ["python", "-m", ...])))
        second.unplug()

It needs Linux and root. Nothing of it is visible outside: the switch lives in a namespace too, addresses are valid only
behind it, and the ssh keys last as long as the lab. Several labs can run at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.cable import Condition

NETNS_ETC = Path("/etc/netns")  # `ip netns exec NAME` lays what is in /etc/netns/NAME over /etc
_NOBODY = "10.77.0.254"
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client"}


SMALL_JOB = (  # flags of the trainer
    "--dataset=synthetic",
    "--synthetic_num_users=300",
    "--synthetic_events_per_user=20",
    "--synthetic_num_items=100",
    "--embedding_dim=8",
    "--attention_hidden_units=8",
    "--hidden_units=8",
)


class LabError(Exception):
    """The lab cannot be made on this machine; one line says what is missing and what to do."""


@dataclasses.dataclass(frozen=True)
class Host:
    """A namespace with one network card, `eth0`."""

    namespace: str
    address: str
    switch: str  # the switch's namespace; the port there has this host's name
    cable: subprocess.Popen[str] | None = None  # where it is one of ours, see `hosts`
    usual_delay_ms: float = 0.0  # of a cable of ours that nothing disturbs, one way between two hosts

    def command(self, command: Sequence[str]) -> list[str]:
        """Returns the words that run `command` on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def limit(self, rate: str, delay_ms: float = 0.0) -> None:
        """Sets the rate of the link in each direction, and half of the delay of packets that pass it.

        Args:
            rate: in the form of tc(8), for example 100mbit; `unlimited` removes the limit.
            delay_ms: one way, between two hosts that both have it; needs the kernel's netem.
        """
        # Both ends are set, because an end limits only what it sends. A packet passes two links, and one end of each.
        for namespace, card in ((self.namespace, "eth0"), (self.switch, self.namespace)):
            tc = ["tc", "-n", namespace, "qdisc"]
            subprocess.run([*tc, "del", "dev", card, "root"], capture_output=True, check=False)
            if delay_ms:
                limits = [] if rate == "unlimited" else ["rate", rate]
                netem = ["netem", "delay", f"{delay_ms / 2:g}ms", "limit", "20000", *limits]
                _run([*tc, "add", "dev", card, "root", *netem])
            elif rate != "unlimited":
                # The bucket holds a millisecond: less, and the timer cannot keep the rate; more, and bursts beat it.
                burst = max(16_000, bits_per_second(rate) // 8 // 1000)
                _run([*tc, "add", "dev", card, "root", "tbf", "rate", rate, "burst", str(burst), "latency", "100ms"])

    def disturb(self, delay_ms: float = 0.0, loss: float = 0.0, changed: float = 0.0, cut: str = "") -> int:
        """Makes a cable of ours bad, or good again without arguments; returns the number of frames changed so far.

        Args:
            delay_ms: one way, as in `limit`; the host's usual delay if 0.
            loss: the share of frames that are lost.
            changed: the share of frames with TCP data in which a bit changes that TCP does not notice.
            cut: `from` loses what this host sends, `to` what is sent to it.
        """
        assert self.cable, "Only cables of ours can be made bad: give hosts() our_cables=True."
        assert self.cable.stdin
        assert self.cable.stdout
        condition = Condition(delay_ms=(delay_ms or self.usual_delay_ms) / 2, loss=loss, changed=changed, cut=cut)
        print(json.dumps(dataclasses.asdict(condition)), file=self.cable.stdin, flush=True)
        return int(self.cable.stdout.readline())

    def rename_card(self, before: str, after: str) -> None:
        """Renames the network card; the test must give it back its name `eth0`, by which the lab knows it."""
        for change in (["down"], ["name", after], ["up"]):
            _run(["ip", "-n", self.namespace, "link", "set", after if change == ["up"] else before, *change])

    def unplug(self) -> None:
        """Cuts this host off; `plug_in` brings it back."""
        _run(["ip", "-n", self.switch, "link", "set", self.namespace, "down"])

    def plug_in(self) -> None:
        """Connects this host again."""
        _run(["ip", "-n", self.switch, "link", "set", self.namespace, "up"])


def bits_per_second(rate: str) -> int:
    """Parses a rate in the form of tc(8), for example 100mbit or 2.5gbit.

    Raises:
        ValueError: `rate` is no rate.
    """
    match = re.fullmatch(r"([0-9.]+)([kmg]?)bit", rate)
    if not match:
        raise ValueError(f"A rate must be a number and kbit, mbit or gbit. Received: {rate!r}. For example 100mbit.")
    return round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]])


def horovodrun(hosts: Sequence[Host], command: Sequence[str]) -> list[str]:
    """Returns the words that start one worker on each host; they are to be run on the first host."""
    launcher = str(Path(sys.executable).with_name("horovodrun"))
    slots = ",".join(f"{host.address}:1" for host in hosts)
    # The cache would remember that ssh reached these addresses in an earlier lab.
    flags = ["--gloo", "--disable-cache", "-np", str(len(hosts)), "-H", slots, "--network-interface", "eth0"]
    return [launcher, *flags, *command]


@contextlib.contextmanager
def hosts(
    num_hosts: int, *, our_cables: bool = False, delay_ms: float = 0.0, own_names: bool = True
) -> Iterator[list[Host]]:
    """Builds the lab for a block and takes it down, whatever happens; it also takes down what a killed one left.

    Args:
        our_cables: a process carries the packets of each host (see `cable`), slower than the kernel would.
        delay_ms: the usual delay of such cables.
        own_names: each host knows an address for the name of the machine. Otherwise no host does, and the name server
            does not answer.

    Raises:
        LabError: the lab cannot be made on this machine.
    """
    _check_machine()
    _sweep()
    prefix = f"lab{os.getpid()}-"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sigterm_as_exit())
        stack.callback(_tear_down, prefix)
        switch = f"{prefix}switch"
        folder = NETNS_ETC / switch  # for keys and logs; the next lab finds here what a killed one left
        folder.mkdir(parents=True, mode=0o700)
        for key in ("host_key", "user_key"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)])
        _run(["ip", "netns", "add", switch])
        _run(["ip", "-n", switch, "link", "add", "bridge", "type", "bridge"])
        _run(["ip", "-n", switch, "link", "set", "bridge", "up"])
        found = [Host(f"{prefix}{number}", f"10.77.0.{number + 1}", switch) for number in range(num_hosts)]
        for host in found:
            _run(["ip", "netns", "add", host.namespace])
        if our_cables:
            found = [
                dataclasses.replace(host, cable=stack.enter_context(_cable(host)), usual_delay_ms=delay_ms)
                for host in found
            ]
            for host in found:
                host.disturb()  # no more than usual
        for host in found:
            _add(host, found, folder, own_names)
        for host in found:
            stack.enter_context(_sshd(host, folder))
        yield found


def _add(host: Host, all_hosts: Sequence[Host], folder: Path, own_names: bool) -> None:
    etc = NETNS_ETC / host.namespace
    (etc / "ssh").mkdir(parents=True)
    names = [f"{other.address} host{number}" for number, other in enumerate(all_hosts)]
    own = [f"{host.address} {socket.gethostname()}"] if own_names else []
    (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *own, *names, ""]))
    if not own_names:
        (etc / "resolv.conf").write_text(f"nameserver {_NOBODY}\noptions timeout:1 attempts:1\n")
    (etc / "ssh" / "ssh_config").write_text(
        f"IdentityFile {folder}/user_key\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\nLogLevel ERROR\n"
    )
    (etc / "ssh" / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPermitRootLogin prohibit-password\n"
        f"ListenAddress {host.address}\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    here, there = host.namespace, host.switch
    if not host.cable:
        _run(["ip", "-n", there, "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", here])
    _run(["ip", "-n", there, "link", "set", here, "master", "bridge", "up"])
    _run(["ip", "-n", here, "address", "add", f"{host.address}/24", "dev", "eth0"])
    for card in ("lo", "eth0"):
        _run(["ip", "-n", here, "link", "set", card, "up"])


@contextlib.contextmanager
def _cable(host: Host) -> Iterator[subprocess.Popen[str]]:
    ends = [f"{host.namespace}:eth0", f"{host.switch}:{host.namespace}"]
    command = [sys.executable, str(Path(__file__).with_name("cable.py")), *ends]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cable:
        assert cable.stdout
        try:
            if not cable.stdout.readline():
                raise LabError("A cable of ours needs /dev/net/tun. Received: see above. Load the kernel's tun module.")
            for namespace, card in (end.split(":") for end in ends):
                _run(["ip", "-n", namespace, "link", "set", card, "mtu", "9000"])  # fewer packets to carry
            yield cable
        finally:
            cable.kill()


@contextlib.contextmanager
def _sshd(host: Host, folder: Path) -> Iterator[None]:
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd will not start without it
    log = folder / f"{host.namespace}.log"
    server = subprocess.Popen(host.command([_tool("sshd"), "-D", "-E", str(log)]))
    try:
        deadline = time.monotonic() + 20
        while subprocess.run(host.command(["ssh", host.address, "true"]), capture_output=True).returncode:
            if time.monotonic() > deadline:
                said = " ".join(log.read_text().split()) if log.exists() else ""
                raise LabError(f"sshd must answer on {host.address}. Its log: {said[-300:]}")
            time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


def _check_machine() -> None:
    if os.geteuid():
        raise LabError(f"Network namespaces take root. Received: user id {os.geteuid()}. Run it as root.")
    missing = sorted({package for tool, package in PACKAGES.items() if not _tool(tool)})
    if missing:
        raise LabError(f"The lab needs Debian's {', '.join(missing)}. Run: apt-get install {' '.join(missing)}")


def _tool(name: str) -> str:
    """Returns the absolute path of a program, which sshd insists on."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


def has_netem() -> bool:
    """Tells if the kernel can delay packets."""
    name = f"lab{os.getpid()}-probe"
    _run(["ip", "netns", "add", name])
    try:
        probe = ["tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    finally:
        _run(["ip", "netns", "del", name])


def _tear_down(prefix: str) -> None:
    """Ends what runs on the hosts, then the hosts; cards and cables go with them."""
    names = [name for name in _namespaces() if name.startswith(prefix)]
    for _ in range(50):  # what is killed may just have started another
        found = [subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True) for name in names]
        pids = [int(pid) for listed in found for pid in listed.stdout.split()]
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False)
    for folder in NETNS_ETC.glob(f"{prefix}*"):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        NETNS_ETC.rmdir()  # unless somebody else has something there


def _sweep() -> None:
    """Takes down labs whose process has ended."""
    names = {*_namespaces(), *(path.name for path in NETNS_ETC.glob("lab*-*"))}
    for prefix in {match[0] for name in names if (match := re.match(r"lab(\d+)-", name))}:
        if not Path("/proc", prefix[3:-1]).exists():
            _tear_down(prefix)


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listed.stdout.splitlines() if line.split()]


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Makes SIGTERM unwind the stack as Ctrl-C does; by default it would leave the lab standing."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"`{' '.join(command)}` must work. It said: {' '.join((done.stderr or done.stdout).split())}")

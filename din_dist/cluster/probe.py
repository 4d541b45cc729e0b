"""What `preflight` asks on each host: `python -m din_dist.cluster.probe`, through ssh or, on this machine, without.

Each question on stdin is answered on stdout, both an object of JSON on a line: `{"ask": NAME, ...}` by
`{"answer": {...}}`.

    facts   what this host is and has; the arguments are a `Question`'s, the answer a `Facts`
    time    its clock
    reach   {"peers": {NAME: [ADDRESS, PORT], ...}} -> the ones whose port cannot be connected to, and why

It listens where a worker would, for the others to reach, and ends when stdin closes. It must start in an instant:
no TensorFlow, nothing that imports it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from din_dist import __version__, schema
from din_dist.cluster.addresses import address_of_card, source_address
from din_dist.files import read_record, read_text
from din_dist.text import parse_json
from din_dist.versions import commit

PACKAGE = Path(__file__).parents[1]
CONNECT_SECONDS = 3.0
_LIFETIME_SECONDS = 120  # should nobody ask any more, nor close stdin
_TENSORFLOW = ("tensorflow", "tensorflow-cpu")  # the names that its package goes by
_PACKAGES = ("keras", "numpy", "horovod", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Question:
    """What to look at. Paths from the root on: Horovod gives workers the launcher's HOME, which is not theirs."""

    data_folder: str  # of the prepared version
    output_dir: str
    token: str  # a file that the caller has put there
    launcher: str  # its address
    card: str  # the network card that was named; empty: whichever leads to the launcher
    metrics_host: str
    metrics_ports: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a host is and has."""

    machine: str  # the same for two names of one machine
    address: str | None  # at which workers there would listen: of the card that was named, else of that to the launcher
    commit: str
    versions: Mapping[str, str]
    sources: Mapping[str, str]  # of the package: path -> digest
    num_gpus: int
    num_cores: int
    fingerprint: str | None  # of the prepared data
    data_problem: str  # why there is none
    taken_ports: Mapping[str, str]  # of those asked for: port -> why it cannot be had
    output_shared: bool  # the caller's file is seen in the output folder
    output_problem: str  # why nothing can be written there


def find_facts(question: Question) -> Facts:
    """Looks at this machine."""
    fingerprint, data_problem = _fingerprint(Path(question.data_folder))
    output_shared, output_problem = _output(Path(question.output_dir), question.token)
    return Facts(
        machine=_machine(),
        address=address_of_card(question.card) if question.card else source_address(question.launcher),
        commit=commit(),  # for people: `sources` decide
        versions=_versions(),
        sources={
            path.relative_to(PACKAGE).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
            for path in sorted(PACKAGE.rglob("*.py"))
        },
        num_gpus=_num_gpus(),
        num_cores=len(os.sched_getaffinity(0)),
        fingerprint=fingerprint,
        data_problem=data_problem,
        taken_ports=dict(_taken_ports(question.metrics_host, question.metrics_ports)),
        output_shared=output_shared,
        output_problem=output_problem,
    )


def listen(address: str) -> socket.socket:
    """Listens on a free port of one address, and hangs up on whoever connects."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=1024)
    threading.Thread(target=_hang_up_on_all, args=(listener,), daemon=True).start()
    return listener


def _hang_up_on_all(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed
        while True:
            listener.accept()[0].close()


def unreached(peers: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """The peers that cannot be connected to at their address and port, and why."""
    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        reasons = pool.map(lambda peer: _why_unreached(*peer), peers.values())
        return {name: reason for name, reason in zip(peers, reasons, strict=True) if reason}


def main() -> None:
    signal.alarm(_LIFETIME_SECONDS)
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what anyone else prints must not be taken for an answer
    with contextlib.ExitStack() as stack:
        for line in sys.stdin:
            question: dict[str, Any] = json.loads(line)
            match question.pop("ask"):
                case "facts":
                    facts = find_facts(Question(**question))
                    listener = stack.enter_context(listen(facts.address)) if facts.address else None
                    port = listener.getsockname()[1] if listener else 0
                    answer = {"port": port, **dataclasses.asdict(facts)}
                case "time":
                    answer = {"time": time.time()}
                case "reach":
                    answer = unreached(question["peers"])
                case other:
                    raise ValueError(other)
            print(json.dumps({"answer": answer}), file=answers)


def _why_unreached(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _machine() -> str:
    """A running kernel and one of its network namespaces, such as a container has."""
    boot = read_text(Path("/proc/sys/kernel/random/boot_id")).strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "din_dist": __version__}
    for package, names in {"tensorflow": _TENSORFLOW, **{name: (name,) for name in _PACKAGES}}.items():
        for name in names:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.setdefault(package, metadata.version(name))
    return found


def _num_gpus() -> int:
    if os.environ.get("DIN_DIST_DEVICE") == "cpu":  # as launch/common.sh
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _fingerprint(folder: Path) -> tuple[str | None, str]:
    path = folder / schema.FACTS_FILE
    try:
        return str(parse_json(read_record(path))["fingerprint"]), ""
    except FileNotFoundError:
        return None, f"nothing in {folder}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{path} cannot be read: {' '.join(str(error).split())}"


def _taken_ports(host: str, ports: Sequence[int]) -> Iterator[tuple[str, str]]:
    for port in ports:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            # As the exporter: a connection that has just ended is no hindrance. Nor is another probe at the same time.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((host, port))
            except (OSError, OverflowError) as error:
                yield str(port), (getattr(error, "strerror", None) or str(error)).lower()


def _output(folder: Path, token: str) -> tuple[bool, str]:
    try:
        shared = (folder / token).exists()
        nearest = next(path for path in (folder, *folder.parents) if path.exists())  # the trainer makes the rest
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        return False, (error.strerror or str(error)).lower()
    return shared, ""


if __name__ == "__main__":
    main()

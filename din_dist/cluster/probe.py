"""Answers the questions of `preflight` on one host: `python -m din_dist.cluster.probe`, started by ssh or locally.

Each question is a line of JSON on stdin, `{"ask": NAME, ...}`. Each answer is a line on stdout, `{"answer": {...}}`.

    facts   the facts of this host; the arguments are the fields of a `Question`, the answer those of a `Facts`
    time    the host's clock
    reach   {"peers": {NAME: [ADDRESS, PORT], ...}} -> the peers to which no connection can be made, with the reasons

The probe listens at the address of a worker, so that other hosts can try to connect. It ends when stdin closes. It must
start in an instant, so it imports neither TensorFlow nor a module that does.
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
_LIFETIME_SECONDS = 120  # in case nobody asks any more or closes stdin
_TENSORFLOW = ("tensorflow", "tensorflow-cpu")  # the names of its packages
_PACKAGES = ("keras", "numpy", "horovod", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Question:
    """The things to check on a host. Paths are absolute, because Horovod gives workers the launcher's HOME."""

    data_folder: str  # the prepared data
    output_dir: str
    token: str  # the name of a file that the caller has put into output_dir
    launcher: str  # the launcher's address
    card: str  # the network card that the user named; empty: the one towards the launcher
    metrics_host: str
    metrics_ports: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts of a host."""

    machine: str  # equal for two names of one machine
    address: str | None  # where workers would listen: the address of the named card, or of the one to the launcher
    commit: str
    versions: Mapping[str, str]
    sources: Mapping[str, str]  # path in the package -> digest
    num_gpus: int
    num_cores: int
    fingerprint: str | None  # the fingerprint of the prepared data
    data_problem: str  # why there is no fingerprint
    taken_ports: Mapping[str, str]  # port of the question -> why it is not free
    output_shared: bool  # the caller's token file is in the output folder
    output_problem: str  # why the output folder cannot be written


def find_facts(question: Question) -> Facts:
    """Collects the facts of this machine."""
    fingerprint, data_problem = _fingerprint(Path(question.data_folder))
    output_shared, output_problem = _output(Path(question.output_dir), question.token)
    return Facts(
        machine=_machine(),
        address=address_of_card(question.card) if question.card else source_address(question.launcher),
        commit=commit(),  # for people; `sources` decide
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
    """Listens on a free port of one address, and closes each connection at once."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=1024)
    threading.Thread(target=_hang_up_on_all, args=(listener,), daemon=True).start()
    return listener


def _hang_up_on_all(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed
        while True:
            listener.accept()[0].close()


def unreached(peers: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """Returns the peers to which no connection can be made, with the reasons."""
    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        reasons = pool.map(lambda peer: _why_unreached(*peer), peers.values())
        return {name: reason for name, reason in zip(peers, reasons, strict=True) if reason}


def main() -> None:
    """Answers questions until stdin closes."""
    signal.alarm(_LIFETIME_SECONDS)
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # output of other code must not be taken for an answer
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
    """Returns an id of the running kernel and the network namespace; a container has a namespace of its own."""
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
    if os.environ.get("DIN_DIST_DEVICE") == "cpu":  # the same rule as in launch/common.sh
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
            # The metrics server sets it too: a connection that has just ended, or another probe, takes no port.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((host, port))
            except (OSError, OverflowError) as error:
                yield str(port), (getattr(error, "strerror", None) or str(error)).lower()


def _output(folder: Path, token: str) -> tuple[bool, str]:
    try:
        shared = (folder / token).exists()
        nearest = next(path for path in (folder, *folder.parents) if path.exists())  # the trainer creates the rest
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        return False, (error.strerror or str(error)).lower()
    return shared, ""


if __name__ == "__main__":
    main()

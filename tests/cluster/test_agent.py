"""The agent of a worker, with a launcher's socket at one end and a trainer that obeys, hangs or dies at the other."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from din_dist.cluster.agent import pump, say
from din_dist.cluster.link import Lines, Seal, new_nonce
from din_dist.errors import EXIT_HUNG, EXIT_RETRY
from din_dist.place import LauncherAddress, variables_of_agents
from tests.support.fake_checkout import write_commands

STALL_TIMEOUT_SECONDS = 2.0
KEY = "k" * 64

# Its ways: by the first argument.
TRAINER = """
import os, pathlib, signal, sys, time
way, beats = sys.argv[1], int(os.environ["DIN_DIST_BEATS_FD"])
stops = []
if way == "slow_start":
    pathlib.Path("starting").touch()
    time.sleep(60)
signal.signal(signal.SIGINT, lambda *_: stops.append("SIGINT"))
signal.signal(signal.SIGTERM, lambda *_: stops.append("SIGTERM"))
os.write(beats, b".")
pathlib.Path("ready").touch()
if way == "fails":
    os.write(beats, b"\\nends 2\\n")
    time.sleep(1)
    sys.exit(1)
if way == "finds_out":
    time.sleep(2)
    pathlib.Path("stops").write_text(" ".join(stops))
    sys.exit(1)
if way == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if way == "names_cards":
    pathlib.Path("cards").write_text(os.environ["HOROVOD_GLOO_IFACE"] + " " + os.environ["NCCL_SOCKET_IFNAME"])
    sys.exit(0)
if way == "talks":
    print("on stdout", flush=True)
    print("on stderr", file=sys.stderr, flush=True)
    sys.exit(0)
while way != "obeys" or not stops:
    if way != "hangs":
        os.write(beats, b".")
    time.sleep(0.1)
pathlib.Path("stopped_by").write_text(stops[0])
sys.exit(75)
"""

AGENT = """
import sys
from din_dist.cluster import agent
agent._GRACE_SECONDS = 1.0
agent._LAST_WORDS_SECONDS = 30.0 if sys.argv[1] == "finds_out" else 0.5
sys.exit(agent.main(sys.argv[1:]))
"""


class AgentUnderTest:
    """Started with a trainer of that way; `link` is the launcher's end."""

    def __init__(self, folder: Path, way: str, **variables: str) -> None:
        self.folder = folder
        write_commands(folder / "fakes", train=TRAINER)
        server = socket.create_server(("127.0.0.1", 0))
        address = LauncherAddress("127.0.0.1", server.getsockname()[1], STALL_TIMEOUT_SECONDS)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("DIN_DIST_", "HOROVOD_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", AGENT, way],
            cwd=folder,
            env={
                **{**clean, "PYTHONPATH": str(folder / "fakes")},
                **{**variables_of_agents(address, KEY, "one job"), **variables},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        server.settimeout(20)
        self.link, _ = server.accept()
        challenge = new_nonce()
        self.link.sendall(challenge + b"\n")
        self._lines = Lines()
        self.seal = Seal("launcher", KEY, challenge, self._lines.read_one(self.link))
        self.heard = [self.seal.decode(self._lines.read_one(self.link))]
        self.tell({})
        self.link.settimeout(0.5)

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.02)

    def end(self, beats: bool = True) -> int:
        """Its exit code; the launcher gives signs of life until then, or none."""
        deadline = time.monotonic() + 40
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if beats:
                self.tell({})
            self.hear()
        self.hear()
        return self.process.returncode

    def hear(self) -> None:
        try:
            while piece := self.link.recv(65536):
                self.heard += map(self.seal.decode, self._lines.add(piece))
        except OSError:
            pass

    def tell(self, message: dict) -> None:
        with contextlib.suppress(OSError):
            self.link.sendall(self.seal.encode(message))

    def ended(self) -> list[int]:
        return [message["ended"] for message in self.heard if "ended" in message]


Start = Callable[..., AgentUnderTest]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    agents: list[AgentUnderTest] = []

    def make(way: str, **variables: str) -> AgentUnderTest:
        agents.append(AgentUnderTest(tmp_path, way, **variables))
        return agents[-1]

    yield make
    for agent in agents:
        agent.process.kill()
        agent.link.close()


def test_it_introduces_itself_and_gives_signs_of_life(start: Start) -> None:
    agent = start("obeys", HOROVOD_HOSTNAME="gpu7", HOROVOD_LOCAL_RANK="3", HOROVOD_RANK="11")
    deadline = time.monotonic() + 20
    while len(agent.heard) < 3:
        assert time.monotonic() < deadline
        agent.tell({})
        agent.hear()
    assert agent.heard[0] == {"host": "gpu7", "local_rank": 3, "rank": 11}
    assert agent.heard[1:3] == [{}, {}]


def test_a_stop_reaches_the_trainer(start: Start, tmp_path: Path) -> None:
    agent = start("obeys")
    agent.wait_for("ready")
    agent.tell({"stop": 1})
    assert (agent.end(), agent.ended()) == (EXIT_RETRY, [EXIT_RETRY])
    assert (tmp_path / "stopped_by").read_text() == "SIGINT"


def test_a_terminal_that_closes_stops_the_trainer(start: Start, tmp_path: Path) -> None:
    agent = start("obeys")
    agent.wait_for("ready")
    agent.process.send_signal(signal.SIGHUP)
    assert (agent.end(), agent.ended()) == (EXIT_RETRY, [EXIT_RETRY])
    assert (tmp_path / "stopped_by").read_text() == "SIGINT"


def test_a_stop_before_the_trainer_hears_signals_ends_it(start: Start) -> None:
    agent = start("slow_start")
    agent.wait_for("starting")
    agent.tell({"stop": 1})
    assert (agent.end(), agent.ended()) == (EXIT_RETRY, [EXIT_RETRY])


@pytest.mark.parametrize("variables", [{}, {"HOROVOD_SIZE": "2"}, {"HOROVOD_SIZE": "2", "HOROVOD_ELASTIC": "1"}])
def test_an_eviction_notice_goes_on_to_the_trainer(start: Start, tmp_path: Path, variables: dict[str, str]) -> None:
    agent = start("obeys", **variables)
    agent.wait_for("ready")
    agent.process.send_signal(signal.SIGTERM)
    assert agent.end() == EXIT_RETRY
    assert (tmp_path / "stopped_by").read_text() == "SIGTERM"


@pytest.mark.parametrize(
    ("variables", "stops"),
    [({"HOROVOD_SIZE": "2"}, ""), ({"HOROVOD_SIZE": "2", "HOROVOD_ELASTIC": "1"}, "SIGTERM")],
    ids=["static", "elastic"],
)
def test_a_trainer_that_finds_out_itself_is_not_asked(
    start: Start, tmp_path: Path, variables: dict[str, str], stops: str
) -> None:
    """Horovod's driver sends SIGTERM when another worker has failed; in an elastic job it means an eviction."""
    agent = start("finds_out", **variables)
    agent.wait_for("ready")
    agent.process.send_signal(signal.SIGTERM)
    assert (agent.end(), agent.ended()) == (1, [1])
    assert (tmp_path / "stops").read_text() == stops


def test_without_a_launcher_the_trainer_stops_too(start: Start, tmp_path: Path) -> None:
    agent = start("obeys")
    agent.wait_for("ready")
    agent.link.close()
    assert agent.end() == EXIT_RETRY
    assert (tmp_path / "stopped_by").read_text() == "SIGINT"
    assert agent.process.stderr
    assert "the launcher is gone or out of reach: stopping after this step" in agent.process.stderr.read()


def test_a_line_that_is_not_the_launchers_breaks_the_link(start: Start, tmp_path: Path) -> None:
    """Or that changed on its way. It says so before it parts, to who may hear it."""
    agent = start("obeys")
    agent.wait_for("ready")
    agent.link.sendall(agent.seal.encode({"stop": 2}).replace(b"2", b"1"))
    assert agent.end() == EXIT_RETRY
    assert (tmp_path / "stopped_by").read_text() == "SIGINT", "as without a launcher"
    assert {"parted": True} in agent.heard


@pytest.mark.parametrize(
    ("variables", "cards"),
    [
        ({}, "eth7 eth7"),  # which somebody named
        ({"DIN_DIST_FIND_CARD": "1"}, "lo lo"),
        ({"DIN_DIST_FIND_CARD": "1", "NCCL_SOCKET_IFNAME": "ib0"}, "lo ib0"),
    ],
)
def test_the_card_is_that_towards_the_launcher(
    start: Start, tmp_path: Path, variables: dict[str, str], cards: str
) -> None:
    agent = start("names_cards", **{"HOROVOD_GLOO_IFACE": "eth7", "NCCL_SOCKET_IFNAME": "eth7", **variables})
    assert agent.end() == 0
    assert (tmp_path / "cards").read_text() == cards


def test_a_launcher_that_is_silent_is_gone(start: Start, tmp_path: Path) -> None:
    agent = start("obeys")
    agent.wait_for("ready")
    told = time.monotonic()
    assert agent.end(beats=False) == EXIT_RETRY
    assert time.monotonic() - told > STALL_TIMEOUT_SECONDS / 2
    assert (tmp_path / "stopped_by").read_text() == "SIGINT"


def test_a_trainer_that_hangs_is_killed(start: Start) -> None:
    agent = start("hangs")
    assert (agent.end(), agent.ended()) == (EXIT_HUNG, [EXIT_HUNG])
    assert agent.process.stderr
    assert "gave no sign of life for 2 s: it has hung and is killed" in agent.process.stderr.read()


def test_a_trainer_that_only_takes_long_is_left_alone(start: Start) -> None:
    agent = start("deaf")
    agent.wait_for("ready")
    until = time.monotonic() + 2 * STALL_TIMEOUT_SECONDS
    while time.monotonic() < until:
        agent.tell({})
        agent.hear()
    assert agent.process.poll() is None


def test_a_worker_that_was_given_up_ends_at_once(start: Start) -> None:
    agent = start("deaf")
    agent.wait_for("ready")
    agent.tell({"given_up": True})
    assert agent.end() == EXIT_HUNG


def test_a_terminal_does_not_obey_what_it_repeats(capfd: pytest.CaptureFixture[str]) -> None:
    say("Received: \x1b[2Jone\ntwo")
    assert capfd.readouterr().err == "worker 0: Received: \\x1b[2Jone two\n"


def test_without_a_launcher_a_trainer_that_does_not_stop_is_killed(start: Start) -> None:
    agent = start("deaf")
    agent.wait_for("ready")
    agent.link.close()
    assert agent.end() == EXIT_RETRY
    assert agent.process.stderr
    assert "it is killed: it did not stop within 1 s" in agent.process.stderr.read()


def test_a_trainer_that_dies(start: Start) -> None:
    agent = start("dies")
    assert (agent.end(), agent.ended()) == (137, [137])


def test_what_a_trainer_says_of_its_end_comes_before_it(start: Start) -> None:
    agent = start("fails")
    assert (agent.end(), agent.ended()) == (1, [2])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_chief_speaks_on_stdout(start: Start, rank: str) -> None:
    agent = start("talks", HOROVOD_RANK=rank)
    assert agent.end() == 0
    assert agent.process.stdout
    assert agent.process.stderr
    out, err = agent.process.stdout.read(), agent.process.stderr.read()
    assert ("on stdout" in out, "on stdout" in err) == (rank == "0", rank == "1")
    assert "on stderr" in err


def test_no_trainer_outlives_its_agent(start: Start) -> None:
    agent = start("hangs")
    agent.wait_for("ready")
    (trainer,) = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
    agent.process.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{trainer}").exists() and "Z" not in Path(f"/proc/{trainer}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_passed_on_is_whole_lines() -> None:
    """Whatever the pieces that come: the other stream goes the same way, and would cut a line that came in two."""
    read_end, trainers_end = os.pipe()
    taken, passed_on = os.pipe()

    def pass_on() -> None:
        with os.fdopen(read_end, "rb") as source:
            pump(source, passed_on)
        os.close(passed_on)

    def speak() -> None:
        # What has no end must not be kept for ever; nor must the last words of a process that died be lost.
        with os.fdopen(trainers_end, "wb", buffering=0) as trainer:
            trainer.write(b"x" * 2_000_000 + b" the end")

    threading.Thread(target=pass_on).start()
    os.write(trainers_end, b"step 1: lo")
    time.sleep(0.3)
    os.write(trainers_end, b"ss .5\nstep 2")
    with os.fdopen(taken, "rb", buffering=0) as target:
        assert target.read(100) == b"step 1: loss .5\n"
        threading.Thread(target=speak).start()
        assert target.readall() == b"step 2" + b"x" * 2_000_000 + b" the end"

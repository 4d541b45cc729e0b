"""The place of a process in its job, from the variables of those who started it.

This is the only module that reads the variables of Horovod (`HOROVOD_*`), of SLURM (`SLURM_*`) and of Kubernetes' MPI
operator (`OMPI_*`). It also reads those that our own launcher gives its workers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Mapping
from typing import Self

from din_dist.errors import InputError

# horovodrun gives a worker all of these, or none.
_RANKS = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
_RENDEZVOUS = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_ELASTIC = "HOROVOD_ELASTIC"
_HOST = "HOROVOD_HOSTNAME"
WORKER_VARIABLES = (*_RANKS, *_RENDEZVOUS, _ELASTIC, "HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE", _HOST)

_LAUNCHER = "DIN_DIST_LAUNCHER"
_KEY = "HOROVOD_SECRET_KEY"
_JOB = "DIN_DIST_JOB"
_BEATS = "DIN_DIST_BEATS_FD"
_FIND_CARD = "DIN_DIST_FIND_CARD"
_PROGRAM = "DIN_DIST_PROGRAM"
TRAIN_SH = "train.sh"


def program() -> str:
    """Returns the name of the command that a user ran to start workers; its lines begin with it."""
    return os.environ.get(_PROGRAM, TRAIN_SH)


def name_program(name: str) -> None:
    """Gives the command that a user ran another name than `launch/train.sh`, whose lines begin with its own."""
    os.environ[_PROGRAM] = name


@dataclasses.dataclass(frozen=True)
class LauncherAddress:
    """The address at which an agent reaches its launcher, and the seconds after which the silence of either counts."""

    host: str
    port: int
    stall_timeout_seconds: float

    def __str__(self) -> str:
        return f"{self.host}:{self.port}:{self.stall_timeout_seconds:g}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses the text that `str` gives."""
        host, port, stall_timeout_seconds = text.split(":")
        return cls(host, int(port), float(stall_timeout_seconds))


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of one process in its job. The defaults are those of a process that nobody started as a worker.

    Attributes:
        rank: its number among all workers.
        size: the number of workers.
        local_rank: its number among the workers of its host.
        local_size: the number of workers on its host.
        elastic: the set of workers may change.
        host: the host's name, as Horovod's driver knows it; empty without a driver.
        under_horovodrun: Horovod's driver started this process, or the agent above it.
        rendezvous: the host and port at which Horovod's workers meet.
        card: the network card that Horovod's messages take.
        find_card: nobody named a network card, so each host takes its own towards the launcher.
        launcher: the launcher's address.
        key: the secret by which launcher and agents, and Horovod's connections, know each other.
        job: tells the workers of one job from those of another.
        beats: the descriptor over which the agent hears from its trainer; -1 without an agent.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    elastic: bool = False
    host: str = ""
    under_horovodrun: bool = False
    rendezvous: tuple[str, int] | None = None
    card: str = ""
    find_card: bool = False
    launcher: LauncherAddress | None = None
    key: str = dataclasses.field(default="", repr=False)
    job: str = ""
    beats: int = -1

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> Self:
        """Reads the place from the environment as it is now: the rank changes when an elastic job does.

        A number that makes no sense counts as none, because every log line names the rank. `check_variables` refuses
        it when a command starts.

        Args:
            variables: the environment of another process; None: this one's.
        """
        found = os.environ if variables is None else variables
        rank, size, local_rank, local_size = (
            _number(found, name, default) for name, default in zip(_RANKS, (0, 1, 0, 1), strict=True)
        )
        address, port = (found.get(name, "") for name in _RENDEZVOUS)
        launcher = found.get(_LAUNCHER)
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            elastic=found.get(_ELASTIC) == "1",
            host=found.get(_HOST, ""),
            under_horovodrun=_RANKS[0] in found,
            rendezvous=(address, int(port)) if address and port.isdecimal() else None,
            card=found.get("HOROVOD_GLOO_IFACE", ""),
            find_card=_FIND_CARD in found,
            launcher=LauncherAddress.parse(launcher) if launcher else None,
            key=found.get(_KEY, ""),
            job=found.get(_JOB, ""),
            beats=_number(found, _BEATS, -1),
        )

    @property
    def alone(self) -> bool:
        """True for a worker that has no peers and gets none."""
        return self.size == 1 and not self.elastic


def check_variables() -> None:
    """Checks what horovodrun gives its workers.

    Raises:
        InputError: only some of the variables are set, or they make no sense.
    """
    if not any(name in os.environ for name in (*_RANKS, _ELASTIC)):
        return
    for name in (*_RANKS, *_RENDEZVOUS):
        if name not in os.environ:
            raise _left_over(f"no {name}")
    for name in (*_RANKS, _RENDEZVOUS[1]):
        if not os.environ[name].isdecimal():
            raise _left_over(f"{name}={os.environ[name]!r}")
    place = Place.from_environment()
    if not (place.rank < place.size and place.local_rank < place.local_size <= place.size):
        raise _left_over(", ".join(f"{name}={os.environ[name]}" for name in _RANKS))


def forget() -> None:
    """Removes what horovodrun gives its workers, so that workers started from here do not inherit it."""
    for name in WORKER_VARIABLES:
        os.environ.pop(name, None)


def is_dismissed() -> bool:
    """Returns True when Horovod has taken this rank's host from the job.

    Horovod's C++ then sets the rank to -1 in a way that `os.environ` does not see.
    """
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return getenv(_RANKS[0].encode()) == b"-1"


def wants_horovods_log() -> bool:
    """Returns True where the user asked Horovod for its own log."""
    return "HOROVOD_LOG_LEVEL" in os.environ


def variables_of_agents(launcher: LauncherAddress, key: str, job: str) -> dict[str, str]:
    """Returns the variables by which agents find their launcher and prove that they belong to its job."""
    return {_LAUNCHER: str(launcher), _KEY: key, _JOB: job}


def variables_of_trainer(beats: int) -> dict[str, str]:
    """Returns the variable by which a trainer finds the descriptor for its heartbeats."""
    return {_BEATS: str(beats)}


def let_agents_find_card() -> None:
    """Lets each agent that is started from here name its own host's card towards the launcher."""
    os.environ[_FIND_CARD] = "1"


def slots_of_mpi_operator() -> int:
    """Returns the slots of each host in a job of Kubernetes' MPI operator, whose host list has none; otherwise 0."""
    return _number(os.environ, "OMPI_MCA_orte_set_default_slots", 0)


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """The variables of a batch script of SLURM, in SLURM's own notation; empty where SLURM sets none.

    Attributes:
        nodes: the names of the nodes, such as `gpu[1-2,07],login`.
        gpus_per_node: a count, perhaps after a type, such as `a100:8`.
        tasks_per_node: a count for each node, such as `2(x3),1`.
        step_tasks: the number of tasks that an `srun` started here.
    """

    nodes: str = ""
    gpus_per_node: str = ""
    tasks_per_node: str = ""
    step_tasks: int = 1

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] | None = None) -> Self:
        """Reads the variables of this process, or `variables`."""
        found = os.environ if variables is None else variables
        return cls(
            nodes=found.get("SLURM_JOB_NODELIST", ""),
            gpus_per_node=found.get("SLURM_GPUS_ON_NODE") or found.get("SLURM_GPUS_PER_NODE", ""),
            tasks_per_node=found.get("SLURM_TASKS_PER_NODE", ""),
            step_tasks=_number(found, "SLURM_STEP_NUM_TASKS", 1),
        )


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, "")
    return int(text) if text.isdecimal() else default


def _left_over(received: str) -> InputError:
    there = [name for name in WORKER_VARIABLES if name in os.environ]
    return InputError(
        f"HOROVOD_*: horovodrun gives its workers all of these variables. Received: {received}, beside "
        f"{', '.join(there)}: left over from another job. Run: unset {' '.join(there)}"
    )

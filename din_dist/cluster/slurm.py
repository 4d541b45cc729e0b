"""Finds the hosts of a SLURM job in the variables of its batch script."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from din_dist.errors import InputError
from din_dist.place import SlurmJob

_PIECE = re.compile(r"[^\[\],]+|\[[0-9,-]+\]")
_COUNT = re.compile(r"([1-9][0-9]*)(?:\(x([1-9][0-9]*)\))?")


def hosts_of_slurm(job: SlurmJob, default_slots: int) -> list[tuple[str, int]]:
    """Returns names and slots: a slot for each GPU of a node, or for each task where SLURM names no GPUs.

    Args:
        job: the variables that SLURM sets.
        default_slots: the slots of each node where SLURM names neither.

    Raises:
        InputError: this is no SLURM job, each of its tasks runs this command, or a variable is malformed.
    """
    if not job.nodes:
        raise InputError(
            "--hosts: slurm is for jobs of SLURM. Received: no SLURM_JOB_NODELIST. Start it in a script for sbatch, or "
            "name the hosts."
        )
    if job.step_tasks > 1:
        raise InputError(
            f"--hosts: slurm takes one start for all hosts. Received: an srun of {job.step_tasks} tasks. Leave srun "
            "out: the workers are started over ssh."
        )
    names = expand_nodes(job.nodes)
    per_node = re.search(r"([0-9]+)$", job.gpus_per_node)  # also a100:8
    if per_node and int(per_node[1]):
        return [(name, int(per_node[1])) for name in names]
    if job.tasks_per_node:
        slots = _expand_counts(job.tasks_per_node)
        if len(slots) == len(names):
            return list(zip(names, slots, strict=True))
        raise InputError(
            f"SLURM_TASKS_PER_NODE must have a number for each of the {len(names)} nodes. Received: "
            f"{job.tasks_per_node!r}. Name the hosts with --hosts."
        )
    return [(name, default_slots) for name in names]


def expand_nodes(text: str) -> list[str]:
    """Expands SLURM's short form, in its order: `gpu[1-2,07],login` becomes gpu1, gpu2, gpu07, login.

    Raises:
        InputError: the text has another form.
    """
    found: list[str] = []
    for name in _split(text):
        pieces = _PIECE.findall(name)
        if "".join(pieces) != name or not pieces:
            raise InputError(
                f"SLURM_JOB_NODELIST must be a list of nodes, such as gpu[1-4,7],login. Received: {text!r}. Name the "
                "hosts with --hosts."
            )
        choices = [list(_numbers(piece[1:-1])) if piece.startswith("[") else [piece] for piece in pieces]
        found.extend("".join(parts) for parts in itertools.product(*choices))
    return found


def _split(text: str) -> list[str]:
    """Splits at the commas that are not within brackets."""
    return re.split(r",(?![^\[]*\])", text)


def _numbers(text: str) -> Iterator[str]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}d}"


def _expand_counts(text: str) -> list[int]:
    """Expands `2(x3),1` to 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if not match:
            raise InputError(
                f"SLURM_TASKS_PER_NODE must have the form 2(x3),1. Received: {text!r}. Name the hosts with --hosts."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts

"""Hosts of a SLURM job. Expected values by hand, after the manual pages of sbatch and scontrol."""

from __future__ import annotations

import pytest

from din_dist.cluster.hosts import HostSlots, parse_hosts
from din_dist.cluster.slurm import expand_nodes, hosts_of_slurm
from din_dist.errors import InputError
from din_dist.place import SlurmJob


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1 gpu2"),
        ("gpu[1-3]", "gpu1 gpu2 gpu3"),
        ("gpu[08-11,20]", "gpu08 gpu09 gpu10 gpu11 gpu20"),
        ("a[1-2],login,b[7]-x", "a1 a2 login b7-x"),
        ("rack[1-2]n[01-02]", "rack1n01 rack1n02 rack2n01 rack2n02"),
        ("node-a.example.org", "node-a.example.org"),
    ],
)
def test_nodes_in_short_form(text: str, expected: str) -> None:
    assert expand_nodes(text) == expected.split()


@pytest.mark.parametrize("text", ["gpu[1-", "gpu]", "gpu[a-b]", "a,,b", "[", "gpu[]"])
def test_what_is_no_list_of_nodes(text: str) -> None:
    with pytest.raises(InputError, match="SLURM_JOB_NODELIST must be a list of nodes, such as .* Received: "):
        expand_nodes(text)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_TASKS_PER_NODE": "1(x3)"}, [4, 4, 4]),
        ({"SLURM_GPUS_PER_NODE": "a100:8"}, [8, 8, 8]),
        ({"SLURM_TASKS_PER_NODE": "2(x2),1"}, [2, 2, 1]),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_TASKS_PER_NODE": "6(x3)"}, [6, 6, 6]),
        ({}, [5, 5, 5]),
    ],
)
def test_slots(variables: dict[str, str], expected: list[int]) -> None:
    job = SlurmJob.from_environment({"SLURM_JOB_NODELIST": "n[1-3]", **variables})
    found = hosts_of_slurm(job, default_slots=5)
    assert found == [(f"n{number}", slots) for number, slots in enumerate(expected, start=1)]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "--hosts: slurm is for jobs of SLURM. Received: no SLURM_JOB_NODELIST."),
        (
            {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"},
            "--hosts: slurm takes one start for all hosts. Received: an srun of 2 tasks. Leave srun out",
        ),
        (
            {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x3)"},
            r"SLURM_TASKS_PER_NODE must have a number for each of the 2 nodes. Received: '2\(x3\)'.",
        ),
        (
            {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "two"},
            r"SLURM_TASKS_PER_NODE must have the form 2\(x3\),1. Received: 'two'.",
        ),
    ],
)
def test_wrong_variables(variables: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hosts_of_slurm(SlurmJob.from_environment(variables), default_slots=1)


def test_they_are_hosts_of_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert parse_hosts("slurm", default_slots=8) == [HostSlots("n1", 8), HostSlots("n2", 8)]

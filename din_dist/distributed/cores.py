"""This process' share of the machine's cores. Imports nothing that starts threads, for it must come before them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from din_dist.files import read_text
from din_dist.place import Place

# Of the GPUs that this process may use, also in a container; /sys shows a container those of others too.
_DRIVER = Path("/proc/driver/nvidia/gpus")
_PCI = Path("/sys/bus/pci/devices")


def claim_cores(near_gpus: Sequence[set[int]] | None = None) -> list[int]:
    """Confines a worker that `horovodrun` started to its share of the cores, and returns that.

    To be called before TensorFlow is imported and Horovod started: their thread pools are as wide as what they find
    then, and pools of the full width in every worker would fight over the cores. A process alone keeps all cores; of
    more workers than cores each names one, but is not held to it. Where each worker has a GPU, its cores are of those
    near that GPU.

    Args:
        near_gpus: as `cores_near_gpus` finds them.
    """
    place = Place.from_environment()
    local_rank, local_size = place.local_rank, place.local_size
    cores = os.sched_getaffinity(0)
    if local_size == 1:
        return sorted(cores)
    if len(cores) < local_size:
        return sorted(cores)[local_rank % len(cores) :][:1]
    near = [gpu & cores for gpu in (cores_near_gpus() if near_gpus is None else near_gpus)[:local_size]]
    # The workers that share what this one has a share of.
    sharers = [rank for rank in range(local_size) if near[rank] == near[local_rank]] if len(near) == local_size else []
    if sharers and len(near[local_rank]) >= len(sharers):
        share = _part(near[local_rank], sharers.index(local_rank), len(sharers))
    else:
        share = _part(cores, local_rank, local_size)
    os.sched_setaffinity(0, share)
    return share


def _part(cores: set[int], index: int, count: int) -> list[int]:
    ordered = sorted(cores)
    return ordered[len(ordered) * index // count : len(ordered) * (index + 1) // count]


def cores_near_gpus(driver: Path = _DRIVER, pci: Path = _PCI) -> list[set[int]]:
    """Returns the cores near each GPU that CUDA will count, in its order on a machine of equal GPUs.

    Those of a GPU are the cores of its NUMA node. The list is empty if there is no GPU, or if CUDA_VISIBLE_DEVICES
    names GPUs by UUID.
    """
    found = []
    for address in sorted(path.name.lower() for path in driver.glob("*")):
        try:
            found.append(_cores_of_list(read_text(pci / address / "local_cpulist")))
        except (OSError, ValueError):
            return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    numbers = [name.strip() for name in visible.split(",")]
    if not all(number.isdecimal() and int(number) < len(found) for number in numbers):
        return []
    return [found[int(number)] for number in numbers]


def _cores_of_list(text: str) -> set[int]:
    """Returns the cores of a list in the kernel's form: `0-3,8` is 0, 1, 2, 3, 8."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores

"""The hash of tuples of integers that the data room uses, in Python's own integers."""

from __future__ import annotations


def splitmix(*parts: int) -> int:
    """Adds each integer and the golden gamma, then mixes by SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state

"""Trains the Deep Interest Network (Zhou et al. 2018, arXiv:1706.06978) data-parallel over Horovod."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

# The library's names, each with its place in `din_dist.api`. They are found when they are asked for, because that
# imports TensorFlow, and commands answer a wrong flag before.
_LIBRARY = (
    "DIN",
    "MIND",
    "SRGNN",
    "ComiRecDR",
    "ComiRecSA",
    "Config",
    "Dice",
    "InputError",
    "LazyAdam",
    "LocalActivationUnit",
    "MeanPooling",
    "Result",
    "YouTubeDNN",
    "datasets",
    "load_model",
    "settings",
    "train",
)


def __getattr__(name: str) -> Any:
    """Returns a name of the library.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("din_dist.api"), name)


def __dir__() -> list[str]:
    """Returns the names of the module, those of the library included."""
    return sorted([*globals(), *_LIBRARY])

"""Checks what callers of the library give, and keeps arrays in the configuration of a model."""

from __future__ import annotations

import base64
import contextlib
import enum
import typing
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from din_dist.config import ModelConfig, ModelKind
from din_dist.errors import InputError


def check(holds: bool, name: str, rule: str, received: object, remedy: str) -> None:
    """Raises `InputError` in one line, unless the rule holds.

    Args:
        holds: the rule holds.
        name: of what was given.
        rule: in words.
        received: what breaks it.
        remedy: a sentence.
    """
    if not holds:
        raise InputError(f"{name}: {rule}. Received: {received!r}. {remedy}")


@contextlib.contextmanager
def without_dashes() -> Iterator[None]:
    """Names settings as Python does in errors of the block, because those of settings name flags."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).removeprefix("--")) from error


def model_config(kind: ModelKind, embedding_dim: Any, settings: Mapping[str, Any], known: Collection[str]) -> Any:
    """Returns the settings of a model.

    Args:
        kind: of the model.
        embedding_dim: a width for all embeddings, or the item's followed by that of each item feature.
        settings: by name, as Python users write them: texts in the place of choices, lists in that of tuples.
        known: the names that the model takes.

    Raises:
        InputError: there is no such setting, or a value breaks its rule.
    """
    unknown = next((name for name in settings if name not in known), "")
    check(not unknown, "settings", f"must be among {', '.join(sorted(known))}", unknown, "Drop it, or correct it.")
    types = typing.get_type_hints(ModelConfig)
    values = {name: _value(name, types[name], value) for name, value in settings.items()}
    widths = (embedding_dim,) if isinstance(embedding_dim, int) else tuple(embedding_dim)
    with without_dashes():
        return ModelConfig(model=kind, embedding_dim=widths, **values)


def _value(name: str, type_: Any, value: Any) -> Any:
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        choices = [str(choice) for choice in type_]
        check(value in choices, name, "must be a choice it knows", value, f"Choose among {', '.join(choices)}.")
        return type_(value)
    if typing.get_origin(type_) is tuple:
        return (value,) if isinstance(value, int) else tuple(value)
    return value


def array_to_text(array: np.ndarray) -> str:
    """Returns an array of int32 as text, which JSON keeps a hundred times faster than as many numbers."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array, "<i4").tobytes(), 1)).decode()


def array_from_text(text: str) -> np.ndarray:
    """Returns the int32 `[n]` that `array_to_text` has written."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4").astype(np.int32)

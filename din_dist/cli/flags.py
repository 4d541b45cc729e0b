"""Flags, made from the fields of `config` (each written down there once), and back to a `Config`."""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import Any

from absl import flags

from din_dist.config import Config, DataConfig, JobConfig, ModelConfig, OptimizerConfig
from din_dist.files import local_path

_ROOMS = {"data": DataConfig, "model": ModelConfig, "optimizer": OptimizerConfig, "job": JobConfig}


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for each setting."""
    for kind in _ROOMS.values():
        types = typing.get_type_hints(kind)
        for field in _fields(kind):
            if field.metadata.get("path"):
                define_path(field.name, field.default, field.metadata["help"], flag_values)
            else:
                _define(field.name, types[field.name], field.default, field.metadata["help"], flag_values)
    flags.DEFINE_boolean(
        "overwrite_prepared",
        False,
        "For prepare_data: prepare again, as after a change of the source. Other commands take no notice.",
        flag_values=flag_values,
    )


class PathParser(flags.ArgumentParser):
    """Reads a flag that is a path; see `files.local_path`."""

    syntactic_help = "a path"

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def parse(self, argument: str) -> str:
        return local_path(argument, self._name)

    def flag_type(self) -> str:
        return "path"


def define_path(
    name: str,
    default: Any,
    help_text: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    short_name: str | None = None,
) -> flags.FlagHolder[str]:
    """Defines a flag whose value is a path; every one of them is defined here."""
    return flags.DEFINE(
        PathParser(name), name, default, help_text, flag_values, flags.ArgumentSerializer(), short_name=short_name
    )


def config_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """The settings that the flags give.

    Raises:
        InputError: they break a rule.
    """
    rooms: dict[str, Any] = {}
    for room, kind in _ROOMS.items():
        types = typing.get_type_hints(kind)
        values = {field.name: _value(types[field.name], flag_values[field.name].value) for field in _fields(kind)}
        if room == "data":  # a default column may be absent from a log; one that was asked for may not
            values["label_column_required"] = flag_values["label_column"].present > 0
            values["item_features_required"] = flag_values["item_features"].present > 0
        rooms[room] = kind(**values)
    return Config(**rooms)


def to_flagfile(flag_values: flags.FlagValues = flags.FLAGS) -> str:
    """The settings in force, as a flagfile that repeats the job."""
    names = [field.name for kind in _ROOMS.values() for field in _fields(kind)]
    lines = (
        # Flags that were not given stay out where that has a meaning of its own.
        flag_values[name].serialize()
        for name in names
        if flag_values[name].present or name not in ("label_column", "item_features")
    )
    return "".join(f"{line}\n" for line in lines if line)


def _fields(kind: type) -> list[dataclasses.Field]:
    """Those that have a flag."""
    return [field for field in dataclasses.fields(kind) if "help" in field.metadata]


def _define(name: str, type_: Any, default: Any, help_text: str, flag_values: flags.FlagValues) -> None:
    if type_ is bool:
        flags.DEFINE_boolean(name, default, help_text, flag_values=flag_values)
    elif type_ is int:
        flags.DEFINE_integer(name, default, help_text, flag_values=flag_values)
    elif type_ is float:
        flags.DEFINE_float(name, default, help_text, flag_values=flag_values)
    elif type_ is str:
        flags.DEFINE_string(name, default, help_text, flag_values=flag_values)
    elif issubclass(typing.get_origin(type_) or type_, tuple):
        flags.DEFINE_list(name, [str(value) for value in default], help_text, flag_values=flag_values)
    else:
        choices = [choice.value for choice in type_]
        flags.DEFINE_enum(name, default.value, choices, help_text, flag_values=flag_values)


def _value(type_: Any, value: Any) -> Any:
    if typing.get_origin(type_) is tuple:
        element = typing.get_args(type_)[0]
        try:
            return tuple(element(part) for part in value)
        except ValueError:
            return value  # words where numbers belong: the config's own check names the flag
    return type_(value) if issubclass(type_, enum.Enum) else value

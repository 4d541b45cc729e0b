"""Makes flags from the fields of `config`, and a `Config` from flags."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import itertools
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from din_dist.cli.help import theme
from din_dist.config import Config, Settings, list_text
from din_dist.config.data import EVENT_LOG
from din_dist.config.settings import check_setting, is_saved, theme_of
from din_dist.errors import InputError
from din_dist.features.declarations import read_declarations
from din_dist.features.spec import to_text
from din_dist.files import local_path

_IN_WHEEL = Path(__file__).parents[1] / "launch"
LAUNCH = _IN_WHEEL if _IN_WHEEL.exists() else Path(__file__).parents[2] / "launch"
FLAGFILES = LAUNCH / "flags"
_FLAG_AND_VALUE = re.compile(
    r"flag --(\w+)=(.*): ((?:invalid lit|could not con|\('Non-bool|value should).*)", re.DOTALL
)
_FLAGFILE = re.compile(r"Unable to open flagfile: \[Errno \d+\] (.*): '(.*)'", re.DOTALL)
_RULES = {  # absl's words -> ours
    "invalid literal for int": "must be a whole number",
    "could not convert string to float": "must be a number",
    "Non-boolean argument": "must be true or false",
}
_ONE_OF = re.compile(r"value should be one of <(.*)>", re.DOTALL)
_ABSENT_BY_DEFAULT = ("label_column", "item_features")  # a log may lack these columns unless the user asks for them


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for each setting of a job, and the flag of prepare_data that all commands accept."""
    for _, part in Config().parts():
        define_settings(type(part), flag_values)
    with theme("data", flag_values):
        flags.DEFINE_boolean(
            "overwrite_prepared",
            False,
            "For prepare_data: prepare the data again, for example after a change of the source. Other commands ignore "
            "it.",
            flag_values=flag_values,
        )


def define_settings(kind: type[Settings], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for each setting of a class, under its theme of `--help`."""
    types = typing.get_type_hints(kind)
    for title, fields in itertools.groupby(fields_with_flags(kind), key=lambda field: theme_of(kind, field)):
        with theme(title, flag_values):
            for field in fields:
                _define(field, types[field.name], flag_values)


def define_overrides(names: Collection[str]) -> None:
    """Defines flags that change settings of a job that is already trained; see `overridden`.

    Args:
        names: of paths and whole numbers.
    """
    for _, part in Config().parts():
        for field in fields_with_flags(type(part)):
            if field.name in names:
                help_text = f"{field.metadata['help'].partition(' Default:')[0]} Default: as in training."
                with theme(theme_of(type(part), field)):
                    if parse := field.metadata.get("path"):
                        define_path(field.name, None, help_text, parse=parse)
                    else:
                        flags.DEFINE_integer(field.name, None, help_text)


def overridden(config: Config, names: Collection[str]) -> Config:
    """Returns `config` with the values that the flags of `define_overrides` were given."""
    given = {name: flags.FLAGS[name].value for name in names}
    return config.replace(**{name: value for name, value in given.items() if value is not None})


class PathParser(flags.ArgumentParser):
    """Parses a flag that is a path; see `files.local_path` and `files.source_path`."""

    syntactic_help = "a path"

    def __init__(self, name: str, parse: Callable[[str, str], str]) -> None:
        super().__init__()
        self._name, self._parse = name, parse

    def parse(self, argument: str) -> str:
        return self._parse(argument, self._name)

    def flag_type(self) -> str:
        return "path"


def problem_of(error: flags.Error, names: Collection[str]) -> str:
    """Returns what is wrong with a command line, as one line for people.

    Args:
        error: as absl raises it.
        names: all flags of the command, among which a misspelt one is sought.
    """
    if isinstance(error.__context__, InputError):  # from a flag that checks itself
        return str(error.__context__)
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, names, n=1)
        tip = f" Did you mean --{near[0]}?" if near else ""
        return f"Unknown command line flag '{error.flagname}'.{tip} See --help."
    text = str(error).removeprefix("ERROR:: ").rstrip(".")
    if match := _FLAGFILE.fullmatch(text):
        return f"--flagfile: must be a file that can be read. Received: {match[2]!r}, {match[1]}. Correct the path."
    if match := _FLAG_AND_VALUE.fullmatch(text):
        name, value, problem = match.groups()
        rule = next((own for theirs, own in _RULES.items() if theirs in problem), "")
        if choices := _ONE_OF.fullmatch(problem):
            rule = f"must be one of {choices[1].replace('|', ', ')}"
        if rule:
            return f"--{name}: {rule}. Received: {value!r}. See --help."
    return f"{text}. See --help."


def define_path(
    name: str,
    default: Any,
    help_text: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    short_name: str | None = None,
    parse: Callable[[str, str], str] = local_path,
) -> flags.FlagHolder[str]:
    """Defines a flag whose value is a path, which `parse` checks. Every such flag is defined here."""
    return flags.DEFINE(
        PathParser(name, parse),
        name,
        default,
        help_text,
        flag_values,
        flags.ArgumentSerializer(),
        short_name=short_name,
    )


def config_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """Returns the settings that the flags give.

    Raises:
        InputError: a setting breaks a rule.
    """
    _imply_dataset(flag_values)
    parts: dict[str, Any] = {}
    for name, part in Config().parts():
        values = settings_from_flags(type(part), flag_values)
        if name == "data":
            values |= {f"{column}_required": flag_values[column].present > 0 for column in _ABSENT_BY_DEFAULT}
            values["feature_declarations"] = _declarations(flag_values)
        parts[name] = type(part)(**values)
    return Config(**parts)


def settings_from_flags(kind: type[Settings], flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns, by name, the values of the flags that `define_settings` defined."""
    types = typing.get_type_hints(kind)
    return {field.name: _value(types[field.name], flag_values[field.name].value) for field in fields_with_flags(kind)}


def check_text(name: str, text: str) -> None:
    """Checks a value of one setting as it is written on a command line, whatever the other settings are.

    Raises:
        InputError: the setting refuses it.
    """
    values = flags.FlagValues()
    define_flags(values)
    try:
        values(["check", f"--{name}={text}"])
    except flags.Error as error:
        if isinstance(error.__context__, InputError):  # from a flag that checks itself
            raise error.__context__ from error
        raise InputError(f"{str(error).rstrip('.')}. See --help.") from error
    for _, part in Config().parts():
        for field in fields_with_flags(type(part)):
            if field.name == name:
                check_setting(field, _value(typing.get_type_hints(type(part))[name], values[name].value))


def to_flagfile(flag_values: flags.FlagValues = flags.FLAGS) -> str:
    """Returns the settings in force, as a flagfile that repeats the job."""
    _imply_dataset(flag_values)
    _declarations(flag_values)
    lines = []
    for _, part in Config().parts():
        for field in fields_with_flags(type(part)):
            flag = flag_values[field.name]
            if field.name in _ABSENT_BY_DEFAULT:
                lines += [flag.serialize()] if flag.present else []  # naming one of these columns makes it required
            elif field.name != "features" and is_saved(field, flag.value):  # that file may change
                lines.append(flag.serialize())
    return "".join(f"{line}\n" for line in lines if line)


def _imply_dataset(flag_values: flags.FlagValues) -> None:
    """Takes a --data_path alone for one's own files, because the default data set reads none."""
    dataset = flag_values["dataset"]
    if flag_values["data_path"].value and not dataset.present:
        dataset.value = EVENT_LOG


def flags_of(values: Mapping[str, Any], flagfiles: Sequence[str] = ()) -> flags.FlagValues:
    """Returns the flags of a job as if a command line had given them.

    Args:
        values: name of a setting -> its value.
        flagfiles: come before them.

    Raises:
        InputError: there is no such flag, or a value is not of its kind.
    """
    found = flags.FlagValues()
    define_flags(found)
    words = [f"--flagfile={name}" for name in flagfiles]
    words += [f"--{name}={list_text(v) if isinstance(v, (list, tuple)) else v}" for name, v in values.items()]
    try:
        found(with_our_flagfiles(["din_dist", *words]))
    except flags.Error as error:
        if isinstance(error.__context__, InputError):
            raise error.__context__ from error
        raise InputError(f"{str(error).rstrip('.')}. See din-dist train --help.") from error
    return found


def flagfile_of(config: Config) -> str:
    """Returns the settings of `config` as `to_flagfile` does those of the command line."""
    values: dict[str, Any] = {}
    for _, part in config.parts():
        for field in fields_with_flags(type(part)):
            value, required = getattr(part, field.name), f"{field.name}_required"
            if field.name in _ABSENT_BY_DEFAULT and not getattr(part, required):
                continue
            if field.name != "features" and (value != field.default or field.name in _ABSENT_BY_DEFAULT):
                values[field.name] = value
    return to_flagfile(flags_of(values))


def _declarations(flag_values: flags.FlagValues) -> str:
    """Returns the declared features as text. The file is read once, because it may change under a running job."""
    path, flag = flag_values["features"].value, flag_values["feature_declarations"]
    if path and flag.present:
        raise InputError(
            f"--features: repeats --feature_declarations, which a saved job has. Received: both, {path}. Drop one."
        )
    if path and not flag.value:
        flag.value = to_text(read_declarations(_declarations_file(Path(path))))
    return str(flag.value)


def _declarations_file(path: Path) -> Path:
    """Returns the file itself, or the one of that name beside our flagfiles, which name it so."""
    ours = FLAGFILES / path
    return ours if not path.exists() and ours.is_file() else path


def with_our_flagfiles(arguments: Sequence[str]) -> list[str]:
    """Returns the command line with paths in place of the names of our flagfiles, with or without `.flags`.

    A file of that name in the current folder comes first.
    """
    found, follows = [], False
    for argument in arguments:
        given = re.fullmatch("(--?flagfile=)(.*)", argument, re.DOTALL)
        if follows:
            found.append(_our_flagfile(argument))
        else:
            found.append(given[1] + _our_flagfile(given[2]) if given else argument)
        follows = argument in ("--flagfile", "-flagfile")
    return found


def _our_flagfile(name: str) -> str:
    if not Path(name).exists():
        for path in (FLAGFILES / name, FLAGFILES / f"{name}.flags"):
            if path.suffix == ".flags" and path.is_file():
                return str(path)
    return name


def fields_with_flags(kind: type[Settings]) -> Iterator[dataclasses.Field]:
    """Yields the settings of a class that have a flag."""
    return (field for field in dataclasses.fields(kind) if "help" in field.metadata)


def _define(field: dataclasses.Field, type_: Any, flag_values: flags.FlagValues) -> None:
    name, default, help_text = field.name, field.default, field.metadata["help"]
    simple: dict[Any, Any] = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    if parse := field.metadata.get("path"):
        define_path(name, default, help_text, flag_values, parse=parse)
    elif type_ in simple:
        simple[type_](name, default, help_text, flag_values=flag_values)
    elif typing.get_origin(type_) is tuple:
        values = [str(value) for value in typing.cast(tuple, default)]
        flags.DEFINE_list(name, values, help_text, flag_values=flag_values)
    else:
        choices = [choice.value for choice in type_]
        flags.DEFINE_enum(name, typing.cast(enum.Enum, default).value, choices, help_text, flag_values=flag_values)


def _value(type_: Any, value: Any) -> Any:
    if typing.get_origin(type_) is tuple:
        element = typing.get_args(type_)[0]
        try:
            return tuple(element(part) for part in value)
        except ValueError:
            return value  # not numbers: the rule of the setting names the flag
    return type_(value) if issubclass(type_, enum.Enum) else value

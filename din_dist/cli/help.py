"""The page that `--help` prints: the flags of a command, in groups by theme."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import weakref
from collections.abc import Iterator, Sequence

from absl import flags

_NAMES = {"help", "helpshort", "?"}
_LONGEST_LINE = 100
_OTHERS = "other flags"
# By theme, the names of its flags.
_themes: weakref.WeakKeyDictionary[flags.FlagValues, dict[str, list[str]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def theme(title: str, flag_values: flags.FlagValues = flags.FLAGS) -> Iterator[None]:
    """Puts the flags that are defined in the block under a heading of `--help`; themes keep their first order."""
    before = set(flag_values)
    yield
    names = _themes.setdefault(flag_values, {}).setdefault(title, [])
    names += [name for name in flag_values if name not in before and flag_values[name].name == name]


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Tells whether a command line asks for `page`."""
    return any(word.startswith("-") and word.lstrip("-").partition("=")[0] in _NAMES for word in arguments)


def page(about: str | None, *sources: flags.FlagValues) -> str:
    """Returns the help of a command.

    Args:
        about: what the command does, as its docstring says it.
        sources: its flags. Those that the main module defined outside of every theme come last.
    """
    groups: dict[str, list[flags.Flag]] = {}
    for source in sources:
        for title, names in _themes.get(source, {}).items():
            groups.setdefault(title, []).extend(source[name] for name in names)
    known = {flag.name for group in groups.values() for flag in group}
    others = [flag for source in sources for flag in source.get_flags_for_module(sys.argv[0])]
    groups[_OTHERS] = [flag for flag in others if flag.name not in known]
    texts = [_group(title, group) for title, group in groups.items() if group]
    return "\n\n".join([(about or "").strip(), *texts, "--flagfile=FILE reads flags from a file."])


def _group(title: str, group: Sequence[flags.Flag]) -> str:
    return "\n".join([f"{title[0].upper()}{title[1:]}:", *map(_entry, group)])


def _entry(flag: flags.Flag) -> str:
    short = f"-{flag.short_name}, " if flag.short_name else ""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = (flag.default_as_str or "").strip("'")
    known = f" Default: {default}." if default and "Default: " not in (flag.help or "") else ""
    return textwrap.fill(
        f"{short}{name}: {flag.help}{known}",
        width=min(shutil.get_terminal_size((_LONGEST_LINE, 0)).columns, _LONGEST_LINE),
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )

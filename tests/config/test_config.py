"""Rules that stand on the fields of settings, and how settings are changed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest

from din_dist.config import Config, WireDtype
from din_dist.config.settings import (
    Settings,
    path_setting,
    port_setting,
    require,
    setting,
    text_setting,
    theme_of,
)
from din_dist.errors import InputError


def check_name(name: str, value: str) -> None:
    require(value.islower(), "must be in lower case", name, value, "For example a.")


@dataclasses.dataclass(frozen=True)
class Toy(Settings):
    THEME: ClassVar[str] = "toys"

    count: int = setting(2, "Toys.", at_least=1)
    share: float = setting(0.5, "Share.", above=0, below=1, theme="shares")
    sizes: tuple[int, ...] = setting((3, 4), "Sizes.", at_most=10)
    name: str = text_setting("a", "Name.", check=check_name)
    port: int = port_setting(0, "Port.")
    folder: str = path_setting("", "Folder.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--count: must be at least 1. Received: 0. For example 2."),
        ({"count": 2**31}, "--count: must be at most 2147483647. Received: 2147483648. For example 2."),
        ({"share": 0.0}, "--share: must be above 0. Received: 0.0. For example 0.5."),
        ({"share": 1.0}, "--share: must be below 1. Received: 1.0. For example 0.5."),
        ({"share": float("nan")}, "--share: must be finite. Received: nan. For example 0.5."),
        ({"sizes": (3, 11)}, "--sizes: must be at most 10. Received: 11. For example 3,4."),
        ({"sizes": (-(2**31),)}, "--sizes: must be at least -2147483647. Received: -2147483648. For example 3,4."),
        ({"name": "A"}, "--name: must be in lower case. Received: 'A'. For example a."),
        ({"port": -1}, "--port: must be a port, or 0. Received: -1. Ports go up to 65535."),
        ({"folder": "s3://bucket"}, "--folder: must be a path of this machine. Received: 's3://bucket', a URL."),
    ],
)
def test_a_rule_stands_on_its_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Toy(**values)
    assert str(error.value).startswith(message)


def test_a_path_is_resolved() -> None:
    assert Toy(folder="file:///data/toys").folder == "/data/toys"


def test_a_field_may_have_a_theme_of_its_own() -> None:
    assert {field.name: theme_of(Toy, field) for field in dataclasses.fields(Toy)} == {
        **dict.fromkeys(("count", "sizes", "name", "port", "folder"), "toys"),
        "share": "shares",
    }


def test_settings_are_replaced_by_the_names_of_their_flags() -> None:
    config = Config().replace(native=False, keep_checkpoints=5, wire_dtype=WireDtype.BFLOAT16)
    assert (config.execution.native, config.recovery.keep_checkpoints) == (False, 5)
    assert config.optimizer.wire_dtype is WireDtype.BFLOAT16
    assert config.replace(native=True, keep_checkpoints=2, wire_dtype=WireDtype.FLOAT32) == Config()
    with pytest.raises(TypeError, match="No such settings: natives"):
        Config().replace(natives=False)
    with pytest.raises(InputError, match="--keep_checkpoints: must be at least 1"):
        Config().replace(keep_checkpoints=0)


def test_settings_that_depend_on_each_other_are_replaced_together() -> None:
    config = Config().replace(
        dataset="event_log", data_path="log.csv", split="leave_two_out", early_stopping_patience=1
    )
    assert config.evaluation.early_stopping_patience == 1

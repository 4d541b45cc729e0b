"""The file of a space: what it may say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from din_dist.errors import InputError
from din_dist.tuning.space import Dimension, ValueKind, read_space

KINDS = {
    "learning_rate": ValueKind.NUMBER,
    "epochs": ValueKind.WHOLE,
    "embedding_dim": ValueKind.OTHER,
    "xla": ValueKind.OTHER,
}
REFUSED = {"output_dir": "is the folder of a trial"}


def read(tmp_path: Path, text: str) -> list[Dimension]:
    path = tmp_path / "space.toml"
    path.write_text(text)
    return read_space(path, KINDS, REFUSED)


def test_ranges_and_choices(tmp_path: Path) -> None:
    text = """
        [learning_rate]
        low = 1e-4
        high = 1
        log = true
        [epochs]
        low = 2
        high = 8
        step = 2
        [embedding_dim]
        choices = ["32,8", 64]
        [xla]
        choices = [true, false]
    """
    rate, epochs, width, xla = read(tmp_path, text)
    assert rate == Dimension("learning_rate", ValueKind.NUMBER, 1e-4, 1.0, log=True)
    assert epochs == Dimension("epochs", ValueKind.WHOLE, 2, 8, step=2)
    assert width.choices == ("32,8", "64") and xla.choices == ("true", "false")
    assert (rate.texts(), epochs.texts()) == (("0.0001", "1.0"), ("2", "8"))
    assert rate.has(0.5) and not rate.has(2.0) and not rate.has(None)
    assert epochs.has(4) and not epochs.has(3)
    assert width.has("64") and not width.has("32")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "--space: must name a setting to search. Received: "),
        ("[epochs", "--space: must be a TOML file with a table for each setting. Received: "),
        ("[epoch]\nlow=1\nhigh=2", "[epoch] must be a setting of train. Received: 'epoch'. Did you mean epochs?"),
        ("[output_dir]\nchoices=['a']", "[output_dir] is the folder of a trial. Received: 'output_dir'. Leave it out"),
        ("epochs = 3", "[epochs] must be a table. Received: 3. For example low = 1e-4"),
        ("[epochs]\nlow=1", "[epochs] must have low and high, with log or step if wanted, or choices alone."),
        ("[epochs]\nlow=1\nhigh=2\nchoices=[3]", "or choices alone. Received: ['choices', 'high', 'low']."),
        ("[epochs]\nlow=1.5\nhigh=2", "[epochs] must have a low that is a whole number. Received: 1.5."),
        ("[epochs]\nlow=true\nhigh=2", "[epochs] must have a low that is a whole number. Received: True."),
        ("[learning_rate]\nlow='1'\nhigh=2", "[learning_rate] must have a low that is a number. Received: '1'."),
        ("[learning_rate]\nlow=1\nhigh=inf", "[learning_rate] must have a high that is a number. Received: inf."),
        ("[learning_rate]\nlow=2\nhigh=1", "[learning_rate] must have a low below its high. Received: [2.0, 1.0]."),
        ("[learning_rate]\nlow=0\nhigh=1\nlog=true", "must have a low above 0 to be searched by logarithm"),
        ("[learning_rate]\nlow=0\nhigh=1\nlog=1", "must have a log that is true or false. Received: 1."),
        ("[epochs]\nlow=1\nhigh=9\nlog=true\nstep=2", "[epochs] takes log or step."),
        ("[epochs]\nlow=1\nhigh=3\nstep=5", "must have a step that fits between low and high. Received: 5."),
        ("[xla]\nlow=0\nhigh=1", "[xla] is no number, and needs choices."),
        ("[xla]\nchoices=[]", "must have choices that are a list of different values. Received: []."),
        ("[epochs]\nchoices=[1, '1']", "must have choices that are a list of different values."),
        ("[epochs]\nchoices=[[1]]", "must have choices that are a list of different values. Received: [1]."),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.toml: No such file or directory"):
        read_space(tmp_path / "none.toml", KINDS, REFUSED)

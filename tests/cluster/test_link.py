"""What launcher and agents say to each other is proven, line by line."""

from __future__ import annotations

import pytest

from din_dist.cluster.link import LONGEST_LINE, Lines, Seal, new_nonce

KEY = "k" * 64


def pair(key: str = KEY) -> tuple[Seal, Seal]:
    challenge, nonce = new_nonce(), new_nonce()
    return Seal("launcher", KEY, challenge, nonce), Seal("agent", key, challenge, nonce)


def test_both_sides_understand_each_other() -> None:
    launcher, agent = pair()
    for message in ({"host": "gpu7"}, {}, {"ended": 75}):
        assert launcher.decode(agent.encode(message)) == message
        assert agent.decode(launcher.encode({"stop": 1})) == {"stop": 1}


def test_a_line_is_of_no_use_but_in_its_place() -> None:
    launcher, agent = pair()
    first, second = agent.encode({"ended": 0}), agent.encode({})
    with pytest.raises(ValueError, match="without proof"):
        launcher.decode(second)  # the first one is missing
    launcher.decode(first)
    with pytest.raises(ValueError, match="without proof"):
        launcher.decode(first)  # said again
    with pytest.raises(ValueError, match="without proof"):
        pair()[0].decode(second)  # in another link
    with pytest.raises(ValueError, match="without proof"):
        agent.decode(agent.encode({}))  # said back


@pytest.mark.parametrize("change", [(b"ended", b"endet"), (b"75", b"7"), (b" ", b""), (b'"', b"'")])
def test_a_line_that_changed_on_its_way_is_none(change: tuple[bytes, bytes]) -> None:
    launcher, agent = pair()
    with pytest.raises(ValueError, match="without proof"):
        launcher.decode(agent.encode({"ended": 75}).replace(*change, 1))


def test_a_stranger_proves_nothing() -> None:
    launcher, stranger = pair(key="x" * 64)
    for line in (stranger.encode({}), b"", b"\n", b"{}\n", b"[" * 4000 + b"\n", b"\xff" * 100):
        with pytest.raises(ValueError, match="without proof"):
            launcher.decode(line)
    with pytest.raises(ValueError, match="two nonces"):
        Seal("launcher", KEY, new_nonce(), b"short")


def test_a_line_without_an_end_is_not_kept() -> None:
    lines = Lines()
    assert lines.add(b"one\ntw") == [b"one"]
    assert lines.add(b"o\n") == [b"two"]
    with pytest.raises(ValueError, match="without an end"):
        lines.add(b"x" * (LONGEST_LINE + 1))

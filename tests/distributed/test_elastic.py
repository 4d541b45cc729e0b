"""What a worker of an elastic job does when its host is taken while all meet anew. Real jobs: tests/multi_process/."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from din_dist.distributed.elastic import run_elastic
from din_dist.distributed.runtime import Runtime
from din_dist.errors import Left, LostPeer
from din_dist.training.output_dir import OutputDirLock, claim_output_dir


class Dismissed(Runtime):
    elastic = True

    def reset(self) -> None:
        raise Left("because its host was taken from the job")


class Keeper:
    patience_seconds = 60.0

    def __init__(self, kept: str | None) -> None:
        self._kept = kept

    def stop_requested(self) -> bool:
        return False

    def give_up(self, waited_seconds: float) -> None:
        raise AssertionError

    def keep(self) -> str | None:
        return self._kept


def lose_the_others() -> None:
    raise LostPeer("a worker is gone")


@pytest.mark.parametrize(("kept", "told"), [(None, "the other workers go on"), ("step 7 is saved", "step 7 is saved")])
def test_it_keeps_what_was_learned_if_nobody_else_does(kept: str | None, told: str) -> None:
    said: list[str] = []
    with pytest.raises(Left, match="because its host was taken from the job") as left:
        run_elastic(cast(Any, Dismissed()), lose_the_others, said.append, Keeper(kept))
    assert left.value.after == told
    assert said == ["a worker was lost: going on without it"]


def test_a_folder_is_free_where_no_chief_holds_it(tmp_path: Path) -> None:
    """Not even one of the same job, which could otherwise be taken over."""
    with claim_output_dir(tmp_path, "job"):
        assert not OutputDirLock(tmp_path, "job").hold_if_free()
    lock = OutputDirLock(tmp_path, "job")
    assert lock.hold_if_free()
    assert lock.hold_if_free(), "it is ours"
    assert not OutputDirLock(tmp_path, "job").hold_if_free()
    lock.release()

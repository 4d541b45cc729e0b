"""Stand-ins for what a training process is asked to do."""

from __future__ import annotations

from collections.abc import Callable


class StopWhen:
    """Asks the job to stop as soon as `asked` says so; it is called once in every step."""

    leave = False

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    @property
    def stop(self) -> bool:
        return self._asked()

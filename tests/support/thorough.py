"""How hard tests try: `--thorough` sets it."""

from __future__ import annotations

import os

VARIABLE = "DIN_DIST_THOROUGH_TESTS"


def up_to(number: int) -> int:
    """Returns how many examples Hypothesis shall make: `number` in a thorough run, a third otherwise, at least 10."""
    return number if os.environ.get(VARIABLE) else max(number // 3, 10)

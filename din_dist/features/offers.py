"""`Offers`: which row of a table of offers an item has under the circumstances of an event.

Letters of shapes: E events, K offers, n items that are asked for.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Offers:
    """Finds offers. Row 0 is for an item that has none under these circumstances; offer k has row k + 1.

    Attributes:
        keys: int64 `[K]`, ascending: circumstances * (num_items + 1) + item.
        circumstances: int32 `[E]`, the number of each event's circumstances; -1 where one of them is missing.
        num_items: of the log.
    """

    keys: np.ndarray
    circumstances: np.ndarray
    num_items: int

    @property
    def num_rows(self) -> int:
        """The number of rows, row 0 included."""
        return len(self.keys) + 1

    def rows(self, events: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Returns the row of each item's offer, int64 `[n]`.

        Args:
            events: `[n]`, the events whose circumstances count.
            items: `[n]`, dense ids.
        """
        wanted = self.circumstances[events] * np.int64(self.num_items + 1) + items
        return places_in(self.keys, wanted) + 1


def places_in(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the place of each number in `known`, which ascends, int64 `[n]`; -1 for none."""
    if not len(known):
        return np.full(len(wanted), -1, np.int64)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[places] == wanted, places, -1)

"""Makes a log of pages, as a shop writes it: what was shown, what was clicked, and when the click came.

rows = pages(num_users=30)
known = known_before(rows, rows[7], delay=5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def pages(num_users: int, labelled: bool = True, seconds: int = 3) -> list[Row]:
    """Pages of five items of one category, shown within some seconds; one is clicked, at random, up to 9 s later."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(num_users):
        for page in range(12):
            category = int(random.integers(30))
            clicked = random.integers(5)
            for place, item in enumerate(category * 8 + random.choice(8, 5, replace=False)):
                time = 1000 + 10 * page + int(random.integers(seconds))
                row = {"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": time, "page": f"p{page}"}
                row["category_id"] = f"c{category}"
                label = int(place == clicked)
                came = time + int(random.integers(9)) if label else None
                rows.append(row | ({"label": label, "came": came} if labelled else {}))
    return rows


def request_time(rows: Sequence[Row], row: Row) -> int:
    """Returns the first time of an event's page."""
    return min(
        other["timestamp"] for other in rows if (other["user_id"], other["page"]) == (row["user_id"], row["page"])
    )


def known_before(rows: Sequence[Row], row: Row, delay: int) -> list[str]:
    """Returns the items that an event's user clicked and that are known before its page, in the order of the clicks.

    Args:
        rows: the log.
        row: the event.
        delay: how long after it came a click is known.
    """
    now = request_time(rows, row)
    clicks = [other for other in rows if other["user_id"] == row["user_id"] and other["label"]]
    clicks.sort(key=lambda click: click["timestamp"])
    known = [click for click in clicks if click["came"] + delay < now]
    return [click["item_id"] for click in sorted(known, key=lambda click: click["came"])]

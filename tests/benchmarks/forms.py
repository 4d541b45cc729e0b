"""What forms of histories and negatives are worth, and cost: `python -m tests.benchmarks.forms FOLDER`.

Trains the job of launch/flags/quick.flags on The Complete Journey in each form, in FOLDER/FORM; see `compared_jobs`.
With baskets or a delay the histories of validation and test have less, so their GAUC answers another question. Takes
half an hour.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.benchmarks.compared_jobs import compare, quick_flags

_BASKETS = ("--history_ends=before_time", "--request_column=basket_id")
FORMS: dict[str, tuple[str, ...]] = {
    "as_it_is": (),
    "baskets": _BASKETS,
    "baskets_known_after_a_day": (*_BASKETS, "--history_delay=1d"),
    "negatives_by_popularity": ("--negatives=popularity:0.75",),
    "negatives_of_the_batch": ("--negatives=batch",),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compare(folder, {name: [*quick_flags(folder, name), *flags] for name, flags in FORMS.items()}, "form")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""What forms of histories and negatives are worth, and cost: `python -m tests.benchmarks.forms FOLDER [FORM ...]`.

Trains the job of launch/flags/quick.flags on The Complete Journey in each form, or in those that are named, in
FOLDER/FORM; see `compared_jobs`. With baskets or a delay the histories of validation and test have less, so their GAUC
answers another question. Takes an hour.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.compared_jobs import compare, quick_flags
from tests.support.repository import ROOT

_BASKETS = ("--history_ends=before_time", "--request_column=basket_id")
FORMS: dict[str, tuple[str, ...]] = {
    "as_it_is": (),
    "baskets": _BASKETS,
    "baskets_known_after_a_day": (*_BASKETS, "--history_delay=1d"),
    "features_of_behaviours": ("--features={behaviours}",),
    "baskets_and_features_of_behaviours": (*_BASKETS, "--features={behaviours}"),
    "long_history": ("--histories=all:20", "--long_history=category_id:20"),
    "coupons": ("--action_column=redemption", "--histories=all:20,coupon:10"),
    "negatives_by_popularity": ("--negatives=popularity:0.75",),
    "negatives_of_the_batch": ("--negatives=batch",),
}


def main(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    declared = [
        ROOT / "launch" / "flags" / f"{name}.toml" for name in ("quick_features", "complete_journey_behaviours")
    ]
    behaviours = folder / "behaviours.toml"
    behaviours.write_text("\n".join(path.read_text() for path in declared))
    jobs = {
        name: [*quick_flags(folder, name), *(flag.format(behaviours=behaviours) for flag in FORMS[name])]
        for name in names or FORMS
    }
    compare(folder, jobs, "form")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])

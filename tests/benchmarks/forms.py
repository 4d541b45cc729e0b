"""What forms of histories and negatives are worth, and cost: `python -m tests.benchmarks.forms FOLDER [FORM ...]`.

Trains the job of launch/flags/quick.flags on The Complete Journey in each form, or in those that are named, in
FOLDER/FORM; see `compared_jobs`. With baskets or a delay the histories of validation and test have less, so their GAUC
answers another question. The forms of `IMPRESSIONS` train on made-up pages of items instead, whose clicks and purchases
they predict. FORM may be `impressions`, for all of these. Takes two hours.
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
_ON_IMPRESSIONS = (
    "--dataset=synthetic_impressions",
    *("--synthetic_num_users=4000", "--synthetic_events_per_user=100", "--synthetic_num_items=2000"),
    *("--synthetic_num_categories=40", "--item_features=category_id", "--request_column=page_id"),
    *("--split=temporal", "--max_history_length=50", "--embedding_dim=16,16", "--attention_hidden_units=32,16"),
    *("--hidden_units=80,40", "--activation=dice", "--optimizer=lazy_adam", "--learning_rate=0.002"),
    *("--global_batch_size=1024", "--epochs=3", "--num_workers=2", "--metrics_port=-1"),
)
_BOTH = "--label_columns=click,buy"
_CLICKS_AND_PURCHASES = (_BOTH, "--histories=click:50,buy:50")
_SKIPPED_TOO = (_BOTH, "--histories=click:50,buy:50,skipped:50")
IMPRESSIONS: dict[str, tuple[str, ...]] = {
    "clicks": (_BOTH,),
    "clicks_and_purchases": _CLICKS_AND_PURCHASES,
    "clicks_purchases_and_skipped": _SKIPPED_TOO,
    "skipped_shared_attention": (*_SKIPPED_TOO, "--share_attention"),
    "ages_of_clicks": (_BOTH, "--features={ages}"),
    "newest_20_and_20_of_the_category": (_BOTH, "--histories=all:20", "--long_history=category_id:20"),
    "esmm": (_BOTH, "--task_head=esmm"),
    "mmoe": (_BOTH, "--task_head=mmoe:4"),
    "clicks_alone": ("--label_column=click",),
}
_AGES = '[age]\nof = "history"\nkind = "time_since"\nfrom = "timestamp"\nwidth = 8\n'


def main(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    declared = [
        ROOT / "launch" / "flags" / f"{name}.toml" for name in ("quick_features", "complete_journey_behaviours")
    ]
    behaviours = folder / "behaviours.toml"
    behaviours.write_text("\n".join(path.read_text() for path in declared))
    ages = folder / "ages.toml"
    ages.write_text(_AGES)
    chosen = [*names] or [*FORMS, *IMPRESSIONS]
    if "impressions" in chosen:
        chosen = [*(name for name in chosen if name != "impressions"), *IMPRESSIONS]
    jobs = {}
    for name in chosen:
        given = (FORMS | IMPRESSIONS)[name]
        folders = [f"--data_dir={folder / 'data'}", f"--output_dir={folder / name}"]
        base = [*_ON_IMPRESSIONS, *folders] if name in IMPRESSIONS else quick_flags(folder, name)
        jobs[name] = [*base, *(flag.format(behaviours=behaviours, ages=ages) for flag in given)]
    compare(folder, jobs, "form")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])

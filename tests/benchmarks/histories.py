"""Time of an update with several histories, or with ages of behaviours: `python -m tests.benchmarks.histories FLAGS`.

FLAGS are those of a job on `synthetic_impressions`, for example
--dataset=synthetic_impressions --label_columns=click,buy --split=temporal --embedding_dim=64 --group_negatives
Data that is missing is prepared. All forms take turns in one process. Prints JSON, with the mean number of history
positions of an example in each form.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.features.spec import FeatureSpec, Kind, Owner, to_text
from tests.benchmarks.in_turn import compare

settings.define_flags()
FORMS: dict[str, dict] = {
    "one": {},
    "click and buy": {"histories": ("click:100", "buy:100")},
    "click, buy and skipped": {"histories": ("click:100", "buy:100", "skipped:100")},
    "the same, shared attention": {"histories": ("click:100", "buy:100", "skipped:100"), "share_attention": True},
    "one with ages": {"feature_declarations": to_text((FeatureSpec("age", Owner.HISTORY, Kind.TIME_SINCE, width=8),))},
    "one of 20 and long": {"histories": ("all:20",), "long_history": "category_id:20"},
}
_BATCHES = 20


def main() -> None:
    config = settings.config_from_flags()
    entry.import_tensorflow()
    from din_dist.assembly import Assembly
    from din_dist.data.prepared import prepare
    from din_dist.distributed.runtime import Runtime

    with tempfile.TemporaryDirectory() as folder:
        forms = {
            name: config.replace(output_dir=folder, metrics_port=-1, **settings) for name, settings in FORMS.items()
        }
        jobs = {name: Assembly(form, Runtime(), prepare(form.data)) for name, form in forms.items()}
        positions = {name: _positions(job) for name, job in jobs.items()}
        print(json.dumps({"positions_per_example": positions, **compare(jobs, "one")}))


def _positions(job: Any) -> float:
    batches = [*job.batches(0, _BATCHES)]
    return sum(len(batch.history_item_ids) for batch in batches) / sum(len(batch.labels) for batch in batches)


if __name__ == "__main__":
    entry.run(main)

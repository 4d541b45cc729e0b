"""Time of an update that learns one, two and four labels: `python -m tests.benchmarks.tasks FLAGS`.

FLAGS are those of a job on `synthetic_impressions` or another log with four labels, after prepare_data, for example
--dataset=synthetic_impressions --label_columns=click,cart,buy,like --split=temporal --embedding_dim=64
All forms take turns in one process. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile

from din_dist.cli import entry
from din_dist.cli import flags as settings
from tests.benchmarks.in_turn import compare

settings.define_flags()
FORMS = {  # name -> how many labels, and the head
    "one": (1, "shared"),
    "two": (2, "shared"),
    "four": (4, "shared"),
    "two, mmoe:4": (2, "mmoe:4"),
    "two, esmm": (2, "esmm"),
}


def main() -> None:
    config = settings.config_from_flags()
    entry.import_tensorflow()
    from din_dist.assembly import Assembly
    from din_dist.data.event_store import EventStore
    from din_dist.data.prepared import open_prepared
    from din_dist.distributed.runtime import Runtime

    store = open_prepared(config.data)

    def job_of(num_tasks: int, head: str) -> Assembly:
        tasks = config.data.label_columns[:num_tasks] if num_tasks > 1 else ()
        own: EventStore = dataclasses.replace(
            store,
            facts=dataclasses.replace(store.facts, tasks=tasks),
            task_labels=store.task_labels if tasks else None,
        )
        return Assembly(config.replace(label_columns=tasks, task_head=head), Runtime(), own)

    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(output_dir=folder, metrics_port=-1)
        jobs = {name: job_of(*form) for name, form in FORMS.items()}
        print(json.dumps(compare(jobs, "one")))


if __name__ == "__main__":
    entry.run(main)

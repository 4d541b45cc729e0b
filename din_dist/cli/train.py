"""Trains a model on prepared data: `python -m din_dist.cli.train`, alone or under `horovodrun`.

The last line on stdout is the summary, as JSON.
"""

from __future__ import annotations

import time
from pathlib import Path

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.distributed.cores import claim_cores
from din_dist.place import Place
from din_dist.tracking.run import require_installed

settings.define_flags()


def main() -> None:
    started = time.perf_counter()
    config = settings.config_from_flags()
    require_installed(config.telemetry.tracker)
    signals = entry.Signals()
    cores = claim_cores()
    entry.import_tensorflow()  # takes seconds: wrong flags are answered before
    from din_dist.cli.training_process import TrainingProcess
    from din_dist.distributed.devices import claim_devices
    from din_dist.distributed.runtime import open_runtime
    from din_dist.training.output_dir import OutputDirLock

    runtime = open_runtime()
    claim_devices(runtime, len(cores))
    lock = OutputDirLock(Path(config.job.output_dir), Place.from_environment().job)
    process = TrainingProcess(config, runtime, lock, signals, len(cores), settings.to_flagfile(), started)
    summary = process.run()
    if summary:
        print(summary, flush=True)


if __name__ == "__main__":
    entry.run(main)

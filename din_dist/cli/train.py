"""Trains a model on prepared data: `python -m din_dist.cli.train`, alone or under `horovodrun`.

The last line on stdout is the summary, as JSON.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from din_dist import progress
from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.distributed.cores import claim_cores
from din_dist.errors import EXIT_GAVE_UP, InputError
from din_dist.files import read_record, write_text
from din_dist.place import Place
from din_dist.text import duration, parse_json

if TYPE_CHECKING:
    from din_dist.training.trainer import Trainer

_SAVING_LOCK = ".saving"

settings.define_flags()
flags.adopt_module_key_flags(settings)  # for --help


def main() -> None:
    started = time.perf_counter()
    config = settings.config_from_flags()
    requests = entry.Signals()
    cores = claim_cores()
    entry.import_tensorflow()  # takes seconds: wrong flags are answered before
    import numpy as np

    from din_dist.assembly import Assembly
    from din_dist.data.prepared import open_prepared
    from din_dist.distributed.elastic import run_elastic
    from din_dist.distributed.runtime import claim_devices, open_runtime
    from din_dist.telemetry.projector import write_projector
    from din_dist.telemetry.prometheus import PrometheusMetrics
    from din_dist.text import to_json
    from din_dist.training.output_dir import OutputDirLock
    from din_dist.training.trainer import peak_memory_bytes
    from din_dist.versions import build_info

    runtime = open_runtime()
    claim_devices(runtime, len(cores))
    folder = Path(config.job.output_dir)
    lock = OutputDirLock(folder, Place.from_environment().job)
    with runtime.together():
        lock.hold(runtime.is_chief)
        prometheus_metrics = PrometheusMetrics(config.job, runtime)
    store = open_prepared(config.data)
    job = Assembly(
        config,
        runtime,
        store,
        prometheus_metrics=prometheus_metrics,
        signals=requests,
        num_threads=len(cores),
    )
    seconds = {"start": time.perf_counter() - started}

    def run() -> str | None:
        """The summary, on the chief. Called again when workers came or went."""
        lock.hold(runtime.is_chief)
        job.telemetry.show_flags(settings.to_flagfile())
        job.trainer.train()
        test = job.trainer.test()
        floors_started = time.perf_counter()
        with job.telemetry.phase("test"):
            floors = job.evaluator.floors("test") if test else {}
            if runtime.is_chief and config.job.projector_items:
                with job.telemetry.dispensable():
                    write_projector(folder / "tensorboard", job.model.lookup, store, config.job.projector_items)
        prometheus_metrics.enter_phase("done")
        seconds.update(job.trainer.seconds, floors=time.perf_counter() - floors_started)
        seconds["total"] = time.perf_counter() - started
        peak_memory = int(runtime.gather(np.array([peak_memory_bytes()])).max())
        if not runtime.is_chief:
            return None
        summary = {
            **{f"test_{name}": value for name, value in test.items()},
            "test_floors": floors,
            f"best_validation_{job.trainer.validation_metric}": job.trainer.state.best_validation,
            "best_step": job.trainer.state.best_step or job.trainer.state.step,
            "examples_per_second": round(job.trainer.examples_per_second, 1) or None,
            "epochs": job.trainer.state.epoch,
            "steps": job.trainer.state.step,
            "epoch_records": job.trainer.state.epoch_records,
            "world_size": runtime.world_size,
            "global_batch_size": config.job.global_batch_size,
            "num_parameters": job.model.count_params(),
            "peak_memory_bytes": peak_memory,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "versions": build_info(),
            "metrics": prometheus_metrics.values(),
        }
        if not job.trainer.seconds["training"]:
            with progress.at(f"reading {folder / 'summary.json'}"):
                summary = _with_what_was_measured(summary, folder)
        job.telemetry.say(_table(summary), summary=summary)
        text = to_json(summary)
        with job.telemetry.dispensable():
            write_text(folder / "summary.json", text + "\n")
        return text

    waiting = _Waiting(folder, job.trainer, requests, config.job.rejoin_timeout_seconds)
    with job.telemetry.until_the_end(job.trainer):
        summary = run_elastic(runtime, run, job.telemetry.say, waiting)
    runtime.barrier()
    runtime.shutdown()
    if summary:
        print(summary, flush=True)
        lock.release()


class _Waiting:
    """While this worker of an elastic job waits for the others: see `distributed.elastic.Waiting`."""

    def __init__(self, folder: Path, trainer: Trainer, requests: entry.Signals, patience_seconds: float) -> None:
        self._folder, self._trainer, self._requests = folder, trainer, requests
        self.patience_seconds = patience_seconds

    def stop_requested(self) -> bool:
        return self._requests.stop

    def give_up(self, waited_seconds: float) -> None:
        reason = "on request" if self.stop_requested() else f"fewer than --min_workers for {waited_seconds:.0f} s"
        entry.leave_at_once(EXIT_GAVE_UP, f"{reason}; {self._save()}")

    def _save(self) -> str:
        """One worker does; not by the chief's lock, for that may be the one that all wait for."""
        from din_dist.training.output_dir import claim_output_dir

        try:
            self._saving = claim_output_dir(self._folder, name=_SAVING_LOCK)  # to the end of this process
            self._trainer.save_alone()
        except InputError:
            return "another worker saves"
        except OSError as error:
            return f"the checkpoint could not be written: {error}"
        return f"step {self._trainer.state.step} is saved. The same command goes on from there"


def _with_what_was_measured(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the summary of a run that had nothing left to train, with the speed and times of the run that had."""
    try:
        before = parse_json(read_record(folder / "summary.json"))
    except (OSError, ValueError):
        return summary
    measured = ("examples_per_second", "world_size", "peak_memory_bytes", "seconds", "metrics")
    if not isinstance(before, dict) or before.get("steps") != summary["steps"] or not before.get("examples_per_second"):
        return summary
    found = {name: before[name] for name in measured if name in before}
    return {**summary, **found} if all(_is_like(value, summary[name]) for name, value in found.items()) else summary


def _is_like(value: Any, ours: Any) -> bool:
    """Tells whether a value that was read is of the kind that is written: a number, or numbers by name."""
    if isinstance(ours, dict):
        return isinstance(value, dict) and all(isinstance(part, (int, float)) for part in value.values())
    return isinstance(value, (int, float))


def _table(summary: dict[str, Any]) -> str:
    """The end of a job for people: the model against its floors, and where the time went."""
    lines = []
    if "test_gauc" in summary:
        rows = {"this model": {"gauc": summary["test_gauc"], "auc": summary["test_auc"]}, **summary["test_floors"]}
        width = max(20, *map(len, rows))
        lines.append(f"  {'':<{width}} test GAUC      AUC")
        lines += [f"  {name:<{width}} {metrics['gauc']:9.4f} {metrics['auc']:8.4f}" for name, metrics in rows.items()]
    if summary["examples_per_second"]:
        lines.append(f"  {summary['examples_per_second']:,.0f} examples/s with {summary['world_size']} worker(s)")
    seconds = {name: value for name, value in summary["seconds"].items() if name != "total"}
    parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    lines.append(f"  {duration(summary['seconds']['total'])} in all: {parts}")
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)

"""Measures training speed on prepared data: `python -m din_dist.cli.benchmark`, alone or under `horovodrun`.

It takes the trainer's flags. It prints a table to stderr and, as the last line on stdout, the same numbers as JSON. It
writes nothing to --output_dir.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from din_dist.benchmark import sweep
from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.cli.help import theme
from din_dist.config import Config, require
from din_dist.distributed.cores import claim_cores

FORMS = (
    *("padded", "unfactored", "dense_allreduce", "without_native", "without_xla", "without_shared_memory"),
    *("in_float32", "without_metrics", "undoable", "without_group_negatives"),
)
ROUNDS = 5

with theme("benchmark"):
    flags.DEFINE_integer("benchmark_steps", 200, "Updates to measure.")
    flags.DEFINE_integer("benchmark_warmup_steps", 20, "Updates before them, which are not measured.")
    flags.DEFINE_integer(
        "benchmark_item_rows",
        0,
        "Train as if the item's table had (about) this many rows; the items of the data are spread over them. Default: "
        "one row per item.",
    )
    flags.DEFINE_list(
        "compare",
        [],
        "Other forms to run in turn with ours, for ratios. Default: none. padded: histories as a rectangle, attention "
        "inputs concatenated. unfactored: packed, but attention inputs concatenated. dense_allreduce: whole tables "
        "exchanged and updated. without_native: without our kernels. without_xla: without them and XLA. "
        "without_shared_memory: without it between workers of one machine. in_float32: for another --compute_dtype. "
        "without_metrics: nothing is measured or reported. undoable: the last updates are kept in memory, as in "
        "elastic jobs. without_group_negatives: for that flag. The first two run without XLA and our kernels.",
    )
    settings.define_path(
        "trace_dir",
        "",
        "Write there a TensorFlow profiler trace of 10 updates, for TensorBoard. Under horovodrun, the chief also "
        "writes horovod_timeline.json, of what goes through Horovod, for about:tracing. Default: none.",
    )
with theme("sweep"):
    flags.DEFINE_string(
        "sweep",
        "",
        "Run a series and write SWEEP.csv and SWEEP.svg in --sweep_dir. workers: the same batch and cores for each; "
        "starts horovodrun itself. batch: growing batches. rows: the items spread over more and more rows. history: "
        "longer histories of synthetic data. Default: none.",
    )
    flags.DEFINE_list("sweep_values", [], "Points of the series. Default: some for each kind.")
    flags.DEFINE_integer("sweep_rounds", 3, "How often to run the series; medians are drawn.")
    settings.define_path("sweep_dir", "sweeps", "Folder for the results of a series.")
settings.define_flags()


def main() -> None:
    config = settings.config_from_flags()
    _check_flags()
    if flags.FLAGS.sweep:
        _sweep(config)
        return
    cores = claim_cores()
    entry.import_tensorflow()
    from din_dist.data.prepared import open_prepared
    from din_dist.distributed.devices import claim_devices
    from din_dist.distributed.runtime import open_runtime, raise_lost_peer
    from din_dist.text import to_json

    runtime = open_runtime()
    claim_devices(runtime, len(cores))
    store = open_prepared(config.data)
    # It reports as a job does, at the same cost, but to nobody.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()), raise_lost_peer():
        found = _measure(config.replace(output_dir=folder, metrics_port=0), runtime, store, len(cores))
    runtime.barrier()
    runtime.shutdown()
    if runtime.is_chief:
        entry.say(_table(found))
        print(to_json(found), flush=True)


def _check_flags() -> None:
    values = flags.FLAGS
    for name in ("benchmark_steps", "benchmark_warmup_steps", "sweep_rounds"):
        require(getattr(values, name) >= 1, "must be at least 1", name, getattr(values, name), "For example 100.")
    for form in values.compare:
        require(form in FORMS, f"must be of {', '.join(FORMS)}", "compare", form, f"For example {FORMS[0]}.")
    rows = values.benchmark_item_rows
    require(rows < 2**31, "must be below 2**31", "benchmark_item_rows", rows, "For example 10000000.")


def _sweep(config: Config) -> None:
    """Runs the series that `--sweep` names."""
    values = flags.FLAGS
    own = ("benchmark_steps", "benchmark_warmup_steps", "benchmark_item_rows", "trace_dir")
    sweep.run(
        values.sweep,
        values.sweep_values,
        values.sweep_rounds,
        Path(values.sweep_dir),
        settings.to_flagfile().splitlines(),
        [f"--{name}={values[name].value}" for name in own],
        config.job.global_batch_size,
        entry.say,
    )


def _measure(config: Config, runtime: Any, store: Any, num_threads: int) -> dict[str, Any]:
    """Measures our form, alone and in turn with those of `--compare`. Returns the report."""
    from din_dist.benchmark.step import report, seconds_since_process_start
    from din_dist.training.trainer import peak_memory_bytes

    values = flags.FLAGS
    ours, model = _start("ours", config, runtime, store, num_threads)
    ours.run(1)
    to_first_step = seconds_since_process_start()
    ours.run(values.benchmark_warmup_steps)
    tally = ours.run(values.benchmark_steps)
    peak_memory = peak_memory_bytes()
    ours.run_in_parts(5)  # tracing, until the shapes are general
    parts, gradients, merged = ours.run_in_parts(max(10, values.benchmark_steps // 4))
    found = report(config, runtime, model, tally, parts, gradients, merged)
    found |= {"peak_memory_bytes": peak_memory, "seconds_to_first_step": to_first_step}
    if values.trace_dir:
        _trace(ours, runtime, Path(values.trace_dir))
    others = {form: _start(form, config, runtime, store, num_threads)[0] for form in values.compare}
    found["times_the_speed_of"] = _compare(ours, others, values.benchmark_warmup_steps, values.benchmark_steps)
    return found


def _start(form: str, config: Config, runtime: Any, store: Any, num_threads: int) -> tuple[Any, Any]:
    """Wires one form. Returns its benchmark, which has run nothing yet, and its model."""
    from din_dist.benchmark.forms import assembly_of, config_of, with_idle_rows
    from din_dist.benchmark.step import LEARNING_RATE, StepBenchmark
    from din_dist.telemetry.step_report import Moment
    from din_dist.training.trainer import Update

    config = config_of(form, config)
    idle_rows_per_item = max(1, flags.FLAGS.benchmark_item_rows // store.facts.num_items)
    make = with_idle_rows(assembly_of(form), idle_rows_per_item)
    job = make(config, runtime, store, num_threads=num_threads)

    def report(batch: Any, result: Any, waited: float, started: Moment) -> None:
        global_batch_size = config.job.global_batch_size
        found = job.trainer.report(Update(batch, result, LEARNING_RATE, global_batch_size, waited, started))
        job.trainer.state.advance(global_batch_size, found.loss)
        job.trainer.keep(result)
        job.telemetry.after_step(job.trainer.state, found, dict)

    return (
        StepBenchmark(
            job.step,
            job.make_batches(0, 2**40),
            config.job.global_batch_size,
            report if form in ("ours", "undoable") else None,
        ),
        job.model,
    )


def _compare(ours: Any, others: dict[str, Any], warmup_steps: int, steps: int) -> dict[str, float]:
    """Returns our speed over theirs: the median of rounds in which the forms take turns, so noise hits all alike."""
    for other in others.values():
        other.run(warmup_steps)
    ratios: dict[str, list[float]] = {form: [] for form in others}
    for _ in range(ROUNDS if others else 0):
        own = _seconds(ours.run(max(1, steps // ROUNDS)))
        for form, other in others.items():
            ratios[form].append(_seconds(other.run(max(1, steps // ROUNDS // 4))) / own)
    return {form: statistics.median(values) for form, values in ratios.items()}


def _seconds(tally: Any) -> float:
    return tally.seconds / tally.examples


def _trace(ours: Any, runtime: Any, folder: Path) -> None:
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    tf.profiler.experimental.start(str(folder / f"rank-{runtime.rank}"))
    with runtime.timeline(folder / "horovod_timeline.json"):
        ours.run(10)
    tf.profiler.experimental.stop()


def _table(found: dict[str, Any]) -> str:
    step = found["step_seconds"]
    lines = [
        f"{found['examples_per_second']:12,.0f} examples/s   {found['positions_per_second']:,.0f} history positions/s, "
        f"{found['world_size']} worker(s), global batch {found['global_batch_size']:,}",
        f"{step * 1e3:12.2f} ms a step, of which {found['input_wait_seconds'] * 1e3:.2f} waiting for input and "
        f"{found['report_seconds'] * 1e3:.2f} ({found['report_seconds'] / step:.1%}) for metrics and log",
    ]
    for name in ("forward_backward", "exchange", "update"):
        lines.append(f"{found[f'{name}_seconds'] * 1e3:12.2f} ms {name.replace('_', ' and ')}, run by itself")
    sent = found["bytes_sent_per_step"]
    own, alone = (found[f"{kind}_flops_per_second"] / 1e9 for kind in ("achieved", "matrix"))
    lines += [
        f"{found['flops_per_example']:12,.0f} FLOPs of matrix products an example: {own:.1f} GFLOP/s, "
        f"{found['share_of_matrix_rate']:.0%} of the {alone:.1f} that they reach alone in float32",
        f"{sum(sent.values()):12,} bytes sent a step by each worker: {sent['dense']:,} dense, {sent['sparse']:,} rows, "
        f"{sent['statistics']:,} batch statistics",
        f"{found['peak_memory_bytes'] / 2**20:12,.0f} MiB peak memory of the chief",
        f"{found['seconds_to_first_step']:12.1f} s from process start to the first update",
    ]
    lines += [f"{ratio:12.2f} times the speed of {form}" for form, ratio in found["times_the_speed_of"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    entry.run(main)

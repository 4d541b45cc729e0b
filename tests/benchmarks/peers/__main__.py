"""din_dist against the peers that install from PyPI: `python -m tests.benchmarks.peers --data_path=LOG`, run by hand.

DeepCTR (its DIN, TensorFlow 2.15) and FuxiCTR (its DIN, PyTorch), each in an environment of its own with the exact
versions of `PEER.txt`, made here on the first run (minutes). All train the same examples with the same negatives,
exported from our prepared data: `leave_one_out`, histories up to 100, one fixed negative, embeddings 64 + 64, attention
80-40-1 with softmax, head 80-40-1, sigmoid units, no dropout, no L2, Adam, one batch size, on the same cores.

Speed: the systems take turns for --rounds rounds, each a process of its own: warm-up steps, then --seconds of training
steps, input pipeline included. Ours is `din_dist.cli.benchmark`. Ratios are the median of the ratios of the rounds.
Quality: seconds of training until the test GAUC is --target_gauc, evaluation excluded, the slow first step (tracing)
included; every system's scores are judged here, by `din_dist.metrics`. With several --learning_rates each system trains
at each of them, and the one that ends with its best GAUC counts. Memory is VmHWM of the training process, in the speed
rounds. Takes about 8 minutes for the rounds, then up to --max_seconds and the evaluations of each system and rate.

With --features (declarations as of the trainer, ids alone) FuxiCTR has the same features in tables of the same widths:
those of items beside the item, in histories too, and the others in its head. With --max_examples each system trains
until it has seen so many, and the table compares the test GAUC there.

With --histories (as of the trainer, with --action_column) both have the same several histories, each with an attention
unit of its own. FuxiCTR's wheel installs no such model, so `fuxictr_histories` builds its repository's from its layers.
Neither peer's DIN has a form for numbers beside each behaviour: FuxiCTR embeds a number of an example or of an item,
and DeepCTR's sequences are of ids. So these are not compared.

With --long_history beside --histories=all:20 one of two histories is searched. For --long_history=category_id:20 ours
has the newest 20 and the newest 20 of the candidate's category, and FuxiCTR's SIM the newest 20 and those 20 of the
newest 100 whose vectors fit the candidate's best. Its attention is a product of two projections instead of units, and
it has a second loss for what it chooses.

Each system is used as its documentation shows, so these differences remain:
- Padding. DeepCTR fills every history up to 100, the width of its input; FuxiCTR up to the longest of the batch, and
  with --histories each up to its own limit; ours pads nothing. Histories of 5-core Amazon logs have 9 items on average:
  this, and the factored attention layer, is what is measured there.
- Tables. Adam moves all rows of the peers' tables at every step, and of ours those of the batch (`lazy_adam`). A row of
  the peers' goes on by its momentum after its batch, about ten times as far in all. So one rate means more there, and
  qualities compare at the best rate of each.
- Model. Ours follows the authors' code: scores divided by sqrt(H), a projection of the interest, the product of
  interest and candidate as a third input of the head, a bias an item, and scale and offset where they have batch
  normalisation (`--batch_norm=frozen`). The peers have none of these: their head sees candidate and interest.
  `--nointerest_projection` leaves out the projection.
- Start. The peers' embeddings start at N(0, 1e-4), ours at Glorot's. Our benchmark of speed trains at a rate of 1e-6,
  which is the same work.
- Order. Each shuffles with its own generator: the peers all examples, ours the events, each with its negative beside it
  (`--group_negatives`, as in `launch/flags/recommended.flags`).
- FuxiCTR clips gradients to norm 10 by default, and reads its batches in --loader_workers processes of their own, whose
  memory is not counted. Its documented model is the one that its wheel installs, `model_zoo.LongCTR.DIN`, and with
  --histories that of `fuxictr_histories`, whose loader holds all padded examples in memory.
- Scores are logits from ours and probabilities from the peers: GAUC sees only their order.
- Prepared data: ours is the whole folder (records, arrays, vocabularies of string ids). The peers' are arrays of dense
  ids that our pipeline made. DeepCTR, which has no format, has its padded arrays, and so has FuxiCTR with --histories.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from din_dist.cli import entry
from din_dist.config import ALL_BEHAVIOURS, DataConfig, require
from din_dist.metrics.ranking import gauc
from din_dist.schema import NamedHistory
from tests.benchmarks.peers import common

HERE = Path(__file__).parent
OURS = "din_dist"
PEERS = {"deepctr": "DeepCTR", "fuxictr": "FuxiCTR"}
SIZES: dict[str, Any] = {
    "max_history_length": 100,
    "embedding_dim": 64,
    "attention_hidden_units": [80, 40],
    "hidden_units": [80, 40],
}
OTHER_SETTINGS: dict[str, Any] = {
    "split": "leave_one_out",
    "item_features": "category_id",
    "negatives_per_positive": 1,
    "group_negatives": True,
    "activation": "sigmoid",
    "attention_normalization": "softmax",
    "batch_norm": "frozen",
    "dropout": 0,
    "optimizer": "lazy_adam",
    "embedding_l2": 0,
    "metrics_port": -1,
}
OF_HISTORIES = ("histories", "action_column", "long_history")
OF_REPORT = ("rounds", "target_gauc", "interest_projection")
FOR_THE_RUNNERS = (
    *("batch_size", "threads", "loader_workers", "seed", "warmup_steps", "seconds"),
    *("evaluate_every_steps", "max_seconds"),
)

flags.DEFINE_string("dataset", "event_log", "As of the trainer: event_log or complete_journey.")
flags.DEFINE_string("data_path", "", "The log, as for the trainer; with a column category_id and without labels.")
flags.DEFINE_string("features", "", "Declared features, as for the trainer. FuxiCTR alone takes them.")
flags.DEFINE_list("histories", [], "As of the trainer, of actions alone: all:20,coupon:10. FuxiCTR alone takes them.")
flags.DEFINE_string("action_column", "", "As of the trainer, for --histories.")
flags.DEFINE_string("long_history", "", "As of the trainer: one more history, which is searched. FuxiCTR alone.")
flags.DEFINE_list("peers", list(PEERS), f"Which ones: of {', '.join(PEERS)}.")
flags.DEFINE_integer("rounds", 3, "Rounds of the measurement of speed.")
flags.DEFINE_integer("warmup_steps", 10, "Steps at the start of a round, not measured.")
flags.DEFINE_float("seconds", 20.0, "Seconds of training steps of each system in a round.")
flags.DEFINE_integer("batch_size", 1024, "Examples a step.")
flags.DEFINE_string("compute_dtype", "float32", "Of ours: float32, as the peers compute, or bfloat16.")
flags.DEFINE_bool("interest_projection", True, "Of ours, as the authors have; the peers have none.")
flags.DEFINE_integer("loader_workers", 1, "Processes of FuxiCTR's data loader (1 is its default).")
flags.DEFINE_list("learning_rates", ["0.001"], "Of Adam, for the quality: each system trains at each.")
flags.DEFINE_integer("seed", 1234, "Of negatives, weights and order.")
flags.DEFINE_float("target_gauc", 0.77, "Test GAUC to reach; 0 leaves that part out.")
flags.DEFINE_integer("evaluate_every_steps", 50, "Steps between two evaluations on the way there.")
flags.DEFINE_float("max_seconds", 1200.0, "Seconds of training after which a system has not reached it.")
flags.DEFINE_integer("max_examples", 0, "Examples after which training ends; 0: no such end.")
FLAGS = flags.FLAGS


def main() -> None:
    _check_flags()
    folder = common.own_folder()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: FLAGS.threads])  # every process below inherits it
    pythons = {peer: common.environment(PEERS[peer], HERE / f"{peer}.txt") for peer in FLAGS.peers}
    sizes = _prepare(folder, pythons)
    systems = [OURS, *FLAGS.peers]
    rounds: list[dict[str, dict[str, Any]]] = []
    our_steps = 100  # of a first run that only tells how many make --seconds
    for number in range(FLAGS.rounds + 1):
        found = {}
        for system in systems if number else [OURS]:
            found[system] = _our_speed(our_steps) if system == OURS else _peer(system, pythons, folder, "speed")[-1]
            if number:
                entry.say(f"round {number}: {_name(system)} {found[system]['examples_per_second']:,.0f} examples/s")
        our_steps = max(1, round(FLAGS.seconds * found[OURS]["examples_per_second"] / FLAGS.batch_size))
        rounds += [found] if number else []
    curves: dict[str, dict[float, list[dict[str, Any]]]] = {system: {} for system in systems}
    for system in systems if FLAGS.target_gauc else []:
        for rate in _learning_rates():
            curves[system][rate] = _peer(system, pythons, folder, "quality", rate)
    report = _report(systems, sizes, rounds, curves)
    print(_table(report))
    print(json.dumps(report), flush=True)


def _check_flags() -> None:
    own_log = FLAGS.dataset == "event_log"
    require(own_log == bool(FLAGS.data_path), "belongs to event_log", "data_path", FLAGS.data_path, "Name the log.")
    given = FLAGS.features or FLAGS.histories or FLAGS.long_history
    others = [peer for peer in FLAGS.peers if peer != "fuxictr"] if given else []
    require(not others, "takes no features and one history", "peers", ",".join(others), "Give --peers=fuxictr.")
    histories = _histories()
    if FLAGS.long_history:
        rule, remedy = "beside --long_history there is the newest of all alone", "For example --histories=all:20."
        named = [history.name for history in histories if not history.feature]
        require(named == [ALL_BEHAVIOURS], rule, "histories", ",".join(FLAGS.histories), remedy)
    several = bool(histories) and not FLAGS.long_history
    require(not (several and FLAGS.features), "does not go with --histories", "features", FLAGS.features, "Drop one.")
    for peer in FLAGS.peers:
        require(peer in PEERS, f"must be of {', '.join(PEERS)}", "peers", peer, "For example deepctr.")
    values = FLAGS.flag_values_dict()
    for name in ("rounds", "warmup_steps", "batch_size", "evaluate_every_steps"):
        require(values[name] >= 1, "must be at least 1", name, values[name], "For example 2.")
    for name in ("seconds", "max_seconds"):
        require(values[name] > 0, "must be positive", name, values[name], "For example 20.")
    for name in ("loader_workers", "seed"):
        require(values[name] >= 0, "must be at least 0", name, values[name], "For example 1.")
    _learning_rates()
    require(0 <= FLAGS.target_gauc < 1, "must be in [0, 1)", "target_gauc", FLAGS.target_gauc, "For example 0.77.")
    common.check_flags()


def _learning_rates() -> list[float]:
    try:
        found = [float(rate) for rate in FLAGS.learning_rates]
    except ValueError:
        found = []
    rule, remedy = "must be positive numbers with a comma between them", "For example 0.001,0.003."
    given = ",".join(FLAGS.learning_rates)
    require(bool(found) and all(rate > 0 for rate in found), rule, "learning_rates", given, remedy)
    return found


def _prepare(folder: Path, pythons: dict[str, Path]) -> dict[str, int]:
    """Exports the examples, has each peer bring them into its own form, and tells the bytes of each form."""
    lines = common.read([sys.executable, str(HERE / "export.py"), *_exported_job(), f"--export_dir={folder / 'data'}"])
    sizes = {OURS: int(lines[-1]["bytes"])}
    for peer in pythons:
        _peer(peer, pythons, folder, "prepare")
        sizes[peer] = sum(path.stat().st_size for path in (folder / "data" / peer).iterdir())
    return sizes


def _histories() -> tuple[NamedHistory, ...]:
    """The histories by name; none if there is one.

    Raises:
        InputError: the trainer would not take them.
    """
    return DataConfig(
        dataset=FLAGS.dataset,
        data_path=FLAGS.data_path,
        item_features=(OTHER_SETTINGS["item_features"],),
        max_history_length=SIZES["max_history_length"],
        histories=tuple(FLAGS.histories),
        action_column=FLAGS.action_column,
        long_history=FLAGS.long_history,
    ).named_histories


def _our_job() -> list[str]:
    """The flags of our job."""
    given = {**FLAGS.flag_values_dict(), "histories": ",".join(FLAGS.histories)}
    return [*_our_flags(), *(f"--{name}={given[name]}" for name in OF_HISTORIES if given[name])]


def _exported_job() -> list[str]:
    """The flags of the examples that the peers get. Where one is to search, it gets the history to search in."""
    return _our_flags() if FLAGS.long_history else _our_job()


def _our_flags() -> list[str]:
    settings = {**OTHER_SETTINGS, **SIZES, "dataset": FLAGS.dataset, "data_path": FLAGS.data_path, "seed": FLAGS.seed}
    settings |= {"features": FLAGS.features} if FLAGS.features else {}
    settings |= {"global_batch_size": FLAGS.batch_size, "compute_dtype": FLAGS.compute_dtype}
    settings |= {} if FLAGS.interest_projection else {"interest_projection": False}
    texts = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


def _our_speed(steps: int) -> dict[str, Any]:
    options = [f"--benchmark_steps={steps}", f"--benchmark_warmup_steps={FLAGS.warmup_steps}"]
    versions = {package: metadata.version(package) for package in ("tensorflow-cpu", "keras")}
    found = common.read([sys.executable, "-m", "din_dist.cli.benchmark", *_our_job(), *options])[-1]
    return {**found, "versions": versions}


def _peer(
    system: str, pythons: dict[str, Path], folder: Path, mode: str, learning_rate: float = 1e-3
) -> list[dict[str, Any]]:
    """Runs a system's runner and gives what it said; in mode `quality` each entry has its `gauc`."""
    data = folder / "data"
    job: dict[str, Any] = {
        **SIZES,
        **{name: FLAGS[name].value for name in FOR_THE_RUNNERS},
        "learning_rate": learning_rate,
        "histories": [history.longest for history in _histories()],
        "long_history": FLAGS.long_history,
        "mode": mode,
        "data": str(data),
        "scores": str(data / f"{system}-scores.npy"),
    }
    test: Any = np.load(data / "test.npz") if mode == "quality" else {}

    def judge(found: dict[str, Any]) -> str:
        if mode != "quality":
            return ""
        found["gauc"] = gauc(np.load(job["scores"]), test["labels"], test["users"]).gauc
        at = f"after {found['seconds']:.1f} s of training at a rate of {learning_rate:g}"
        entry.say(f"{_name(system)}: test GAUC {found['gauc']:.4f} {at}")
        enough = 0 < FLAGS.max_examples <= found["examples"] or found["seconds"] >= FLAGS.max_seconds
        return "stop" if enough or found["gauc"] >= FLAGS.target_gauc else "go on"

    if system == OURS:
        words = [*_our_job(), f"--learning_rate={learning_rate}", f"--job={json.dumps(job)}"]
        return common.read([sys.executable, str(HERE / "run_ours.py"), *words], judge)
    return common.read([str(pythons[system]), str(HERE / f"run_{system}.py"), json.dumps(job)], judge)


def _report(
    systems: Sequence[str],
    sizes: dict[str, int],
    rounds: list[dict[str, dict[str, Any]]],
    curves: dict[str, dict[float, list[dict[str, Any]]]],
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "machine": {"cores": FLAGS.threads, "cpu": common.cpu_model(), "python": platform.python_version()},
        "commit": common.commit(),
        "settings": {name: FLAGS[name].value for name in (*OF_HISTORIES, *FOR_THE_RUNNERS, *OF_REPORT)},
        "data": Path(FLAGS.data_path).name or FLAGS.dataset,
        "features": Path(FLAGS.features).name,
        "systems": {},
    }
    for system in systems:
        results = [found[system] for found in rounds]
        speeds = [result["examples_per_second"] for result in results]
        ratios = [found[OURS]["examples_per_second"] / found[system]["examples_per_second"] for found in rounds]
        at_the_end = {rate: curve[-1]["gauc"] for rate, curve in curves[system].items()}
        best = max(at_the_end, key=at_the_end.__getitem__, default=None)
        curve = [] if best is None else curves[system][best]
        reached = [point["seconds"] for point in curve if point["gauc"] >= FLAGS.target_gauc]
        report["systems"][system] = {
            "examples_per_second": statistics.median(speeds),
            "examples_per_second_by_round": speeds,
            "ours_times_its_speed": statistics.median(ratios),
            "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
            "prepared_bytes": sizes[system],
            "seconds_to_target": reached[0] if reached else None,
            "gauc_at_the_end_by_learning_rate": at_the_end,
            "learning_rate": best,
            "curve": [{name: point[name] for name in ("seconds", "examples", "gauc")} for point in curve],
            "versions": results[-1]["versions"],
        }
    return report


def _table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    target, limit = FLAGS.target_gauc, FLAGS.max_seconds
    lines = [
        f"{machine['cores']} cores of {machine['cpu']}, batch {FLAGS.batch_size}, commit {report['commit']}",
        "",
        f"| | examples/s | ours: times as fast | peak memory, MiB | prepared data, MB | s to {target} test GAUC "
        "| test GAUC at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, found in report["systems"].items():
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        seconds = found["seconds_to_target"]
        reached = "not measured" if not found["curve"] else f"not within {limit:.0f} s"
        last = found["curve"][-1] if found["curve"] else None
        rates = ", ".join(f"{gauc:.4f} at {rate:g}" for rate, gauc in found["gauc_at_the_end_by_learning_rate"].items())
        at_the_end = f"{rates} after {last['examples']:,} examples" if last else "not measured"
        lines.append(
            f"| {_name(system)} ({versions}) | {found['examples_per_second']:,.0f} "
            f"| {'' if system == OURS else format(found['ours_times_its_speed'], '.1f')} "
            f"| {found['peak_memory_bytes'] / 2**20:,.0f} | {found['prepared_bytes'] / 1e6:.1f} "
            f"| {reached if seconds is None else format(seconds, '.0f')} | {at_the_end} |"
        )
    return "\n".join(lines)


def _name(system: str) -> str:
    return PEERS.get(system, system)


if __name__ == "__main__":
    entry.run(main)

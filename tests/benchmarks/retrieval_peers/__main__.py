"""Our models that find items against the originals: `python -m tests.benchmarks.retrieval_peers --data_path=LOG`.

| ours | the original |
|---|---|
| youtube_dnn without hidden layers, comirec_sa, comirec_dr, mind | the code of ComiRec's authors, THUDM/ComiRec |
| sr_gnn with --softmax=full | the code of its authors, CRIPAC-DIG/SR-GNN, pytorch_code/ |
| none | SASRec of RecBole, so that it is known where the family stands |

The authors' code is not copied: name checkouts by --comirec_dir and --sr_gnn_dir. The peers' environments have the
exact versions of `comirec.txt` and `recbole.txt`. They are made on the first run, which takes minutes.

All train the same examples, exported from our prepared data: `leave_two_out`, histories up to 20, ids alone, in another
order each epoch. Sizes are the same: vectors of 64, 4 interests, batch 128, 1,280 sampled items an update (10 times the
batch, as in theirs), Adam. Rates are the authors': 0.001, and 0.005 for ComiRec-DR. SR-GNN has all items in its
softmax, an L2 of 1e-5, and a tenth of the rate after every third epoch, on both sides. SASRec has RecBole's sizes and
batch 2048.

Speed: the systems take turns for --rounds rounds, each a process of its own on the same cores: warm-up steps, then
--seconds of training steps, input pipeline included. Ratios are the median of the ratios of the rounds.
Quality: each trains --epochs epochs. After each epoch its vectors of users and items are judged here, by the code of
`din_dist.cli.evaluate`: recall@20 and NDCG@20 of the test events among all items, without those of the user's history
(--noexclude_history keeps them). The epoch with the best recall of up to 5,000 validation events counts. Each user has
one test event, so hit rate is recall. Intervals are over users, also that of the difference. They do not cover the
chance of training: give other --seed.

These differences remain:
- Padding. ComiRec's code fills every history up to 20. SR-GNN fills the sessions of a batch to its most distinct items,
  in a matrix of edges for each. Ours pads nothing. Histories here have 7 items on average.
- Negatives. ComiRec's code draws without replacement, and ours with replacement, both log-uniform by frequency.
- Tables. Adam of the peers moves all rows at every step, ours those of the batch (`lazy_adam`).
- Start. SR-GNN's vectors start uniform up to 0.125, ours as Glorot's, up to 0.022 here. ComiRec's start as ours do.
- Choices of MIND's first round are drawn anew in each pass of theirs, and fixed in ours.
- Versions. ComiRec's code was written for TensorFlow 1. It runs as a graph in a session of the same TensorFlow as ours.
- Theirs get examples from arrays, ComiRec's without its iterator, which is slower. SR-GNN's keeps its `Data`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.config import require
from din_dist.errors import InputError
from tests.benchmarks.peers import common

if TYPE_CHECKING:
    from tests.benchmarks.retrieval_peers.judge import Judge, Measured, Parts

HERE = Path(__file__).parent
OURS, THEIRS = "ours", "theirs"
LENGTH, K = 20, 20
CHECKOUTS = {
    "comirec": ("THUDM/ComiRec", "a576eed8b605a531f2971136ce6ae87739d47693"),
    "sr_gnn": ("CRIPAC-DIG/SR-GNN", "e21cfa431f74c25ae6e4ae9261deefe11d1cb488"),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model of ours and its original.

    Attributes:
        name: of the original.
        runner: run_RUNNER.py.
        environment: ENVIRONMENT.txt.
        learning_rate: on both sides.
        ours: more flags of ours. None: we have no such model.
        theirs: more values of the runner's job.
        batch_size: None: --batch_size.
    """

    name: str
    runner: str
    environment: str
    learning_rate: float = 1e-3
    ours: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int | None = None


_WEIGHT_DECAY, _DECAY, _EPOCHS_BETWEEN_DECAYS = 1e-5, 0.1, 3  # SR-GNN's
COMPARISONS = {
    "youtube_dnn": Comparison("ComiRec's DNN", "comirec", "comirec", ours={"tower_units": ""}),
    "comirec_sa": Comparison("ComiRec-SA", "comirec", "comirec"),
    "comirec_dr": Comparison("ComiRec-DR", "comirec", "comirec", learning_rate=5e-3),
    "mind": Comparison("ComiRec's MIND", "comirec", "comirec"),
    "sr_gnn": Comparison(
        "SR-GNN",
        "sr_gnn",
        "recbole",
        ours={
            "softmax": "full",
            "l2": _WEIGHT_DECAY,
            "embedding_l2": _WEIGHT_DECAY,
            "learning_rate_schedule": "step",
            "learning_rate_decay": _DECAY,
        },
        theirs={
            "weight_decay": _WEIGHT_DECAY,
            "learning_rate_decay": _DECAY,
            "epochs_between_decays": _EPOCHS_BETWEEN_DECAYS,
        },
    ),
    "sasrec": Comparison("RecBole's SASRec", "sasrec", "recbole", ours=None, batch_size=2048),
}

flags.DEFINE_enum("dataset", "event_log", ("event_log", "complete_journey"), "As for the trainer.")
flags.DEFINE_string("data_path", "", "The log of event_log, as for the trainer, without labels.")
flags.DEFINE_string("comirec_dir", "", "A checkout of THUDM/ComiRec. Default: leave out its models.")
flags.DEFINE_string("sr_gnn_dir", "", "A checkout of CRIPAC-DIG/SR-GNN. Default: leave it out.")
flags.DEFINE_list("models", [], f"Which ones: of {', '.join(COMPARISONS)}. Default: those whose code is there.")
flags.DEFINE_integer("rounds", 2, "Rounds of the measurement of speed; 0 leaves it out.")
flags.DEFINE_integer("warmup_steps", 20, "Steps at the start of a round, not measured.")
flags.DEFINE_float("seconds", 10.0, "Seconds of training steps of each system in a round.")
flags.DEFINE_integer("batch_size", 128, "Examples a step; SASRec has RecBole's 2048.")
flags.DEFINE_list("learning_rates", [], "Compare the best of these on each side. Default: the authors' rate.")
flags.DEFINE_integer("epochs", 0, "Epochs of training for the quality; 0 leaves it out.")
flags.DEFINE_integer("epoch_examples", 0, "Examples after which an epoch counts as over. Default: all.")
flags.DEFINE_float("max_seconds", 3600.0, "Seconds of training after which a system stops before that.")
flags.DEFINE_boolean("exclude_history", True, "Leave out what is in the user's history, but never the target.")
flags.DEFINE_integer("seed", 1234, "Of weights, order and sampled items.")
flags.DEFINE_multi_string("our_flag", [], "One more flag of ours, to see what explains a difference: num_sampled=2560.")
flags.DEFINE_list("sides", [OURS, THEIRS], "Which ones to run: ours, theirs or both.")
FLAGS = flags.FLAGS


@dataclasses.dataclass
class Findings:
    """What was measured of a system: `speeds` by round, `curve` after each epoch, and `parts` of the best one."""

    speeds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    parts: Parts | None = None
    best: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `curve`, by the recall of validation


Found: TypeAlias = dict[tuple[str, str], Findings]


def main() -> None:
    _check_flags()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: FLAGS.threads])  # every process below inherits it
    chosen = {name: COMPARISONS[name] for name in _chosen()}
    pythons = {
        comparison.environment: common.environment(comparison.name, HERE / f"{comparison.environment}.txt")
        for comparison in chosen.values()
    }
    run = Run(pythons)
    run.prepare(chosen)
    found: Found = {(name, side): Findings() for name in chosen for side in _sides(name)}
    for number in range(1, FLAGS.rounds + 1):
        for (name, side), findings in found.items():
            findings.speeds += run.speed(name, side)
            speed = findings.speeds[-1]["examples_per_second"]
            entry.say(f"round {number}: {_label(name, side)} {speed:,.0f} examples/s")
    differences = {}
    if FLAGS.epochs:
        judge = _judge(run.our_flags(next(iter(chosen))))
        for (name, side), findings in found.items():
            run.train(name, side, findings, judge)
        for name in chosen:
            ours, theirs = (found[name, side].parts if (name, side) in found else None for side in (OURS, THEIRS))
            if ours and theirs:
                differences[name] = judge.compare(ours, theirs)
    report = _report(found, differences)
    print(_table(report))
    print(json.dumps(report), flush=True)


def _check_flags() -> None:
    values = FLAGS.flag_values_dict()
    for name in ("warmup_steps", "batch_size"):
        require(values[name] >= 1, "must be at least 1", name, values[name], "For example 20.")
    for name in ("rounds", "epochs", "epoch_examples", "seed"):
        require(values[name] >= 0, "must be at least 0", name, values[name], "For example 2.")
    for name in ("seconds", "max_seconds"):
        require(values[name] > 0, "must be positive", name, values[name], "For example 20.")
    require(FLAGS.rounds + FLAGS.epochs > 0, "must not both be 0", "rounds", FLAGS.rounds, "Add --epochs=2.")
    for side in FLAGS.sides:
        require(side in (OURS, THEIRS), f"must be of {OURS}, {THEIRS}", "sides", side, f"For example {OURS}.")
    for name in FLAGS.models:
        require(name in COMPARISONS, f"must be of {', '.join(COMPARISONS)}", "models", name, "For example mind.")
        checkout = COMPARISONS[name].runner
        if checkout in CHECKOUTS:
            _check_checkout(checkout)
    for name in CHECKOUTS:
        if values[f"{name}_dir"]:
            _check_checkout(name)
    common.check_flags()


def _check_checkout(name: str) -> None:
    """Checks that a flag names a checkout of the right commit."""
    repository, commit = CHECKOUTS[name]
    given = FLAGS[f"{name}_dir"].value
    command = ["git", "-C", given, "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True) if given else None
    if done is None or done.stdout.strip() != commit:
        received = "none" if done is None else done.stdout.strip() or done.stderr.strip()
        raise InputError(
            f"--{name}_dir: must be a checkout of {repository} at commit {commit}. Received: {received}. Clone "
            f"{repository} from GitHub with git, run `git checkout {commit[:7]}` in it, and name its folder."
        )


def _chosen() -> list[str]:
    there = [name for name, found in COMPARISONS.items() if found.runner not in CHECKOUTS or _code(found)]
    return FLAGS.models or there


def _code(comparison: Comparison) -> str:
    """Returns the folder of the original's code; none if it is a package."""
    given = FLAGS[f"{comparison.runner}_dir"].value if comparison.runner in CHECKOUTS else ""
    return given and str(Path(given).expanduser().absolute())


def _sides(name: str) -> list[str]:
    sides = [THEIRS] if COMPARISONS[name].ours is None else [OURS, THEIRS]
    return [side for side in sides if side in FLAGS.sides]


def _label(name: str, side: str) -> str:
    return f"{COMPARISONS[name].name}" if side == THEIRS else f"din_dist {name}"


def _judge(our_flags: Sequence[str]) -> Judge:
    entry.import_tensorflow()
    from din_dist.data.prepared import open_prepared
    from tests.benchmarks.retrieval_peers.judge import Judge

    values = flags.FlagValues()
    settings.define_flags(values)
    values([sys.argv[0], *our_flags])
    config = settings.config_from_flags(values).data
    return Judge(open_prepared(config), config, exclude_history=FLAGS.exclude_history, k=K)


class Run:
    """Starts the processes of all systems.

    Args:
        pythons: environment -> its interpreter.
    """

    def __init__(self, pythons: dict[str, Path]) -> None:
        self._pythons, self._num_train = pythons, 0
        self._data = common.own_folder() / "retrieval-data"

    def prepare(self, chosen: dict[str, Comparison]) -> None:
        """Exports the examples, and has each peer bring them into its own form."""
        export = [sys.executable, str(HERE / "export.py"), *self.our_flags(next(iter(chosen)))]
        self._num_train = common.read([*export, f"--export_dir={self._data}"])[-1]["num_train"]
        for runner in {comparison.runner for comparison in chosen.values()}:
            self._start(next(name for name in chosen if COMPARISONS[name].runner == runner), THEIRS, "prepare")

    def speed(self, name: str, side: str) -> list[dict[str, Any]]:
        """Returns what the runner says of a system's speed."""
        return self._start(name, side, "speed")

    def train(self, name: str, side: str, findings: Findings, judge: Judge) -> None:
        """Trains a system for its quality at each rate, and adds to its findings after each epoch."""
        rate, num_evaluations = 0.0, 0

        def answer(said: dict[str, Any]) -> str:
            nonlocal num_evaluations
            num_evaluations += 1
            with np.load(self._vectors(name, side)) as vectors:
                parts = judge.parts(vectors["users"], vectors["items"])
            measured = judge.measure(parts["test"])
            above, below = parts["validation"]["recall"]
            point = {**said, "learning_rate": rate, "validation_recall": float(above.sum() / below.sum())}
            findings.curve.append({**point, **{metric: found._asdict() for metric, found in measured.items()}})
            if findings.curve[-1]["validation_recall"] > findings.best.get("validation_recall", -1):
                findings.best, findings.parts = findings.curve[-1], parts["test"]
            entry.say(
                f"{_label(name, side)} at {rate}: recall@{K} {measured['recall'].value:.4f}, NDCG@{K} "
                f"{measured['ndcg'].value:.4f} after {said['examples']:,} examples in {said['seconds']:.1f} s"
            )
            done = num_evaluations >= FLAGS.epochs or said["seconds"] >= FLAGS.max_seconds
            return "stop" if done else "go on"

        for rate in map(float, FLAGS.learning_rates or [COMPARISONS[name].learning_rate]):
            num_evaluations = 0
            self._start(name, side, "quality", answer, rate)

    def _start(
        self, name: str, side: str, mode: str, answer: Any = lambda said: "", rate: float | None = None
    ) -> list[dict[str, Any]]:
        comparison = COMPARISONS[name]
        job = json.dumps(self._job(name, side, mode) | ({} if rate is None else {"learning_rate": rate}))
        if side == OURS:
            command = [sys.executable, str(HERE / "run_ours.py"), *self.our_flags(name, rate), f"--job={job}"]
            return common.read(command, answer)
        runner = HERE / f"run_{comparison.runner}.py"
        return common.read([str(self._pythons[comparison.environment]), str(runner), job], answer)

    def _vectors(self, name: str, side: str) -> Path:
        return self._data / f"{name}-{side}.npz"

    def _batch_size(self, name: str) -> int:
        return COMPARISONS[name].batch_size or FLAGS.batch_size

    def _steps_per_epoch(self, name: str) -> int:
        return -(-self._num_train // self._batch_size(name))

    def _job(self, name: str, side: str, mode: str) -> dict[str, Any]:
        comparison = COMPARISONS[name]
        return {
            **{flag: FLAGS[flag].value for flag in ("threads", "seed", "warmup_steps", "seconds", "max_seconds")},
            **{"model": name, "mode": mode, "data": str(self._data), "vectors": str(self._vectors(name, side))},
            **{"code": _code(comparison), "max_history_length": LENGTH, "embedding_dim": 64, "num_interests": 4},
            **{"batch_size": self._batch_size(name), "learning_rate": comparison.learning_rate},
            "evaluate_every_steps": -(-FLAGS.epoch_examples // self._batch_size(name)) or self._steps_per_epoch(name),
            **comparison.theirs,
        }

    def our_flags(self, name: str, rate: float | None = None) -> list[str]:
        """Returns the flags of our side; `rate` is in the place of the authors' learning rate."""
        comparison = COMPARISONS[name]
        given: dict[str, Any] = {
            **{
                "dataset": FLAGS.dataset,
                "data_path": FLAGS.data_path or "",
                "split": "leave_two_out",
                "item_features": "",
            },
            **{"max_history_length": LENGTH, "num_positions": LENGTH, "embedding_dim": 64, "num_interests": 4},
            **{"global_batch_size": self._batch_size(name), "num_sampled": 10 * self._batch_size(name)},
            **{"optimizer": "lazy_adam", "learning_rate": rate or comparison.learning_rate, "embedding_l2": 0},
            **{"seed": FLAGS.seed, "metrics_port": -1},
        }
        if comparison.ours is not None:
            given |= {"model": name, **comparison.ours}
        if given.get("learning_rate_schedule") == "step" and self._num_train:
            given["learning_rate_decay_steps"] = _EPOCHS_BETWEEN_DECAYS * self._steps_per_epoch(name)
        return [f"--{flag}={value}" for flag, value in given.items()] + [f"--{flag}" for flag in FLAGS.our_flag]


def _report(found: Found, differences: dict[str, dict[str, Measured]]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "machine": {"cores": FLAGS.threads, "cpu": common.cpu_model(), "python": platform.python_version()},
        "commit": common.commit(),
        "data": Path(FLAGS.data_path).name or FLAGS.dataset,
        "settings": {
            name: FLAGS[name].value
            for name in (
                "batch_size",
                "epochs",
                "epoch_examples",
                "rounds",
                "warmup_steps",
                "seconds",
                "seed",
                "exclude_history",
            )
        },
        "systems": [],
        "ours_less_theirs": {
            name: {metric: measured._asdict() for metric, measured in found.items()}
            for name, found in differences.items()
        },
    }
    for (name, side), findings in found.items():
        speeds = [said["examples_per_second"] for said in findings.speeds]
        ours = [said["examples_per_second"] for said in found[name, OURS].speeds] if (name, OURS) in found else []
        ratios = [own / speed for own, speed in zip(ours, speeds, strict=False)]
        report["systems"].append(
            {
                "model": name,
                "side": side,
                "name": _label(name, side),
                "versions": (findings.speeds or findings.curve)[-1]["versions"],
                "examples_per_second": statistics.median(speeds) if speeds else None,
                "examples_per_second_by_round": speeds,
                "ours_times_its_speed": statistics.median(ratios) if ratios else None,
                "peak_memory_bytes": max((said["peak_memory_bytes"] for said in findings.speeds), default=None),
                "best": {name: value for name, value in findings.best.items() if name != "versions"},
                "curve": [
                    {name: value for name, value in point.items() if name != "versions"} for point in findings.curve
                ],
            }
        )
    return report


def _table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['cores']} cores of {machine['cpu']}, batch {FLAGS.batch_size}, commit {report['commit']}",
        "",
        f"| | examples/s | ours: times as fast | peak memory, MiB | recall@{K} | NDCG@{K} | rate | examples | seconds "
        f"| ours less theirs, recall@{K} | NDCG@{K} |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in report["systems"]:
        theirs = found["side"] == THEIRS
        less = report["ours_less_theirs"].get(found["model"], {}) if theirs else {}
        best = found["best"]
        cells = [
            found["name"] + " (" + ", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ")",
            _number(found["examples_per_second"], ",.0f"),
            _number(found["ours_times_its_speed"], ".2f") if theirs else "",
            _number(found["peak_memory_bytes"] and found["peak_memory_bytes"] / 2**20, ",.0f"),
            _with_interval(best.get("recall"), ".4f"),
            _with_interval(best.get("ndcg"), ".4f"),
            _number(best.get("learning_rate"), "g"),
            _number(best.get("examples"), ",d"),
            _number(best.get("seconds"), ",.0f"),
            _with_interval(less.get("recall"), "+.4f"),
            _with_interval(less.get("ndcg"), "+.4f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_interval(measured: dict[str, Any] | None, form: str) -> str:
    if measured is None:
        return ""
    low, high = measured["interval"]
    return f"{measured['value']:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    entry.run(main)

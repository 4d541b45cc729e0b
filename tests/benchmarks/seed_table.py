"""What choices within models that find items are worth: `python -m tests.benchmarks.seed_table FLAGS`, run by hand.

FLAGS are the trainer's, for what all jobs share. Each variant of `VARIANTS` trains once for each of --seeds, one after
the other in one process. --max_steps is the number of updates of each, however long its epochs are. The schedule of the
learning rate ends there. --split needs a validation part.

The rankings of all items are judged by recall@20 and NDCG@20, as `din_dist.cli.evaluate` does. This happens at the end,
and every --evaluate_every_steps if that is given. The test figures are those of the weights with the best validation
recall. Models with several interests are judged by --evaluate_with=interests and =readout, without a second training.

Prints a Markdown table, then JSON of all runs. A cell has the mean over seeds and the standard deviation. Differences
are those to the variant's base, taken within each seed. `alike` is the mean cosine of two interests of a test user,
which is 1 if they are the same. Seconds are those of training without evaluation: wall clock, and CPU of all threads.
With --results_dir, a run whose result lies there is not made again, so a folder is for one set of FLAGS.

The flags that README.md names were chosen on Beauty by the validation recall of `comirec_sa`, one seed, 1,100 updates:
0.0461 at a rate of 0.003, 0.0542 at 0.005 and 0.0648 at 0.01. The other variants and data sets have the same rate.
Temperatures of cosines were compared at a rate of 0.005, batch 1024, 548 updates: 0.0774 with 0.05, 0.0750 with 0.1.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from din_dist.cli import entry
from din_dist.cli import flags as settings
from din_dist.config import (
    Config,
    EvaluateWith,
    HistoryCut,
    InterestWeights,
    ModelKind,
    PositionVectors,
    Readout,
    SessionQuery,
    SessionReadout,
    require,
)
from din_dist.evaluation.request import EVENTS, USERS

if TYPE_CHECKING:
    from din_dist.assembly import Assembly
    from din_dist.evaluation.retrieval import Queries

settings.define_flags()
flags.DEFINE_integer("seeds", 3, "How many: --seed and those after it.", lower_bound=1)
flags.DEFINE_string("results_dir", "", "Where the results of each run lie. Default: a temporary folder.")
flags.DEFINE_list("variants", [], "Names of `VARIANTS`. Default: all.")
flags.DEFINE_float("cosine_temperature", 0.1, "--temperature of the variants that normalize vectors.")
flags.DEFINE_enum("queries", EVENTS, (EVENTS, USERS), "As of `evaluate`.")
flags.DEFINE_boolean("exclude_history", True, "As of `evaluate`.")
flags.DEFINE_integer("max_queries", 3000, "Most queries of each split, as whole users that are evenly spaced.")
FLAGS = flags.FLAGS

K = 20
_COSINES: dict[str, Any] = {"normalize_vectors": True}
_COMIREC, _SR_GNN = ModelKind.COMIREC_SA.value, ModelKind.SR_GNN.value
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> its base, and what differs from there
    "youtube_dnn": (_COMIREC, {"model": ModelKind.YOUTUBE_DNN}),
    _COMIREC: (_COMIREC, {}),
    "positions=none": (_COMIREC, {"positions": PositionVectors.NONE}),
    "normalize_vectors": (_COMIREC, _COSINES),
    "interest_weights=none": (_COMIREC, {"interest_weights": InterestWeights.NONE}),
    "readout=soft": (_COMIREC, {"readout": Readout.SOFT}),
    "readout=soft normalize_vectors": (_COMIREC, {"readout": Readout.SOFT, **_COSINES}),
    "history_cut=fixed": (_COMIREC, {"history_cut": HistoryCut.FIXED}),
    _SR_GNN: (_SR_GNN, {}),
    "session_query=mean": (_SR_GNN, {"session_query": SessionQuery.MEAN}),
    "session_readout=attention": (_SR_GNN, {"session_readout": SessionReadout.ATTENTION}),
    "session_readout=attention session_query=mean": (
        _SR_GNN,
        {"session_readout": SessionReadout.ATTENTION, "session_query": SessionQuery.MEAN},
    ),
    "session_readout=mean_last": (_SR_GNN, {"session_readout": SessionReadout.MEAN_LAST}),
}


class Judged(NamedTuple):
    """What was measured of one seed of one row of the table."""

    recall: float  # of the test users or events
    ndcg: float
    validation_recall: float
    best_step: int
    alike: float | None  # None: the user has one vector
    seconds: float  # of training
    cpu_seconds: float


Found = dict[str, list[Judged]]  # row of the table -> its seeds


def main() -> None:
    given = settings.config_from_flags()
    names = FLAGS.variants or [*VARIANTS]
    for name in names:
        require(name in VARIANTS, f"must be of {'; '.join(VARIANTS)}", "variants", name, f"For example {_COMIREC}.")
    require(FLAGS.max_queries >= 1, "must be at least 1", "max_queries", FLAGS.max_queries, "For example 3000.")
    require(given.job.max_steps >= 1, "must be at least 1", "max_steps", given.job.max_steps, "For example 500.")
    entry.import_tensorflow()
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        given = given.replace(output_dir=folder, metrics_port=-1)
        results = Path(FLAGS.results_dir or folder)
        results.mkdir(parents=True, exist_ok=True)
        for seed in range(given.job.seed, given.job.seed + FLAGS.seeds):
            for number, name in enumerate(VARIANTS):
                path = results / f"{number}-{seed}.json"
                if name not in names:
                    continue
                if not path.exists():
                    judged = run(config_of(given, name).replace(seed=seed))
                    path.write_text(json.dumps({_row(name, way): one._asdict() for way, one in judged.items()}))
                    gc.collect()
                for row, values in json.loads(path.read_text()).items():
                    found.setdefault(row, []).append(Judged(**values))
                    entry.say(f"seed {seed}: {row} {values}")
    print(table(found))
    print(json.dumps({row: [judged._asdict() for judged in of_seeds] for row, of_seeds in found.items()}))


def config_of(given: Config, name: str) -> Config:
    """Returns the settings of a variant."""
    base, changes = VARIANTS[name]
    if "normalize_vectors" in changes:
        changes = {**changes, "temperature": FLAGS.cosine_temperature}
    return given.replace(**{"model": ModelKind(base), **changes})


def _row(name: str, evaluate_with: str) -> str:
    return name if evaluate_with == EvaluateWith.INTERESTS else f"{name}, evaluate_with={evaluate_with}"


def run(config: Config) -> dict[str, Judged]:
    """Trains a job, and returns what was measured by the ways of evaluation."""
    from din_dist.assembly import Assembly
    from din_dist.data.prepared import prepare
    from din_dist.distributed.runtime import Runtime
    from din_dist.training.schedules import learning_rate

    job = Assembly(config, Runtime(), prepare(config.data))
    num_steps = config.job.max_steps
    judge, seconds, cpu_seconds = Judge(job), 0.0, 0.0
    for steps in stretches(num_steps, config.evaluation.evaluate_every_steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        for step, batch in zip(steps, job.make_batches(steps[0] - 1, steps[-1]), strict=True):
            rate = learning_rate(config.optimizer, step, num_steps)
            float(job.step(batch, rate, step, len(batch.candidate_item_ids)).loss)  # training reads it too
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started
        judge.judge(steps[-1], seconds, cpu_seconds)
    return judge.best


def stretches(num_steps: int, every: int) -> Iterator[range]:
    """Yields the updates, counted from 1, between two evaluations; all if `every` is 0."""
    for first in range(1, num_steps + 1, every or num_steps):
        yield range(first, min(first + (every or num_steps), num_steps + 1))


class Judge:
    """Judges the weights of a job in each way of evaluation, and keeps the best by validation.

    Attributes:
        best: way -> what was measured on the test part when the validation part was best.
    """

    def __init__(self, job: Assembly) -> None:
        from din_dist.data.splits import item_counts

        self._job, self._popularity = job, item_counts(job.store, job.splits)
        self._asked = {split: self._queries(split) for split in ("validation", "test")}
        several = self._users(job.model, "test").shape[1] > 1
        ways = [EvaluateWith.INTERESTS, EvaluateWith.READOUT] if several else [EvaluateWith.INTERESTS]
        self._models = {way: self._model(way) for way in ways}
        self._recalls = dict.fromkeys(ways, -1.0)
        self.best: dict[str, Judged] = {}

    def _queries(self, split: str) -> Queries:
        from din_dist.evaluation.retrieval import queries_of

        job, most = self._job, FLAGS.max_queries
        return queries_of(job.store, job.splits[split], job.config.data.max_history_length, most, by=FLAGS.queries)

    def _model(self, way: EvaluateWith) -> Any:
        """Returns another model of the job, for weights that are put there."""
        from din_dist.assembly import make_model
        from din_dist.data.trained_items import row_of_item

        config, store = self._job.config.replace(evaluate_with=way).model, self._job.store
        rows = row_of_item(store.facts, self._job.trained_items)
        return make_model(config, store.facts, store.item_features, seed=0, row_of_item=rows)

    def judge(self, step: int, seconds: float, cpu_seconds: float) -> None:
        """Judges the weights after update `step`."""
        for way, model in self._models.items():
            for own, learned in zip(model.weights, self._job.model.weights, strict=True):
                own.assign(learned)
            recall = self._measured(model, "validation")[0]
            if recall > self._recalls[way]:
                self._recalls[way] = recall
                cosine = alike(self._users(model, "test"))
                measured = self._measured(model, "test")
                self.best[way] = Judged(*measured, recall, step, cosine, seconds, cpu_seconds)

    def _measured(self, model: Any, split: str) -> tuple[float, float]:
        """Returns recall and NDCG."""
        import tensorflow as tf

        from din_dist.evaluation.retrieval import Task, by_user, rank
        from tests.benchmarks.retrieval_peers.judge import VectorScorer

        asked, store = self._asked[split], self._job.store
        items = model.items(tf.range(store.facts.num_candidates + 1)).numpy()
        scorer = VectorScorer(asked.events, self._users(model, split), items)
        positions = rank(store, asked, Task(0, FLAGS.exclude_history, 0), scorer, K, self._job.runtime)
        sums = by_user(asked, positions, self._popularity, [K])
        recall, ndcg = (float(above.sum() / below.sum()) for above, below in (sums[f"recall@{K}"], sums[f"ndcg@{K}"]))
        return recall, ndcg

    def _users(self, model: Any, split: str) -> np.ndarray:
        """Returns the vectors of the users that are asked, float32 `[E, K, H]`."""
        from din_dist.data.walks import windows

        asked = self._asked[split]
        lengths = asked.history_ends - asked.history_starts
        history = self._job.store.history_item_ids[windows(asked.history_starts, lengths)]
        found: np.ndarray = model.users_of(history.astype(np.int32), lengths.astype(np.int32)).numpy()
        return found


def alike(vectors: np.ndarray) -> float | None:
    """Returns the mean cosine of two different interests of a user; None if users have one.

    Args:
        vectors: float `[E, K, H]`. Users without any history, whose vectors are 0, do not count.
    """
    num_interests = vectors.shape[1]
    if num_interests == 1:
        return None
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    there = (lengths > 0).all(axis=(1, 2))
    units = vectors[there] / lengths[there]
    cosines = np.einsum("ekh,elh->ekl", units, units)
    others = ~np.eye(num_interests, dtype=bool)
    return float(cosines[:, others].mean())


def table(found: Mapping[str, Sequence[Judged]]) -> str:
    """Returns the Markdown table of all rows, each with its difference from its base within each seed."""
    heads = ["variant", f"recall@{K}", "from its base", f"NDCG@{K}", "from its base", "alike", "s", "CPU s", "updates"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row, of_seeds in found.items():
        base = found.get(VARIANTS[row.partition(", ")[0]][0], of_seeds)
        cells = [f"`{row}`"]
        columns: list[Callable[[Judged], float]] = [lambda one: one.recall, lambda one: one.ndcg]
        for value in columns:
            own, others = [*map(value, of_seeds)], [*map(value, base)]
            differences = [mine - other for mine, other in zip(own, others, strict=True)]
            cells += [spread(own), "" if base is of_seeds else spread(differences, "+")]
        cosines = [one.alike for one in of_seeds if one.alike is not None]
        cells.append(spread(cosines, digits=2) if cosines else "")
        for time_of in (lambda one: one.seconds, lambda one: one.cpu_seconds, lambda one: one.best_step):
            cells.append(f"{statistics.mean(map(time_of, of_seeds)):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], sign: str = "", digits: int = 4) -> str:
    """Returns the mean and, of several values, their standard deviation."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({statistics.stdev(values):.{digits}f})"


if __name__ == "__main__":
    entry.run(main)

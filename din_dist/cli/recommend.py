"""Finds items for the users of files: `python -m din_dist.cli.recommend`, alone or under `horovodrun`.

A row holds a user or a history. It gets the best of all items as recommended_items, with their logits. The export is
that of a model that finds items, or of a model that ranks with such a one inside (cli.export --retriever_export_dir).
The parts of the result are published one by one, so the same command resumes after a stop or a kill. The last line on
stdout is a summary of this run, as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from din_dist.cli import entry, row_files
from din_dist.cli.help import theme
from din_dist.config import require
from din_dist.serving.asked import NUM_RETRIEVED, Recommend, require_recommends
from din_dist.serving.manifest import Manifest

with theme("result"):
    K = flags.DEFINE_integer("k", 10, "Most items to recommend for a row, best first.")
    NUM_RETRIEVED_FLAG = flags.DEFINE_integer(
        "num_retrieved",
        NUM_RETRIEVED,
        "How many items the model that ranks gets from the one that finds. Of no effect where one model does both.",
    )
    EXCLUDE_HISTORY = flags.DEFINE_boolean(
        "exclude_history",
        True,
        "Leave out the items of the history. Turn it off where users come back to the same items.",
    )


def main() -> None:
    row_files.run(_wanted)


def _wanted(manifest: Manifest, files: Sequence[Path]) -> row_files.Wanted:
    """Returns the request for items, from the flags."""
    for flag in (K, NUM_RETRIEVED_FLAG):
        require(flag.value >= 1, "must be at least 1", flag.name, flag.value, "For example 100.")
    rule = "must be at most --num_retrieved, from which the best are taken"
    fits = manifest.finds_items or K.value <= NUM_RETRIEVED_FLAG.value
    require(fits, rule, K.name, K.value, f"Give --num_retrieved={K.value} or more.")
    require_recommends(manifest)
    asked = Recommend(K.value, NUM_RETRIEVED_FLAG.value, EXCLUDE_HISTORY.value)
    settings = {f"--{flag.name}": flag.value for flag in (K, NUM_RETRIEVED_FLAG, EXCLUDE_HISTORY)}
    return row_files.Wanted(None, recommend=asked, settings=settings)


if __name__ == "__main__":
    entry.run(main)

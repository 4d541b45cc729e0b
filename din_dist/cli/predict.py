"""Scores files of any size with an export: `python -m din_dist.cli.predict`, alone or under `horovodrun`.

A row holds a user or a history, and a candidate or a list of candidates. It gets the columns logit and
click_probability. The parts of the result are published one by one, so the same command resumes after a stop or a kill.
The last line on stdout is a summary of this run, as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from din_dist.cli import entry, row_files
from din_dist.cli.help import theme
from din_dist.config import require
from din_dist.serving.manifest import Manifest

with theme("input"):
    ITEM_COLUMN = flags.DEFINE_string("item_column", "item_id", "Column of the candidate's item id.")
    CANDIDATES_COLUMN = flags.DEFINE_string(
        "candidates_column",
        "candidates",
        "Column of a list of candidates. It is used if --item_column is not given and the first file has it.",
    )
with theme("result"):
    TOP_K = flags.DEFINE_integer(
        "top_k",
        0,
        "Number of candidates of a list to keep: the best, best first, with their ids as top_items. 0: all, as given.",
    )


def main() -> None:
    row_files.run(_wanted)


def _wanted(manifest: Manifest, files: Sequence[Path]) -> row_files.Wanted:
    """Returns the column of candidates and what to keep, from the flags."""
    from din_dist.tables.ids import Field
    from din_dist.tables.survey import names_of

    require(TOP_K.value >= 0, "must be at least 0", TOP_K.name, TOP_K.value, "0 keeps all candidates.")
    values = flags.FLAGS
    if values[ITEM_COLUMN.name].present and values[CANDIDATES_COLUMN.name].present:
        raise row_files.not_both(ITEM_COLUMN.name, CANDIDATES_COLUMN.name)
    lists = values[CANDIDATES_COLUMN.name].present > 0
    if not lists and not values[ITEM_COLUMN.name].present:
        lists = CANDIDATES_COLUMN.value in names_of(files[0])
    require(
        lists or not TOP_K.value, "needs a list of candidates", TOP_K.name, TOP_K.value, "Give --candidates_column."
    )
    integers = manifest.item_id_type == "integer"
    column = CANDIDATES_COLUMN if lists else ITEM_COLUMN
    settings = {f"--{column.name}": column.value, "--top_k": TOP_K.value}
    return row_files.Wanted(Field(column.value, integers, is_list=lists), TOP_K.value, settings=settings)


if __name__ == "__main__":
    entry.run(main)

"""What groups of features are worth on The Complete Journey: `python -m tests.benchmarks.feature_groups FOLDER`.

Trains the job of launch/flags/quick.flags with each group of the features of complete_journey_features.toml beside it,
in FOLDER/GROUP; see `compared_jobs`. Takes half an hour.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.compared_jobs import compare, quick_flags
from tests.support.repository import ROOT

GROUPS: dict[str, tuple[str, ...]] = {  # by the owners of the features
    "ids": (),
    "item": ("item",),
    "item_user": ("item", "user"),
    "item_user_context": ("item", "user", "context"),
    "all": ("item", "user", "context", "candidate"),
    "item_context_promotions": ("item", "context", "candidate"),
    "promotions": ("candidate",),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compare(folder, {name: flags_of(folder, name, owners) for name, owners in GROUPS.items()}, "features")


def flags_of(folder: Path, name: str, owners: Sequence[str]) -> list[str]:
    """Writes the declarations of some owners, and returns the flags of their job."""
    flags = [*quick_flags(folder, name), "--features="]
    if owners:
        declared = (ROOT / "launch/flags/complete_journey_features.toml").read_text()
        tables = re.split(r"\n(?=\[)", declared)[1:]
        path = folder / f"{name}.toml"
        path.write_text("\n".join(table for table in tables if re.search(f'of = "({"|".join(owners)})"', table)))
        flags[-1] += str(path)
    return flags


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

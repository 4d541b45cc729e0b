"""The table that `evaluate` prints."""

from __future__ import annotations

import re

from din_dist.evaluation.table import table

KS = (1, 10)
NAMES = ("recall", "ndcg", "mean_popularity")


def test_intervals_stand_apart() -> None:
    """However many digits they have: popularity counts clicks, of which there may be millions."""
    metrics = {f"{name}@{k}": 1234567.8 if name == "mean_popularity" else 0.5 for name in NAMES for k in KS}
    bounds = {name: (value * 0.9, value * 1.1) for name, value in metrics.items()}
    retrieval = {
        **{"num_events": 9, "num_events_in_split": 9, "num_events_of_repeats": 0, "ranked_against": "all items"},
        **{"exclude_history": False, "ks": KS, "metrics": metrics | {"mrr": 0.5}, "intervals": bounds},
        **{"floors": {"popularity": metrics | {"mrr": 0.1}}, "events_per_second": 1.0, "seconds_for_all_events": 9.0},
    }
    found = {
        **{"num_examples": 9, "num_users": 3, "num_users_skipped": 0, "gauc": 0.5, "floors": {}, "split": "test"},
        **{"retrieval": retrieval, "seconds": {"total": 3.0, "start": 3.0}, "world_size": 1, "bootstrap_samples": 9},
        **{"stages": dict.fromkeys(("found", "found_and_ranked"), retrieval), "num_retrieved": 100},
    }
    lines = table(found).splitlines()
    intervals = [line.split("interval")[1] for line in lines if line.strip().startswith("95 % interval")]
    assert len(intervals) == 3 + 2 * 3
    for line in intervals:
        assert len(re.split("  +", line.strip())) == 2, line
    assert "1,111,111.0 – 1,358,024.6  1,111,111.0 – 1,358,024.6" in "\n".join(lines)
    (heading,) = [line for line in lines if line.split() == ["@1", "@10"]]
    assert {len(line) for line in lines if "popularity has" in line} == {len(heading)}

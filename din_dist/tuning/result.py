"""Shows what a study has found: a table, and the best trial against the start flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from din_dist.tuning.study import Outcome, TrialState


def best_of(outcomes: Sequence[Outcome], maximize: bool) -> Outcome | None:
    """Returns the best trial that is done, the earlier of equals; None without one."""
    done = [outcome for outcome in outcomes if outcome.state is TrialState.DONE and outcome.value is not None]
    sign = -1 if maximize else 1
    return min(done, key=lambda outcome: (sign * (outcome.value or 0.0), outcome.number), default=None)


def table(outcomes: Sequence[Outcome], metric: str) -> str:
    """Returns a line for each trial: number, value, state, seconds, and values or why it failed."""
    lines = [f"  {'trial':>5}  {metric:>8}  {'state':<7}  {'seconds':>8}  flags"]
    for outcome in outcomes:
        value = "" if outcome.value is None else f"{outcome.value:.4f}"
        words = " ".join(f"--{name}={text}" for name, text in outcome.values.items()) or "the start flags"
        words += f" ({outcome.problem})" if outcome.problem else ""
        lines.append(f"  {outcome.number:>5}  {value:>8}  {outcome.state:<7}  {outcome.seconds:>8.1f}  {words}")
    return "\n".join(lines)


def verdict(outcomes: Sequence[Outcome], best: Outcome, metric: str) -> str:
    """Returns a sentence that says whether the best trial is better than the start flags."""
    start = outcomes[0]
    if start.state is not TrialState.DONE or start.value is None:
        return f"trial {best.number} is the best; the start flags failed, so there is nothing to compare it with"
    if best is start or best.value == start.value:
        return f"no trial is better than the start flags, whose validation {metric} is {start.value:.4f}"
    assert best.value is not None
    return (
        f"trial {best.number} is better than the start flags: validation {metric} {best.value:.4f} against "
        f"{start.value:.4f}"
    )


def to_record(outcomes: Sequence[Outcome], best: Outcome, metric: str, best_flags: str) -> dict[str, Any]:
    """Returns the result as the last line on stdout has it."""
    start = outcomes[0].value if outcomes[0].state is TrialState.DONE else None
    numbers = {state.value: sum(outcome.state is state for outcome in outcomes) for state in TrialState}
    return {
        "metric": metric,
        "best_trial": best.number,
        "best_value": best.value,
        "start_value": start,
        "is_better": None if start is None else best.value != start,
        "values": best.values,
        "best_flags": best_flags,
        "trials": len(outcomes),
        **{f"trials_{name}": count for name, count in numbers.items() if count},
    }

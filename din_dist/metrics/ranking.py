"""AUC, GAUC and log loss: arithmetic on whole arrays, exact, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Gauc:
    """Per-user AUC averaged by impressions. Users with one label class have no AUC; they are skipped and counted."""

    gauc: float
    num_users: int
    num_users_skipped: int


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the chance that a positive outscores a negative; NaN without both classes. A tie counts one half.

    The result is exact: it comes from the ranks of the sorted scores (Mann-Whitney U), not from bins.
    """
    return gauc(scores, labels, np.zeros(len(scores), np.int64)).gauc


def gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> Gauc:
    """Returns the mean over users of each user's AUC, weighted by impressions.

    Args:
        scores: `[M]`.
        labels: `[M]` in {0, 1}.
        users: int `[M]`, in any order.
    """
    aucs, impressions = aucs_by_user(scores, labels, users)
    counted = ~np.isnan(aucs)
    value = float(np.average(aucs[counted], weights=impressions[counted])) if counted.any() else float("nan")
    return Gauc(value, int(counted.sum()), int((~counted).sum()))


def aucs_by_user(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the AUC and the impressions of each of the K users, `[K]` both, by ascending user.

    The AUC is NaN for users without both labels.
    """
    if not len(scores):
        return np.zeros(0), np.zeros(0, np.int64)
    order = np.lexsort((scores, users))
    scores, users = np.asarray(scores)[order], np.asarray(users)[order]
    labels = np.asarray(labels, np.float64)[order]
    new_user = np.concatenate([[True], users[1:] != users[:-1]])
    new_tie = new_user | np.concatenate([[True], scores[1:] != scores[:-1]])
    # Ranks from 1 over the whole array; tied examples get their mean rank. A user's own ranks start after the
    # impressions of the users before.
    tie_starts = np.flatnonzero(new_tie)
    tie_sizes = np.diff(tie_starts, append=len(scores))
    ranks = np.repeat(tie_starts + (tie_sizes + 1) / 2, tie_sizes)
    user_starts = np.flatnonzero(new_user)
    impressions = np.diff(user_starts, append=len(scores))
    positives = np.add.reduceat(labels, user_starts)
    negatives = impressions - positives
    rank_sums = np.add.reduceat(labels * (ranks - np.repeat(user_starts, impressions)), user_starts)
    counted = (positives > 0) & (negatives > 0)
    wins = rank_sums - positives * (positives + 1) / 2
    aucs = np.full(len(user_starts), np.nan)
    aucs[counted] = wins[counted] / (positives * negatives)[counted]
    return aucs, impressions


def pairwise_gauc(scores: np.ndarray) -> float:
    """Returns the share of pairs in which the positive strictly outscores the negative, the authors' own metric.

    Unlike in `gauc`, a tie counts nothing. Source: the authors' din/train.py, `_eval`.

    Args:
        scores: `[pairs, 1 + negatives]`, the positive first.
    """
    return float(np.mean(scores[:, :1] > scores[:, 1:])) if len(scores) else float("nan")


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean sigmoid cross entropy, in nats."""
    return float(np.mean(log_losses(logits, labels))) if len(logits) else float("nan")


def log_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the sigmoid cross entropy of each example, `[M]`, in nats."""
    logits = np.asarray(logits, np.float64)
    return np.logaddexp(0.0, logits) - logits * labels

"""ComiRec's controllable re-ranking: the first items of a list differ in category (Cen et al. 2020, section 3.4).

Places are filled one after the other, each by the item with the highest gain among those left. The gain is the item's
score, and a weight for each item chosen before that is of another category.

Letters of shapes: B queries, I items of the catalogue, L places, P items that are considered for them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from din_dist.data.event_store import EventStore

CONSIDERED = 4  # items for each place, the best by score
_ABOVE_ALL = 2.0**127  # a float32 that no logit reaches


def category_of_items(store: EventStore) -> tuple[str, np.ndarray | None]:
    """Returns the name and the values, int32 `[num_items + 1]`, of the first feature of items: their category.

    Items without a category have 0: they are alike, and differ from all others. Without features it is `("", None)`.
    """
    return next(iter(store.item_features.items()), ("", None))


@dataclasses.dataclass(frozen=True, eq=False)
class Diversity:
    """The wish for lists of many categories.

    Attributes:
        weight: finite, at least 0; in the unit of the scores.
        category_of: int `[num_items + 1]`, the category of each item.
    """

    weight: float
    category_of: np.ndarray

    def rerank(self, scores: np.ndarray, length: int) -> None:
        """Raises the scores of the items for the first places, so that sorting by score gives the new order.

        Args:
            scores: float `[B, I]`, changed in place. Column i is item i + 1; -inf marks an item that is no candidate.
            length: L, the number of places; at most I and below 2**23.
        """
        chosen = diverse_order(scores, self.category_of[1 : 1 + scores.shape[1]], self.weight, length)
        rows, places = np.nonzero(chosen >= 0)
        # Neighbours among the float32 numbers: the scores of two places always differ.
        scores[rows, chosen[rows, places]] = _ABOVE_ALL * (1 + (length - places) / 2**23)


def diverse_order(scores: np.ndarray, categories: np.ndarray, weight: float, length: int) -> np.ndarray:
    """Returns the columns of the items in the first places, int64 `[B, L]`; -1 where no candidate is left.

    The lower column comes first in a tie. Gains are float64.

    Args:
        scores: float `[B, I]`; -inf marks an item that is no candidate.
        categories: int `[I]`.
        weight: what an item gains for each one before it of another category.
        length: L, at most I.
    """
    num_considered = min(CONSIDERED * length, scores.shape[1])
    # In the order of columns, because `argmax` takes the first of equal gains.
    columns = np.sort(tf.math.top_k(scores, num_considered).indices.numpy(), axis=1)  # [B, P]
    own_scores = np.take_along_axis(scores, columns, axis=1).astype(np.float64)
    own_categories = categories[columns]
    left = own_scores > -np.inf
    num_alike = np.zeros(columns.shape)  # items chosen before of the same category
    chosen = np.full((len(scores), length), -1, np.int64)
    rows = np.arange(len(scores))
    for place in range(length):
        gains = np.where(left, own_scores + weight * (place - num_alike), -np.inf)
        best = gains.argmax(axis=1)
        chosen[:, place] = np.where(left[rows, best], columns[rows, best], -1)
        left[rows, best] = False
        num_alike += own_categories == own_categories[rows, best][:, None]
    return chosen

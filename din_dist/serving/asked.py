"""A request for items, and the check that an export can answer it, without TensorFlow."""

from __future__ import annotations

from typing import NamedTuple

from din_dist.errors import InputError
from din_dist.serving.manifest import Manifest

NEAREST, RECOMMEND = "nearest", "recommend"  # the signatures that find items, and that also rank them
NUM_RETRIEVED = 200  # items that a model ranks if nothing else is asked


class Recommend(NamedTuple):
    """A request for items.

    Attributes:
        k: the most items of a user.
        num_retrieved: how many items a model that ranks gets from the one that finds.
        exclude_history: leave out the items of the history.
    """

    k: int = 10
    num_retrieved: int = NUM_RETRIEVED
    exclude_history: bool = True


def require_recommends(manifest: Manifest) -> None:
    """Checks that an export finds items.

    Raises:
        InputError: it does not.
    """
    if not manifest.recommends:
        raise InputError(
            "--export_dir: must be an export that finds items. Received: one that ranks given candidates. Export its "
            "job with --retriever_export_dir, or use cli.predict."
        )

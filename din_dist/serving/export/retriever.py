"""An export that finds items, inside another export that ranks what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from din_dist.errors import InputError
from din_dist.layers.packed import segment_ids
from din_dist.schema import NamedHistory
from din_dist.serving.asked import NEAREST
from din_dist.serving.bundle import Bundle
from din_dist.serving.given_behaviours import NAMES
from din_dist.serving.manifest import FeatureInputs, InnerExport


class Retriever(tf.Module):
    """Finds the best of all items for each history, by the signature of an export that was made before.

    Args:
        bundle: the export.
        history: the name of the behaviours that it reads, of those of the model that ranks. Empty: that has one
            history.
    """

    def __init__(self, bundle: Bundle, history: str = "") -> None:
        super().__init__()
        self._program = bundle.program  # tracked, so that its tables and variables become part of the outer export
        self._nearest = bundle.signature(NEAREST)
        self._manifest, self._history = bundle.manifest, history
        self._names = [name for feature in bundle.manifest.features for name in feature.inputs]

    @property
    def described(self) -> InnerExport:
        """The entry of the outer export's manifest about it."""
        found = self._manifest
        return InnerExport(found.digest, found.step, found.model, found.num_items, self._history)

    def nearest(
        self,
        history_item_ids: tf.Tensor,
        history_lengths: tf.Tensor,
        k: tf.Tensor,
        exclude_history: tf.Tensor,
        features: Mapping[str, tf.Tensor],
    ) -> dict[str, tf.Tensor]:
        """Returns what `RetrievalSignatures.nearest` does.

        Args:
            history_item_ids: `[N]`, the behaviours of B users, concatenated.
            history_lengths: int64 `[B]`.
            k: int64 scalar.
            exclude_history: bool scalar.
            features: inputs by name. Among them `history_names` `[N]` if behaviours have names; others are left aside.
        """
        if self._history:
            own = tf.equal(features[NAMES], self._history)
            users = segment_ids(tf.cast(history_lengths, tf.int32))
            counted = tf.math.unsorted_segment_sum(tf.cast(own, tf.int64), users, tf.size(history_lengths))
            history_item_ids, history_lengths = tf.boolean_mask(history_item_ids, own), counted
        given = {name: features[name] for name in self._names if name in features}
        return self._nearest(
            history_item_ids=history_item_ids,
            history_lengths=history_lengths,
            k=k,
            exclude_history=exclude_history,
            **given,
        )


def retriever_of(
    bundle: Bundle,
    item_id_type: str,
    features: Sequence[FeatureInputs],
    histories: Sequence[NamedHistory],
    history: str = "",
) -> Retriever:
    """Returns the export `bundle` as the retriever of a model that ranks.

    Args:
        bundle: the export.
        item_id_type: "string" or "integer", of the ranking model's items.
        features: declared for the ranking model.
        histories: of the ranking model.
        history: the name of the one that the retriever reads. Empty: the first.

    Raises:
        InputError: they do not fit.
    """
    manifest, flag = bundle.manifest, "--retriever_export_dir"
    if not manifest.finds_items:
        raise InputError(
            f"{flag}: must be an export of a model that finds items. Received: one with "
            f"--model={manifest.model}. Export a job with --model=comirec_sa or another of "
            "din_dist/models/README.md."
        )
    if manifest.item_id_type != item_id_type:
        raise InputError(
            f"{flag}: must have item ids of the job's type. Received: {manifest.item_id_type} ids, and {item_id_type} "
            "ids of the job. Train both on logs with the same ids."
        )
    own = {tuple(feature.inputs): feature for feature in features}
    for feature in manifest.features:
        if feature.owner not in ("user", "context"):
            continue
        found = own.get(tuple(feature.inputs))
        if found is None or (found.kind, found.type, found.unit) != (feature.kind, feature.type, feature.unit):
            raise InputError(
                f"{flag}: must read features that the job has, too. Received: {feature.owner} feature "
                f"{feature.name!r} ({feature.kind}), which the job's --features lack or declare otherwise. Declare it "
                "alike for both jobs."
            )
    names = [named.name for named in histories]
    if history and (len(names) < 2 or history not in names):
        raise InputError(
            f"--retriever_history: must be one of the job's several --histories. Received: {history!r}, and "
            f"{', '.join(filter(None, names)) or 'a job with one history'}. Name one of these, or drop it."
        )
    return Retriever(bundle, (history or names[0]) if len(names) > 1 else "")

"""Opens an export for the server. Imports TensorFlow."""

from __future__ import annotations

import dataclasses
from typing import Any

from din_dist.serving.bundle import Bundle
from din_dist.serving.http.parse import Vocabulary
from din_dist.serving.http.scoring import warm_up
from din_dist.serving.http.served import Served
from din_dist.serving.http.versions import Version
from din_dist.serving.manifest import Manifest
from din_dist.serving.store_exports import local_export


def open_version(version: Version, expect_digest: str = "") -> Served:
    """Loads an export and runs each of its paths once, so that no request waits for TensorFlow's preparations.

    Raises:
        InputError: see `Bundle.open` and `local_export`.
    """
    bundle = Bundle.open(local_export(version.source, expect_digest), expect_digest)
    manifest = bundle.manifest
    vocabulary = Vocabulary.of(manifest)
    warm_up(bundle, vocabulary)
    number = manifest.step if version.number is None else version.number
    return Served(bundle, vocabulary, number, _description(manifest), manifest.predictions)


def _description(manifest: Manifest) -> dict[str, Any]:
    """Returns the facts about the model that clients may want."""
    features = {"features": [dataclasses.asdict(feature) for feature in manifest.features]} if manifest.features else {}
    return {
        "item_id_type": manifest.item_id_type,
        "item_features": dict(manifest.item_features),
        **features,
        **({"calibration": manifest.calibration} if manifest.calibration else {}),
        "max_history_length": manifest.max_history_length,
        **({"histories": dict(manifest.histories)} if manifest.histories else {}),
        **({"long_history": manifest.long_history} if manifest.long_history else {}),
        **({"finds_items": True} if manifest.finds_items else {}),
        **({"retriever": dataclasses.asdict(manifest.retriever)} if manifest.retriever else {}),
        "num_items": manifest.num_items,
        "step": manifest.step,
        "digest": manifest.digest,
        "versions": dict(manifest.versions),
    }

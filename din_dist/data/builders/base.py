"""The base of all builders: writes records of blocks of whole users, and the files beside them."""

from __future__ import annotations

import abc
import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from din_dist import schema
from din_dist.data.blocks import Block, EventLog
from din_dist.data.checksums import write_checksums
from din_dist.data.event_store import ITEMS, USERS, item_feature_path, vocabulary_of, vocabulary_path, write_facts
from din_dist.data.raw_features import write_raw
from din_dist.data.spilled_log import Room

BLOCKS_PER_SHARD = 64  # of about 1 MB; TFDS holds one shard's blocks in memory


class EventsBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes an `EventLog` as records of the split `events`, in the order of the users.

    A `ShardBasedBuilder` keeps that order and holds one shard in memory. TFDS's `GeneratorBasedBuilder` would hold up
    to 1 GB, and without shuffling all records.

    These are written beside the records: `facts.json`, `vocabulary/`, `item_features/`, `raw_features/`. All lie in
    TFDS's incomplete folder until they are complete.
    """

    room: Room | None = None  # where a log goes that does not fit into memory; None: it fits

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            description=(type(self).__doc__ or "").split("\n\n")[0],
            features=block_features(self._more()),
            disable_shuffling=True,
        )

    @abc.abstractmethod
    def _read(self, dl_manager: tfds.download.DownloadManager) -> tuple[EventLog, Mapping[str, Mapping]]:
        """Returns the log, and the facts about its source files (see `sources.fingerprint_files`)."""

    def _log_download_bytes(self) -> None:
        """Prints nothing. TFDS would print sizes, and at the end a folder; the command prints the rest."""

    def _log_download_done(self) -> None:
        """Prints nothing; see `_log_download_bytes`."""

    def _settings(self) -> dict[str, Any]:
        """Returns everything that the events depend on besides the content of the source files."""
        return {}

    def _more(self) -> dict[str, type]:
        """Returns the dtype of each array that a block has beside those of every log, by its name in `schema`."""
        return {}

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        self._log, sources = self._read(dl_manager)
        self._tally = EventTally(self._more())
        super()._download_and_prepare(dl_manager, download_config)
        write_beside(Path(self.data_path), self._log, self._tally, sources, self._fingerprint(sources))
        del self._log, self._tally

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> Mapping[str, Sequence]:
        num_blocks = len(self._log.blocks)
        shards = [
            functools.partial(self._examples, first, min(first + BLOCKS_PER_SHARD, num_blocks))
            for first in range(0, num_blocks, BLOCKS_PER_SHARD)
        ]
        return {schema.EVENTS_SPLIT: shards}

    def _examples(self, first_block: int, end_block: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(first_block, end_block):
            block = self._log.blocks[index]
            self._tally.add(block)
            yield index, record_of(block, self._more())

    def _fingerprint(self, sources: Mapping[str, Mapping]) -> str:
        return self._fingerprint_of(sources, self._log.late_columns, self._log.extends)

    def _fingerprint_of(
        self, sources: Mapping[str, Mapping], late_columns: Sequence[str], extends: Mapping[str, Any] | None = None
    ) -> str:
        made_from = {
            "builder": [self.name, str(self.version)],
            "settings": self._settings(),
            "content": [source["digest"] + source.get("partition", "") for source in sources.values()],
        }
        if late_columns:
            made_from["late_columns"] = late_columns
        if extends:
            made_from["extends"] = extends["fingerprint"]
        return hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=16).hexdigest()


def block_features(more: Mapping[str, type]) -> tfds.features.FeaturesDict:
    """Returns the features of a record; `more` as of `EventsBuilder._more`."""
    flat = functools.partial(tfds.features.Tensor, shape=(None,), encoding="bytes")
    return tfds.features.FeaturesDict(
        {
            schema.BLOCK_FIRST_USER: tfds.features.Scalar(np.int64),
            schema.BLOCK_OFFSETS: flat(dtype=np.int64),
            schema.BLOCK_ITEM_IDS: flat(dtype=np.int32),
            schema.BLOCK_TIMESTAMPS: flat(dtype=np.int64),
            schema.BLOCK_LABELS: flat(dtype=np.uint8),
            **{name: flat(dtype=dtype) for name, dtype in more.items()},
        }
    )


def record_of(block: Block, more: Iterable[str]) -> dict[str, Any]:
    """Returns the record of a block; `more` names the arrays beside those of every log."""
    return {
        schema.BLOCK_FIRST_USER: block.first_user,
        schema.BLOCK_OFFSETS: block.offsets,
        schema.BLOCK_ITEM_IDS: block.item_ids,
        schema.BLOCK_TIMESTAMPS: block.timestamps,
        schema.BLOCK_LABELS: block.labels,
        **{name: getattr(block, name) for name in more},
    }


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Does nothing. TFDS would look for data of this name in Google's bucket, and leave a temporary folder."""


class EventTally:
    """Counts the events of blocks and finds their first and last timestamp.

    Args:
        more: the names of the arrays that blocks have beside those of every log.
    """

    def __init__(self, more: Collection[str] = ()) -> None:
        self.more = more
        self.num_events = 0
        self.first_timestamp = np.iinfo(np.int64).max
        self.last_timestamp = np.iinfo(np.int64).min

    def add(self, block: Block) -> None:
        self.num_events += len(block.item_ids)
        self.first_timestamp = min(self.first_timestamp, int(block.timestamps.min()))
        self.last_timestamp = max(self.last_timestamp, int(block.timestamps.max()))


def write_beside(
    folder: Path, log: EventLog, tally: EventTally, sources: Mapping[str, Mapping], fingerprint: str
) -> None:
    """Writes facts, vocabularies and item features of `log` to `folder`, beside the records."""
    vocabularies = {USERS: log.user_ids, ITEMS: log.item_ids}
    vocabularies |= {vocabulary_of(name): feature.ids for name, feature in log.item_features.items()}
    for name, ids in vocabularies.items():
        path = vocabulary_path(folder, name)
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": ids}), path)
    for name, feature in log.item_features.items():
        path = item_feature_path(folder, name)
        path.parent.mkdir(exist_ok=True)
        np.save(path, feature.of_item.astype(np.int32, copy=False))
    for written in (schema.VOCABULARY_DIR, schema.ITEM_FEATURES_DIR):
        if (folder / written).is_dir():
            write_checksums(folder / written)
    if log.raw_features:
        write_raw(folder, log.raw_features, log.tables, log.offers)
    facts = schema.DatasetFacts(
        num_users=len(log.user_ids),
        num_items=len(log.item_ids),
        num_events=tally.num_events,
        has_labels=log.has_labels,
        item_features={name: len(feature.ids) for name, feature in log.item_features.items()},
        first_timestamp=tally.first_timestamp,
        last_timestamp=tally.last_timestamp,
        fingerprint=fingerprint,
        sources=sources,
        reader=schema.READER,
        has_request_times=schema.BLOCK_REQUEST_TIMES in tally.more,
        has_label_times=schema.BLOCK_LABEL_TIMES in tally.more,
        has_weights=schema.BLOCK_WEIGHTS in tally.more,
        has_sessions=schema.BLOCK_SESSION_PLACES in tally.more,
        tasks=log.tasks,
        actions=log.actions,
        extends=log.extends,
        forgotten=log.forgotten,
        num_behaviours=log.behaviours.kept if log.behaviours else None,
        num_only_behaviours=log.behaviours.only_behaviours if log.behaviours else 0,
        num_without_id=log.behaviours.without_id if log.behaviours else 0,
    )
    write_facts(folder, facts.by_present_rule())

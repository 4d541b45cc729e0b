"""The user's own events.

Prepared by `python -m din_dist.cli.prepare_data --dataset=event_log --data_path=FILES`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from din_dist import schema
from din_dist.data.behaviour_log import OWN_LOG, BehaviourColumns
from din_dist.data.blocks import EventLog
from din_dist.data.builders.base import BLOCKS_PER_SHARD, EventsBuilder
from din_dist.data.event_store import write_facts
from din_dist.data.extension import Extension, extended, facts_of_parent
from din_dist.data.forgetting import Forgetting
from din_dist.data.log_reader import Columns, read_log
from din_dist.data.raw_columns import RawColumns
from din_dist.data.spilled_log import SpilledLogReader
from din_dist.tables.sources import absolute, check_unchanged, find_files, fingerprint_files
from din_dist.tables.storage import File


@dataclasses.dataclass(eq=False)
class EventLogConfig(tfds.core.BuilderConfig):
    """The files of a log and how to read them.

    Attributes:
        source: a file, a folder or a glob, as an absolute path.
        columns: the columns to read.
        features: what declared features need.
        behaviours: the log that histories come from. None: this one.
        extends: the prepared data that the files extend. None: they are all there is.
        forgets: what is left out of all events.
        spark_master: the cluster that prepares them; empty: this process does. It changes nothing of the result.
    """

    source: str = ""
    columns: Columns = dataclasses.field(default_factory=Columns)
    features: RawColumns = dataclasses.field(default_factory=RawColumns)
    behaviours: BehaviourColumns | None = None
    extends: Extension | None = None
    forgets: Forgetting = Forgetting()
    spark_master: str = ""

    @classmethod
    def for_source(
        cls,
        source: str,
        columns: Columns,
        features: RawColumns = RawColumns(),  # noqa: B008 (it is frozen)
        behaviours: BehaviourColumns | None = None,
        extends: Extension | None = None,
        forgets: Forgetting = Forgetting(),  # noqa: B008 (it is frozen)
        spark_master: str = "",
    ) -> EventLogConfig:
        """Makes a configuration whose name, and so whose folder, follows from the source and the columns."""
        source = absolute(source)
        own_log = [behaviours.name_parts()] if behaviours else []
        extension = [{"extends": extends.source}] if extends else []
        forgotten = [forgets.to_json()] if forgets.is_any else []
        key = json.dumps([source, columns.to_json(), *features.name_parts(), *own_log, *extension, *forgotten])
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        return cls(
            name=name,
            description=source,
            source=source,
            columns=columns,
            features=features,
            behaviours=behaviours,
            extends=extends,
            forgets=forgets,
            spark_master=spark_master,
        )

    def find_tables(self) -> dict[str, list[File]]:
        """Returns the files beside those of the log, by the name of their table.

        Raises:
            InputError: a file is missing, or cannot be read.
        """
        return self.features.find_tables() | ({OWN_LOG: self.behaviours.find()} if self.behaviours else {})


class EventLogBuilder(EventsBuilder):
    """Events of users in Parquet, CSV or JSON-lines files.

    Dense ids follow first appearance in the files, taken in sorted order.
    """

    name = "event_log"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First."}
    builder_config: EventLogConfig  # None in what TFDS makes only to look at it

    def _settings(self) -> dict[str, Any]:
        config = self.builder_config
        own_log = config.behaviours.settings() if config.behaviours else {}
        forgotten = {"forgets": config.forgets.to_json()} if config.forgets.is_any else {}
        return config.columns.to_json() | config.features.settings() | own_log | forgotten

    def _more(self) -> dict[str, type]:
        config = self.builder_config
        if not config:
            return {}
        return config.columns.more | (config.behaviours.blocks if config.behaviours else {})

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        if not self.builder_config.spark_master:
            super()._download_and_prepare(dl_manager, download_config)
            return
        from din_dist.data.spark.engine import SparkLog, prepare_on_spark, refuse_features

        config, folder = self.builder_config, Path(self.data_path)
        refuse_features(config.features)
        files = find_files(config.source).files
        template = self._get_filename_template(split_name=schema.EVENTS_SPLIT)

        def paths_of_shards(count: int) -> tuple[str, ...]:
            return tuple(str(template.sharded_filepath(shard_index=n, num_shards=count)) for n in range(count))

        log = SparkLog(files, config.columns, config.features, self._more())
        written = prepare_on_spark(log, config.spark_master, folder, paths_of_shards, BLOCKS_PER_SHARD)
        check_unchanged(written.sources, files)
        num_bytes = sum(Path(path).stat().st_size for path in paths_of_shards(len(written.shard_lengths)))
        split = tfds.core.splits.SplitInfo(
            name=schema.EVENTS_SPLIT,
            shard_lengths=written.shard_lengths,
            num_bytes=num_bytes,
            filename_template=template,
        )
        self.info.set_splits(tfds.core.splits.SplitDict([split]))
        fingerprint = self._fingerprint_of(written.sources, written.late_columns)
        facts = dataclasses.replace(written.facts, fingerprint=fingerprint, sources=written.sources)
        write_facts(folder, facts.by_present_rule())

    def _read(self, dl_manager: tfds.download.DownloadManager) -> tuple[EventLog, Mapping[str, Mapping]]:
        config = self.builder_config
        files = find_files(config.source).files
        tables = config.find_tables()
        sources = fingerprint_files(files, config.columns.names)
        for name, found in tables.items():
            sources |= {path: {**facts, "table": name} for path, facts in fingerprint_files(found).items()}

        def check_read() -> None:
            check_unchanged(sources, [*files, *itertools.chain(*tables.values())])  # while it was being read

        if self.room:
            self.room.begin(self._key(sources))
            log = SpilledLogReader(files, config.columns, config.features, self.room, check_read).read()
        else:
            log = read_log(files, config.columns, features=config.features, behaviours=config.behaviours)
        check_read()
        last_timestamp = None
        if config.extends:
            parent = config.extends.open()
            last_timestamp = parent.facts.last_timestamp
            log = dataclasses.replace(extended(parent, log, config.features.conflict), extends=facts_of_parent(parent))
        if config.forgets.is_any:
            log = config.forgets.apply(log, last_timestamp)
        return log, sources

    def _key(self, sources: Mapping[str, Mapping]) -> str:
        """Returns what names everything that the files of a log on its way depend on."""
        content = [[path, facts["digest"]] for path, facts in sources.items()]
        return json.dumps([self.name, str(self.version), schema.READER, self._settings(), content])

"""The event_log builder as TFDS sees it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from din_dist import schema
from din_dist.data.builders.event_log import EventLogBuilder, EventLogConfig
from din_dist.data.log_reader import Columns

_FOLDER = tempfile.TemporaryDirectory()
LOG = Path(_FOLDER.name, "log.csv")
LOG.write_text("user_id,item_id,timestamp\nu,i,2\nv,i,1\nu,j,1\n")


class EventLogTest(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = EventLogBuilder
    BUILDER_CONFIG_NAMES_TO_TEST: ClassVar = [EventLogConfig.for_source(str(LOG), Columns())]
    EXAMPLE_DIR = _FOLDER.name
    SPLITS: ClassVar = {schema.EVENTS_SPLIT: 1}
    MOCK_OUT_FORBIDDEN_OS_FUNCTIONS = False  # our files are local


def test_the_record(tmp_path: Path) -> None:
    builder = EventLogBuilder(data_dir=tmp_path, config=EventLogConfig.for_source(str(LOG), Columns()))
    builder.download_and_prepare()
    (record,) = tfds.as_numpy(builder.as_dataset(split=schema.EVENTS_SPLIT))
    expected = {
        schema.BLOCK_FIRST_USER: np.int64(0),
        schema.BLOCK_OFFSETS: np.array([0, 2, 3], np.int64),
        schema.BLOCK_ITEM_IDS: np.array([2, 1, 1], np.int32),
        schema.BLOCK_TIMESTAMPS: np.array([1, 2, 1], np.int64),
        schema.BLOCK_LABELS: np.array([1, 1, 1], np.uint8),
    }
    assert record.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(record[name], value, name)
        assert record[name].dtype == value.dtype, name

"""A log that is prepared on two executors with processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from din_dist.data.prepared import prepare
from tests.support.repository import ROOT
from tests.support.spark_log import content, log, settings, write_files


@pytest.mark.thorough
def test_executors_write_the_bytes_of_the_local_way(tmp_path: Path) -> None:
    source = write_files(tmp_path / "log", log())
    flags = [f"--data_path={source}", f"--data_dir={tmp_path}/spark", "--engine=spark"]
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "spark-defaults.conf").write_text(
        "spark.executor.memory 1g\nspark.sql.shuffle.partitions 2\nspark.ui.enabled false\n"
    )
    command = [sys.executable, "-m", "din_dist.cli.prepare_data", *flags, "--spark_master=local-cluster[2,1,1024]"]
    environment = os.environ | {"SPARK_CONF_DIR": str(conf), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    ours = content(prepare(settings(source, data_dir=str(tmp_path / "local"))).folder)
    theirs = content(next((tmp_path / "spark" / "event_log").glob("*/*")))
    assert {name for name in ours if theirs.get(name) != ours[name]} == set()

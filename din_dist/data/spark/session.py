"""Opens a session of Spark, whose executors run the code of this process. Only this room imports pyspark."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from din_dist.errors import InputError

PACKAGE = Path(__file__).parents[2]
DEFAULTS = {  # before what spark-defaults.conf says
    "spark.app.name": "din_dist prepare_data",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.session.timeZone": "UTC",
    "spark.speculation": "false",  # two attempts of a task would write the same file
}


def require_spark() -> None:
    """Checks that pyspark and Java are installed.

    Raises:
        InputError: one of them is missing.
    """
    if importlib.util.find_spec("pyspark") is None:
        raise InputError(
            "--engine=spark: needs pyspark. Received: an environment without it. Install the extra: "
            "pip install 'din_dist[spark]'."
        )
    home = os.environ.get("JAVA_HOME")
    java = Path(home) / "bin" / "java" if home else shutil.which("java")
    if not java or not Path(java).exists():
        raise InputError(
            f"--engine=spark: needs Java 17. Received: {'no ' + str(java) if home else 'no java on PATH'}. Install it "
            "(Debian, Ubuntu: apt-get install openjdk-17-jre-headless), or set JAVA_HOME."
        )


@contextlib.contextmanager
def spark_session(master: str) -> Iterator[Any]:
    """Yields a session, one that runs already or a new one, which is stopped at the end.

    Args:
        master: as Spark takes it: `local[2]`, `yarn`, `spark://HOST:7077`.

    Raises:
        InputError: Spark cannot start, or a job of it fails.
    """
    require_spark()
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    own = None
    try:
        session = SparkSession.getActiveSession()
        if session is None:
            builder = SparkSession.builder.master(master)
            for name, value in DEFAULTS.items():
                builder = builder.config(name, value)
            session = own = builder.getOrCreate()
            session.sparkContext.setLogLevel("ERROR")
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of pandas, which nothing here uses
            session.sparkContext.addPyFile(str(_zipped(Path(folder))))
            yield session
    except (PySparkException, Py4JError, ConnectionError) as error:
        raise InputError(
            f"--engine=spark: a job of Spark failed on {master}. Received: {_cause(error)}. See Spark's own log, and "
            "correct --spark_master or its settings (spark-defaults.conf)."
        ) from error
    finally:
        if own is not None:
            own.stop()


def _zipped(folder: Path) -> Path:
    """Writes the package as an archive for the executors, which then run the code that the driver runs."""
    path = folder / "din_dist_package.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(PACKAGE.rglob("*.py")):
            archive.write(file, file.relative_to(PACKAGE.parent))
    return path


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "Error" in line or line.startswith("Caused by")]
    return " ".join((causes or lines or [type(error).__name__])[-1].split())[:300]

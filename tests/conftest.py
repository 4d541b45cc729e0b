"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import thorough

# What `-m fast` runs: folders and files, and the words in the names of those of their tests that are left out.
FAST = {
    "tests/api/test_layers.py": ("functional", "saved_model"),
    "tests/api/test_optimizers.py": ("fit",),
    "tests/benchmark": (),
    "tests/cli/test_flags.py": (),
    "tests/cluster/test_hosts.py": (),
    "tests/cluster/test_link.py": (),
    "tests/cluster/test_slurm.py": (),
    "tests/config": (),
    "tests/daily": (),
    "tests/data/builders": ("first_command",),
    "tests/data/test_event_store.py": (),
    "tests/data/test_hashing.py": (),
    "tests/data/test_log_reader.py": (),
    "tests/data/test_negatives.py": (),
    "tests/data/test_row_ids.py": (),
    "tests/data/test_pipeline.py": ("no_labels", "kernels_make_the_same", "ranks_hide_the_same"),
    "tests/data/test_splits.py": (),
    "tests/data/test_statistics.py": (),
    "tests/distributed/test_gradients.py": (),
    "tests/distributed/test_runtime.py": ("not_even_imported",),
    "tests/docker/test_pin_images.py": (),
    "tests/evaluation/test_confidence.py": (),
    "tests/evaluation/test_catalogue.py": (),
    "tests/features": (),
    "tests/k8s/test_manifests.py": (),
    "tests/launch/test_test_launcher.py": (),
    "tests/layers": ("older_instructions", "do_not_exist", "same_units_are_left_out"),
    "tests/metrics": (),
    "tests/models/test_against_reference.py": ("compiled", "frozen", "at_the_edges"),
    "tests/prometheus/test_dashboard.py": (),
    "tests/report/test_charts.py": (),
    "tests/report/test_page.py": (),
    "tests/serving/batch/test_parts.py": (),
    "tests/serving/export/test_vocabulary.py": (),
    "tests/serving/http/test_body.py": (),
    "tests/serving/http/test_parse.py": (),
    "tests/serving/http/test_settings.py": (),
    "tests/serving/test_manifest.py": (),
    "tests/tables": (),
    "tests/telemetry/test_reporter.py": (),
    "tests/telemetry/test_step_report.py": (),
    "tests/test_documents.py": (),
    "tests/test_execution.py": (),
    "tests/test_imports.py": (),
    "tests/test_shape.py": (),
    "tests/test_text.py": (),
    "tests/test_version.py": (),
    "tests/tracking": ("mlflow_has", "trials", "wandb", "tensorboard", "counted", "left_behind"),
    "tests/training/test_checkpoint.py": (),
    "tests/training/test_optimizers.py": (),
    "tests/training/test_regularization.py": (),
    "tests/training/test_schedules.py": (),
    "tests/training/test_undo.py": (),
    "tests/tuning": (),
}


def is_fast(test: str) -> bool:
    """Tells whether the table has a test, named as pytest names it."""
    return any(
        test.startswith((f"{path}/", f"{path}::")) and not any(word in test for word in left_out)
        for path, left_out in FAST.items()
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="also run what is marked thorough: more combinations, longer jobs"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--thorough"):
        os.environ[thorough.VARIABLE] = "1"


def is_left_to_thorough_runs(item: pytest.Item) -> bool:
    """Tells whether only `--thorough` runs a test.

    `@pytest.mark.thorough` says so of a test. `@pytest.mark.thorough(unless=holds)` says so of its cases, but for those
    whose parameters, a dict, `holds` accepts. Each of them varies what another test or case covers.
    """
    return any(
        "unless" not in mark.kwargs or not mark.kwargs["unless"](item.callspec.params)  # type: ignore[attr-defined]
        for mark in item.iter_markers("thorough")
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_fast(item.nodeid):
            item.add_marker(pytest.mark.fast)
    if config.getoption("--thorough") or any("::" in argument for argument in config.args):
        return
    left = {item for item in items if is_left_to_thorough_runs(item)}
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with amazon_beauty.parquet, which the repository does not hold.

    It lies beside the checkout, or DIN_DIST_SHARED_DATA names it. Tests that need it are skipped where it is missing,
    in continuous integration too: a clone with nothing beside it passes.
    """
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DIN_DIST_SHARED_DATA") or beside)
    if not (folder / "amazon_beauty.parquet").is_file():
        pytest.skip(f"no amazon_beauty.parquet in {folder}: set DIN_DIST_SHARED_DATA to the folder that has it")
    return folder

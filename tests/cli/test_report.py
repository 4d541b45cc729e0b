"""`cli.report` on real jobs: finished, at work, broken off, barely begun; and in a real browser, with hostile data."""

from __future__ import annotations

import fcntl
import functools
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import image

from din_dist.report.job import duration
from tests.support.chromium import open_page, screenshot
from tests.support.commands import assert_one_line, command
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded, preloaded
from tests.support.repository import ROOT
from tests.support.small_log import write_log

RAN = "a string from data ran"
SCRIPT = f"<script>document.title='{RAN}'</script>"
IMAGE = f'"><img src=x onerror="document.title=\'{RAN}\'">'


def write_hostile_log(path: Path) -> None:
    """Users, items and categories whose names run something, were they markup."""
    write_log(path, num_users=150)
    table = pq.read_table(path)
    for column, prefix in (("user_id", IMAGE), ("item_id", SCRIPT), ("category_id", IMAGE)):
        values = pa.array([f"{prefix}{value}" for value in table[column].to_pylist()])
        table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloaded]:
    with preloaded(tmp_path_factory.mktemp("commands") / "printed") as process:
        yield process


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, commands: Preloaded) -> Path:
    """The folder of a finished job."""
    folder = tmp_path_factory.mktemp("job")
    write_hostile_log(folder / "log.parquet")
    flags = ("--split=leave_two_out", "--epochs=2", "--checkpoint_every_steps=10", "--negatives_per_positive=2")
    for name in ("prepare_data", "train"):
        done = commands.run(name, *command(name, folder, *flags)[3:])
        assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def copy(job: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(job, tmp_path / "run"))


Report = Callable[..., subprocess.CompletedProcess[str]]  # given a job's folder and flags


def report_by_a_process(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    words = command("report", folder.parent)[:3]
    return subprocess.run(
        [*words, f"--output_dir={folder}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture(scope="module")
def report(commands: Preloaded) -> Report:
    """Makes a report without waiting for imports."""
    return lambda folder, *flags: commands.run("report", f"--output_dir={folder}", *flags)


@pytest.fixture(scope="module")
def page_of(report: Report) -> Callable[..., str]:
    return functools.partial(page_by, report)


def page_by(report: Report, folder: Path, *flags: str) -> str:
    """Returns the page of a report that is made anew; checks that nothing else was written."""
    before = contents(folder)
    done = report(folder, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    after = contents(folder)
    page = after.pop(Path("report.html")).decode()
    assert after == before
    return page


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", page)).split())


@pytest.fixture(scope="module")
def finished(job: Path) -> str:
    page = page_by(report_by_a_process, job)
    (job / "report.html").unlink()  # what is copied from here is a job as it was left
    return page


def test_a_finished_job(job: Path, finished: str) -> None:
    """The numbers are those of its summary."""
    summary, text = json.loads((job / "summary.json").read_text()), text_of(finished)
    for value in (summary["test_gauc"], summary["test_auc"], summary["test_log_loss"]):
        assert f"{value:.4f}" in text
    for floors in summary["test_floors"].values():
        assert f"{floors['gauc']:.4f}" in text
    assert f"Scored: the test split with the weights of update {summary['best_step']:,}" in text
    assert f"{duration(summary['seconds']['total'])} in all" in text, "as the last line of the terminal says"
    for words in (
        "finished",
        "By history length",
        "By item popularity",
        "By category_id",
        "Expected calibration error",
        "corrected for drawn negatives",
        "Examples per second over time",
        "Where the time went",
        "Confidently wrong",
        "Finding the item among all",
        "150 users, 30 items",
    ):
        assert words in text, words
    assert "Left out" not in text
    assert len(finished) < 1_000_000


def test_a_job_at_work(copy: Path, page_of: Callable[..., str]) -> None:
    """Its lock is held by another and stays so; the test split is not looked at."""
    (copy / "summary.json").unlink()
    with (copy / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = text_of(page_of(copy))
    assert "running" in text
    assert "Scored: the validation split" in text
    assert "not the test split" in text


def test_a_job_that_broke_off(copy: Path, page_of: Callable[..., str]) -> None:
    (copy / "summary.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] in ("train", "validation")]
    (copy / "metrics.jsonl").write_text("\n".join(kept)[:-20])
    text = text_of(page_of(copy))
    for words in ("broken off", "Scored: the validation split", "1 line of metrics.jsonl could not be read"):
        assert words in text, words


def test_a_job_without_a_checkpoint(copy: Path, page_of: Callable[..., str]) -> None:
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    text = text_of(page_of(copy))
    assert "Left out:" in text
    assert "read from a checkpoint. Received: none yet." in text
    assert "Examples per second over time" in text
    assert "150 users, 30 items" in text
    assert "Scored" not in text


def test_the_best_weights_are_scored_not_the_newest(copy: Path, page_of: Callable[..., str]) -> None:
    """The newest checkpoint is made to say that the one before it was the best."""
    older, newest = sorted((copy / "checkpoints").iterdir())[-2:]
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state"]["best_step"] = step = int(older.name.removeprefix("step-"))
    (newest / "manifest.json").write_text(json.dumps(manifest))
    text = text_of(page_of(copy))
    assert f"with the weights of update {step}" in text
    assert f"{json.loads((copy / 'summary.json').read_text())['test_log_loss']:.4f}" not in text


def test_without_data_or_settings_the_curves_remain(copy: Path, page_of: Callable[..., str]) -> None:
    flags = (copy / "flags.txt").read_text()
    (copy / "flags.txt").write_text(re.sub("--data_dir=.*", f"--data_dir={copy / 'nowhere'}", flags))
    text = text_of(page_of(copy))
    assert "Left out:" in text
    assert "the data must be prepared before" in text
    assert "Loss" in text
    (copy / "flags.txt").unlink()
    (copy / "report.html").unlink()
    text = text_of(page_of(copy))
    assert "flags.txt: holds the settings of a training job. Received: no such file." in text
    assert "Examples per second over time" in text


def test_fewer_examples(copy: Path, page_of: Callable[..., str]) -> None:
    text = text_of(page_of(copy, "--report_max_examples=100"))
    (scored, whole) = re.search(r"(\d+) of its (\d+) examples, as whole users", text).groups()  # type: ignore[union-attr]
    assert int(scored) <= 100 < int(whole)


def test_another_job_beside_it(
    job: Path, copy: Path, page_of: Callable[..., str], commands: Preloaded, tmp_path: Path
) -> None:
    """A job that began the same and stopped earlier, scored on the same examples; one on another log is not scored."""
    earlier = shutil.copytree(copy, tmp_path / "earlier")
    (earlier / "flags.txt").write_text((earlier / "flags.txt").read_text().replace("--epochs=2", "--epochs=1"))
    text = text_of(page_of(copy, f"--compare={earlier}"))
    assert "On the same examples, this job's GAUC is 0.0000 above that of earlier" in text
    assert "interval of the difference +0.0000 to +0.0000, which may be chance" in text
    assert "epochs 2 1" in text
    (copy / "report.html").unlink()
    flags = (earlier / "flags.txt").read_text()
    (earlier / "flags.txt").write_text(flags.replace("--data_path=", "--data_path=nowhere/"))
    text = text_of(page_of(copy, f"--compare={earlier}"))
    assert "the data must be prepared before. Received: nothing there." in text
    other = tmp_path / "other"
    other.mkdir()
    write_log(other / "log.parquet", num_users=20)
    done = commands.run("prepare_data", *command("prepare_data", other, "--split=leave_two_out")[3:])
    assert done.returncode == 0, done.stderr
    (copy / "report.html").unlink()
    (earlier / "flags.txt").write_text(flags.replace(str(job.parent), str(other)))
    text = text_of(page_of(copy, f"--compare={earlier}"))
    assert "--compare: must be a job on the same prepared data. Received: another log or other features." in text


def test_what_it_refuses(tmp_path: Path, job: Path, report: Report) -> None:
    assert_one_line(report(tmp_path), "--output_dir: must be the folder of a training job")
    assert_one_line(report(job, f"--compare={tmp_path}"), "--compare: must be the folder of a training job")
    assert_one_line(report(job, "--report_max_examples=0"), "--report_max_examples: must be at least 1. Received: 0")
    blocked = tmp_path / "missing" / "report.html"
    done = report(job, f"--report_path={blocked}", "--report_max_examples=10")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: --report_path: must be a file that can be written. Received: {blocked}, No such file"
    )


class Document(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def test_in_a_browser_hostile_names_are_names(finished: str, tmp_path: Path) -> None:
    """As it is and without its Content-Security-Policy, which must be the second lock only."""
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(finished)
    for name, page in (("report", finished), ("unguarded", policy.sub("", finished))):
        path = tmp_path / f"{name}.html"
        path.write_text(page)
        dom, console = open_page(path, tmp_path / f"{name}-profile")
        document = Document(dom)
        assert console == []
        assert "<title>run · training report</title>" in dom
        assert document.count("script") == document.count("img") == document.count("iframe") == 0
        assert not [
            attribute for _, attributes in document.elements for attribute in attributes if attribute[:2] == "on"
        ]
        assert SCRIPT in document.text
        assert IMAGE in document.text
        assert document.count("article") >= 6


def test_the_browser_would_have_run_them(finished: str, tmp_path: Path) -> None:
    """Unescaped they do run, unless the Content-Security-Policy forbids it: so the test above can fail."""
    broken = finished.replace(html.escape(SCRIPT).replace("&#x27;", "&#39;"), SCRIPT)
    assert broken != finished
    titles = []
    for name, page in (("guarded", broken), ("open", broken.replace("Content-Security-Policy", "x"))):
        path = tmp_path / f"{name}.html"
        path.write_text(page)
        titles.append(re.search("<title>(.*?)</title>", open_page(path, tmp_path / f"{name}-profile")[0]).group(1))  # type: ignore[union-attr]
    assert titles == ["run · training report", RAN]


def test_it_loads_nothing(finished: str) -> None:
    document = Document(finished)
    assert not {tag for tag, _ in document.elements} & {"link", "script", "img", "iframe", "object", "embed", "form"}
    assert not [attributes for _, attributes in document.elements if {"src", "href", "style"} & attributes.keys()]
    assert "url(" not in finished
    assert "@import" not in finished


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (500, True)])
def test_it_renders(finished: str, tmp_path: Path, width: int, dark: bool) -> None:
    """Light or dark as the reader has it, with text and with the accent colour of charts on it."""
    (tmp_path / "report.html").write_text(finished)
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    screenshot(tmp_path / "report.html", tmp_path / "page.png", tmp_path / "profile", width, 3000, *flags)
    pixels = (image.imread(tmp_path / "page.png")[..., :3] * 255).round().astype(int)
    assert pixels.shape == (3000, width, 3)
    paper, accent = ([18, 24, 27], [92, 196, 196]) if dark else ([246, 247, 247], [10, 108, 116])
    assert (pixels[0, 0] == paper).all()
    assert (np.abs(pixels - accent).max(axis=-1) <= 2).sum() > 1000
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100

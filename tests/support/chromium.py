"""Opens a page in Debian's Chromium, without a window.

document, console = open_page(tmp_path / "report.html", tmp_path / "profile")
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.patience import PATIENCE
from tests.support.programs import program

_QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
]


def open_page(page: Path, profile: Path) -> tuple[str, list[str]]:
    """Returns the document after loading, as HTML, and the lines of its console.

    Args:
        profile: a folder for this run of the browser alone.
    """
    done = _run("--dump-dom", page, profile)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def screenshot(page: Path, picture: Path, profile: Path, width: int, height: int, *flags: str) -> None:
    """Writes a picture of the page, `width` by `height` pixels, as PNG."""
    _run(f"--screenshot={picture}", page, profile, "--hide-scrollbars", f"--window-size={width},{height}", *flags)


def _run(task: str, page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [program("chromium"), *_QUIET, f"--user-data-dir={profile}", *flags, task, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done

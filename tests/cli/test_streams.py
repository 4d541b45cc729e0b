"""Commands whose streams are closed, full, or read by nobody: no traceback, and no end because of it."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from din_dist import files
from tests.support.commands import command, prepare_log
from tests.support.patience import PATIENCE
from tests.support.repository import ROOT

COMMAND = """
import sys

from din_dist.cli import entry
from din_dist.errors import InputError

count, *wrong = sys.argv[1:]
del sys.argv[1:]


def main() -> None:
    for number in range(int(count)):
        print("result", number, flush=True)
        entry.say(f"line {number}")
    if wrong:
        raise InputError(wrong[0])
    open("done", "w").close()


entry.run(main)
"""


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which COMMAND is a small command of ours."""
    (folder / "command.py").write_text(COMMAND)
    line = f"set -o pipefail; {line}".replace("COMMAND", f"{sys.executable} command.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.parametrize(
    "line",
    [
        "COMMAND 9 >&-",
        "COMMAND 9 2>&-",
        "COMMAND 9 <&-",
        "COMMAND 9 <&- >&- 2>&-",
        "COMMAND 9999 2>/dev/full",
        "COMMAND 9999 2>&1 | head -1",
        "COMMAND 9999 | head -1",
        "COMMAND 9999 2> >(head -1 >&2)",
        "COMMAND 9999 > >(true)",
    ],
)
def test_what_nobody_reads_is_no_reason_to_stop(tmp_path: Path, line: str) -> None:
    done = shell(tmp_path, line)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_a_result_that_could_not_be_written_is_told(tmp_path: Path) -> None:
    done = shell(tmp_path, "COMMAND 3 >/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: standard output must take the result. Received: No space left on device. It is not complete."
    )


def test_other_ends_keep_their_code(tmp_path: Path) -> None:
    for line in ("COMMAND 3 wrong >/dev/full", "COMMAND 3 wrong 2>&-", "COMMAND 3 wrong 2>&1 | head -1"):
        assert shell(tmp_path, line).returncode == 2, line


def test_a_closed_stream_is_no_file_of_ours(tmp_path: Path) -> None:
    """Without something in its place, the next file that is opened gets its number, and all that is printed."""
    program = (
        "from din_dist.streams import open_standard_streams; open_standard_streams(); import os\n"
        "file = open('file', 'w'); file.write(str(file.fileno())); os.write(1, b'x'); os.write(2, b'y'); print('z')"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["bash", "-c", f"{sys.executable} program.py <&- >&- 2>&-"]
    assert subprocess.run(words, cwd=tmp_path, env=environment, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "3"


def test_terminal_escapes_of_data_do_not_reach_the_terminal(tmp_path: Path) -> None:
    done = shell(tmp_path, "COMMAND 0 $'a\\x1b[2Jb\\u202ec\\nd'")
    assert done.stderr == "error: a\\x1b[2Jb\\u202ec d\n"


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale in which no umlaut can be written


def test_results_are_utf8_whatever_the_locale() -> None:
    program = r"from din_dist.streams import open_standard_streams as open; open(); print('gr\u00f6\u00dfe \u6771')"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **ASCII}, capture_output=True, check=True)
    assert done.stdout.decode() == "größe 東\n"


def test_every_text_file_says_its_encoding() -> None:
    """What the locale says must not decide how a file is read: the job may have been started elsewhere."""
    package = Path(files.__file__).parent
    opened = 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(files.read_text(path))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            is_text = called.endswith((".read_text", ".write_text", "NamedTemporaryFile", "TemporaryFile"))
            is_text |= called.endswith((".open", "fdopen")) and any(
                str(mode) in ("r", "w", "a", "a+") for mode in modes
            )
            is_text |= called in ("open", "io.open") or given.get("text") == "True"
            if called.endswith("TemporaryFile") and modes[:1] != ["w+"]:
                continue
            opened += is_text
            assert not is_text or "encoding" in given, f"{path}:{node.lineno}: {ast.unparse(node)}"
    assert opened > 10


@pytest.mark.thorough(unless=lambda case: case["redirected"] in ("2>&-", "2>&1 | head -1"))
@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", "2> >(head -1 >/dev/null)", "2>&1 | head -1"])
def test_a_job_trains_on_when_its_log_is_gone(tmp_path: Path, redirected: str) -> None:
    prepare_log(tmp_path)
    words = " ".join(command("train", tmp_path, "--epochs=1"))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} {redirected}"],
        cwd=ROOT,
        env={**os.environ, **ASCII},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_each_line_is_one_write(tmp_path: Path, unbuffered: str) -> None:
    """Otherwise a line of another thread, or the last line of a process, could come before a line's end."""
    (tmp_path / "command.py").write_text(COMMAND)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with ours, theirs:
        command = [sys.executable, "command.py", "2"]
        subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs, timeout=PATIENCE, check=True
        )
        theirs.close()
        writes = list(iter(lambda: ours.recv(1 << 16), b""))
    assert writes == [b"result 0\n", b"line 0\n", b"result 1\n", b"line 1\n"]

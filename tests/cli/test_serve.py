"""`serve` as users run it, with an export of a job that was trained as users do it."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tensorflow as tf

from din_dist.serving.bundle import Bundle
from din_dist.serving.manifest import MANIFEST, digest_of_file, read_manifest
from tests.support.commands import assert_one_line
from tests.support.finished_job import finish
from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded
from tests.support.served import Served, serving

HISTORIES = [["i1", "i2", "i3"], [], ["never seen"], [f"i{number % 30}" for number in range(25)]]
CANDIDATES = ["i4", "i5", "i6", "never seen"]


@pytest.fixture(scope="module")
def versions(exported_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as TensorFlow Serving has it: the export as versions 2 and 10, and a 11 that is none yet."""
    folder = tmp_path_factory.mktemp("versions")
    for version in ("2", "10"):
        shutil.copytree(exported_job / "export", folder / version)
    (folder / "11").mkdir()
    return folder


@pytest.fixture(scope="module")
def served(commands: Preloaded, versions: Path) -> Iterator[Served]:
    with serving(commands, "clicks", f"--export_dir={versions}") as found:
        yield found


@pytest.fixture(scope="module")
def bundle(versions: Path) -> Bundle:
    return Bundle.open(versions / "10")


def test_the_newest_version_is_served(served: Served, bundle: Bundle) -> None:
    assert served.url == f"http://{served.address}/v1/models/clicks"
    (status,) = json.loads(served.get("/v1/models/clicks"))["model_version_status"]
    assert (status["version"], status["state"]) == ("10", "AVAILABLE")
    told = json.loads(served.get("/v1/models/clicks/versions/10/metadata"))["metadata"]["din_dist"]
    assert told["digest"] == bundle.manifest.digest
    assert told["item_features"] == {"category_id": "string"}
    metrics = served.get("/metrics")
    assert f'din_dist_serving_model_info{{digest="{bundle.manifest.digest}",name="clicks",version="10"}} 1.0' in metrics
    assert "din_dist_build_info{" in metrics
    assert "process_resident_memory_bytes" in metrics


def test_answers_are_the_exports(served: Served, bundle: Bundle) -> None:
    flat = np.array([item for history in HISTORIES for item in history], object)
    lengths = np.array([len(history) for history in HISTORIES])
    expected = bundle.score(flat, lengths, np.array(CANDIDATES, object))
    assert len(set(expected)) == 4
    pairs = zip(HISTORIES, CANDIDATES, strict=True)
    rows = [{"history_item_ids": history, "candidate_item_id": candidate} for history, candidate in pairs]
    answers = served.predict({"instances": rows})["predictions"]
    np.testing.assert_allclose([one["logits"] for one in answers], expected, atol=1e-6)
    np.testing.assert_allclose([one["click_probability"] for one in answers], 1 / (1 + np.exp(-expected)), atol=1e-6)

    columns = {
        "history_item_ids": flat.tolist(),
        "history_lengths": lengths.tolist(),
        "candidate_item_ids": CANDIDATES,
    }
    answer = served.predict({"inputs": columns})["outputs"]
    np.testing.assert_allclose(answer["logits"], expected, atol=1e-6)

    body = {"history_item_ids": HISTORIES[3], "candidate_item_ids": CANDIDATES, "k": 3}
    best = bundle.rank(np.array(HISTORIES[3], object), np.array(CANDIDATES, object), 3)
    answer = served.predict({"signature_name": "rank", "inputs": body})["outputs"]
    assert answer["places"] == best["places"].tolist()
    assert answer["item_ids"] == [CANDIDATES[place] for place in answer["places"]]
    np.testing.assert_allclose(answer["logits"], best["logits"], atol=1e-6)
    np.testing.assert_allclose(answer["click_probability"], best["click_probability"], atol=1e-6)

    rows = [row | {"candidate_features": {"category_id": "c2"}} for row in rows]
    answers = served.predict({"instances": rows})["predictions"]
    featured = bundle.score_with_features(
        flat, lengths, np.array(CANDIDATES, object), {}, {"category_id": np.array(["c2"] * 4, object)}
    )
    assert np.abs(featured - expected).max() > 1e-4
    np.testing.assert_allclose([one["logits"] for one in answers], featured, atol=1e-6)


def test_what_it_refuses(commands: Preloaded, versions: Path, served: Served, tmp_path: Path) -> None:
    assert_one_line(commands.run("serve"), "--export_dir: must name an export. Received: ''.")
    assert_one_line(commands.run("serve", f"--export_dir={tmp_path}"), f"{tmp_path}: must be an export. Received: ")
    taken = served.address.rpartition(":")[2]
    done = commands.run("serve", f"--export_dir={versions}", f"--port={taken}")
    assert_one_line(
        done, f"--host, --port: must be an address and a free port of this machine. Received: 127.0.0.1 and {taken}"
    )
    changed = shutil.copytree(versions / "10", tmp_path / "changed")
    with (changed / "saved_model.pb").open("ab") as file:
        file.write(b"!")
    done = commands.run("serve", f"--export_dir={changed}", "--port=0")
    assert_one_line(done, "saved_model.pb: must be as it was published. Received: other content.")


def test_another_export_than_expected_is_refused(commands: Preloaded, versions: Path, tmp_path: Path) -> None:
    """Before any of it is loaded: an export is a program."""
    digest = read_manifest(versions / "10").digest
    for wrong in ("abc", f"{digest}0", f"{digest[:-1]}g"):
        done = commands.run("serve", f"--export_dir={versions}", "--port=0", f"--expect_digest={wrong}")
        assert_one_line(done, "--expect_digest: must be the SHA-256 of a manifest, 64 hexadecimal digits. Rec")
    evil = write_program(versions / "10", tmp_path / "evil", writes=tmp_path / "written")
    told = f"--expect_digest: must be the SHA-256 of {evil / MANIFEST}. Received: {digest}, and a manifest with "
    assert_one_line(commands.run("serve", f"--export_dir={evil}", "--port=0", f"--expect_digest={digest}"), told)
    assert not (tmp_path / "written").exists()
    with serving(commands, "clicks", f"--export_dir={versions}", f"--expect_digest={digest.upper()}") as server:
        assert server.is_ready()
    commands.start("serve", f"--export_dir={evil}", "--port=0")  # without the digest it does what it likes
    wait_until((tmp_path / "written").exists)


def write_program(export: Path, folder: Path, writes: Path) -> Path:
    """Something that looks like an export, down to its digests, and writes a file whenever it is loaded."""

    class Writer(tf.saved_model.experimental.TrackableResource):
        def _create_resource(self) -> tf.Tensor:
            return tf.raw_ops.VarHandleOp(dtype=tf.int32, shape=[], shared_name="writer")

        def _initialize(self) -> None:
            tf.io.write_file(str(writes), "written")

    module = tf.Module()
    module.writer = Writer()
    tf.saved_model.save(module, str(folder))
    writes.unlink(missing_ok=True)
    manifest = json.loads((export / MANIFEST).read_text())
    files = [path for path in folder.rglob("*") if path.is_file()]
    manifest["files"] = {str(path.relative_to(folder)): digest_of_file(path) for path in files}
    (folder / MANIFEST).parent.mkdir()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_probes_have_a_port_of_their_own(commands: Preloaded, versions: Path) -> None:
    """It answers when the other one is full, and goes on until the end."""
    words = ("--health_port=0", "--health_host=127.0.0.2", "--max_connections=5")
    with serving(commands, "clicks", f"--export_dir={versions}", *words) as server, contextlib.ExitStack() as stack:
        (line,) = server.process.stderr.splitlines()
        assert line.startswith("health and metrics: http://127.0.0.2:")
        place = line.rpartition("//")[2]
        host, _, port = server.address.partition(":")
        for _ in range(5):
            stack.enter_context(socket.create_connection((host, int(port))))
        for path, told in (("/healthz", '{"status": "ok"}'), ("/readyz", '{"status": "ready"}')):
            assert _get(place, path) == (200, told)
        assert f'digest="{read_manifest(versions / "10").digest}"' in _get(place, "/metrics")[1]
        assert _get(place, "/v1/models/clicks")[0] == 404
        for wrong in ("-2", "70000"):
            done = commands.run("serve", f"--export_dir={versions}", f"--health_port={wrong}")
            assert_one_line(done, f"--health_port: must be a port, 0 or -1. Received: {wrong}.")
        done = commands.run("serve", f"--export_dir={versions}", "--port=0", f"--health_port={port}")
        assert_one_line(done, "--health_host, --health_port: must be an address and a free port of this machine. Rec")


def _get(place: str, path: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection(place, timeout=30)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_it_outlives_a_want_of_files(commands: Preloaded, versions: Path) -> None:
    """Nothing can be accepted for a while, as when others of the machine have taken all: it waits, and says so once."""
    with serving(commands, "clicks", f"--export_dir={versions}") as server, contextlib.ExitStack() as stack:
        process = psutil.Process(server.process.pid)
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds() + 10, before[1]))
        host, _, port = server.address.partition(":")
        for _ in range(60):
            stack.enter_context(socket.create_connection((host, int(port))))
        time.sleep(3)
        assert server.predict(score())  # the silent ones give way
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
        stack.close()
        assert server.is_ready()
        told = "no connection can be accepted for now: Too many open files; see ulimit -n and --max_connections"
        lines = server.process.stderr.splitlines()
        assert {line for line in lines if not line.startswith("looking for versions failed: ")} == {told}
        assert server.process.stderr.count(told) < 10


def score() -> dict[str, Any]:
    return {"instances": [{"history_item_ids": HISTORIES[3], "candidate_item_id": "i1"}]}


class Load:
    """Clients that ask without pause until the port is closed.

    `answered` has the status of each answer, `answers` has their texts, each once. What was sent and not answered is in
    `lost`.
    """

    def __init__(self, address: str, body: Any, num_clients: int = 8) -> None:
        self.lost: list[str] = []
        self.answered: list[int] = []
        self.answers: set[bytes] = set()
        self._address, self._body = address, json.dumps(body)
        self._clients = [threading.Thread(target=self._ask) for _ in range(num_clients)]
        for client in self._clients:
            client.start()

    def _ask(self) -> None:
        while True:
            connection = http.client.HTTPConnection(self._address, timeout=30)
            count = 0
            try:
                while connection.sock or not count:
                    connection.request("POST", "/v1/models/clicks:predict", self._body)
                    response = connection.getresponse()
                    self.answers.add(response.read())
                    self.answered.append(response.status)
                    count += 1
            except OSError as error:
                if not count:  # the port is closed
                    return
                self.lost.append(repr(error))
            finally:
                connection.close()

    def join(self) -> None:
        for client in self._clients:
            client.join(30)
            assert not client.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_under_load_loses_nothing(commands: Preloaded, versions: Path, number: signal.Signals) -> None:
    """Whoever is connected gets an answer to all that was sent, and the process ends with 0."""
    with serving(commands, "clicks", f"--export_dir={versions}") as server:
        load = Load(server.address, score())
        time.sleep(0.5)
        os.kill(server.process.pid, number)
        done = server.process.wait(30)
        load.join()
    assert (done.returncode, done.stdout) == (0, f"{server.url}\n"), done.stderr
    assert done.stderr.splitlines()[-1] == "ending after what was accepted; Ctrl-C twice ends at once"
    assert load.lost == []
    assert len(load.answered) > 20
    assert set(load.answered) == {200}


@pytest.fixture(scope="module")
def other_export(commands: Preloaded, exported_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of another job on the same log, whose answers are others."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copy(exported_job / "log.parquet", folder)
    return finish(commands, folder, "--epochs=1", "--learning_rate=0.01") / "export"


def publish(export: Path, folder: Path) -> Path:
    """Copies an export aside, then renames it to `folder`."""
    aside = folder.with_name(f"copy of {folder.name}")
    shutil.copytree(export, aside)
    return aside.rename(folder)


def test_newer_versions_are_served_without_a_pause(
    commands: Preloaded, exported_job: Path, other_export: Path, tmp_path: Path
) -> None:
    """All that is asked meanwhile is answered, each time by one of the versions. A broken one is counted and left."""
    first = exported_job / "export"
    publish(first, tmp_path / "1")
    with serving(commands, "clicks", f"--export_dir={tmp_path}", "--reload_interval_seconds=0.05") as server:

        def is_served(version: int) -> bool:
            return json.loads(server.get("/v1/models/clicks"))["model_version_status"][0]["version"] == str(version)

        load = Load(server.address, score(), num_clients=4)
        publish(other_export, tmp_path / "2")
        wait_until(lambda: is_served(2))
        broken = shutil.copytree(first, tmp_path / "copy of 3")
        with (broken / "saved_model.pb").open("ab") as file:
            file.write(b"!")
        broken.rename(tmp_path / "3")
        wait_until(lambda: 'din_dist_serving_reloads_total{result="refused"} 1.0' in server.get("/metrics"))
        assert is_served(2)
        publish(first, tmp_path / "4")
        wait_until(lambda: is_served(4))
        metrics = server.get("/metrics")
        os.kill(server.process.pid, signal.SIGTERM)
        done = server.process.wait(30)
        load.join()
    assert (done.returncode, load.lost) == (0, [])
    assert set(load.answered) == {200}
    answers = sorted(json.loads(answer)["predictions"][0]["logits"] for answer in load.answers)
    history, candidate = np.array(HISTORIES[3], object), np.array(["i1"], object)
    expected = [Bundle.open(export).rank(history, candidate, 1)["logits"][0] for export in (first, other_export)]
    assert abs(expected[0] - expected[1]) > 1e-3
    assert all(min(abs(answer - one) for one in expected) < 1e-6 for answer in answers)
    assert answers[-1] - answers[0] > 1e-3
    assert 'din_dist_serving_reloads_total{result="served"} 2.0' in metrics
    assert "din_dist_serving_version 4.0" in metrics
    told = (
        f"{tmp_path / '3'} is not served: {tmp_path / '3'}/saved_model.pb: must be as it was published. Received: other"
    )
    one, two, three, _ = done.stderr.splitlines()
    assert (one, three) == ("version 2 is served", "version 4 is served")
    assert two.startswith(told)


def test_only_the_expected_export_is_opened_later_too(
    commands: Preloaded, exported_job: Path, other_export: Path, tmp_path: Path
) -> None:
    publish(exported_job / "export", tmp_path / "1")
    digest = read_manifest(tmp_path / "1").digest
    words = (f"--export_dir={tmp_path}", f"--expect_digest={digest}", "--reload_interval_seconds=0.05")
    with serving(commands, "clicks", *words) as server:
        write_program(other_export, tmp_path / "copy of 2", writes=tmp_path / "written").rename(tmp_path / "2")
        wait_until(lambda: "2 is not served: --expect_digest: must be the SHA-256 of" in server.process.stderr)
        publish(tmp_path / "1", tmp_path / "3")
        wait_until(lambda: "version 3 is served" in server.process.stderr)
    assert not (tmp_path / "written").exists()


def test_few_files_many_strangers_and_a_terminal_that_closes(versions: Path) -> None:
    """With 256 files a thousand that say nothing, or too little, leave room for others. Then its terminal closes."""
    keeper, terminal = pty.openpty()

    def begin() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    words = [sys.executable, "-m", "din_dist.cli.serve", f"--export_dir={versions}", "--port=0", "--model_name=clicks"]
    with (
        subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=begin) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        lines = []
        with open(keeper, closefd=False) as screen:
            while not (lines and lines[-1].startswith("http")):
                lines.append(screen.readline().strip())
        os.close(terminal)
        assert any("connections, because of the limit of open files: see ulimit -n" in line for line in lines)
        url = urllib.parse.urlparse(lines[-1])
        server = psutil.Process(process.pid)
        server_memory, num_threads = server.memory_info().rss, server.num_threads()
        head = f"POST {url.path}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n"
        for number in range(1000):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((url.hostname, url.port))
            with contextlib.suppress(OSError):
                client.send(("", head, head + "\r\n{")[number % 3].encode())
            if number % 100 == 0:
                time.sleep(0.1)
        time.sleep(1.5)
        for _ in range(20):
            with contextlib.closing(http.client.HTTPConnection(url.netloc, timeout=30)) as connection:
                connection.request("POST", f"{url.path}:predict", json.dumps(score()))
                assert connection.getresponse().status == 200
        assert server.num_fds() < 256
        assert server.num_threads() < num_threads + 10
        assert server.memory_info().rss < server_memory + 100 * 2**20
        load = Load(url.netloc, score())
        time.sleep(0.5)
        os.close(keeper)  # the kernel sends SIGHUP, and whatever is printed fails
        assert process.wait(60) == 0
        load.join()
        assert load.lost == []
        assert set(load.answered) == {200}


def test_who_asked_to_be_left_alone_by_sighup_is() -> None:
    """nohup asks so."""
    source = """
import asyncio, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.argv = ["serve"]
from din_dist.cli import serve

async def main():
    serve._stop_on_signals(lambda: print("stopped"))
    signal.raise_signal(signal.SIGHUP)
    await asyncio.sleep(0.1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0.1)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "stopped\n"


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)

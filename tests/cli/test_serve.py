"""`serve` as users run it, with an export of a job that was trained as users do it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from din_dist.serving.bundle import Bundle
from tests.cli.test_commands import assert_one_line
from tests.preloaded import Preloaded, Running, preloaded
from tests.programs import free_port
from tests.small_log import write_log

HISTORIES = [["i1", "i2", "i3"], [], ["never seen"], [f"i{number % 30}" for number in range(25)]]
CANDIDATES = ["i4", "i5", "i6", "never seen"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloaded]:
    with preloaded(tmp_path_factory.mktemp("commands") / "output") as found:
        yield found


@pytest.fixture(scope="module")
def versions(commands: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as TensorFlow Serving has it: the export as versions 2 and 10, and a 11 that is none yet."""
    folder = tmp_path_factory.mktemp("serve")
    write_log(folder / "log.parquet", num_users=60)
    settings = [
        *("--dataset=event_log", f"--data_path={folder / 'log.parquet'}", f"--data_dir={folder / 'prepared'}"),
        *(f"--output_dir={folder / 'run'}", "--metrics_port=-1", "--embedding_dim=8", "--hidden_units=8", "--noxla"),
        *("--attention_hidden_units=8", "--max_history_length=10", "--epochs=1", "--learning_rate=0.02"),
    ]
    for name, words in (
        ("prepare_data", settings),
        ("train", settings),
        ("export", [f"--output_dir={folder / 'run'}", f"--export_dir={folder / 'versions' / '10'}"]),
    ):
        done = commands.run(name, *words)
        assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "versions" / "10", folder / "versions" / "2")
    (folder / "versions" / "11").mkdir()
    return folder / "versions"


class Served:
    """A server at work; `url` is the model's."""

    def __init__(self, process: Running, url: str) -> None:
        self.process, self.url = process, url
        self.address = urllib.parse.urlparse(url).netloc

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return json.loads(self.get("/readyz")) == {"status": "ready"}
        return False

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as response:
            return response.read().decode()

    def predict(self, body: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}:predict", json.dumps(body).encode(), timeout=30) as response:
            return json.load(response)


@contextlib.contextmanager
def serving(commands: Preloaded, name: str, *words: str) -> Iterator[Served]:
    port = free_port()
    process = commands.start("serve", f"--port={port}", f"--model_name={name}", *words)
    served = Served(process, f"http://127.0.0.1:{port}/v1/models/{name}")
    try:
        until = time.monotonic() + 120
        while not served.is_ready():
            assert time.monotonic() < until, process.stderr
            time.sleep(0.02)
        yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


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


def test_sigterm_under_load_loses_nothing(served: Served) -> None:
    """Its last test: whoever is connected gets an answer to all that was sent, and the process ends with 0."""
    lost: list[str] = []
    answered: list[int] = []
    body = json.dumps({"instances": [{"history_item_ids": HISTORIES[3], "candidate_item_id": "i1"}]})

    def client() -> None:
        while True:
            connection = http.client.HTTPConnection(served.address, timeout=30)
            count = 0
            try:
                while connection.sock or not count:
                    connection.request("POST", "/v1/models/clicks:predict", body)
                    response = connection.getresponse()
                    response.read()
                    answered.append(response.status)
                    count += 1
            except OSError as error:
                if not count:  # the port is closed
                    return
                lost.append(repr(error))
            finally:
                connection.close()

    clients = [threading.Thread(target=client) for _ in range(8)]
    for thread in clients:
        thread.start()
    time.sleep(0.5)
    os.kill(served.process.pid, signal.SIGTERM)
    done = served.process.wait(30)
    for thread in clients:
        thread.join(30)
        assert not thread.is_alive()
    assert (done.returncode, done.stdout) == (0, f"{served.url}\n"), done.stderr
    assert done.stderr.splitlines()[-1] == "ending after what was accepted; Ctrl-C twice ends at once"
    assert lost == []
    assert len(answered) > 20
    assert set(answered) == {200}

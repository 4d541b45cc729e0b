"""Starts `serve` and talks to it.

with serving(commands, "clicks", f"--export_dir={folder}") as served:
    served.predict({"instances": [...]})
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from tests.support.patience import PATIENCE
from tests.support.preloaded import Preloaded, Running
from tests.support.programs import free_port


class Served:
    """A server at work; `url` is the model's."""

    def __init__(self, process: Running, url: str) -> None:
        self.process, self.url = process, url
        self.address = urllib.parse.urlparse(url).netloc

    def is_ready(self) -> bool:
        """Tells whether the server says that it is ready."""
        with contextlib.suppress(OSError):
            return json.loads(self.get("/readyz")) == {"status": "ready"}
        return False

    def get(self, path: str) -> str:
        """Returns what the server answers to a GET."""
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as response:
            return response.read().decode()

    def predict(self, body: Any) -> Any:
        """Returns the answer to a request for scores."""
        return self.ask("predict", body)

    def ask(self, verb: str, body: Any) -> Any:
        """Returns the answer to a request, to `predict` or to `recommend`."""
        with urllib.request.urlopen(f"{self.url}:{verb}", json.dumps(body).encode(), timeout=30) as response:
            return json.load(response)

    def refused(self, body: Any, verb: str = "predict") -> str:
        """Returns the text with which the server refuses a request."""
        try:
            answer = self.ask(verb, body)
        except urllib.error.HTTPError as error:
            return error.read().decode()
        raise AssertionError(f"it was answered: {answer}")


@contextlib.contextmanager
def serving(commands: Preloaded, name: str, *words: str) -> Iterator[Served]:
    """Serves an export for a block, which begins when the server is ready.

    Args:
        commands: starts it.
        name: of the model.
        words: flags of `serve`.
    """
    port = free_port()
    process = commands.start("serve", f"--port={port}", f"--model_name={name}", *words)
    served = Served(process, f"http://127.0.0.1:{port}/v1/models/{name}")
    try:
        until = time.monotonic() + PATIENCE
        while not served.is_ready():
            assert time.monotonic() < until, process.stderr
            time.sleep(0.02)
        yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)

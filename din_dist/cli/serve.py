"""Serves an export over HTTP: `python -m din_dist.cli.serve --export_dir DIR`.

The API is that of TensorFlow Serving's REST endpoint. The line on stdout is the model's URL, printed as soon as the
server accepts requests. SIGTERM, SIGINT and SIGHUP end it after it has answered the requests that it accepted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from din_dist import environment
from din_dist.cli import entry
from din_dist.cli.flags import define_settings, settings_from_flags
from din_dist.errors import EXIT_SIGINT, InputError
from din_dist.serving.http.settings import ServeConfig
from din_dist.serving.http.versions import find_export
from din_dist.serving.manifest import Manifest, read_manifest

_OTHER_FILES = 128  # for probes, connections that are just accepted or closed, and a margin
_OF_THE_MODEL = 128  # the most files of the model, and those that were open before

define_settings(ServeConfig)


def main() -> None:
    """Loads the export and serves it until a signal comes."""
    config = ServeConfig(**settings_from_flags(ServeConfig))
    folder, version = find_export(config.export_dir, config.expect_digest)
    manifest = read_manifest(folder, config.expect_digest)
    from din_dist.serving.http.listener import listen

    _allow_open_files(config.max_connections + _OTHER_FILES + _OF_THE_MODEL)
    _num_connections(config.max_connections)
    listener, health_listener = listen(config.host, config.port), None
    if config.health_port >= 0:
        health_listener = listen(config.health_host or config.host, config.health_port, "--health_host, --health_port")
    entry.import_tensorflow()  # takes seconds, so a wrong folder or a taken port is reported before
    from din_dist.serving.bundle import Bundle
    from din_dist.serving.http.metrics import ServingMetrics
    from din_dist.serving.http.parse import Vocabulary
    from din_dist.serving.http.scoring import warm_up
    from din_dist.serving.http.server import Served, Server
    from din_dist.versions import build_info

    bundle = Bundle.open(folder, manifest.digest)
    vocabulary = Vocabulary.of(manifest)
    warm_up(bundle, vocabulary)
    version = manifest.step if version is None else version
    served = Served(bundle, vocabulary, version, _description(manifest), manifest.predictions)
    labels = {"name": config.model_name, "version": str(version), "digest": manifest.digest}
    metrics = ServingMetrics(labels, build_info())
    num_connections = _num_connections(config.max_connections)
    if num_connections < config.max_connections:
        entry.say(f"at most {num_connections} connections, because of the limit of open files: see ulimit -n")
    config = dataclasses.replace(config, max_connections=num_connections)
    gc.collect()
    gc.freeze()  # a collection over TensorFlow's many objects would delay every answer

    async def serve() -> bool:
        server = Server(config, served, metrics, entry.say)
        _stop_on_signals(server.stop)
        if health_listener:
            entry.say(f"health and metrics: {_url(health_listener)}")
        url = f"{_url(listener)}/v1/models/{config.model_name}"
        return await server.run(listener, lambda: print(url, flush=True), health_listener)

    answered = asyncio.run(serve())
    for number in environment.ending_signals():
        signal.signal(number, signal.SIG_DFL if number is signal.SIGINT else signal.SIG_IGN)  # the process is ending
    if not answered:
        entry.leave_at_once(1, f"not all was answered within {config.shutdown_timeout_seconds:g} seconds")


def _stop_on_signals(stop: Callable[[], None]) -> None:
    """Calls `stop` at the first signal; a second Ctrl-C ends the process at once."""
    asked: set[signal.Signals] = set()

    def end(number: signal.Signals) -> None:
        if signal.SIGINT in asked and number is signal.SIGINT:
            os._exit(EXIT_SIGINT)
        stop()
        if not asked:
            entry.say("ending after what was accepted; Ctrl-C twice ends at once")
        asked.add(number)

    for number in environment.ending_signals():
        asyncio.get_running_loop().add_signal_handler(number, end, number)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _allow_open_files(count: int) -> None:
    """Raises the soft limit of open files, usually 1024, as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _num_connections(wanted: int) -> int:
    """Returns how many connections the limit of open files allows now, at most `wanted`.

    Raises:
        InputError: the limit allows no connection.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    others = len(list(Path("/proc/self/fd").iterdir())) + _OTHER_FILES
    if limit <= others:
        raise InputError(
            f"The limit of open files must be above {others}. Received: {limit}. Raise it: ulimit -n {others + wanted}."
        )
    return min(wanted, limit - others)


def _description(manifest: Manifest) -> dict[str, Any]:
    """Returns the facts about the model that clients may want."""
    features = {"features": [dataclasses.asdict(feature) for feature in manifest.features]} if manifest.features else {}
    return {
        "item_id_type": manifest.item_id_type,
        "item_features": dict(manifest.item_features),
        **features,
        **({"calibration": manifest.calibration} if manifest.calibration else {}),
        "max_history_length": manifest.max_history_length,
        **({"histories": dict(manifest.histories)} if manifest.histories else {}),
        **({"long_history": manifest.long_history} if manifest.long_history else {}),
        **({"finds_items": True} if manifest.finds_items else {}),
        **({"retriever": dataclasses.asdict(manifest.retriever)} if manifest.retriever else {}),
        "num_items": manifest.num_items,
        "step": manifest.step,
        "digest": manifest.digest,
        "versions": dict(manifest.versions),
    }


if __name__ == "__main__":
    entry.run(main)

"""Serves an export over HTTP: `python -m din_dist.cli.serve --export_dir DIR`.

The API is that of TensorFlow Serving's REST endpoint. The line on stdout is the model's URL, printed when requests are
taken on. SIGTERM and SIGINT end it: what was accepted is answered first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import signal
import typing
from pathlib import Path
from typing import Any

from absl import flags

from din_dist.cli import entry
from din_dist.cli.flags import define_path
from din_dist.errors import EXIT_SIGINT
from din_dist.serving.http.settings import ServeConfig
from din_dist.serving.http.versions import find_export
from din_dist.serving.manifest import Manifest, read_manifest

_OTHER_FILES = 256  # besides connections

_DEFINE: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
for _field in dataclasses.fields(ServeConfig):
    _kind = typing.get_type_hints(ServeConfig)[_field.name]
    _define = define_path if _field.metadata.get("path") else _DEFINE[_kind]
    _define(_field.name, _field.default, _field.metadata["help"])


def main() -> None:
    values = flags.FLAGS
    given: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(ServeConfig)}
    config = ServeConfig(**given)
    folder, version = find_export(Path(config.export_dir))
    manifest = read_manifest(folder)
    from din_dist.serving.http.server import Served, Server, listen

    _allow_open_files(config.max_connections + _OTHER_FILES)
    listener = listen(config.host, config.port)
    entry.import_tensorflow()  # takes seconds: a wrong folder or a taken port is answered before
    from din_dist.serving.bundle import Bundle
    from din_dist.serving.http.metrics import ServingMetrics
    from din_dist.serving.http.parse import Vocabulary
    from din_dist.serving.http.scoring import warm_up
    from din_dist.versions import build_info

    bundle = Bundle.open(folder)
    vocabulary = Vocabulary(manifest.item_id_type, manifest.item_features, manifest.max_history_length)
    warm_up(bundle, vocabulary)
    version = manifest.step if version is None else version
    served = Served(bundle, vocabulary, version, _description(manifest))
    labels = {"name": config.model_name, "version": str(version), "digest": manifest.digest}
    metrics = ServingMetrics(labels, build_info())

    async def serve() -> bool:
        server = Server(config, served, metrics, entry.say)
        loop = asyncio.get_running_loop()
        asked: set[signal.Signals] = set()

        def end(number: signal.Signals) -> None:
            if signal.SIGINT in asked and number is signal.SIGINT:
                os._exit(EXIT_SIGINT)
            if not asked:
                entry.say("ending after what was accepted; Ctrl-C twice ends at once")
            asked.add(number)
            server.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end, number)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1/models/{config.model_name}"
        return await server.run(listener, when_ready=lambda: print(url, flush=True))

    if not asyncio.run(serve()):
        entry.leave_at_once(1, f"not all was answered within {config.shutdown_timeout_seconds:g} seconds")


def _allow_open_files(count: int) -> None:
    """As far as this user may: the usual limit of 1024 is soft."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _description(manifest: Manifest) -> dict[str, Any]:
    """What clients may want to know of the model."""
    return {
        "item_id_type": manifest.item_id_type,
        "item_features": dict(manifest.item_features),
        "max_history_length": manifest.max_history_length,
        "num_items": manifest.num_items,
        "step": manifest.step,
        "digest": manifest.digest,
        "versions": dict(manifest.versions),
    }


if __name__ == "__main__":
    entry.run(main)

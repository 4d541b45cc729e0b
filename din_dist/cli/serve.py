"""Serves an export over HTTP: `python -m din_dist.cli.serve --export_dir DIR`.

The API is that of TensorFlow Serving's REST endpoint. The line on stdout is the model's URL, printed as soon as the
server accepts requests. SIGTERM, SIGINT and SIGHUP end it after it has answered the requests that it accepted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from din_dist import environment
from din_dist.cli import entry
from din_dist.cli.flags import define_settings, settings_from_flags
from din_dist.errors import EXIT_SIGINT, InputError
from din_dist.files import is_remote
from din_dist.serving.http.settings import ServeConfig
from din_dist.serving.http.versions import NewerVersions, found_versions
from din_dist.serving.manifest import read_manifest
from din_dist.serving.store_exports import local_export

_STORE_SECONDS = 30.0  # between two looks into a store, where each is a request that is paid for
_OTHER_FILES = 128  # for probes, connections that are just accepted or closed, and a margin
_OF_THE_MODEL = 128  # the most files of the model, and those that were open before

define_settings(ServeConfig)


def main() -> None:
    """Loads the export and serves it until a signal comes."""
    config = ServeConfig(**settings_from_flags(ServeConfig))
    version = found_versions(config.export_dir)[0]
    read_manifest(local_export(version.source, config.expect_digest), config.expect_digest)
    from din_dist.serving.http.listener import listen

    _allow_open_files(config.max_connections + _OTHER_FILES + _OF_THE_MODEL)
    _num_connections(config.max_connections)
    listener, health_listener = listen(config.host, config.port), None
    if config.health_port >= 0:
        health_listener = listen(config.health_host or config.host, config.health_port, "--health_host, --health_port")
    entry.import_tensorflow()  # takes seconds, so a wrong folder or a taken port is reported before
    from din_dist.serving.http.metrics import ServingMetrics
    from din_dist.serving.http.opening import open_version
    from din_dist.serving.http.reload import Reloader
    from din_dist.serving.http.server import Server
    from din_dist.versions import build_info

    gc.collect()
    # A collection over TensorFlow's many objects would delay every answer. Before the first export is opened, because
    # what is frozen is never freed.
    gc.freeze()
    opener = functools.partial(open_version, expect_digest=config.expect_digest)
    newer = NewerVersions(config.export_dir, opener, version)
    first = [newer.open_first()]  # the server takes it out, so that nobody else holds it in memory
    metrics = ServingMetrics(build_info())
    num_connections = _num_connections(config.max_connections)
    if num_connections < config.max_connections:
        entry.say(f"at most {num_connections} connections, because of the limit of open files: see ulimit -n")
    config = dataclasses.replace(config, max_connections=num_connections)
    gc.collect()
    interval = config.reload_interval_seconds
    if is_remote(config.export_dir) and interval:
        interval = max(interval, _STORE_SECONDS)
    reloader = Reloader(newer, interval, metrics, entry.say)

    async def serve() -> bool:
        server = Server(config, first.pop(), metrics, entry.say)
        _stop_on_signals(server.stop)
        if health_listener:
            entry.say(f"health and metrics: {_url(health_listener)}")
        url = f"{_url(listener)}/v1/models/{config.model_name}"
        reloader.start(server.replace)
        try:
            return await server.run(listener, lambda: print(url, flush=True), health_listener)
        finally:
            reloader.stop()

    answered = asyncio.run(serve())
    for number in environment.ending_signals():
        signal.signal(number, signal.SIG_DFL if number is signal.SIGINT else signal.SIG_IGN)  # the process is ending
    if not answered:
        entry.leave_at_once(1, f"not all was answered within {config.shutdown_timeout_seconds:g} seconds")
    if not reloader.has_ended():
        entry.leave_at_once(0, "a newer version was being opened; it is not served")


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


if __name__ == "__main__":
    entry.run(main)

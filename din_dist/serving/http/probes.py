"""Health, readiness and metrics, at the model's port and at a separate port."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry, exposition

from din_dist.serving.http.responses import error

PATHS = "/healthz, /readyz, /metrics"


class Probes:
    """Answers requests about the server itself.

    Args:
        registry: the metrics to show at `/metrics`.
        is_ending: true if no more requests should come.
    """

    def __init__(self, registry: CollectorRegistry, is_ending: Callable[[], bool]) -> None:
        self._registry, self._is_ending = registry, is_ending

    def add_to(self, app: web.Application) -> None:
        """Adds the routes in `PATHS`."""
        app.router.add_get("/healthz", self._healthy)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._show_metrics)

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self._is_ending():
            return error(503, "The server is ending.")
        return web.json_response({"status": "ready"})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        text, content_type = exposition.choose_encoder(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=text(self._registry), headers={hdrs.CONTENT_TYPE: content_type})

"""Serves POST /debug/trace, for administrators: a timeline of all processes, for ui.perfetto.dev.

Runs in the api process; the file is made in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from minisgl.api.engine import Engine
from minisgl.api.http.auth import Keys
from minisgl.api.http.body import json_handler
from minisgl.api.http.connection import connection_of
from minisgl.api.reader import Reader
from minisgl.api.requests.fields import Fields, integer, number
from minisgl.api.traces import MAX_BYTES
from minisgl.errors import InvalidParam, model_loading
from minisgl.tracing.assemble import assemble

_SECONDS, _MAX_SECONDS, _MAX_STEPS = 10.0, 600.0, 1_000_000
_ENDS_SECONDS = 5.0  # for the last events
_PROFILED_SECONDS = 60.0  # the same, of a profiler
TRACE = (
    integer("steps", "End it after so many steps, if that is before `seconds`.", 1, _MAX_STEPS),
    number("seconds", f"End it after so many seconds; default: {_SECONDS:g}.", 0.001, _MAX_SECONDS),
    integer("kernels", "1: with the kernels of the device, by torch's profiler, which costs time.", 0, 1),
)
_FIELDS = Fields(*TRACE)


class TraceRoutes:
    """The handler, and the process that makes files."""

    def __init__(self, engine: Engine, keys: Keys) -> None:
        self._engine, self._keys = engine, keys
        self._reader = Reader()

    def add_to(self, app: web.Application) -> None:
        app.router.add_post("/debug/trace", self.trace)
        app.router.add_get("/debug/trace", json_handler(self.show))
        app.on_cleanup.append(self.close)

    async def close(self, _: web.Application) -> None:
        self._reader.close()

    def show(self, request: web.Request) -> Any:
        """Whether a trace runs."""
        self._keys.check_admin(request)
        return {"running": self._engine.traces.running}

    async def trace(self, request: web.Request) -> web.Response:
        self._keys.check_admin(request)
        values, unknown = _FIELDS.read({name: _value(text) for name, text in request.query.items()})
        if unknown:
            raise InvalidParam(unknown[0], f"{unknown[0]} is not known here: write ?steps=, ?seconds= or ?kernels=1.")
        if request.can_read_body and await request.content.read(1):
            raise InvalidParam("body", "this request has no body: write ?steps=, ?seconds= or ?kernels=1 into the URL.")
        if values.get("kernels") and self._engine.config.model.format == "fake":
            raise InvalidParam("kernels", "kernels must be 0: the fake engine has none.")
        if self._engine.state not in ("ready", "recovering"):
            raise model_loading()
        if (connection := connection_of(request)) is not None:
            connection.generates()  # so that a client that has left is noticed
        spool = await self._events(values.get("steps", 0), values.get("seconds", _SECONDS), bool(values.get("kernels")))
        raw = await self._reader.run(assemble, spool, MAX_BYTES)
        headers = {"Content-Disposition": 'attachment; filename="minisgl.pftrace"'}
        return web.Response(body=raw, content_type="application/octet-stream", headers=headers)

    async def _events(self, steps: int, seconds: float, kernels: bool) -> bytes:
        traces = self._engine.traces
        found: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        traces.begin(steps, kernels, lambda spool: None if found.done() else found.set_result(spool))
        try:
            if not (await asyncio.wait({found}, timeout=seconds))[0]:
                traces.end()
                await asyncio.wait({found}, timeout=_PROFILED_SECONDS if kernels else _ENDS_SECONDS)
        finally:  # also where the client has left
            if not found.done():
                traces.finish()
        return found.result()


def _value(text: str) -> float | int | str:
    """A number of a URL; other texts as they are, which no check admits."""
    try:
        value: float | int = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float)) else text

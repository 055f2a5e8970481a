"""Serves what the page shows of the engine: GET /debug/live, a stream of views, and POST /debug/live, what its reader wants.

Everything is for administrators (on a server without keys: for this machine); somebody with another key sees the requests of
that key alone.  Runs in the api process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import HttpVersion11, web

from minisgl.api.caller import Callers
from minisgl.api.engine import Engine
from minisgl.api.http.auth import TENANT, Keys
from minisgl.api.http.body import read_json
from minisgl.api.http.journal_routes import NAME
from minisgl.api.http.journal_upload import MAX_BYTES, receive
from minisgl.api.http.watchers import Watcher, Watchers
from minisgl.api.requests.fields import Fields, array, integer, required, string
from minisgl.api.requests.unknown_fields import ignored_header
from minisgl.errors import InvalidParam, RequestError

_INTEGERS = {"type": "integer"}
_SECONDS = 1.0  # between two looks at the processes
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _integers(name: str, value: list[Any]) -> list[int]:
    if len(value) > 10_000 or not all(type(item) is int and abs(item) < 1 << 53 for item in value):
        raise InvalidParam(name, f"{name} must be an array of at most 10000 integers.")
    return value


WATCHER = required(string("watcher", "The name that the stream of GET /debug/live begins with."))
_UPLOAD = Fields(WATCHER)
_EXPLAINED = 50
STEPS = integer("steps", f"End after so many steps; default: {_EXPLAINED}.", 1, 1_000_000)
_EXPLAIN = Fields(STEPS)
LIVE = Fields(
    WATCHER,
    array("opened", "Nodes of the radix tree to show with their children.", _INTEGERS, "an array of integers", _integers),
    array("closed", "Nodes to show without them.", _INTEGERS, "an array of integers", _integers),
    array("whole", "Nodes to show with all their children, not the largest alone.", _INTEGERS, "an array", _integers),
    string("journal", "Show this journal of --data-dir; empty: the live engine."),
    integer("place", "Go to this step of the journal, counted from 0.", 0),
    integer("life", "Answer with all that is known of a request.", 0, 1 << 53),
    integer("node", "Answer with the tokens of a node.", 0, 1 << 53),
)


class LiveRoutes:
    """The handlers."""

    def __init__(self, engine: Engine, keys: Keys, callers: Callers) -> None:
        self._engine, self._keys, self._callers = engine, keys, callers
        self.watchers = Watchers(engine)

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/debug/live", self.stream)
        router.add_post("/debug/live", self.choose)
        router.add_get("/debug/journals", self.list)
        router.add_post("/debug/live/journal", self.upload)
        router.add_get("/debug/explain", self.explain)

    async def close(self, _: web.Application) -> None:
        self.watchers.close()

    def _client(self, request: web.Request) -> int | None:
        """Whose requests may be seen: None for all.  Raises RequestError (401, 403, 404)."""
        if self._engine.config.server.no_page:
            raise page_off()
        origin = request.headers.get("Origin")
        foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("Host")
        if foreign and not request[TENANT].name:  # whatever else --allow-origin lets it call
            text = "A page of another origin sees what the engine does with a key alone."
            raise RequestError(text, status=403, code="foreign_origin")
        if self._keys.may_administer(request):
            return None
        if request[TENANT].name:
            return self._callers.client(request[TENANT].name)
        self._keys.check_admin(request)
        return None

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: {"watcher", ...} first, then views, changes of them, and the processes once a second."""
        watcher = self.watchers.enter(self._client(request))
        try:
            response = web.StreamResponse(headers=_HEADERS)
            if request.version >= HttpVersion11:
                response.enable_chunked_encoding()
            with contextlib.suppress(ConnectionResetError):
                await response.prepare(request)
                hello = {"watcher": watcher.secret, "everything": watcher.client is None, "journal_bytes": MAX_BYTES}
                await self._write(response, hello)
                await self._follow(watcher, response)
                await response.write_eof()
            return response
        finally:
            self.watchers.leave(watcher)

    async def explain(self, request: web.Request) -> web.StreamResponse:
        """What the scheduler decides in its next steps, and why: lines of JSON, one for each of its calls, as they happen."""
        client = self._client(request)
        self._keys.check_admin(request)
        values, unknown = _EXPLAIN.read(
            {name: int(text[:20]) if text.isdecimal() else text for name, text in request.query.items()}
        )
        if unknown:
            raise InvalidParam(unknown[0], f"{unknown[0]} is not known here: write ?steps=N.")
        watcher = self.watchers.enter(client)
        try:
            self.watchers.tell(watcher, "explain")
            response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "application/x-ndjson"})
            if request.version >= HttpVersion11:
                response.enable_chunked_encoding()
            with contextlib.suppress(ConnectionResetError):
                await response.prepare(request)
                await response.write(b"\n")
                await self._tell(watcher, response, values.get("steps", _EXPLAINED))
                await response.write_eof()
            return response
        finally:
            self.watchers.leave(watcher)

    async def _tell(self, watcher: Watcher, response: web.StreamResponse, steps: int) -> None:
        while self._engine.state not in ("draining", "stopped", "dead"):
            try:
                view = await asyncio.wait_for(watcher.views.get(), _SECONDS)
            except asyncio.TimeoutError:
                await response.write(b"\n")  # a sign of life
                continue
            if view is None:
                return
            message = json.loads(view)
            if message.get("untold"):
                await self._line(response, {"untold": message["untold"]})
            for facts in message.get("told", ()):
                await self._line(response, {**facts, "began": message["began"]})
                steps -= facts["number"] is not None
                if not steps:
                    return
            self.watchers.tell(watcher, "ready")

    @staticmethod
    async def _line(response: web.StreamResponse, value: Any) -> None:
        await response.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")

    async def _follow(self, watcher: Watcher, response: web.StreamResponse) -> None:
        loop = asyncio.get_running_loop()
        look = loop.time()
        while self._engine.state not in ("draining", "stopped", "dead"):
            if loop.time() >= look:
                look = loop.time() + _SECONDS
                await self._write(response, {"actors": self.watchers.actors()} if watcher.client is None else {"alive": True})
            try:
                view = await asyncio.wait_for(watcher.views.get(), max(0.0, look - loop.time()))
            except asyncio.TimeoutError:
                continue
            if view is None:
                return
            await response.write(b"data: " + view + b"\n\n")
            self.watchers.tell(watcher, "ready")

    @staticmethod
    async def _write(response: web.StreamResponse, value: Any) -> None:
        await response.write(f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode())

    async def choose(self, request: web.Request) -> web.Response:
        client = self._client(request)
        values, unknown = LIVE.read(await read_json(request, self._engine.config.server.max_body_bytes))
        watcher = self.watchers.find(values["watcher"], client)
        headers = ignored_header(self._engine.config, LIVE, unknown)
        if any(name in values for name in ("opened", "closed", "whole")):
            self.watchers.tell(watcher, "choose", *(values.get(name, []) for name in ("opened", "closed", "whole")))
        if "journal" in values:
            self.watchers.open(watcher, self._path(request, values["journal"]))
        if "place" in values:
            self.watchers.tell(watcher, "seek", values["place"])
        for what in ("life", "node"):
            if what in values:
                body = await self.watchers.ask(watcher, what, values[what])
                if body == b"null":
                    raise RequestError(
                        f"There is no {'request' if what == 'life' else what} {values[what]} here.",
                        status=404,
                        code="not_shown",
                    )
                return web.Response(body=body, content_type="application/json", headers=headers)
        return web.json_response({"watcher": watcher.secret}, headers=headers)

    # ---------------- journals in files
    async def upload(self, request: web.Request) -> web.Response:
        """Show a journal of the reader's own: the body.  It is kept without a name, and goes with its reader."""
        client = self._client(request)
        self._keys.check_admin(request)
        values, unknown = _UPLOAD.read(dict(request.query))
        if unknown:
            raise InvalidParam(unknown[0], f"{unknown[0]} is not known here: write ?watcher=NAME.")
        self.watchers.find(values["watcher"], client)
        file = await receive(request, self._engine.config.server.data_dir or None)
        try:
            watcher = self.watchers.find(values["watcher"], client)  # it may have left
            return web.json_response(await self.watchers.open_file(watcher, file))
        except BaseException:
            file.close()
            raise

    def _folder(self) -> Path | None:
        data_dir = self._engine.config.server.data_dir
        return Path(data_dir).absolute() / "journals" if data_dir else None

    def _path(self, request: web.Request, name: str) -> str:
        """Raises RequestError unless it may be opened."""
        if not name:
            return ""
        self._keys.check_admin(request)
        folder = self._folder()
        if folder is None or not NAME.fullmatch(name):
            raise RequestError(f"There is no journal {name[:100]!r} in --data-dir.", status=404, code="no_journal")
        return str(folder / name)

    async def list(self, request: web.Request) -> web.Response:
        """The journals in --data-dir, newest first."""
        if self._engine.config.server.no_page:
            raise page_off()
        self._keys.check_admin(request)
        return web.json_response({"journals": journals_in(self._folder()), "data_dir": self._folder() is not None})


def journals_in(folder: Path | None) -> list[dict[str, Any]]:
    """The journals of a folder, newest first, with the size of all their parts."""
    found: dict[str, list[Any]] = {}
    for path in folder.iterdir() if folder is not None and folder.is_dir() else ():
        name = path.name.partition(".part")[0]
        if path.is_file() and NAME.fullmatch(name):
            about = path.stat()
            size, changed = found.get(name, (0, 0.0))
            found[name] = [size + about.st_size, max(changed, about.st_mtime)]
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return [{"name": name, "bytes": size, "changed": int(changed)} for name, (size, changed) in ordered]


def page_off() -> RequestError:
    """404."""
    return RequestError("The page is switched off (--no-page).", status=404, code="page_off")

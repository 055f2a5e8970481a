"""Serves POST /debug/journal/start and stop, for administrators: a journal of the scheduler in --data-dir, by its name.

Runs in the api process.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from minisgl.api.engine import Engine
from minisgl.api.http.auth import Keys
from minisgl.api.http.body import json_handler, read_json
from minisgl.api.journals import Then
from minisgl.api.requests.fields import Fields, boolean, check_string, number, required, string
from minisgl.api.requests.unknown_fields import ignored_header
from minisgl.errors import InvalidParam, RequestError

NAME = re.compile(r"(?!\.+$)(?!.*\.part\d+$)[A-Za-z0-9._-]{1,100}")
_ANSWER_SECONDS = 10.0  # for the scheduler, which may be between two steps or about to start
JOURNAL = Fields(
    required(string("name", "Letters, digits, '.', '_' and '-': the file in journals/ of --data-dir.")),
    boolean("tokens", "Keep token ids, parameters and grammars as they are; default: --journal-tokens."),
    number("mb", "MB that all its files may take, the oldest going first; default: --journal-mb.", 1, 1 << 20),
)


class JournalRoutes:
    """The handlers."""

    def __init__(self, engine: Engine, keys: Keys) -> None:
        self._engine, self._config, self._keys = engine, engine.config, keys

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_post("/debug/journal/start", self.start)
        router.add_post("/debug/journal/stop", self.stop)
        router.add_get("/debug/journal", json_handler(self.show))

    async def start(self, request: web.Request) -> web.Response:
        self._keys.check_admin(request)
        server = self._config.server
        values, unknown = JOURNAL.read(await read_json(request, server.max_body_bytes))
        name = check_string("name", values["name"])
        if not NAME.fullmatch(name):
            text = "name may have up to 100 of the characters A-Z a-z 0-9 . _ - and not end like a part (.part1)."
            raise InvalidParam("name", text)
        path = self._path(name)
        tokens, megabytes = values.get("tokens", server.journal_tokens), values.get("mb", server.journal_mb)
        on, error = await self._answer(lambda then: self._engine.journals.begin(path, tokens, megabytes, then))
        if not on:
            raise _disk(error)
        headers = ignored_header(self._config, JOURNAL, unknown)
        return web.json_response({"journal": name, "tokens": tokens, "mb": megabytes}, headers=headers)

    def _path(self, name: str) -> str:
        """Where a journal lands.  Raises RequestError without a place for it."""
        if not self._config.server.data_dir:
            text = "This server keeps no journals for HTTP: start it with --data-dir DIR, or with --journal FILE."
            raise RequestError(text, status=404, code="no_data_dir")
        folder = Path(self._config.server.data_dir).absolute() / "journals"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as e:
            raise _disk(e.strerror or "unusable") from None
        return str(folder / name)

    async def stop(self, request: web.Request) -> web.Response:
        self._keys.check_admin(request)
        running = self._engine.journals.file
        _, error = await self._answer(self._engine.journals.end)
        return web.json_response({"journal": os.path.basename(running.path) if running else "", "error": error or None})

    def show(self, request: web.Request) -> Any:
        """The journal that runs; null if there is none."""
        self._keys.check_admin(request)
        m = self._engine.journals.file
        return {"journal": os.path.basename(m.path) if m else None, "failures": self._engine.journals.failures}

    async def _answer(self, ask: Callable[[Then], object]) -> tuple[bool, str]:
        """Ask the scheduler, and wait for its answer."""
        found: asyncio.Future[tuple[bool, str]] = asyncio.get_running_loop().create_future()

        def then(on: bool, error: str) -> None:
            if not found.done():
                found.set_result((on, error))

        ask(then)
        try:
            return await asyncio.wait_for(found, _ANSWER_SECONDS)
        except asyncio.TimeoutError:
            text = "The scheduler has not answered: it may be starting again. GET /debug/journal says what runs."
            raise RequestError(text, status=503, code="engine_recovering", retry_after=5) from None


def _disk(why: str) -> RequestError:
    return RequestError(f"The journal cannot be written: {why}.", status=507, code="journal_not_written")

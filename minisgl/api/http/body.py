"""Reads the bodies of requests, and writes streamed answers as server-sent events.  Runs in the api process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from minisgl.api.endpoints.table import ENDPOINTS, compact
from minisgl.api.engine import Kept
from minisgl.api.generation import StreamedAnswer
from minisgl.api.http.connection import connection_of
from minisgl.api.http.errors import account_of
from minisgl.api.http.keep_alive import KEEP_ALIVE, Opening
from minisgl.api.http.stream_writer import StreamWriter
from minisgl.api.reader import SMALL, Reader
from minisgl.api.rendering import holds_rendered, joined, json_pieces
from minisgl.api.requests.fields import parse_json
from minisgl.config import Config
from minisgl.errors import RequestError

_BODY_SECONDS = 30.0  # limit for the arrival of a body
KEPT = web.AppKey("kept", Kept)
_SSE_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def read_body(request: web.Request, limit: int) -> bytes:
    """The bytes of a JSON body.  Raises RequestError if it is something else, larger than `limit` bytes, or too slow."""
    if request.content_type != "application/json":
        text = "The Content-Type header must be application/json (curl: -H 'Content-Type: application/json')."
        raise RequestError(text, code="unsupported_content_type")
    check_encoding(request)
    if (request.content_length or 0) > limit:
        raise body_too_large(limit)
    try:
        if request.content.is_eof():  # it arrived with the headers
            return await request.read()
        return await asyncio.wait_for(request.read(), _BODY_SECONDS)
    except asyncio.TimeoutError:
        text = f"The request body did not arrive within {_BODY_SECONDS:.0f} seconds."
        raise RequestError(text, status=408, code="request_timeout") from None
    except web.HTTPRequestEntityTooLarge:
        raise body_too_large(limit) from None


async def read_json(request: web.Request, limit: int) -> dict[str, Any]:
    """The JSON object of a small body.  Raises RequestError as `read_body` does, and if it is not plain JSON."""
    return parse_json(await read_body(request, min(limit, SMALL)))


async def read_checked(request: web.Request, config: Config, reader: Reader) -> Any:
    """The checked request of one of the ENDPOINTS.  A large body waits for room, and is read in another process."""
    limit, path = config.server.max_body_bytes, request.path.rstrip("/")
    size = request.content_length if request.content_length is not None else limit
    if size <= SMALL:
        return ENDPOINTS[path].parse(config, parse_json(await read_body(request, limit)))
    if size > limit:
        raise body_too_large(limit)
    async with reader.room(size):
        raw = await read_body(request, limit)
        request._read_bytes = None  # aiohttp keeps what it has read
        if len(raw) <= SMALL:
            return ENDPOINTS[path].parse(config, parse_json(raw))
        return await reader.run(checked, path, config, raw)


def checked(path: str, config: Config, raw: bytes) -> Any:
    """Check a body of one of the ENDPOINTS.  Runs in the reader process.  Raises RequestError."""
    return compact(config, ENDPOINTS[path].parse(config, parse_json(raw)))


async def respond(request: web.Request, answer: Any, headers: Mapping[str, str]) -> web.StreamResponse:
    """Answer with a JSON value.  One that is rendered already is sent in pieces, as fast as the client reads them."""
    if not holds_rendered(answer):
        return web.json_response(answer, headers=headers)
    pieces = json_pieces(answer)
    response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8", **headers})
    response.content_length = sum(map(len, pieces))
    with contextlib.suppress(ConnectionResetError), _Unwritten(request, response.content_length) as unwritten:
        await response.prepare(request)
        for piece in joined(pieces):
            unwritten.add(-len(piece))
            await response.write(piece)
        await response.write_eof()
    return response


class _Unwritten:
    """A context with the rest of an answer in one piece, counted among what waits in this process."""

    def __init__(self, request: web.Request, size: int) -> None:
        self.held, self._kept = 0, request.app[KEPT]
        self._size, self._connection = size, connection_of(request)

    def __enter__(self) -> _Unwritten:
        self.add(self._size)
        if self._connection is not None:
            self._connection.watch(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.add(-self.held)

    def add(self, size: int) -> None:
        self.held += size
        self._kept.bytes += size

    def probe(self) -> None:
        """The answer itself is being written."""


def json_handler(make: Callable[[web.Request], Any]) -> Handler:
    """A handler that answers with the JSON value that `make` returns."""

    async def handle(request: web.Request) -> web.Response:
        return web.json_response(make(request))

    return handle


def check_encoding(request: web.Request) -> None:
    """A compressed body could be a thousand times larger than it looks.  Raises RequestError."""
    if "Content-Encoding" in request.headers:
        raise RequestError("Compressed request bodies are not supported.", code="unsupported_content_encoding")


def body_too_large(limit: int) -> RequestError:
    """413."""
    return RequestError(f"The request body is larger than {limit} bytes.", status=413, code="body_too_large")


async def stream(request: web.Request, answer: StreamedAnswer, headers: Mapping[str, str]) -> web.StreamResponse:
    """Answer with server-sent events as the answer grows.  Closes the answer at the end, which cancels its requests.

    Raises RequestError as long as nothing has been sent.  A silence is filled with signs of life, see keep_alive.py.
    """
    keep_alive, connection = request.app[KEEP_ALIVE], connection_of(request)
    try:
        with keep_alive.watch(opening := Opening(answer)):
            if connection is not None:
                connection.watch(opening)
            first, timed = await answer.first()
        if timed:
            timings = answer.timings
            timing = f"queue;dur={1000 * timings.queued:.1f}, ttft;dur={1000 * timings.first:.1f}"
            headers = {"Server-Timing": timing, **headers}
        response = web.StreamResponse(headers={**_SSE_HEADERS, **headers})
        if request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        with contextlib.suppress(ConnectionResetError):  # the client has left
            await response.prepare(request)
            await response.write(first)
            writer = StreamWriter(request, response, answer)
            if connection is not None:
                connection.watch(writer)
            with keep_alive.watch(writer):
                await writer.run()
            await response.write_eof()
        return response
    finally:
        if answer.error is not None:
            account_of(request).fail(answer.error)
            answer.error = None  # its frames hold the answer
        answer.close()


def timing_header(answer: Any) -> dict[str, str]:
    """The Server-Timing header of a body with `timings`."""
    timings = answer.get("timings") if isinstance(answer, dict) else None
    if timings is None:
        return {}
    names = ("queue", "ttft", "decode", "total")
    return {"Server-Timing": ", ".join(f"{name};dur={timings[f'{name}_ms']:.1f}" for name in names)}

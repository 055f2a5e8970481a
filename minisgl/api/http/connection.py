"""Connections: who does not say what they want is shown out, who does not speak HTTP is told so.  Runs in the api process.

aiohttp waits for ever for the end of a first request's headers, so that a few thousand silent connections take every file
descriptor.  A `Door` is a connection's protocol until those headers are complete; then aiohttp's own takes its place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from typing import cast

from aiohttp import web
from aiohttp.http_exceptions import InvalidURLError, LineTooLong
from aiohttp.web_protocol import _ErrInfo

from minisgl.errors import NOT_HTTP, RequestError, internal_error

log = logging.getLogger("minisgl.api")
HEADER_SECONDS = 30.0  # from the connection to the end of its first request's headers
_END = b"\r\n\r\n"


class Handler(web.RequestHandler):
    """aiohttp's protocol, but for what it does by itself about bytes that are not HTTP.

    Its `handle_error` would repeat what was sent, perhaps a key, to the client and with a traceback to the log; here it is
    OpenAI's error body.  A body that breaks off in such bytes would leave its reader waiting for the rest.
    """

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages and isinstance(broken := self._messages[-1][0], _ErrInfo):
            bodies = [payload for _, payload in self._messages]
            if self._current_request is not None:
                bodies.append(self._current_request.content)
            for body in bodies:
                if not body.is_eof():
                    body.set_exception(_not_http(broken.exc, broken.message or ""))
                    body.feed_eof()  # aiohttp reads and drops the rest of a body that its handler has left: there is none

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # the client has left, and aiohttp knows what to do
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun and cannot become another")
        if status >= 500:
            log.error("a request failed outside its handler", exc_info=exc)
            error = internal_error()
        else:
            error = _not_http(exc, message or "")
            log.info("%s: %s", request.remote, error.message)
        response = web.json_response(error.body(), status=error.status, headers={"x-request-id": uuid.uuid4().hex})
        response.force_close()
        return response


def _not_http(exc: BaseException | None, message: str) -> RequestError:
    """In the parser's own words, without what it quotes."""
    if isinstance(exc, LineTooLong):
        return RequestError("The request's line or one of its headers is too long.", status=431, code="header_too_large")
    said = [line.strip(" :.") for line in message.partition("\n\n")[0].splitlines()] or ["it cannot be read"]
    fault = "its URL cannot be read" if isinstance(exc, InvalidURLError) else said[-1][:80]
    return RequestError(f"The request is not HTTP/1.1: {fault}.", code=NOT_HTTP)


class Door(asyncio.Protocol):
    """The protocol of a new connection; `make` is aiohttp's factory of protocols (`AppRunner.server`)."""

    def __init__(self, make: Callable[[], web.RequestHandler], seconds: float = HEADER_SECONDS) -> None:
        self._inner = make()
        self._inner.__class__ = Handler  # aiohttp takes no other way to name the class that it makes
        self._seconds = seconds
        self._tail = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._late)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        seen = self._tail + data
        self._tail = seen[-3:]
        if _END in seen and self._timer is not None and self._transport is not None:
            self._timer.cancel()
            self._transport.set_protocol(self._inner)
        self._inner.data_received(data)

    def _late(self) -> None:
        text = f"The request's headers did not arrive within {self._seconds:g} seconds."
        body = json.dumps(RequestError(text, status=408, code="request_timeout").body()).encode()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._inner.connection_lost(exc)

    def eof_received(self) -> None:
        self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

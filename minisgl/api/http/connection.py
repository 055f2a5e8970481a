"""Closes connections whose headers do not arrive in time, and answers malformed HTTP with 400.  Runs in the api process."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import InvalidURLError, LineTooLong
from aiohttp.web_protocol import _ErrInfo

from minisgl.api.http.door import Door, Doorkeeper
from minisgl.api.request_log import RequestLog
from minisgl.errors import NOT_HTTP, RequestError, internal_error

log = logging.getLogger("minisgl.api")
HEADER_SECONDS = 30.0  # from the connection to the end of its first request's headers
_END = b"\r\n\r\n"


class Connection(web.RequestHandler):
    """aiohttp's protocol of one connection, for the `server` of an AppRunner, with three changes.

    With a `door`, requests that the engine has no place for are refused there.

    aiohttp waits without limit for the end of a first request's headers, so a few thousand silent connections would take every
    file descriptor.  Here they have `seconds`.

    aiohttp's `handle_error` repeats the bytes that are not HTTP, perhaps an API key, to the client and to the log.  Here it
    answers with OpenAI's error body.  A body that breaks off in such bytes would leave its reader waiting for the rest.
    """

    __slots__ = ("_door", "_request_log", "_seconds", "_tail", "_timer")

    def __init__(
        self,
        server: web.Server,
        seconds: float = HEADER_SECONDS,
        request_log: RequestLog | None = None,
        door: Door | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, **server._kwargs)
        self._door = door
        if door is not None:
            self._parser = cast(Any, Doorkeeper(self._parser, self._refuse))
        self._seconds, self._request_log = seconds, request_log or RequestLog()
        self._tail = b""  # the last bytes of headers that are not complete
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._too_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _too_late(self) -> None:
        text = f"The request's headers did not arrive within {self._seconds:g} seconds."
        error = RequestError(text, status=408, code="request_timeout")
        body = json.dumps(error.body()).encode()
        if self.transport is not None and not self.transport.is_closing():
            self._request_log.refuse("unknown", uuid.uuid4().hex, error)
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            self.transport.close()

    def _refuse(self, message: Any, body: Any) -> bool:
        """Answer a message at the door.  False: it goes on, which it does where another one is not answered yet."""
        idle = not self._messages and self._waiter is not None and not self._waiter.done()
        if not idle or self._door is None or self.transport is None:
            return False
        peer = self.peername
        answer = self._door.refusal(message, body, str(peer[0] if isinstance(peer, (list, tuple)) and peer else peer or ""))
        if answer is None:
            return False
        self.transport.write(answer)
        self._next_keepalive_close_time = self._loop.time() + self.keepalive_timeout
        if message.should_close:
            self.transport.close()
        return True

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            if _END in (seen := self._tail + data):
                self._timer.cancel()
                self._timer = None
            self._tail = seen[-3:]
        super().data_received(data)
        if self._messages and isinstance(broken := self._messages[-1][0], _ErrInfo):
            bodies = [payload for _, payload in self._messages]
            if self._current_request is not None:
                bodies.append(self._current_request.content)
            for body in bodies:
                if not body.is_eof():
                    body.set_exception(_not_http(broken.exc, broken.message or ""))
                    body.feed_eof()  # aiohttp reads and drops the rest of an abandoned body; here it has ended

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # the client has left, and aiohttp ends the connection
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun and cannot become another")
        if status >= 500:
            log.error("a request failed outside its handler", exc_info=exc)
            error = internal_error()
        else:
            error = _not_http(exc, message or "")
        name = uuid.uuid4().hex
        self._request_log.refuse("unknown", name, error)
        response = web.json_response(error.body(), status=error.status, headers={"x-request-id": name})
        response.force_close()
        return response


def _not_http(exc: BaseException | None, message: str) -> RequestError:
    """The error in the parser's own words, without the bytes that it quotes."""
    if isinstance(exc, LineTooLong):
        return RequestError("The request's line or one of its headers is too long.", status=431, code="header_too_large")
    said = [line.strip(" :.") for line in message.partition("\n\n")[0].splitlines()] or ["it cannot be read"]
    fault = "its URL cannot be read" if isinstance(exc, InvalidURLError) else said[-1][:80]
    return RequestError(f"The request is not HTTP/1.1: {fault}.", code=NOT_HTTP)

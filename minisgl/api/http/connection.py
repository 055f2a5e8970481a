"""One connection of a client: limits of time, an answer for those that have closed their sending side, 400 for malformed HTTP.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import uuid
from typing import Any, Protocol, cast

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import InvalidURLError, LineTooLong
from aiohttp.web_protocol import _ErrInfo

from minisgl.api.http.connection_limits import Connections
from minisgl.api.http.door import Door, Doorkeeper
from minisgl.api.request_log import RequestLog
from minisgl.errors import NOT_HTTP, RequestError, internal_error

log = logging.getLogger("minisgl.api")
HEADER_SECONDS = 30.0  # to the end of a request's headers, from the connection or from the first byte after another request
_LAST_SECONDS = 1.0  # for a client that is refused to say something, and to read why
_CLOSING_SECONDS = 0.02  # from the last byte of a request that is its client's last to the end of what it sends
_PROBE_SECONDS = 0.005  # from the end of what a client sends to a look whether it has left, doubled each time up to
_MAX_PROBE_SECONDS = 1.0
_KEEPALIVE_SECONDS = 15  # between TCP's own probes of a client that sends no more
_TCP_CLOSE_WAIT, _TCP_CLOSE = 8, 7  # states of a socket: the peer sends no more; the peer has reset the connection


class Watched(Protocol):
    """An answer that may still write: `probe` writes something harmless, which only a client that is there accepts."""

    def probe(self) -> None: ...

    @property
    def held(self) -> int:
        """Bytes of the answer that wait to be written, and are counted in `Kept`."""


class Connection(web.RequestHandler):
    """aiohttp's protocol of one connection, for the `server` of an AppRunner, with four changes.

    With a `door`, requests that the engine has no place for are refused there.

    aiohttp limits no time for headers, so silent connections would take every descriptor.  Here they have `seconds`, and all
    `connections` of a server have bounds together (see connection_limits.py).

    aiohttp drops a request whose client sends no more, as `nc -N` does after its request.  Here it is answered, as far as
    that can be told from a client that has left (see `eof_received`).

    aiohttp takes an answer for written while up to 64 KiB wait in the transport.  Here nothing may wait: the request is being
    served, and its client lags, until the kernel has all of it.

    aiohttp's `handle_error` repeats the bytes that are not HTTP, perhaps an API key, to the client and to the log.  Here it
    answers with OpenAI's error body.  A body that breaks off in such bytes would leave its reader waiting for the rest.
    """

    __slots__ = (
        "_answer",
        "_body",
        "_busy",
        "_connections",
        "_deaf",
        "_door",
        "_early",
        "_end_timer",
        "_generating",
        "_last",
        "_refused",
        "_request_log",
        "_seconds",
        "_streams",
        "_timer",
        "_wire",
        "half_closed",
        "since",
    )

    def __init__(
        self,
        server: web.Server,
        seconds: float = HEADER_SECONDS,
        request_log: RequestLog | None = None,
        connections: Connections | None = None,
        door: Door | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, **server._kwargs)
        self._door = door
        self._parser = cast(Any, Doorkeeper(self._parser, self._refuse))
        self._seconds, self._request_log = seconds, request_log or RequestLog()
        self._connections = Connections() if connections is None else connections
        self._timer: asyncio.TimerHandle | None = None  # for headers, or of a refusal
        self._end_timer: asyncio.TimerHandle | None = None
        self._refused = self._deaf = False
        self._busy = False  # with a request
        self._body: StreamReader | None = None  # of the latest request
        self._generating = self._streams = False  # what is known of the latest request
        self._early = False  # its client had sent its end before there was anything to wait for
        self._last = 0.0  # when the latest bytes came
        self._answer: Watched | None = None
        self.half_closed = False
        self.since = loop.time()  # when its client connected

    # ---------------- limits
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a connection needs a transport for reading and writing")
        self._wire = transport  # aiohttp forgets its own before everything is sent
        # Under TLS, asyncio pauses at the limit, not beyond it: with 0 it would pause with nothing to wait for.
        transport.set_write_buffer_limits(high=int(transport.get_extra_info("sslcontext") is not None), low=0)
        if self._connections.made(self):
            super().connection_made(transport)
            self._timer = self._loop.call_at(self.since + self._seconds, self._too_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        self._connections.lost(self)
        self._answer = None
        if not self._refused:
            super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._connections.lags(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._connections.reads(self)

    def show_out(self) -> None:
        self._wire.abort()

    def buffered(self) -> int:
        return self._wire.get_write_buffer_size()

    def held(self) -> int:
        return self.buffered() + (0 if self._answer is None else self._answer.held)

    def refuse(self) -> None:
        self._refused = True
        self._timer = self._loop.call_later(_LAST_SECONDS, self.show_out)

    def _too_late(self) -> None:
        text = f"The request's headers did not arrive within {self._seconds:g} seconds."
        self._connections.closed["headers"] += 1
        self._end_with(RequestError(text, status=408, code="request_timeout"), b"408 Request Timeout")

    def _end_with(self, error: RequestError, status: bytes) -> None:
        """Write an answer past aiohttp, which has no request, and read on for a while, without looking.

        Closing at once would reset the connection of a client that is still sending, before it has read the answer.
        """
        if not self._wire.is_closing() and not self._deaf:
            self._deaf = True
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(_LAST_SECONDS, self.show_out)
            body = json.dumps(error.body()).encode()
            self._request_log.refuse("unknown", uuid.uuid4().hex, error)
            after = b"" if error.retry_after is None else b"Retry-After: %d\r\n" % error.retry_after
            self._wire.write(
                b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nConnection: close\r\n%b"
                b"Content-Length: %d\r\n\r\n%b" % (status, after, len(body), body)
            )
            if self._wire.can_write_eof():
                self._wire.write_eof()
            else:
                self._wire.close()

    # ---------------- what the client sends
    def _refuse(self, message: Any, body: Any) -> bool:
        """Answer a message at the door.  False: it goes on, which it does where another one is not answered yet."""
        idle = not self._messages and self._waiter is not None and not self._waiter.done()
        if not idle or self._door is None or self.transport is None:
            return False
        peer = self.peername
        address = str(peer[0] if isinstance(peer, (list, tuple)) and peer else peer or "")
        answer = self._door.refusal(message, body, address, self._connections.draining)
        if answer is None:
            return False
        self._wire.write(answer)
        self._keepalive = True  # from here on as aiohttp does after an answer of its own
        self._next_keepalive_close_time = self._loop.time() + self.keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._connections.asked(self)
        self._connections.rests(self)
        if message.should_close or self._connections.draining:
            self._wire.close()
        return True

    def data_received(self, data: bytes) -> None:
        if self._refused:
            text = "The server has as many connections as it can have, all of them in use; try again in a moment."
            error = RequestError(text, status=503, code="server_overloaded", retry_after=1)
            self._end_with(error, b"503 Service Unavailable")
        if self._deaf:
            return
        self._last = self._loop.time()
        if self._timer is None and not self._busy and data.strip(b"\r\n"):  # the first bytes of another request
            self._timer = self._loop.call_later(self._seconds, self._too_late)
            self._next_keepalive_close_time = self._last + self._seconds + 1.0
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._busy, self._body = True, self._messages[-1][1]
            self._connections.asked(self)
        if self._messages and isinstance(broken := self._messages[-1][0], _ErrInfo):
            bodies = [payload for _, payload in self._messages]
            if self._current_request is not None:
                bodies.append(self._current_request.content)
            for body in bodies:
                if not body.is_eof():
                    body.set_exception(_not_http(broken.exc, broken.message or ""))
                    body.feed_eof()  # aiohttp reads and drops the rest of an abandoned body; here it has ended

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends no more: it has left, or waits for its answer with its sending side closed.  True: it is answered.

        The two look alike until something is written, which a client that has left resets.  A stream is kept: it writes a
        sign of life at once.  Another answer is kept if its end came with the request, as whoever closes the sending side
        does, and nobody who gives up; or if it is being written.
        """
        if self._wire.get_extra_info("sslcontext") is not None:
            return None  # TLS has no half of a connection
        if self.half_closed:
            return True
        if self._refused or self._deaf or not self._busy or self._body is None or not self._body.is_eof():
            return None
        if not (self._streams or self._is_early() or self._is_being_written()):
            return None
        self.half_closed = True
        sock: socket.socket | None = self._wire.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):  # a client that left is gone from its host in a minute
                sock.setsockopt(socket.IPPROTO_TCP, option, _KEEPALIVE_SECONDS)
            self._probe()
            self._look(_PROBE_SECONDS)
        return True

    def _is_early(self) -> bool:
        if self._early or not self._generating:
            return True
        request = self._current_request
        last = request is not None and not request.keep_alive
        return last and self._loop.time() - self._last <= _CLOSING_SECONDS

    def _is_being_written(self) -> bool:
        return self._current_request is not None and self._current_request.writer.output_size > 0

    def _probe(self) -> None:
        if self._answer is not None and not self._early:
            self._answer.probe()

    def _look(self, seconds: float) -> None:
        """End the connection if the client has reset it; nobody else notices, as nothing is read any more."""
        if _tcp_state(self._wire) == _TCP_CLOSE:
            self._wire.abort()
        elif not self._wire.is_closing():
            self._end_timer = self._loop.call_later(seconds, self._look, min(2 * seconds, _MAX_PROBE_SECONDS))

    # ---------------- what its requests say of themselves
    @property
    def ending(self) -> bool:
        """Whether no request can follow the one that is being answered."""
        return self.half_closed and not self._messages

    def generates(self, streams: bool = False) -> None:
        """The latest request has been read, and from now on costs something; `streams`: its answer is a stream."""
        if not self._generating:
            self._early = self.half_closed or _tcp_state(self._wire) == _TCP_CLOSE_WAIT
        self._generating, self._streams = True, streams

    def watch(self, answer: Watched) -> None:
        """The answer to the request that is being served."""
        self._answer = answer
        if self.half_closed:
            self._probe()

    async def finish_response(self, *args: Any) -> Any:
        try:
            return await super().finish_response(*args)
        finally:
            self._answer, self._generating, self._streams = None, False, False
            if not self._messages:
                self._busy = False
                self._connections.rests(self)
                if self.ending or self._connections.draining:
                    self.close()

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


def connection_of(request: web.BaseRequest) -> Connection | None:
    """The connection that a request came by; None where another server runs the application."""
    protocol = request.protocol
    return protocol if isinstance(protocol, Connection) else None


def _tcp_state(transport: asyncio.Transport) -> int:
    """The state of the transport's socket, as <netinet/tcp.h> numbers it; 0: it has none."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0 or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def _not_http(exc: BaseException | None, message: str) -> RequestError:
    """The error in the parser's own words, without the bytes that it quotes."""
    if isinstance(exc, LineTooLong):
        return RequestError("The request's line or one of its headers is too long.", status=431, code="header_too_large")
    said = [line.strip(" :.") for line in message.partition("\n\n")[0].splitlines()] or ["it cannot be read"]
    fault = "its URL cannot be read" if isinstance(exc, InvalidURLError) else said[-1][:80]
    return RequestError(f"The request is not HTTP/1.1: {fault}.", code=NOT_HTTP)

"""The first seconds of a connection: who does not say what they want is shown out.  Runs in the api process.

aiohttp waits for ever for the end of a first request's headers, so that a few thousand silent connections take every file
descriptor.  A `Door` is a connection's protocol until those headers are complete; then aiohttp's own takes its place.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import cast

from minisgl.errors import RequestError

HEADER_SECONDS = 30.0  # from the connection to the end of its first request's headers
_END = b"\r\n\r\n"


class Door(asyncio.Protocol):
    """The protocol of a new connection; `make` is aiohttp's factory of protocols (`AppRunner.server`)."""

    def __init__(self, make: Callable[[], asyncio.Protocol], seconds: float = HEADER_SECONDS) -> None:
        self._inner = make()
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

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

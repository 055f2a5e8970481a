"""Writes a streamed answer to its socket.  Runs in the api process, on the thread of its event loop."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable

from aiohttp import web

from minisgl.api.generation import StreamedAnswer

log = logging.getLogger("minisgl.api")


class Turn:
    """Batches callbacks into one call_soon per loop turn.

    One handle of the event loop for every piece of every stream would make up a tenth of the cost of streaming.
    """

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def soon(self, callback: Callable[[], None]) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._run)
        self._due.append(callback)

    def _run(self) -> None:
        due, self._due = self._due, []
        for callback in due:
            try:
                callback()
            except Exception:  # a bug: only its own stream fails
                log.exception("a piece of a stream could not be written")


TURN = web.AppKey("turn", Turn)


class StreamWriter:
    """Writes the rest of an answer as it grows, straight to the transport, at most one piece per turn of the event loop.

    No task is woken for a piece, and aiohttp's own writer is bypassed: at tens of thousands of pieces a second these would be
    most of the cost.  The response must be prepared and have been written to, so that its headers are out.
    """

    def __init__(self, request: web.Request, response: web.StreamResponse, answer: StreamedAnswer) -> None:
        if request.transport is None:
            raise ConnectionResetError("the client has left")
        self._request = request
        self._transport = request.transport
        self._chunked = response.chunked
        self._answer = answer
        self._pause: asyncio.Future[None] | None = None
        self._wrote = True  # since the last sweep
        self._soon = functools.partial(request.app[TURN].soon, self._write)

    async def run(self) -> None:
        """Write until the answer is done.  Raises ConnectionResetError when the client has left; stops when cancelled."""
        while not self._answer.done:
            self._pause = asyncio.get_running_loop().create_future()
            self._answer.listen(self._soon)
            await self._pause
            await self._request.writer.drain()

    def _write(self) -> None:
        """Write the new piece; wake `run` at the end of the answer, or if the client lags."""
        transport, answer, pause = self._transport, self._answer, self._pause
        if pause is None or pause.done():
            return
        if transport.is_closing():
            pause.set_exception(ConnectionResetError("the client has left"))
            return
        if piece := answer.more():
            self._wrote = True
            transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
        if answer.done or transport.get_write_buffer_size():
            pause.set_result(None)  # a client that lags gets its news in one piece, once the kernel has the last one
        else:
            answer.listen(self._soon)

    def sweep(self) -> None:
        """Show that the stream is alive if it has had nothing to send since the last call (see keep_alive.py)."""
        quiet, self._wrote = not self._wrote, False
        if quiet:
            self.probe()

    def probe(self) -> None:
        """Write a sign of life, unless something waits to be read."""
        waiting = self._pause is not None and not self._pause.done()
        if waiting and not self._transport.is_closing() and not self._transport.get_write_buffer_size():
            alive, self._wrote = self._answer.alive, True
            self._transport.write(b"%x\r\n%b\r\n" % (len(alive), alive) if self._chunked else alive)

    @property
    def held(self) -> int:
        """Bytes of the answer that wait in this process, apart from the transport's."""
        return self._answer.held

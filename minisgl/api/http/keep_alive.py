"""Keeps streams alive that have nothing to send: before the first token of a long prompt, and in long gaps.

Proxies and clients give up a connection that is silent for a minute or less.  One timer sweeps over all open streams, so that a
token costs no more than the note that something was written.  Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Protocol

from aiohttp import web

from minisgl.api.generation import StreamedAnswer

log = logging.getLogger("minisgl.api")
SWEEP_SECONDS = 2.5  # a stream that had nothing to send between two sweeps gets a sign of life
HELD_SWEEPS = 8  # after so many the headers of a stream go out, whatever may still be refused


class Swept(Protocol):
    """A stream, as the sweeps see it."""

    def sweep(self) -> None: ...


class KeepAlive:
    """Sweeps over the streams that are watched, as long as there are any."""

    def __init__(self) -> None:
        self._streams: dict[Swept, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watch(self, stream: Swept) -> Iterator[None]:
        """Have sweeps pass `stream` inside this context."""
        self._streams[stream] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self.sweep)
        try:
            yield
        finally:
            del self._streams[stream]

    def sweep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for stream in list(self._streams):
            try:
                stream.sweep()
            except Exception:  # a bug: only its own stream fails
                log.exception("a stream could not be kept alive")
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(SWEEP_SECONDS, self.sweep) if self._streams else None


KEEP_ALIVE = web.AppKey("keep_alive", KeepAlive)


class Opening:
    """A stream whose headers are held back, so that a refusal can still become an HTTP status.

    They go out with the first chunk.  Without one, the second sweep that finds all prompts with the scheduler sends them: the
    scheduler refuses a prompt at once, if at all.
    """

    def __init__(self, answer: StreamedAnswer) -> None:
        self._answer = answer
        self._accepted = False  # at the last sweep
        self._sweeps = 0

    def sweep(self) -> None:
        self._sweeps += 1
        if self._accepted or self._sweeps >= HELD_SWEEPS:
            self._answer.hurry()
        self._accepted = self._answer.accepted

    def probe(self) -> None:
        """Send the headers now: a client that has left does not take them."""
        self._answer.hurry()

    @property
    def held(self) -> int:
        """Bytes of the answer that wait in this process."""
        return self._answer.held

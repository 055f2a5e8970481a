"""Declares how the dialects render an answer as server-sent events, piece by piece.  Runs in the api process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from minisgl.api.engine import Chunk
from minisgl.api.usage import Timings
from minisgl.errors import RequestError

Pieces = Iterator[bytes | None]  # of events; None: enough work is done for one turn of the event loop


class Events(Protocol):
    """Renders an answer as server-sent events.  Every method returns complete events, perhaps none.

    `alive`: what shows during a silence that the stream is alive.
    """

    alive: bytes

    def start(self) -> bytes:
        """The events before the first chunk."""

    def adding(self, index: int, chunk: Chunk) -> Pieces:
        """The events of a chunk of the answer with this index, in pieces."""

    def ending(self, timings: Timings) -> Pieces:
        """The events after the last chunk of every answer, in pieces."""

    def failed(self, error: RequestError) -> bytes:
        """The events of a failure, instead of `end`."""


class SmallEvents(ABC):
    """Events that do not repeat what they have said: each is rendered in one turn."""

    @abstractmethod
    def add(self, index: int, chunk: Chunk) -> bytes:
        """The events of a chunk of the answer with this index."""

    @abstractmethod
    def end(self, timings: Timings) -> bytes:
        """The events after the last chunk of every answer."""

    def adding(self, index: int, chunk: Chunk) -> Pieces:
        yield self.add(index, chunk)

    def ending(self, timings: Timings) -> Pieces:
        yield self.end(timings)

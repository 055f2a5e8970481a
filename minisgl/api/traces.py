"""The trace of all processes, as the api process knows it: begins and ends it, and collects the events.

One runs at a time.  Whoever begins one is told when it has ended and all living processes have sent the rest of their events; a
process that dies takes its own with it, and the one that is started in its place joins.  `--trace FILE` begins one with the
engine.  Its events are appended to FILE.events, and become FILE when the server ends.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import minisgl.actors.messages as msg
from minisgl.actors.runtime.actor import Actor, Context
from minisgl.errors import RequestError, UserError
from minisgl.tracing.assemble import assemble, head, pack
from minisgl.tracing.probe import Probe

MAX_BYTES = 64 << 20  # of a trace over HTTP
SPOOLED = 4  # a trace is at least so much larger than its events
SUFFIX = ".events"
Then = Callable[[bytes], object]  # is told the spool


class Traces:
    """Begins and ends traces."""

    def __init__(self, ctx: Context, actor: Actor, path: str, megabytes: float, living: Callable[[], Iterable[str]]) -> None:
        """`path`: of --trace; "": none.  `living`: names of the other actors that take messages.  Raises UserError."""
        self._ctx, self._living = ctx, living
        self._probe = Probe(ctx, actor, ship=self.said)
        self._order: msg.Trace | None = None  # of the trace that runs, or is about to
        self._waiting: set[str] = set()  # actors whose last events have not come
        self._spool: list[bytes] = []
        self._most = self._room = 0  # bytes of the file, and left for events
        self._then: Then | None = None
        self._path = os.path.abspath(path) if path else ""
        if path:
            try:
                self._file = open(self._path + SUFFIX, "xb", buffering=0)  # noqa: SIM115
            except OSError as e:
                raise UserError(f"--trace {path}: {e.filename}: {e.strerror}") from e
            self._begin(msg.Trace(on=True), int(megabytes * (1 << 20)), self._write)

    @property
    def running(self) -> bool:
        """Whether there is one."""
        return self._order is not None

    def begin(self, steps: int, kernels: bool, then: Then) -> None:
        """Begin a trace; `then` is told its events when it has ended.  Raises RequestError (409) while there is one.

        It ends by itself after `steps`, if that is not 0, or when it is full.
        """
        if self._order is not None:
            text = "A trace runs already: wait until it has ended" + (" with the server (--trace)." if self._path else ".")
            raise RequestError(text, status=409, code="trace_runs")
        self._begin(msg.Trace(on=True, steps=steps, kernels=kernels), MAX_BYTES, then)

    def _begin(self, order: msg.Trace, most: int, then: Then) -> None:
        self._order, self._most, self._room, self._then = order, most, most // SPOOLED, then
        self._spool, self._waiting = [], set()
        self._keep(head(time.monotonic_ns(), time.time_ns()))
        self._probe(order)
        for name in self._living():
            self.joined(name)

    def joined(self, name: str) -> None:
        """An actor takes messages, from now on."""
        if self._order is not None and self._order.on:
            self._waiting.add(name)
            self._ctx.send(name, self._order)

    def end(self) -> None:
        """End the trace, if there is one; what is on its way still comes.  Idempotent."""
        if self._order is not None and self._order.on:
            self._order = msg.Trace(on=False)
            for name in self._waiting:
                self._ctx.send(name, self._order)
            self._probe.end()
            self._look()

    def finish(self) -> None:
        """End the trace with what has come.  Idempotent."""
        self._waiting.clear()
        self.end()
        self._look()

    def lost(self, names: Iterable[str]) -> None:
        """These have died."""
        self._waiting.difference_update(names)
        self._look()

    def said(self, m: msg.Traced) -> None:
        """Events have come."""
        if self._order is None:
            return
        self._keep(pack(m.name, m.pid, m.data))
        if m.last:
            self._waiting.discard(m.name)
        if m.enough or self._room < 0:
            self.end()
        self._look()

    def _keep(self, data: bytes) -> None:
        self._room -= len(data)
        if not self._path:
            self._spool.append(data)
            return
        try:
            self._file.write(data)
        except OSError as e:
            self._room = -1
            logging.getLogger("minisgl").warning("the trace %s ends: %s", self._path, e.strerror)

    def _look(self) -> None:
        """Tell who has begun the trace, when all is there."""
        if self._order is not None and not self._order.on and not self._waiting:
            self._order, then, self._then, spool, self._spool = None, self._then, None, b"".join(self._spool), []
            if then is not None:
                then(spool)

    def _write(self, _: bytes) -> None:
        """Make the file of --trace."""
        self._file.close()
        spool = Path(self._path + SUFFIX)
        try:
            Path(self._path).write_bytes(assemble(spool.read_bytes(), self._most))
            spool.unlink()
        except OSError as e:
            logging.getLogger("minisgl").warning("the trace %s is not written: %s", self._path, e.strerror)

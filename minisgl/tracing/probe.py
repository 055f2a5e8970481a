"""Records what one actor does, with the time: a Probe in every process, which sends its events to the api process.

The core knows nothing of it.  While a trace runs, methods of the actor, of its context and of what it owns are shadowed on
these objects by others that note when they were called; when it ends, the shadows are deleted, and what is left is the code as
it was.  A new name in the core is a line in one of the tables below, and a test checks that the names exist.

Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.  An event is a list:

    track | begin | end | name | arguments or None | hop or None

`track`: "" for the thread itself, "device" for a worker's device, others by their name, "requests" for what assemble.py makes
tracks of requests of.  `hop`: [OUT, kind, key, receivers] where something leaves the process, [IN, kind, key] where it comes.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgpack

from minisgl.actors.messages import Trace, Traced
from minisgl.actors.runtime.actor import Actor, Context
from minisgl.actors.wire import BadMessage

OUT, IN = 0, 1
BATCH = 1024  # events of a message
REQUESTS, DEVICE = "requests", "device"
Call = Callable[..., Any]
# By the kind of actor: where the object is that has the method, the method, and the name of its slices.
PLAIN: dict[str, tuple[tuple[str, str, str], ...]] = {
    "api": (("", "open", "open request"),),
    "scheduler": (("machine", "_retract", "retract"),),
    "worker": (("_runner", "capture_ahead", "capture a graph"),),
}


def key_of(m: Any) -> int:
    """What tells a message from others of its type, the same at both ends; nearly always."""
    if (uid := getattr(m, "uid", None)) is not None:
        return int(uid)
    if (uids := getattr(m, "uids", None)) is not None:
        return zlib.crc32(m.tokens.tobytes(), zlib.crc32(uids.tobytes()))
    return 0


class Batch:
    """Events in msgpack, packed as they come: the collector of garbage has nothing to look through.

    First their names, then each with its duration instead of its end, and the number of its name.
    """

    def __init__(self) -> None:
        self.events = 0
        self._names: dict[str, int] = {}
        self._packer = msgpack.Packer(autoreset=False)

    def add(self, began: int, ended: int, name: str, args: Any, hop: Any, *, track: str) -> None:
        names = self._names
        self._packer.pack((track, began, ended - began, names.setdefault(name, len(names)), args, hop))
        self.events += 1

    def take(self) -> bytes:
        """All events, which leave the batch."""
        data: bytes = msgpack.packb(list(self._names)) + self._packer.bytes()
        self._packer.reset()
        self._names, self.events = {}, 0
        return data


def unpacked(data: bytes) -> Iterator[tuple[str, int, int, str, Any, Any]]:
    """The events again."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(data) + 1)
    unpacker.feed(data)
    names = unpacker.unpack()
    for track, began, took, name, args, hop in unpacker:
        yield track, began, began + took, names[name], args, hop


class Probe:
    """The observer of an actor: see Actor.observer.

    `more` shadows what actors of this kind have beyond messages; `ship` takes what is sent, by default to the api process.
    """

    def __init__(
        self,
        ctx: Context,
        actor: Actor,
        more: Callable[[Probe, Actor, Trace], None] | None = None,
        ship: Callable[[Traced], object] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._ctx, self._actor, self._more, self._clock = ctx, actor, more, clock
        self._ship = ship
        self._batch: Batch | None = None  # while it traces
        self._count = 0  # of events
        self._undo: list[tuple[Any, str]] = []
        self._finish: list[Callable[[], None]] = []  # what else is to be done at the end
        self._enough = False

    def __call__(self, m: Trace) -> None:
        if m.on and self._batch is None:
            self._begin(m)
        elif not m.on:
            self.end()

    def _begin(self, m: Trace) -> None:
        kind = self._ctx.name.rstrip("0123456789")
        if kind == "scheduler" and getattr(self._actor, "machine", None) is None:
            raise BadMessage("the scheduler has nothing to trace yet")
        self._batch, self._enough = Batch(), False
        self._send: Call = self._ctx.send
        self._shadow(self._ctx, "send", self._sending)
        self._shadow(self._actor, "receive", self._receiving)
        self._shadow(self._actor, "stopping", self._stopping)
        for where, method, name in PLAIN.get(kind, ()):
            owner = getattr(self._actor, where) if where else self._actor
            self._shadow(owner, method, partial(self._plain, name))
        if self._more is not None:
            self._more(self, self._actor, m)

    def end(self) -> None:
        """Take everything back and send what is left.  Idempotent."""
        if self._batch is None:
            return
        for owner, name in reversed(self._undo):
            delattr(owner, name)
        self._undo.clear()
        for finish in self._finish:
            finish()
        self._finish.clear()
        self._flush(last=True)
        self._batch = None

    def _flush(self, last: bool = False, enough: bool = False) -> None:
        if self._batch is not None:
            m = Traced(self._ctx.name, os.getpid(), self._batch.take(), last, enough)
            (self._ship or partial(self._send, "api"))(m)

    # ---------------- for those who shadow
    def now(self) -> int:
        return self._clock()

    @property
    def count(self) -> int:
        """Events so far."""
        return self._count

    def shadow(self, owner: Any, name: str, make: Callable[[Call], Call]) -> None:
        """Have `owner.name` be what `make` makes of it, until the end."""
        self._shadow(owner, name, make)

    def _shadow(self, owner: Any, name: str, make: Callable[[Call], Call]) -> None:
        setattr(owner, name, make(getattr(owner, name)))
        self._undo.append((owner, name))

    def at_end(self, finish: Callable[[], None]) -> None:
        """Have this called when the trace ends, before the last events are sent."""
        self._finish.append(finish)

    def add(self, began: int, ended: int, name: str, args: Any = None, hop: Any = None, *, track: str = "") -> None:
        """Note an event."""
        if (batch := self._batch) is not None:
            self._count += 1
            batch.add(began, ended, name, args, hop, track=track)
            if batch.events >= BATCH:
                self._flush()

    def enough(self) -> None:
        """Say that the steps asked for have come."""
        if not self._enough:
            self._enough = True
            self._flush(enough=True)

    # ---------------- what all actors have
    def _plain(self, name: str, original: Call) -> Call:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self._clock()
            try:
                return original(*args, **kwargs)
            finally:
                self.add(began, self._clock(), name)

        return call

    def _sending(self, original: Call) -> Call:
        def send(to: str, m: Any) -> None:
            began = self._clock()
            original(to, m)
            kind = type(m).__name__
            if kind not in ("Traced", "Trace"):
                self.add(began, self._clock(), "send " + kind, None, (OUT, kind, key_of(m), (to,)))

        return send

    def _receiving(self, original: Call) -> Call:
        def receive(m: Any) -> None:
            began = self._clock()
            try:
                original(m)
            finally:
                kind = type(m).__name__
                if kind not in ("Traced", "Trace"):
                    self.add(began, self._clock(), kind, None, (IN, kind, key_of(m)))

        return receive

    def _stopping(self, original: Call) -> Call:
        def stopping() -> None:
            original()
            self.end()

        return stopping

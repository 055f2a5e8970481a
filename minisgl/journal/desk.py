"""The desk of the journals in the scheduler process: begins and ends them as messages ask, and says what became of them."""

from __future__ import annotations

import logging
import math
import secrets
import time

import minisgl.actors.messages as msg
from minisgl.actors.runtime.actor import Context
from minisgl.actors.scheduler.interface import Event, Output
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.journal.files import Files
from minisgl.journal.recorder import Recorder, Sink, Writer
from minisgl.version import __version__

STREAM_SECONDS = 0.1  # between two messages of the stream
_EARLY = 0.001  # an actor that is woken for something may come so much too early, and then looks all the time
_PIECE = 1 << 20  # bytes of a message


class _Stream:
    """The sink of those who watch: messages to the api process."""

    error = ""
    due = False  # it has one part

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._waiting = bytearray()
        self._begins = False
        self._next = -math.inf

    def begin(self, data: bytes) -> None:
        self._waiting, self._begins = bytearray(data), True

    def write(self, data: bytes) -> None:
        self._waiting += data

    def flush(self, now: float) -> float:
        """Send what there is, unless something was sent just now; returns when that may be done."""
        if now < self._next - _EARLY:
            return self._next if self._waiting else math.inf
        while self._waiting:
            self._ctx.send("api", msg.JournalBytes(bytes(self._waiting[:_PIECE]), self._begins))
            del self._waiting[:_PIECE]
            self._begins, self._next = False, now + STREAM_SECONDS
        return math.inf

    def close(self) -> None:
        """Nothing is kept."""


class Desk:
    """A Watcher for any number of journals of one machine, and how they begin and end: see `Watching` of the scheduler."""

    def __init__(self, ctx: Context, config: Config) -> None:
        self._ctx = ctx
        self._info = {"minisgl": __version__, "model": config.model.name, "source": config.model.path}
        self._recorder: Recorder | None = None
        self._open: dict[str, Writer] = {}  # by path

    def __call__(self, machine: StepMachine, m: msg.Journal | None) -> Desk | None:
        if m is None:
            return None
        self._recorder = self._recorder or Recorder(machine)
        if m.on and m.path not in self._open:
            self._begin(self._recorder, m)
        elif not m.on:
            self._end(m.path, "")
        return self._watcher()

    def _watcher(self) -> Desk | None:
        """Who watches: nobody without a journal, and then the machine is as it was."""
        if self._recorder is not None and not self._open:
            self._recorder.close()
            self._recorder = None
        return self if self._open else None

    def _begin(self, recorder: Recorder, m: msg.Journal) -> None:
        info = {**self._info, "run": secrets.token_hex(8), "unix_time": time.time(), "time": self._ctx.now()}
        try:
            sink: Sink = Files(m.path, m.megabytes) if m.path else _Stream(self._ctx)
            writer = Writer(sink, info, m.tokens)
            recorder.add(writer)
        except (OSError, UserError) as e:
            self._say(m.path, str(e))
            return
        self._open[m.path] = writer
        self._ctx.send("api", msg.Journaled(m.path, True, ""))

    def _end(self, path: str, error: str) -> None:
        writer = self._open.pop(path, None)
        if writer is None or self._recorder is None:
            return
        self._recorder.remove(writer)
        writer.sink.close()
        self._say(path, error or writer.sink.error)

    def _say(self, path: str, error: str) -> None:
        if error:
            logging.getLogger("minisgl").warning("the journal %s ends: %s", path, error)
        self._ctx.send("api", msg.Journaled(path, False, error))

    # ---------------- the Watcher
    def saw(self, inbox: list[Event], now: float, output: Output) -> None:
        if self._recorder is not None:
            self._recorder.saw(inbox, now, output)
            if self._recorder.wrote:  # it has no time to rest
                self._recorder.wrote = False
                self._flush(now)

    def rest(self, now: float) -> float:
        if self._recorder is None:
            return math.inf
        return min(self._recorder.rest(now), self._flush(now))

    def _flush(self, now: float) -> float:
        """Have the sinks send what they may; end the journals whose sinks have failed."""
        again = math.inf
        for path, writer in list(self._open.items()):
            if writer.sink.error:
                self._end(path, writer.sink.error)
            else:
                again = min(again, writer.sink.flush(now))
        self._watcher()
        return again

    def close(self) -> None:
        for path in list(self._open):
            self._end(path, "")

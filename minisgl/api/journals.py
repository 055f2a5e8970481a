"""The journals of the scheduler, as the api process knows them: one in files, and one stream for those who look on.

A scheduler that takes over from one that has died is told again what to keep: it begins another part.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import minisgl.actors.messages as msg
from minisgl.actors.runtime.actor import Context
from minisgl.config import ServerConfig
from minisgl.errors import RequestError

STREAM = ""  # the path of the stream
Then = Callable[[bool, str], object]  # whether the journal runs now, and what went wrong
OnBytes = Callable[[bytes, bool], None]  # bytes, and whether they begin anew (minisgl.journal.format)


class Journals:
    """Begins and ends journals.  `file`: the one that runs, or is about to; `failures`: journals that could not go on."""

    def __init__(self, ctx: Context, config: ServerConfig) -> None:
        self._ctx = ctx
        self.file: msg.Journal | None = None
        self.failures = 0
        if config.journal:
            path = os.path.abspath(config.journal)
            self.file = msg.Journal(path, on=True, tokens=config.journal_tokens, megabytes=config.journal_mb)
        self._stream: msg.Journal | None = None
        self._on_bytes: OnBytes = lambda data, begins: None
        self._ending = False
        self._waiting: list[Then] = []  # for what becomes of the one in files

    def engine_ready(self) -> None:
        """A scheduler takes messages.  What the one before was to end has ended with it."""
        if self.file is not None and self._ending:
            self.said(msg.Journaled(self.file.path, on=False, error=""))
        for m in (self.file, self._stream):
            if m is not None:
                self._ctx.send("scheduler", m)

    def begin(self, path: str, tokens: bool, megabytes: float, then: Then) -> None:
        """Begin a journal in files; `then` is told what became of it.  Raises RequestError (409) while there is one."""
        if self.file is not None:
            text = f"A journal runs already ({os.path.basename(self.file.path)}): stop it with POST /debug/journal/stop."
            raise RequestError(text, status=409, code="journal_runs")
        self.file = msg.Journal(path, on=True, tokens=tokens, megabytes=megabytes)
        self._waiting.append(then)
        self._ctx.send("scheduler", self.file)

    def end(self, then: Then) -> str:
        """End the journal in files; returns its path.  Raises RequestError (409) if there is none."""
        if self.file is None:
            raise RequestError("No journal runs: start one with POST /debug/journal/start.", status=409, code="no_journal")
        self._waiting.append(then)
        self._ending = True
        self._ctx.send("scheduler", msg.Journal(self.file.path, on=False, tokens=False, megabytes=1.0))
        return self.file.path

    def watch(self, on_bytes: OnBytes, tokens: bool = False) -> None:
        """Have the stream sent here, from its beginning, at most ten times a second; `tokens`: with token ids."""
        self.unwatch()
        self._on_bytes, self._stream = on_bytes, msg.Journal(STREAM, on=True, tokens=tokens, megabytes=1.0)
        self._ctx.send("scheduler", self._stream)

    def unwatch(self) -> None:
        """End the stream."""
        if self._stream is not None:
            self._ctx.send("scheduler", msg.Journal(STREAM, on=False, tokens=False, megabytes=1.0))
        self._on_bytes, self._stream = lambda data, begins: None, None

    # ---------------- what the scheduler says
    def said(self, m: msg.Journaled) -> None:
        """A journal has begun, or ended."""
        if m.path == STREAM:
            return
        self.failures += bool(m.error)
        if not m.on and self.file is not None and m.path == self.file.path:
            self.file, self._ending = None, False
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then(m.on, m.error)

    def came(self, m: msg.JournalBytes) -> None:
        """The stream goes on."""
        self._on_bytes(m.data, m.begins)

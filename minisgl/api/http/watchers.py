"""Those who look on: each has a stream of views, which the viewer process makes of the live journal.  Runs in the api process.

Whoever opens a journal has a viewer of their own, as long as they look at it.

The viewer and the journal begin with the first of them and end with the last (a little later: a page that is loaded again comes
back at once).  Nothing is kept for a reader that is slow: its next view is made when it has taken the one before.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import IO, Any

from minisgl.api.engine import Engine
from minisgl.api.http.process_facts import Processes, stat_of
from minisgl.api.rings import Depth, Depths
from minisgl.errors import RequestError
from minisgl.view.process import JOURNAL_BYTES, MAX_BEHIND, ViewerProcess

MOST = 16  # watchers
LINGER_SECONDS = 3.0  # the viewer stays after the last one
ANSWER_SECONDS = 60.0  # of the viewer: it may load a tokenizer, or live through a journal
OPEN_SECONDS = 120.0  # of a viewer that starts, and reads and replays a whole journal
_DIED = "The process that replayed the journal has ended: the file is damaged, or takes too much memory."
_GONE = "The journal is not shown: its reader has left, or has opened another."


class Watcher:
    """One of them.  `secret` names it in further requests; `client`: whose requests it may see, None: all.

    `own`: its viewer while it looks at a journal, and `file` that journal, where it came from its reader's own computer;
    `asked`: who waits for what becomes of it.
    """

    def __init__(self, number: int, client: int | None) -> None:
        self.number, self.client, self.secret = number, client, secrets.token_hex(12)
        self.views: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: the end
        self.own: ViewerProcess | None = None
        self.file: IO[bytes] | None = None
        self.asked: asyncio.Future[bytes] | None = None

    def drop_journal(self, why: str = _GONE) -> None:
        """End its own viewer, and tell who still waits for the journal why.  Idempotent."""
        if self.asked is not None and not self.asked.done():
            self.asked.set_result(json.dumps({"steps": 0, "trouble": why}).encode())
        for thing in (self.own, self.file):
            if thing is not None:
                thing.close()
        self.own = self.file = self.asked = None


class Watchers:
    """All of them, and the viewer process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)
        self._watchers: dict[int, Watcher] = {}
        self._viewer: ViewerProcess | None = None
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._linger: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._skipping = False
        self.processes: Processes = dict
        self.rings: Depths = dict
        self._usage: tuple[float, dict[str, Any]] = (0.0, {})
        self._cpu: dict[str, tuple[float, float]] = {}  # by process: when, and its seconds

    @property
    def viewer_pid(self) -> int | None:
        """Of the viewer, while it runs."""
        return self._viewer.pid if self._viewer is not None else None

    # ---------------- who comes and goes
    def enter(self, client: int | None) -> Watcher:
        """Somebody looks on from now.  Raises RequestError (429) if there are too many."""
        if len(self._watchers) >= MOST:
            text = f"{MOST} pages look on already: close one of them."
            raise RequestError(text, status=429, code="too_many_watchers", retry_after=10)
        watcher = Watcher(next(self._numbers), client)
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._viewer is None:
            self._start()
        self._watchers[watcher.number] = watcher
        self.send("watch", watcher.number, client, True)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """It does not look on any longer."""
        self._watchers.pop(watcher.number, None)
        watcher.drop_journal()
        self.send("leave", watcher.number)
        if not self._watchers and self._linger is None:
            self._linger = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.close)

    def find(self, secret: str, client: int | None) -> Watcher:
        """The watcher with this secret, for whoever may see the same.  Raises RequestError (404)."""
        for watcher in self._watchers.values():
            if secrets.compare_digest(watcher.secret.encode(), secret.encode("utf-8", "replace")) and watcher.client == client:
                return watcher
        raise RequestError("Nobody looks on under this name: GET /debug/live first.", status=404, code="no_watcher")

    def _start(self) -> None:
        self._viewer = self._process(self._ended)
        self._follow()

    def _process(self, ended: Callable[[], None], memory: int = 0) -> ViewerProcess:
        """Another viewer.  Raises RequestError (503)."""
        try:
            return ViewerProcess(self._engine.config.model, self._told, ended, memory)
        except OSError as e:
            text = f"The process that follows the engine cannot be started: {e.strerror}."
            raise RequestError(text, status=503, code="no_viewer", retry_after=5) from None

    def _follow(self) -> None:
        """Have the journal sent, from its beginning."""
        self._again, self._skipping = None, False
        if self._viewer is not None:
            self._engine.journals.watch(self._came, tokens=True)

    def _came(self, data: bytes, begins: bool) -> None:
        if self._viewer is None or self._skipping:
            return
        if self._viewer.behind > MAX_BEHIND:  # what it has not read is of the past: go on with the present, later
            self._skipping = True
            self._engine.journals.unwatch()
            self._anew()
            return
        self._viewer.send("journal", data, begins)

    def _anew(self) -> None:
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(1.0, self._follow)

    def _ended(self) -> None:
        """The viewer has died: pages are told, and come again."""
        self.close()

    def close(self) -> None:
        """End the viewer, the journal and all streams.  Idempotent; another `enter` begins anew."""
        for timer in (self._linger, self._again):
            if timer is not None:
                timer.cancel()
        self._linger = self._again = None
        viewer, self._viewer = self._viewer, None
        if viewer is not None:
            self._engine.journals.unwatch()
            viewer.close()
        for watcher in self._watchers.values():
            watcher.drop_journal()
            watcher.views.put_nowait(None)
        for future in self._answers.values():
            future.cancel()
        self._answers = {}

    # ---------------- journals
    def open(self, watcher: Watcher, path: str, file: IO[bytes] | None = None, number: int = 0) -> None:
        """Show the journal of a file; without a path the live one again.  `file` is closed when it is not shown any longer.

        `number`: of an answer that says what became of it.  Raises RequestError (503).
        """
        watcher.drop_journal()
        if not path:
            self.send("watch", watcher.number, watcher.client, True)
            return
        self.send("leave", watcher.number)
        watcher.file, watcher.asked = file, self._answers.get(number)
        ended = partial(self._journal_ended, watcher)
        watcher.own = self._process(ended, JOURNAL_BYTES)
        watcher.own.send("watch", watcher.number, watcher.client, True)
        watcher.own.send("open", watcher.number, path, number)

    async def open_file(self, watcher: Watcher, file: IO[bytes]) -> dict[str, Any]:
        """Show a journal without a name; returns {"steps": n}.  Raises RequestError (400, 503), and shows the live one."""
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        try:
            answer = json.loads(await self._answer(lambda number: self.open(watcher, path, file, number), OPEN_SECONDS))
            if answer["trouble"]:
                raise RequestError(answer["trouble"], code="no_journal")
            return {"steps": answer["steps"]}
        except BaseException:
            if watcher.file is file and watcher.number in self._watchers:
                self.open(watcher, "")
            raise

    def _journal_ended(self, watcher: Watcher) -> None:
        """The viewer of a journal has died: its reader is told, and sees the engine again."""
        watcher.drop_journal(_DIED)
        watcher.views.put_nowait(json.dumps({"trouble": _DIED, "kept": True}).encode())
        self.open(watcher, "")

    # ---------------- to and from the viewer
    def send(self, *message: Any) -> None:
        """Tell the viewer of the live journal."""
        if self._viewer is not None:
            self._viewer.send(*message)

    def tell(self, watcher: Watcher, kind: str, *values: Any) -> None:
        """Tell the viewer that somebody looks at."""
        (watcher.own.send if watcher.own is not None else self.send)(kind, watcher.number, *values)

    async def ask(self, watcher: Watcher, what: str, value: int) -> bytes:
        """The viewer's answer, JSON.  Raises RequestError (503) if there is none."""
        viewer = watcher.own or self._viewer
        return await self._answer(lambda n: viewer.send("ask", n, watcher.number, what, value) if viewer is not None else None)

    async def _answer(self, ask: Callable[[int], object], seconds: float = ANSWER_SECONDS) -> bytes:
        number = next(self._numbers)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            ask(number)
            return await asyncio.wait_for(future, seconds)
        except (asyncio.TimeoutError, asyncio.CancelledError) as e:
            if isinstance(e, asyncio.CancelledError) and not future.cancelled():
                raise
            text = "The process that follows the engine has not answered."
            raise RequestError(text, status=503, code="viewer_silent", retry_after=2) from None
        finally:
            self._answers.pop(number, None)

    def _told(self, message: list[Any]) -> None:
        kind, *values = message
        if kind == "view" and (watcher := self._watchers.get(values[0])) is not None:
            watcher.views.put_nowait(values[1])
        elif kind == "answer" and (future := self._answers.get(values[0])) is not None and not future.done():
            future.set_result(values[1])
        elif kind == "again":
            self._anew()

    # ---------------- the processes
    def _depths(self) -> dict[str, Depth]:
        try:
            return dict(self.rings())
        except OSError:  # a ring is being replaced
            return {}

    def actors(self) -> dict[str, Any]:
        """The processes of the server by name: [pid, seconds since the last sign of life, CPU share, bytes of memory]; the
        rings between them, see rings.py; and what waits in this process.  At most a second old."""
        now = time.monotonic()
        if now - self._usage[0] >= 0.9:
            rows = {}
            known = {**self.processes(), **({"viewer": (self._viewer.pid, None)} if self._viewer is not None else {})}
            for name, (pid, beat) in known.items():
                if (stat := stat_of(pid)) is None:
                    continue
                cpu, memory, _ = stat
                then, before = self._cpu.get(f"{name} {pid}", (now, cpu))
                self._cpu[f"{name} {pid}"] = now, cpu
                share = None if now <= then else round((cpu - before) / (now - then), 3)
                rows[name] = [pid, None if beat is None else round(beat, 2), share, memory]
            state = {"state": self._engine.state, "open": self._engine.open_requests, "down": self._engine.down}
            more = {"restarts": dict(self._engine.restarts), "kept": self._engine.kept.bytes, "rings": self._depths()}
            self._usage = now, {"processes": rows, **more, **state}
        return self._usage[1]

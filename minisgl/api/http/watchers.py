"""Those who look on: each has a stream of views, which the viewer process makes of the live journal.  Runs in the api process.

The viewer and the journal begin with the first of them and end with the last (a little later: a page that is loaded again comes
back at once).  Nothing is kept for a reader that is slow: its next view is made when it has taken the one before.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from typing import Any

from minisgl.api.engine import Engine
from minisgl.api.http.process_facts import Processes, stat_of
from minisgl.errors import RequestError
from minisgl.view.process import MAX_BEHIND, ViewerProcess

MOST = 16  # watchers
LINGER_SECONDS = 3.0  # the viewer stays after the last one
ANSWER_SECONDS = 20.0  # of the viewer: it may load a tokenizer, or live through a journal


class Watcher:
    """One of them.  `secret` names it in further requests; `client`: whose requests it may see, None: all."""

    def __init__(self, number: int, client: int | None) -> None:
        self.number, self.client, self.secret = number, client, secrets.token_hex(12)
        self.views: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: the end


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
        try:
            self._viewer = ViewerProcess(self._engine.config.model, self._told, self._ended)
        except OSError as e:
            text = f"The process that follows the engine cannot be started: {e.strerror}."
            raise RequestError(text, status=503, code="no_viewer", retry_after=5) from None
        self._follow()

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
            watcher.views.put_nowait(None)
        for future in self._answers.values():
            future.cancel()
        self._answers = {}

    # ---------------- to and from the viewer
    def send(self, *message: Any) -> None:
        """Tell the viewer."""
        if self._viewer is not None:
            self._viewer.send(*message)

    async def ask(self, watcher: Watcher, what: str, value: int) -> bytes:
        """The viewer's answer, JSON.  Raises RequestError (503) if there is none."""
        number = next(self._numbers)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        self.send("ask", number, watcher.number, what, value)
        try:
            return await asyncio.wait_for(future, ANSWER_SECONDS)
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
    def actors(self) -> dict[str, Any]:
        """The processes of the server by name: [pid, seconds since the last sign of life, CPU share, bytes of memory]; and
        what waits in this process.  At most a second old."""
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
            self._usage = (
                now,
                {"processes": rows, "restarts": dict(self._engine.restarts), "kept": self._engine.kept.bytes, **state},
            )
        return self._usage[1]

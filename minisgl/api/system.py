"""Starts and ends a complete engine: shared memory, mailbox, child processes and the gateway.

Runs in the api process.  The HTTP server drives it from asyncio (watch `fds()`, call `pump(0)`, and `tick()` by the clock), the
LLM class by blocking in `pump(seconds)`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import zmq

from minisgl.actors import spawn
from minisgl.actors.messages import Stop
from minisgl.actors.runtime.actor import Actor
from minisgl.actors.runtime.process import ZmqContext
from minisgl.actors.runtime.shared_memory import Arenas, actor_names, close_arenas, create_arenas, tokenizer_names
from minisgl.actors.runtime.supervisor import Supervisor, make_run_dir
from minisgl.api.gateway import Gateway
from minisgl.config import Config
from minisgl.errors import UserError

_BURST = 4  # messages handled in one call of `pump`; each may bring a token of every running request
_LEAVE_SECONDS = 3.0  # actors that have not left by then are killed


class System:
    """Spawns every actor on construction; `close` leaves no process, no socket file and no shared memory."""

    def __init__(self, config: Config, make_worker: spawn.MakeWorker = spawn.make_worker) -> None:
        self.config = config
        self._closed = False
        with ExitStack() as undo:  # in case a later step fails
            self.run_dir = make_run_dir()
            undo.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
            self.supervisor = Supervisor(self.run_dir)
            undo.callback(self.supervisor.kill)
            self.ctx = ZmqContext(self.run_dir, "api")
            undo.callback(self.ctx.close)
            arenas, self._fds = create_arenas(config)
            undo.callback(close_arenas, self._fds)
            self.gateway = Gateway(self.ctx, config, arenas)
            self._spawn(arenas, make_worker)
            undo.pop_all()

    def _spawn(self, arenas: Arenas, make_worker: spawn.MakeWorker) -> None:
        def start(name: str, make: Callable[..., Actor], *args: Any) -> None:
            self.supervisor.spawn(name, spawn.with_logs, self.config.server.log_format, make, *args)

        for rank in range(self.config.engine.tp):  # the workers first: they take longest to start
            start(f"worker{rank}", make_worker, self.config, arenas, rank, self.run_dir)
        start("scheduler", spawn.make_scheduler, self.config, arenas)
        for i, name in enumerate(tokenizer_names(self.config.server.num_tokenizers)):
            start(name, spawn.make_tokenizer, self.config, arenas, i)
        start("detokenizer", spawn.make_detokenizer, self.config)
        start("checker", spawn.make_checker, self.config)

    # ---------------- driving
    def fds(self) -> list[int]:
        """Descriptors to watch: whenever one is readable, call `pump(0)` until the next event."""
        return [self.ctx.inbox.FD, *self.supervisor.sentinels()]

    def pump(self, seconds: float) -> bool:
        """Handle messages, waiting at most `seconds` for the first.  True: there may be more, call again."""
        seconds = min(seconds, self.tick()) if seconds > 0 else 0
        if seconds > 0 and not self.ctx.inbox.poll(0):
            poller = zmq.Poller()
            poller.register(self.ctx.inbox, zmq.POLLIN)
            for fd in self.supervisor.sentinels():
                poller.register(fd, zmq.POLLIN)
            poller.poll(int(seconds * 1000) + 1)
        dead = self.supervisor.reap()
        handled = 0
        while (dead or handled < _BURST) and (msg := self.ctx.recv()) is not None:  # all messages of a child that died
            self.gateway.receive(msg)
            handled += 1
        for death in dead:
            self.gateway.actor_died(death)
        return handled == _BURST

    def tick(self) -> float:
        """Do what is due by the clock; returns after how many seconds it wants to be called again, at the latest."""
        return self.gateway.tick(self.ctx.now())

    def wait_ready(self, seconds: float = 600.0) -> None:
        """Block until requests can be served.  Raises UserError with the reason if that cannot happen."""
        end = time.monotonic() + seconds
        while self.gateway.state == "starting":
            if time.monotonic() > end:
                raise UserError(f"the engine was not ready after {seconds:.0f} s")
            self.pump(0.5)
        if self.gateway.state != "ready":
            raise UserError(self.gateway.failure or "the engine could not start")

    # ---------------- the end
    def close(self) -> None:
        """Fail open requests, stop every actor in order, kill those that do not leave, remove all files.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        was_ready = self.gateway.num_pages > 0 and self.gateway.state != "dead"
        self.gateway.end()
        try:
            if was_ready:  # otherwise a worker may be loading weights and does not read messages
                for name in actor_names(0, self.config.server.num_tokenizers):
                    self.ctx.send(name, Stop("shutdown"))
                self.supervisor.join(_LEAVE_SECONDS, self.pump)
        finally:
            self.supervisor.kill()
            self.ctx.close()
            close_arenas(self._fds)
            shutil.rmtree(self.run_dir, ignore_errors=True)

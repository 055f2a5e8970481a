"""Starts and ends a complete engine: shared memory, mailbox, child processes and the gateway.

Runs in the api process.  The HTTP server drives it from asyncio (watch `fds()`, call `pump(0)`, and `tick()` by the clock), the
LLM class by blocking in `pump(seconds)`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zmq

from minisgl.actors import spawn
from minisgl.actors.messages import ActorDied, Stop
from minisgl.actors.runtime.process import ZmqContext
from minisgl.actors.runtime.shared_memory import Memory, actor_names
from minisgl.actors.runtime.supervisor import Supervisor, make_run_dir
from minisgl.api.gateway import Gateway
from minisgl.api.recovery import Recovery
from minisgl.api.rings import Rings
from minisgl.config import RENDEZVOUS, Config
from minisgl.errors import UserError

_BURST = 4  # messages handled in one call of `pump`; each may bring a token of every running request
_LEAVE_SECONDS = 3.0  # actors that have not left by then are killed


class System:
    """Spawns every actor on construction; `close` leaves no process, no socket file and no shared memory.

    An actor that dies is started again, see recovery.py: a System is its Processes.
    """

    def __init__(
        self,
        config: Config,
        make_worker: spawn.MakeWorker = spawn.make_worker,
        make_scheduler: spawn.MakeScheduler = spawn.make_scheduler,
    ) -> None:
        self.config = config
        self._make_worker, self._make_scheduler = make_worker, make_scheduler
        self._closed = False
        self._dead: list[ActorDied] = []  # whose last messages have not been handled
        with ExitStack() as undo:  # in case a later step fails
            self.run_dir = make_run_dir()
            undo.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
            self.supervisor = Supervisor(self.run_dir)
            undo.callback(self.supervisor.kill)
            self.ctx = ZmqContext(self.run_dir, "api")
            undo.callback(self.ctx.close)
            self._memory = Memory(config)
            undo.callback(self._memory.close)
            self.gateway = Gateway(self.ctx, config, self._memory.arenas)
            self.rings = Rings(lambda: self._memory.arenas)
            self.recovery = Recovery(config, self.gateway, self.ctx, self._memory, self)
            for name in reversed(actor_names(config.engine.tp, config.server.num_tokenizers)):  # the workers take longest
                self.gateway.pids[name] = self.start(name)
            undo.pop_all()

    def start(self, name: str, takes_over: int = 0) -> int:
        """Start an actor; returns the pid of its process.  `takes_over`: see SchedulerActor."""
        config, arenas = self.config, self._memory.arenas
        kind = name.rstrip("0123456789")
        index = int(name.removeprefix(kind) or 0)
        make: tuple[Any, ...] = {
            "worker": (self._make_worker, config, arenas, index, self.run_dir),
            "scheduler": (self._make_scheduler, config, arenas, takes_over),
            "tokenizer": (spawn.make_tokenizer, config, arenas, index),
            "detokenizer": (spawn.make_detokenizer, config),
            "checker": (spawn.make_checker, config),
        }[kind]
        return self.supervisor.spawn(name, spawn.in_process, arenas.board, config.server.log_format, *make)

    def end(self, names: Collection[str]) -> None:
        """End actors at once, and wait until their memory is free.  Raises OSError for one that does not end."""
        self.supervisor.end(names)
        if "worker0" in names:  # with all others: where they found each other, the next ones must not find the dead
            Path(self.run_dir, RENDEZVOUS).unlink(missing_ok=True)

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
        self._dead += self.supervisor.reap()
        handled = 0
        while (self._dead or handled < _BURST) and (msg := self.ctx.recv()) is not None:  # all messages of a child that died
            self.ctx.dispatch(self.gateway, msg)
            handled += 1
        dead, self._dead = self._dead, []
        if dead:
            self.recovery.died(dead)
        return handled == _BURST

    def tick(self) -> float:
        """Do what is due by the clock; returns after how many seconds it wants to be called again, at the latest."""
        self.recovery.tick()
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
        all_up = not self.gateway.silent and self.gateway.engine_up and self.gateway.state != "dead"
        self.gateway.end()
        try:
            if all_up:  # otherwise a worker may be loading weights and does not read messages
                for name in actor_names(0, self.config.server.num_tokenizers):
                    self.ctx.send(name, Stop("shutdown"))
                self.supervisor.join(_LEAVE_SECONDS, self.pump)
        finally:
            self.supervisor.kill()
            self.gateway.traces.finish()
            self.ctx.close()
            self._memory.close()
            shutil.rmtree(self.run_dir, ignore_errors=True)

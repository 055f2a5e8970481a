"""Starts processes again that have died or stand still: the supervision of the engine.  Runs in the api process.

Every other process is disposable, because the gateway's ledger has all that is needed to run an open request again.

tokenizer, checker, detokenizer   one of them is started again alone (OTP's one_for_one);
scheduler                         is started again alone, and takes the workers over with their weights and cached pages;
worker                            all workers and the scheduler, because ranks wait for each other in collectives (one_for_all).

More than --max-restarts within --restart-window end the server: then something is wrong that a restart does not mend.  What a
request on trial ends does not count (trials.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

from minisgl import logs
from minisgl.actors.messages import ActorDied
from minisgl.actors.runtime.actor import Context
from minisgl.actors.runtime.shared_memory import Memory, actor_names
from minisgl.api.gateway import Gateway
from minisgl.config import Config

_AT_ONCE_SECONDS = 0.1  # processes that die so soon after others count as one death
_REPLAYED = {"scheduler", "detokenizer"}  # requests that run are sent again when one of these dies
_LAST_WORDS_SECONDS = 0.5  # for a process that stands still to print its stacks


class Processes(Protocol):
    """Starts and ends the other actors."""

    def end(self, names: Collection[str]) -> None:
        """End these at once, if they live; nothing of them is left afterwards.  Raises OSError."""

    def start(self, name: str, takes_over: int = 0) -> int:
        """Start one; returns its pid.  `takes_over`: see SchedulerActor."""


class Recovery:
    """Decides what is started again when something has died."""

    def __init__(self, config: Config, gateway: Gateway, ctx: Context, memory: Memory, processes: Processes) -> None:
        self._server = config.server
        self._gateway = gateway
        self._ctx = ctx
        self._memory = memory
        self._processes = processes
        self._workers = tuple(n for n in actor_names(config.engine.tp) if n.startswith("worker"))
        self._restarts: deque[float] = deque()  # when
        self._loaded = False  # a scheduler can take the workers over, also if the last one has not come to that
        self._report = _Report(gateway)
        self._oom = _oom_kills()
        self._doomed: dict[str, float] = {}  # stands still -> when it is killed

    # ---------------- deaths
    def died(self, deaths: Sequence[ActorDied]) -> None:
        """Some processes have ended, and none of their messages is left in the mailbox."""
        gateway, now = self._gateway, self._ctx.now()
        deaths = [d for d in deaths if not gateway.expects(d)]
        if not deaths:
            return
        first = next((d for d in deaths if d.name in self._workers), deaths[0])
        how = f"the process {first.name} {_how(first)}"
        if gateway.state == "starting" and first.exitcode > 0:
            gateway.give_up(first, gateway.failure or how)
            return
        if not gateway.on_trial and not self._may_restart(now):
            gateway.give_up(first, how + self._too_often())
            return
        names = self._group({d.name for d in deaths})
        # Who was killed from outside has not died of what it did; the kernel kills for want of memory, we what stands still.
        oom, self._oom = self._oom, _oom_kills()
        own = {d.name for d in deaths if d.exitcode != -signal.SIGKILL or d.name in self._doomed or self._oom > oom}
        try:
            self._processes.end(names)
            self._report.begin(now, first, names, len(self._restarts), self._server.max_restarts)
            self._start(names, own)
        except OSError as e:
            gateway.give_up(first, f"{how}, and cannot be started again: {e}")

    def _group(self, dead: set[str]) -> list[str]:
        """The processes to start again, in order: what takes longest first."""
        self._loaded |= self._gateway.engine_up
        if not dead.isdisjoint(self._workers) or ("scheduler" in dead and not self._loaded):
            self._loaded = False
            dead |= {*self._workers, "scheduler"}
        first = [n for n in (*self._workers, "scheduler") if n in dead]
        return [*first, *sorted(dead.difference(first))]

    def _start(self, names: list[str], own: set[str]) -> None:
        gateway, memory, takes_over = self._gateway, self._memory, 0
        if "scheduler" in names:
            takes_over = 0 if self._workers[0] in names else gateway.num_pages
            memory.renew("requests", *(() if takes_over else ("plans", "results", "pages")))
        for name in names:
            self._ctx.forget(name)
            gateway.watchdog.clear(name)
            gateway.pids[name] = self._processes.start(name, takes_over if name == "scheduler" else 0)
            self._doomed.pop(name, None)
        gateway.lost(names, memory.arenas.requests, own)

    def _may_restart(self, now: float) -> bool:
        while self._restarts and now - self._restarts[0] > self._server.restart_window:
            self._restarts.popleft()
        if self._restarts and now - self._restarts[-1] < _AT_ONCE_SECONDS:
            return True
        if len(self._restarts) >= self._server.max_restarts:
            return False
        self._restarts.append(now)
        return True

    def _too_often(self) -> str:
        most, window = self._server.max_restarts, self._server.restart_window
        return f", after {most} restarts within {window:g} s (--max-restarts {most})" if most else " (--max-restarts 0)"

    # ---------------- by the clock
    def tick(self) -> None:
        """Report what has recovered, and end what has stood still for --hang-seconds."""
        self._report.look()
        now, gateway = self._ctx.now(), self._gateway
        gateway.watchdog.tick()
        if not self._server.hang_seconds or gateway.state in ("stopped", "dead"):
            return
        for name, at in self._doomed.items():
            if now >= at:
                self._doomed[name] = math.inf  # until it is started again
                _signal(gateway.pids.get(name, 0), signal.SIGKILL)
        for name in gateway.still(self._server.hang_seconds):
            if name not in self._doomed:
                self._doom(name, now)

    def _doom(self, name: str, now: float) -> None:
        """Have all processes print their stacks, and this one killed."""
        seconds = self._server.hang_seconds
        text = f"minisgl: the process {name} stands still for {seconds:g} s (--hang-seconds): stacks of all, then another one"
        logs.say("hang", text, logging.ERROR, process=name, seconds=seconds)
        self._doomed[name] = now + _LAST_WORDS_SECONDS
        for other, pid in self._gateway.pids.items():
            if other not in self._gateway.silent:  # one that is starting does not print: the signal would end it
                _signal(pid, signal.SIGUSR1)


class _Report:
    """The log lines of a recovery, and how long its parts took."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._names: list[str] = []
        self._began = 0.0

    def begin(self, now: float, death: ActorDied, names: list[str], restarts: int, most: int) -> None:
        if not self._names:
            self._began = now
        self._names = list(dict.fromkeys([*self._names, *names]))
        self._gateway.resumed = 0.0
        n = self._gateway.open_requests
        text = (
            f"minisgl: {death.name} {_how(death)}; starting {', '.join(names)} again (restart {restarts} of {most}), "
            f"{n} open requests go on then"
        )
        facts = {"process": death.name, "exit": death.exitcode, "starting": names, "open_requests": n}
        logs.say("restart", text, logging.WARNING, **facts)

    def look(self) -> None:
        """Say that all is well again, once it is."""
        gateway = self._gateway
        if not self._names or gateway.silent or not gateway.engine_up or gateway.state == "dead":
            return
        replays = not _REPLAYED.isdisjoint(self._names)
        if replays and gateway.waiting_for_replay and not gateway.resumed:
            return
        hellos = [gateway.hellos[name] for name in self._names]
        up = max(gateway.engine_up_at if "scheduler" in self._names else 0.0, *(h.up for h in hellos))
        end = max(up, gateway.resumed if replays else 0.0)
        slowest = max(hellos, key=lambda h: h.up)
        parts = {
            "spawn": slowest.began - self._began,
            "import": slowest.made - slowest.began,
            "load": up - slowest.made,
            "replay": end - up,
        }
        said = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
        total = end - self._began
        rounded = {name: round(seconds, 4) for name, seconds in parts.items()}
        logs.say("recovered", f"minisgl: recovered in {total:.2f} s ({said})", seconds=round(total, 4), parts=rounded)
        self._names = []


def _how(death: ActorDied) -> str:
    return f"was killed by signal {-death.exitcode}" if death.exitcode < 0 else f"ended with exit code {death.exitcode}"


def _oom_kills() -> int:
    """Processes of this machine that the kernel has killed for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", "rb") as f:
        for line in f:
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0


def _signal(pid: int, number: int) -> None:
    """Send a signal to a child, which may have ended."""
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

"""Actors that test_process.py spawns in real processes (children import this module by name)."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

from minisgl.actors.messages import Cancel, Tokenized, Wake
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.ring import RingReader, RingSpec
from minisgl.actors.runtime.shared_memory import Arenas
from minisgl.actors.worker import WorkerActor
from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.model.fake_runner import FakeRunner
from minisgl.plan import StepPlan

POISON = 4321


class Echo(Actor):
    """Answers Cancel with Tokenized; Wake makes it crash; Tokenized(n) makes it end by signal n."""

    @on(Cancel)
    def cancel(self, m: Cancel) -> None:
        self.ctx.send("api", Tokenized(m.uid, os.getpid()))

    @on(Wake)
    def wake(self, m: Wake) -> None:
        raise RuntimeError("boom")

    @on(Tokenized)
    def tokenized(self, m: Tokenized) -> None:
        os.kill(os.getpid(), signal.Signals(m.n))


class RingEcho(Actor):
    """Parks on a ring; every record it reads is answered with its length."""

    def __init__(self, ctx: Context, spec: RingSpec) -> None:
        super().__init__(ctx)
        self.ring = RingReader(spec)

    @on(Wake)
    def wake(self, m: Wake) -> None: ...

    def idle(self) -> bool:
        raw = self.ring.take()
        if raw is not None:
            self.ring.park(False)
            self.ctx.send("api", Tokenized(0, len(raw)))
            return True
        self.ring.park(True)
        return self.ring.pending()


def make_echo(ctx: Context) -> Actor:
    return Echo(ctx)


def make_ring_echo(ctx: Context, spec: RingSpec) -> Actor:
    return RingEcho(ctx, spec)


def make_refusing(ctx: Context) -> Actor:
    raise UserError("the file weights.gguf is damaged: download it again")


def make_dying_worker(ctx: Context, config: object, arenas: Arenas, rank: int, run_dir: str) -> Actor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class PoisonedRunner(FakeRunner):
    """Ends its process when it computes a prompt with POISON in it, as a kernel with a bug would."""

    def launch(self, plan: StepPlan) -> Any:
        if POISON in plan.ids:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().launch(plan)


def make_poisoned_worker(ctx: Context, config: Config, arenas: Arenas, rank: int, run_dir: str) -> Actor:
    return WorkerActor(ctx, rank, arenas, lambda: PoisonedRunner(config))


def never_return() -> None:
    """A C call that no signal interrupts, with the GIL held: a lock taken twice."""
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


class Deaf(Actor):
    """Answers Wake, and after that nothing any more."""

    @on(Wake)
    def wake(self, m: Wake) -> None:
        self.ctx.send("api", Tokenized(0, os.getpid()))
        never_return()


def make_deaf(ctx: Context) -> Actor:
    return Deaf(ctx)


def make_deaf_at_once(ctx: Context) -> Actor:
    ctx.send("api", Tokenized(0, os.getpid()))
    never_return()
    raise AssertionError("unreachable")

"""The scheduler actor runs the step machine: it feeds it messages and results, and publishes its plans to the workers.

Owns      the state of every request, the page pool and the radix cache (inside the StepMachine); torch is never imported.
Receives  Generate, Cancel (api, detokenizer); FlushCache, Journal, Reconnect, Stop (api); WorkerLoaded, WorkerArmed,
          GrammarPrepared, MayCapture, Wake (workers); results through the token ring.
Sends     Track, TokenLogprobs, Tokens (detokenizer); Rejected, Evicted, Started, Embedded, EngineReady (api); Capacity,
          PrepareGrammar, Wake (workers); plans through the plan ring.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np

import minisgl.actors.messages as msg
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.ring import RingReader, RingWriter, attach
from minisgl.actors.runtime.shared_memory import Arenas
from minisgl.actors.runtime.status import Board
from minisgl.actors.scheduler.interface import GPU_PROMPT_SECONDS, Add, Drop, Event, Flush, Output, SchedulerLimits, Watcher
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.actors.wire import BadMessage
from minisgl.cache.kept import KeptPages
from minisgl.cache.no_cache import CACHES
from minisgl.config import Config
from minisgl.plan import PlanKind, StepPlan, StepResult

STATS_SECONDS = 1.0  # between two statistics while steps run,
SOON = 0.01  # where a request was cancelled: its pages are free at once
# Begins or ends a journal, or is told that the machine is there (None); returns who watches from now on.
Watching = Callable[[StepMachine, msg.Journal | None], Watcher | None]


class SchedulerActor(Actor):
    """Connects the machine to the messages and rings of the other processes."""

    def __init__(
        self, ctx: Context, config: Config, arenas: Arenas, takes_over: int = 0, watching: Watching | None = None
    ) -> None:
        """`takes_over`: this many KV pages, and the cache, from a scheduler that has died, with the workers; 0: none."""
        super().__init__(ctx)
        self.config = config
        self.plans = RingWriter(arenas.plans)
        self.results = RingReader(arenas.results)
        self.requests = RingReader(arenas.requests)
        self._pages = arenas.pages
        self.board = Board(arenas.board, ctx.name)
        self.watcher: Watcher | None = None
        self._watching = watching
        self.machine: StepMachine | None = None  # made when the workers have reported their memory
        self._inbox: list[Event] = []
        self._compiling: dict[int, tuple[Request, set[int]]] = {}  # by uid: who waits for a grammar, of which ranks
        self._unsent: StepPlan | None = None  # a plan that does not fit into the ring yet
        self._max_pages: dict[int, int] = {}  # rank -> pages that fit
        self._armed: set[int] = set()
        self._stopping = self._may_capture = False
        self._flags_up = False
        self._reported, self._cancelled = -STATS_SECONDS, False
        self._stats: dict[str, int] = {}
        self._first_step = 0  # results of earlier steps belong to requests of the scheduler before
        if takes_over:
            self._first_step = self.board.line(ctx.name).step + 1 + config.engine.lag
            self._make_machine(takes_over)
            self._machine().table.take_over()
            self._unsent = StepPlan(self._first_step, PlanKind.REJOIN)

    # ---------------- start-up
    @on(msg.WorkerLoaded)
    def worker_loaded(self, m: msg.WorkerLoaded) -> None:
        engine = self.config.engine
        if m.rank >= engine.tp or m.rank in self._max_pages:
            raise BadMessage(f"no worker {m.rank} is expected")
        self._max_pages[m.rank] = m.max_pages
        if len(self._max_pages) < engine.tp:
            return
        num_pages = min(self._max_pages.values())
        self._make_machine(num_pages)
        for rank in range(engine.tp):
            self.ctx.send(f"worker{rank}", msg.Capacity(num_pages))

    def _make_machine(self, num_pages: int) -> None:
        engine = self.config.engine
        limits = SchedulerLimits(
            slots=engine.max_running,
            num_pages=num_pages,
            page_size=engine.page_size,
            max_context=self.config.max_context,
            step_tokens=engine.step_tokens,
            max_steps_in_flight=engine.lag,
            vocab_size=self.config.model.vocab_size,
            eos_ids=self.config.model.eos_ids,
            cache=CACHES[engine.cache],
            itl_target=None if engine.itl_target_ms < 0 else engine.itl_target_ms / 1000,
            prompt_seconds=GPU_PROMPT_SECONDS if engine.device == "cuda" else 0.0,
            order=engine.order,
            grammar_waits_for_token=engine.device == "cuda",
        )
        size = KeptPages.size(num_pages, engine.page_size)
        self.machine = StepMachine(limits, KeptPages(num_pages, engine.page_size, memoryview(attach(self._pages, size))))
        self.machine.counters.steps = self._first_step
        if self._watching is not None:
            self.watcher = self._watching(self.machine, None)

    @on(msg.WorkerArmed)
    def worker_armed(self, m: msg.WorkerArmed) -> None:
        if self.machine is None or not 0 <= m.rank < self.config.engine.tp:
            raise BadMessage(f"no worker {m.rank} has been told its capacity")
        self._armed.add(m.rank)
        if len(self._armed) == self.config.engine.tp:
            self.ctx.send("api", msg.EngineReady(self._machine().limits.num_pages, os.getpid()))

    def _machine(self) -> StepMachine:
        if self.machine is None:
            raise RuntimeError("the workers have not reported their memory yet")
        return self.machine

    # ---------------- requests
    @on(msg.Generate)
    def generate(self, m: msg.Generate) -> None:
        self._check(m)
        ids = np.frombuffer(self.requests.take_now(4 * m.n_ids), np.int32)
        if self.requests.starved():
            self.ctx.send("api", msg.Wake())
        refusal = self._refusal(m)
        if refusal is not None:
            self.ctx.send("api", refusal)
            return
        limit = min(m.n_prompt + m.max_tokens, self.config.max_context, self._machine().limits.kv_tokens)
        request = Request(m.uid, ids, limit, m.seed, m.params, m.options, n_prompt=m.n_prompt)
        if m.n_ids > m.n_prompt:
            request.scored = m.n_prompt
        if not m.params.grammar:
            self._inbox.append(Add(request))
            return
        ranks = range(self.config.engine.tp)
        self._compiling[m.uid] = request, set(ranks)
        for rank in ranks:
            self.ctx.send(f"worker{rank}", msg.PrepareGrammar(m.uid, m.params.grammar))

    def _check(self, m: msg.Generate) -> None:
        """Raises BadMessage for what the api process never sends."""
        machine, vocab = self.machine, self.config.model.vocab_size
        if machine is None:
            raise BadMessage("the workers have not reported their memory yet")
        if m.uid in machine.running or m.uid in machine.waiting or m.uid in self._compiling:
            raise BadMessage(f"request {m.uid} is known already")
        if max((*m.params.stop_token_ids, *(token for token, _ in m.params.logit_bias)), default=0) >= vocab:
            raise BadMessage(f"request {m.uid} names tokens outside of the vocabulary")

    @on(msg.GrammarPrepared)
    def grammar_prepared(self, m: msg.GrammarPrepared) -> None:
        """A request may run when its grammar is compiled on every rank: no step waits for that."""
        if (waiting := self._compiling.get(m.uid)) is None:  # its client has left
            return
        request, ranks = waiting
        ranks.discard(m.rank)
        if not ranks:
            del self._compiling[m.uid]
            self._inbox.append(Add(request))

    def _refusal(self, m: msg.Generate) -> msg.Rejected | None:
        """The answer to a request that could never run; None for others."""
        room = self._machine().limits.kv_tokens
        if m.n_ids + (m.params.max_tokens != 0 and not m.options.pooling) <= room:
            return None
        text = (
            f"This model's maximum context length is {room} tokens with the memory that this server has. However, you "
            f"requested {m.n_ids + 1} tokens. Please reduce the length of the messages, or start the server with a "
            "larger --kv-tokens. (context_length_exceeded)"
        )
        return msg.Rejected(m.uid, 400, text, "messages", "context_length_exceeded", None)

    @on(msg.Cancel)
    def cancel(self, m: msg.Cancel) -> None:
        self._compiling.pop(m.uid, None)
        self._inbox.append(Drop(m.uid))
        self._cancelled = True

    @on(msg.FlushCache)
    def flush_cache(self, m: msg.FlushCache) -> None:
        self._inbox.append(Flush())

    @on(msg.Journal)
    def journal(self, m: msg.Journal) -> None:
        if self.machine is None or self._watching is None:
            raise BadMessage("there is nothing to keep a journal of")
        self.watcher = self._watching(self.machine, m)

    @on(msg.Reconnect)
    def reconnect(self, m: msg.Reconnect) -> None:
        self.ctx.forget(m.name)

    @on(msg.Wake)
    def wake(self, m: msg.Wake) -> None:
        """Has no content: its arrival makes the runtime call `idle`."""

    @on(msg.MayCapture)
    def may_capture(self, m: msg.MayCapture) -> None:
        self._may_capture = True

    @on(msg.Stop)
    def stop(self, m: msg.Stop) -> None:
        if self.machine is None or len(self._armed) < self.config.engine.tp:
            self.ctx.stop()  # the workers do not read the ring yet
        self._stopping, self.wake_at = True, math.inf

    # ---------------- the step
    def idle(self) -> bool:
        """Take results in, publish a plan.  False only when there is nothing to do and the wake-up flags are up."""
        if self.machine is None:
            return False
        worked = self._flush()
        while (raw := self.results.take()) is not None:
            worked, result = True, StepResult.unpack(raw)
            if result.step >= self._first_step:
                self._inbox.append(result)
        if self._stopping:
            worked |= self._stop_workers()
        elif self._unsent is None:  # while a plan waits for room in the ring, everything else waits, too
            inbox, self._inbox = self._inbox, []
            worked |= bool(inbox)
            now = self.ctx.now()
            output = self.machine.step(inbox, now)
            self._send(output, now)
            self._unsent = output.plan
            self.wake_at = now + output.again_in if output.again_in else math.inf
            if self._may_capture and len(self._armed) == self.config.engine.tp:
                self._may_capture = False  # if the machine is busy, a worker sends MayCapture again after the next plan
                if self.machine.idle:
                    self._unsent = StepPlan(self.machine.counters.steps, PlanKind.CAPTURE)
            worked |= self._unsent is not None
            self._flush()
            if self.watcher is not None:
                self.watcher.saw(inbox, now, output)
        if worked:
            self._arm(False)
            self._report()
            return True
        if self._look_again():
            return True
        self._report()
        if self._cancelled:
            self.wake_at = min(self.wake_at, self._reported + SOON)
        if self.watcher is not None:
            self.wake_at = min(self.wake_at, self.watcher.rest(self.ctx.now()))
        return False

    def stopping(self) -> None:
        if self.watcher is not None:
            self.watcher.close()

    def _report(self) -> None:
        """Send the statistics to api, unless they have not changed, or were sent just now and a step is running."""
        now = self.ctx.now()
        running = SOON if self._cancelled else STATS_SECONDS
        if now < self._reported + (running if self._machine().inflight else 0.0):
            return
        self._cancelled = False
        self._reported, stats = now, self._machine().stats() | {"compiling_requests": len(self._compiling)}
        if stats != self._stats:
            self._stats = stats
            self.ctx.send("api", msg.Stats(tuple(stats), np.array(list(stats.values()), np.int64)))

    def _arm(self, flag: bool) -> None:
        """Raise or lower the flags that request a Wake: when there is a result and, if a plan is unsent, when there is room."""
        if flag != self._flags_up:
            self.results.park(flag)
            self.plans.starve(flag and self._unsent is not None)
            self._flags_up = flag

    def _look_again(self) -> bool:
        """Raise the flags, then look once more for anything published before they became visible.

        The flags stay up until there is work, so they have long been visible when the runtime looks again (see process.run).
        """
        self._arm(True)
        return self.results.pending() or (self._unsent is not None and self.plans.has_room(len(self._unsent.pack())))

    def _flush(self) -> bool:
        """Publish the unsent plan and wake sleeping workers.  False if there is none, or a worker is too far behind."""
        plan = self._unsent
        if plan is None:
            return False
        raw = plan.pack()
        if not self.plans.has_room(len(raw)):
            return False
        self.plans.publish(raw)
        if plan.kind == PlanKind.STEP:
            self._machine().kept.published[0] = plan.step + 1
        self._unsent = None
        for rank in self.plans.parked():
            self.ctx.send(f"worker{rank}", msg.Wake())
        self.board.report(plan.step, bool(self._machine().inflight))
        return True

    def _stop_workers(self) -> bool:
        """Send STOP through the ring, so that every rank leaves after the same step.  True if it could be sent."""
        if self._unsent is None:
            self._unsent = StepPlan(self._machine().counters.steps, PlanKind.STOP)
        sent = self._unsent.kind == PlanKind.STOP and self._flush()
        if sent:
            self.ctx.stop()
        return sent

    def _send(self, output: Output, now: float) -> None:
        machine = self._machine()
        for uid, seconds in output.evicted:
            self.ctx.send("api", msg.Evicted(uid, seconds))
        for uid, cached in output.started:
            request = machine.running[uid][1]
            if request.options.pooling:  # its answer is a vector, not text
                self.ctx.send("api", msg.Started(uid, now - request.arrived))
                continue
            prompt = request.ids[: request.n_prompt] if request.params.echo else request.ids[:0]
            said = request.ids[request.n_prompt :]
            self.ctx.send("detokenizer", msg.Track(uid, cached, prompt, request.params, now - request.arrived, said))
        for scores in output.logprobs:
            self.ctx.send("detokenizer", scores)
        for uid, vector in output.vectors:
            self.ctx.send("api", msg.Embedded(uid, vector))
        if output.outputs:  # all rows of the step in one message
            columns = [[getattr(rows, name) for rows in output.outputs] for name in ("uids", "counts", "tokens", "finish")]
            self.ctx.send("detokenizer", msg.Tokens(*map(np.concatenate, columns)))

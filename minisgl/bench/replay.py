"""One run: an engine of its own, warmed up, its prefix cache emptied, then all requests at their times, and its counters.

Runs in the process of its caller, with the actors in theirs, as `LLM` does; without HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.bench.ablations import Setup
from minisgl.bench.outcomes import Outcome, figures
from minisgl.bench.workload import Job, Workload
from minisgl.config import ModelSpec
from minisgl.errors import RequestError, UserError
from minisgl.llm import LLM
from minisgl.sampling_params import Finish, SamplingParams

WARM_UP = 8  # requests of the workload that run before it is measured, at most
_STATS_SECONDS = 3.0  # the scheduler sends its counters once a second, and when it comes to rest

Progress = Callable[[], None]  # called for each answer


@dataclass(slots=True)
class Stream(Outcome):
    """An Outcome that fills itself, with the tokens of the answer."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def on_chunk(self, chunk: Chunk | RequestError) -> None:
        """Take in a piece of the answer, or the reason why there is none."""
        if isinstance(chunk, RequestError):
            self.error, self.ended = str(chunk.code or chunk.message), True
            return
        self.pieces += [time.perf_counter()] * len(chunk.token_ids)
        self.ids += chunk.token_ids
        self.prompt, self.cached, self.tokens = chunk.prompt_tokens, chunk.cached_tokens, len(self.ids)
        self.ended = chunk.finish != Finish.NONE


@dataclass(slots=True)
class Run:
    """What one run has shown.  `counters`: the scheduler's, see Counters, of the measured part.  `ready`: seconds to start."""

    name: str
    seconds: float
    streams: list[Stream]
    counters: dict[str, int]
    ready: float = 0.0
    restarts: int = 0  # of processes: the figures are void

    @property
    def figures(self) -> dict[str, float]:
        """See `figures` of outcomes.py, with shares of counters."""
        return figures(self.streams, self.seconds)

    @property
    def cached(self) -> float:
        """Share of the prompt tokens that came from the prefix cache."""
        return sum(s.cached for s in self.streams) / max(1, sum(s.prompt for s in self.streams))

    @property
    def idle(self) -> float | None:
        """Share of the time of busy workers in which they waited for a plan; None where they do not measure it."""
        busy, idle = self.counters.get("busy_us", 0), self.counters.get("idle_us", 0)
        return idle / (busy + idle) if busy else None


def replay(llm: LLM, jobs: Sequence[Job], concurrency: int = 0, progress: Progress | None = None) -> tuple[float, list[Stream]]:
    """Send each job at its time, but never more than `concurrency` at a time (0: no bound); wait for all answers.

    Returns (seconds from the start to the last answer, a Stream for each job, in order).  Answers are greedy, and as long as
    the jobs say.  Raises UserError if the engine dies.
    """
    system, streams, shown = llm.system, [Stream() for _ in jobs], 0
    gateway, start, at = system.gateway, time.perf_counter(), 0
    params = {n: SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in {job.output for job in jobs}}
    while at < len(jobs) or gateway.open_requests:
        wait = 1.0
        if at < len(jobs) and not (concurrency and gateway.open_requests >= concurrency):
            job, stream = jobs[at], streams[at]
            wait = job.arrival - (time.perf_counter() - start)
            if wait <= 0:
                stream.sent, at = time.perf_counter(), at + 1
                stream.late = 0.0 if concurrency else stream.sent - start - job.arrival
                try:
                    gateway.open(TokenPrompt(job.prompt), params[job.output], stream.on_chunk)
                except RequestError as e:
                    stream.on_chunk(e)
        system.pump(min(1.0, max(0.0, wait)))
        if gateway.state == "dead":
            raise UserError(gateway.failure or "the engine has died")
        if progress is not None:
            done = at - gateway.open_requests
            for _ in range(done - shown):
                progress()
            shown = max(shown, done)
    return time.perf_counter() - start, streams


def engine_stats(llm: LLM, admitted: int = 0) -> dict[str, int]:
    """The scheduler's counters when it is at rest and `admitted` requests have run in all; they come once a second."""
    system, end = llm.system, time.monotonic() + _STATS_SECONDS
    while time.monotonic() < end:
        stats = system.gateway.stats
        if stats.get("running_requests") == 0 and not stats["waiting_requests"] and stats["admitted"] >= admitted:
            break
        system.pump(0.1)
    return dict(system.gateway.stats)


def measure(
    name: str, spec: ModelSpec, setup: Setup, work: Workload, *, settle: float = 0.0, progress: Progress | None = None
) -> Run:
    """Start the engine of a setup, warm it up, run the workload, end it.  `settle`: seconds for graphs to be captured ahead.

    Raises UserError.
    """
    began = time.perf_counter()
    with LLM(spec, make_scheduler=setup.make_scheduler, **setup.settings) as llm:
        ready = time.perf_counter() - began
        warm = [job._replace(arrival=0.0) for job in work.jobs[:WARM_UP]]
        replay(llm, warm)
        end = time.monotonic() + settle
        while (left := end - time.monotonic()) > 0:
            llm.system.pump(min(left, 0.5))
        llm.system.gateway.flush_cache()
        before = engine_stats(llm, len(warm))
        seconds, streams = replay(llm, work.jobs, work.concurrency, progress)
        after = engine_stats(llm, before.get("admitted", 0) + sum(not s.error for s in streams))
        counters = {k: n - before.get(k, 0) for k, n in after.items()}
        return Run(name, seconds, streams, counters, ready, sum(llm.system.gateway.restarts.values()))

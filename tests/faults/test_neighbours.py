"""What loads cost a neighbour, under virtual time: the step machine with the server's defaults, and steps of a small CPU.

The real server under the same loads is measured by scripts/check/neighbours.py.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from minisgl.actors.scheduler.interface import Add, Event, SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import I32
from minisgl.config import EngineConfig
from minisgl.plan import StepPlan, StepResult
from minisgl.sampling_params import RequestOptions, SamplingParams

VOCAB, PAGE = 49_152, 16
NEIGHBOUR, LOADER = 1, 2


def seconds(prefill: int, pairs: float, rows: int, context: int) -> float:
    """SmolLM2-135M in 4 bits on two cores: about 210 tokens a second of one stream, 730 of 64, and 1,000 of a short prompt."""
    return 3.5e-3 + 1e-3 * prefill + 1e-6 * pairs + 1.2e-3 * rows + 4e-6 * context


@dataclass
class Server:
    """The machine, and a worker that takes virtual time; two plans are in flight.  `times`: of the tokens of a request."""

    itl_target: float | None = None
    now: float = 0.0
    times: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        engine = EngineConfig()
        limits = SchedulerLimits(
            slots=engine.max_running,
            num_pages=255_744 // PAGE,
            page_size=PAGE,
            max_context=8192,
            step_tokens=engine.step_tokens,
            max_steps_in_flight=engine.lag,
            vocab_size=VOCAB,
            eos_ids=(2,),
            itl_target=self.itl_target,
        )
        self.machine, self.rng = StepMachine(limits), np.random.default_rng(0)
        self._inbox: list[Event] = []
        self._results: deque[tuple[float, StepResult]] = deque()
        self._decode = np.zeros(0, np.int32)
        self._free = 0.0

    def text(self, tokens: int) -> I32:
        return self.rng.integers(3, VOCAB, tokens, dtype=np.int32)

    def add(self, ids: I32, answer: int, client: int, call: int = 0, *, priority: int = 0) -> int:
        """A request with an answer of so many tokens; without `call`, it is one of its own."""
        uid = len(self.times) + 1
        self.times[uid] = []
        options = RequestOptions(client=client, call=call or 1_000_000 + uid, priority=priority)
        self._inbox.append(Add(Request(uid, ids, len(ids) + answer, 0, SamplingParams(ignore_eos=True), options)))
        return uid

    def step(self) -> None:
        """The scheduler looks: at once if a plan may be made, else when the next result comes."""
        inbox, self._inbox = self._inbox, []
        if self._results and (len(self._results) == 2 or self._results[0][0] <= self.now or not inbox):
            when, result = self._results.popleft()
            self.now = max(self.now, when)
            inbox.append(result)
        out = self.machine.step(inbox, self.now)
        for rows in out.outputs:
            for uid in rows.uids[rows.counts > 0].tolist():
                self.times[uid].append(self.now)
        if out.plan is not None:
            self._run(out.plan)

    def _run(self, plan: StepPlan) -> None:
        if plan.decode is not None:
            self._decode = plan.decode
        table = self.machine.table
        n, end = plan.prefill["n_ids"].astype(np.int64), table.planned[plan.prefill["slot"]].astype(np.int64)
        context = int(table.planned[self._decode].sum() + end.sum())
        took = seconds(int(n.sum()), float((n * (end - n / 2)).sum()), len(self._decode), context)
        self._free = max(self._free, self.now) + took
        rows = len(self.machine.inflight[-1].slots)
        self._results.append((self._free, StepResult(plan.step, np.full(rows, 7, np.int32), round(took * 1e6))))

    def run(self, until: float) -> None:
        while self.now < until and not (self.machine.idle and not self._inbox):
            self.step()


Load = Callable[[Server], Iterator[None]]


def long_prompts(connections: int) -> Load:
    def load(server: Server) -> Iterator[None]:
        uids = [0] * connections
        while True:
            for i, uid in enumerate(uids):
                if not uid or server.times[uid]:
                    uids[i] = server.add(server.text(7900), 1, LOADER)
            yield

    return load


def calls(connections: int, rows: tuple[int, int], tokens: tuple[int, int], priority: int = 0) -> Load:
    """Connections that each send one call after another.  `rows`: prompts and n; `tokens`: of a prompt and of an answer."""

    def load(server: Server) -> Iterator[None]:
        (prompts, n), (prompt, answer) = rows, tokens
        open_rows: list[list[int]] = [[] for _ in range(connections)]
        call = 0
        while True:
            for i, uids in enumerate(open_rows):
                if all(len(server.times[uid]) == answer for uid in uids):
                    call += 1
                    texts = [server.text(prompt) for _ in range(prompts)]
                    open_rows[i] = [server.add(ids, answer, LOADER, call, priority=priority) for ids in texts for _ in range(n)]
            yield

    return load


LOADS: dict[str, Load] = {
    "one prompt of 7,900": long_prompts(1),
    "four prompts of 7,900": long_prompts(4),
    "32 prompts x n = 16": calls(4, (32, 16), (9, 64)),
    "n = 16 x 4,000": calls(1, (1, 16), (9, 4000)),
    "16 clients": calls(16, (1, 1), (300, 500)),
    "300 connections": calls(300, (1, 1), (300, 500)),
    "a batch": calls(128, (1, 1), (300, 500), -1),
}


def live(load: Load | None, same: bool = False, length: float = 25.0, **server: float | None) -> tuple[float, float, float]:
    """(longest time to the first token of a question, longest and median gap of a stream), in seconds, within a load."""
    s = Server(**server)
    client = LOADER if same else NEIGHBOUR
    warm = s.add(s.text(200), 30, client)
    s.run(5)
    stream = s.add(s.text(40), 7000, client)
    assert s.times[warm]
    while len(s.times[stream]) < 30:
        s.step()
    begin, work = s.now, load(s) if load else iter(lambda: None, 0)  # nothing, for ever
    firsts: list[float] = []
    question, asked = 0, s.now + 1.5
    while s.now < begin + length or (question and s.now < begin + 3 * length):
        next(work)
        if not question and s.now >= asked:
            question, asked = s.add(s.text(40), 1, client), s.now
        s.step()
        if question and s.times[question]:
            firsts.append(s.now - asked)
            question, asked = 0, s.now + 0.3
    gaps = np.diff([t for t in s.times[stream] if t >= begin])
    return max(firsts), float(gaps.max()), float(np.median(gaps))


@functools.cache
def alone() -> tuple[float, float, float]:
    return live(None)


@pytest.mark.parametrize("same", [False, True], ids=["other client", "same client"])
@pytest.mark.parametrize("name", LOADS)
def test_a_neighbour_gets_its_first_token_within_a_second_and_no_gap_of_a_tenth(name: str, same: bool) -> None:
    first, gap, _ = alone()
    found = live(LOADS[name], same)
    assert found[0] <= first + 1.0
    assert found[1] <= gap + 0.1


@pytest.mark.parametrize("name", [name for name in LOADS if "7,900" in name])
def test_long_prompts_at_most_double_the_time_between_tokens_at_the_median(name: str) -> None:
    assert live(LOADS[name])[2] <= 2 * alone()[2]


def test_without_a_target_long_prompts_fill_the_steps_of_running_streams() -> None:
    assert live(LOADS["one prompt of 7,900"], itl_target=0.0)[2] > 0.25


def test_a_long_prompt_takes_little_more_than_twice_as_long_beside_a_stream() -> None:
    def long(stream: bool) -> float:
        s = Server()
        s.add(s.text(300), 30, NEIGHBOUR)
        s.run(5)
        if stream:
            s.add(s.text(40), 7000, NEIGHBOUR)
            s.run(s.now + 0.5)
        uid, begin = s.add(s.text(4000), 1, LOADER), s.now
        while not s.times[uid]:
            s.step()
        return s.now - begin

    assert long(True) <= 3.5 * long(False), "three quarters of the decodes' time, and chunks that are not too short"


def test_a_question_does_not_wait_for_long_steps_of_a_prompt_that_nobody_streams_beside() -> None:
    s = Server()
    s.add(s.text(7900), 1, LOADER)
    s.run(1.0)
    waits = []
    while not s.machine.idle and len(waits) < 20:
        uid, asked = s.add(s.text(40), 1, NEIGHBOUR), s.now
        while not s.times[uid]:
            s.step()
        waits.append(s.now - asked)
        s.run(s.now + 0.3)
    assert len(waits) > 10
    assert max(waits) <= 0.8


def test_without_streams_a_long_prompt_has_the_machine_for_itself() -> None:
    s = Server()
    s.add(s.text(300), 1, LOADER)
    s.run(5)
    begin, uid = s.now, s.add(s.text(4000), 1, LOADER)
    while not s.times[uid]:
        s.step()
    ideal = seconds(4000, 4000 * 2000, 0, 0)
    assert s.now - begin <= 1.4 * ideal, "steps of a fifth of a second read the context again, and have a cost of their own"

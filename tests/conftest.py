"""Shared fixtures: small configurations, and one deterministic system of real actors around the fake runner."""

from __future__ import annotations

import os
import random
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest

from minisgl.actors.messages import Started, Text, Tokens, Track
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.local import LocalSystem
from minisgl.actors.runtime.shared_memory import Arenas, Memory
from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.actors.scheduler.interface import Add, Drop, Event, Flush, Output, SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.actors.worker import WorkerActor
from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.api.gateway import Gateway
from minisgl.config import Config, EngineConfig, ModelSpec
from minisgl.errors import RequestError
from minisgl.model.fake_runner import FakeRunner, expected_tokens
from minisgl.plan import StepPlan, StepResult
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams

VOCAB, EOS = 23, 0
MORE = int(os.environ.get("MINISGL_FUZZ", "12"))  # 120: ten times as many random cases, to look for new kinds of faults
LONG = (  # files that take longest come first: with several processes the one that ends last decides
    *("test_kernels.py", "test_cuda_steps.py", "test_end_to_end.py", "test_selfcheck.py", "test_reading_answers.py"),
    *("test_hf_directories.py", "test_architectures.py", "test_step_machine.py", "test_penalties.py", "test_harm.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_runtest_setup() -> None:
    """A test draws the same numbers whatever ran before it in its process."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


def cases(n: int) -> int:
    """How many random cases a test tries, of which `n` are usual."""
    return max(1, n * MORE // 12)


def fake_spec(max_context: int = 64, vocab: int = VOCAB) -> ModelSpec:
    """A spec without a model, for the fake runner."""
    return ModelSpec(
        name="tiny",
        path="",
        format="fake",
        architecture="Fake",
        dtype="float32",
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=vocab,
        max_context=max_context,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tie_embeddings=True,
        bos_id=None,
        eos_ids=(EOS,),
    )


def fake_config(**engine: Any) -> Config:
    """Small on purpose: every limit is hit all the time."""
    settings = {"tp": 2, "page_size": 4, "max_running": 4, "step_tokens": 9, "lag": 2, "kv_tokens": 160} | engine
    return Config(fake_spec(), EngineConfig(**settings))


class PlainDetokenizer(Actor):
    """Stands in for the detokenizer where text does not matter: tokens through, text empty."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.cached: dict[int, int] = {}

    @on(Track)
    def track(self, m: Track) -> None:
        assert m.uid not in self.cached, "a request was announced twice"
        self.cached[m.uid] = m.n_cached
        self.ctx.send("api", Started(m.uid, m.queued))

    @on(Tokens)
    def tokens(self, m: Tokens) -> None:
        cached = np.array([self.cached.get(u, 0) for u in m.uids.tolist()], np.int32)
        self.ctx.send("api", Text(m.uids, m.counts, m.tokens, m.finish, cached, ("",) * len(m.uids)))


def prompt(n: int, first: int = 1) -> list[int]:
    """`n` tokens; prompts with different `first` share no page."""
    return [(first + i * (1 + first % 5)) % (VOCAB - 1) + 1 for i in range(n)]


def talker(n: int, at_least: int, first: int = 1) -> list[int]:
    """A prompt of `n` tokens whose answer goes on for `at_least` tokens before its EOS."""
    for salt in range(first, 5000):
        ids = [salt % (VOCAB - 1) + 1, salt // (VOCAB - 1) % (VOCAB - 1) + 1, *prompt(n - 2, first)][:n]
        if len(expected_tokens(ids, at_least, VOCAB, (EOS,))) == at_least:
            return ids
    raise AssertionError("no such prompt")


class World:
    """Gateway, scheduler, workers (fake runner) and a plain detokenizer in one LocalSystem."""

    def __init__(
        self,
        seed: int | None,
        config: Config,
        scheduler: Callable[[Context, Config, Arenas], SchedulerActor] = SchedulerActor,
    ) -> None:
        self.config = config
        self.system = LocalSystem(seed)
        self.memory = Memory(config)
        self.arenas = self.memory.arenas
        spawn, arenas, engine = self.system.spawn, self.arenas, config.engine
        pages = engine.kv_tokens // engine.page_size
        self.gateway = spawn("api", lambda ctx: Gateway(ctx, config, arenas))
        self.scheduler = spawn("scheduler", lambda ctx: scheduler(ctx, config, arenas))
        self.runners = [FakeRunner(config, pages) for _ in range(engine.tp)]
        for rank in range(engine.tp):
            spawn(f"worker{rank}", lambda ctx, r=rank: WorkerActor(ctx, r, arenas, lambda: self.runners[r]))
        spawn("detokenizer", PlainDetokenizer)
        self.gateway.silent.clear()  # nobody says Hello in a LocalSystem
        self.system.run()
        assert self.gateway.state == "ready"
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, Finish | RequestError] = {}
        self.cached: dict[int, int] = {}
        self.queued: dict[int, float] = {}

    @property
    def machine(self) -> Any:
        return self.scheduler.machine

    def submit(self, ids: list[int], max_tokens: int, options: RequestOptions = DEFAULT_OPTIONS, **params: Any) -> int:
        uid: int = -1
        tokens: list[int] = []

        def deliver(chunk: Chunk | RequestError) -> None:
            assert uid not in self.ends, "something came after the end"
            if isinstance(chunk, RequestError):
                self.ends[uid] = chunk
                return
            tokens.extend(chunk.token_ids)
            self.cached[uid], self.queued[uid] = chunk.cached_tokens, chunk.queued
            if chunk.finish:
                self.ends[uid] = chunk.finish

        uid = self.gateway.open(TokenPrompt(tuple(ids)), SamplingParams(max_tokens=max_tokens, **params), deliver, options)
        self.answers[uid] = tokens
        return uid

    def close(self) -> None:
        self.machine.check()
        self.memory.close()


class Loop:
    """A StepMachine with the fake runner as its worker: no actors and no wire, the test makes every step.

    After each step it checks the books of the machine, and that the plan keeps the contract of plans.
    """

    def __init__(self, **limits: Any) -> None:
        settings = {
            "slots": 4,
            "num_pages": 40,
            "page_size": 4,
            "max_context": 64,
            "step_tokens": 9,
            "max_steps_in_flight": 2,
        } | limits
        self.limits = SchedulerLimits(**settings, vocab_size=VOCAB, eos_ids=(EOS,))
        lim = self.limits
        self.machine = StepMachine(lim)
        engine = EngineConfig(page_size=lim.page_size, max_running=lim.slots, step_tokens=lim.step_tokens)
        self.runner = FakeRunner(Config(fake_spec(lim.max_context), engine), lim.num_pages)
        self.runner.allocate(lim.num_pages)
        self.now = 0.0
        self.asked: dict[int, tuple[list[int], int]] = {}
        self.said: dict[int, list[int]] = {}
        self.ends: dict[int, Finish] = {}
        self.started: dict[int, int] = {}  # uid -> cached tokens, in order of admission
        self.plans: list[StepPlan] = []
        self.pending: deque[StepResult] = deque()
        self._events: list[Event] = []
        self._planned = False

    def add(self, ids: list[int], max_tokens: int, options: RequestOptions = DEFAULT_OPTIONS, **params: Any) -> int:
        lim, uid = self.limits, len(self.asked) + 1
        limit = min(len(ids) + max_tokens, lim.max_context, lim.kv_tokens)
        self.asked[uid], self.said[uid] = (list(ids), limit - len(ids)), []
        request = Request(uid, np.array(ids, np.int32), limit, 0, SamplingParams(max_tokens=max_tokens, **params), options)
        self._events.append(Add(request))
        return uid

    def drop(self, uid: int) -> None:
        self._events.append(Drop(uid))

    def flush(self) -> None:
        self._events.append(Flush())

    def step(self, deliver: int | None = None) -> Output:
        """One call of the machine with the oldest `deliver` results.  Its plan runs at once; the result waits for delivery.

        By default a result comes as late as possible: when `max_steps_in_flight` plans are out, or no plan was made without it.
        """
        if deliver is None:
            deliver = int(len(self.pending) >= self.limits.max_steps_in_flight or not self._planned)
        results = [self.pending.popleft() for _ in range(min(deliver, len(self.pending)))]
        inbox, self._events = [*self._events, *results], []
        out = self.machine.step(inbox, self.now)
        for rows in out.outputs:
            tokens = iter(rows.tokens.tolist())
            for uid, count, finish in zip(rows.uids.tolist(), rows.counts.tolist(), rows.finish.tolist(), strict=True):
                assert uid not in self.ends, "something came after the end"
                self.said[uid].extend(next(tokens) for _ in range(count))
                if finish:
                    self.ends[uid] = Finish(finish)
        for uid, cached in out.started:
            assert uid not in self.started, "a request was announced twice"
            self.started[uid] = cached
        self._planned = out.plan is not None
        if out.plan is not None:
            self._launch(out.plan)
        self.machine.check()
        return out

    def _launch(self, plan: StepPlan) -> None:
        places = list(zip(plan.page_grants["slot"].tolist(), plan.page_grants["index"].tolist(), strict=True))
        assert len(places) == len(set(places)), "one plan grants a place of the page table twice"
        assert len(plan.ids) == int(plan.prefill["n_ids"].sum())
        self.plans.append(plan)
        self.pending.append(self.runner.launch(plan).result())

    def run(self, most: int = 3000) -> None:
        """Step until every request has ended."""
        for _ in range(most):
            self.step()
            if self.machine.idle and not self._events:
                return
        raise AssertionError(f"not idle after {most} steps")

    def check_answers(self) -> None:
        """Every request has ended with the reference answer, or with its beginning if it was cut off."""
        assert self.ends.keys() == self.asked.keys(), "a request was never answered"
        for uid, end in self.ends.items():
            ids, most = self.asked[uid]
            want, got = expected_tokens(ids, most, VOCAB, (EOS,)), self.said[uid]
            if end is Finish.ABORT:
                assert got == want[: len(got)]
            else:
                assert got == want
                assert end is (Finish.STOP if want[-1] == EOS else Finish.LENGTH)
        counters = self.machine.counters
        assert counters.cached_tokens + sum(counters.misses.values()) == counters.prompt_tokens

    def prefilled(self) -> int:
        """Prompt tokens computed so far."""
        return sum(len(plan.ids) for plan in self.plans)


def random_traffic(world: World, seed: int, n: int = 14, abort: float = 0.15) -> dict[int, list[int]]:
    """Shared trunks, second turns, aborts, all interleaved by the system's seed.  Returns what each request must answer."""
    rng = random.Random(seed)
    trunks = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 17))] for _ in range(3)]
    want: dict[int, list[int]] = {}
    said: list[list[int]] = []
    context = world.config.max_context
    for _ in range(n):
        ids = rng.choice(trunks) + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 12))]
        if said and rng.random() < 0.5:  # a second turn: an earlier prompt and its answer, and something new
            ids = [*rng.choice(said)[: context - 22], rng.randrange(1, VOCAB)]
        max_tokens = rng.randrange(1, 20)
        uid = world.submit(ids, max_tokens)
        want[uid] = expected_tokens(ids, max_tokens, VOCAB, (EOS,))
        said.append(ids + want[uid])
        for _ in range(rng.randrange(0, 40)):
            world.system.step()
        if rng.random() < abort:
            victim = rng.choice(list(want))
            if victim not in world.ends:
                world.gateway.close(victim)
                world.ends[victim] = Finish.ABORT
    world.system.run()
    return want


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(seed: int | None = None, **engine: Any) -> World:
        made.append(World(seed, fake_config(**engine)))
        return made[-1]

    yield make
    for w in made:
        w.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What a test has printed or logged may hold halves of characters, which no report can take to the main process."""
    report = yield
    report.sections = [(name, _whole(text)) for name, text in report.sections]
    if report.failed and (text := str(report.longrepr)) != _whole(text):
        report.longrepr = _whole(text)
    return report


def _whole(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()

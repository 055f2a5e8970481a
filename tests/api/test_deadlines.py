"""Deadlines: the api process keeps them, whichever actor stands still, to the moment, and tells what had been said."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import EOS, VOCAB, World, expected_tokens, fake_config, prompt, talker
from test_tokenizer_pool import Front

from minisgl.api.caller import Callers
from minisgl.api.deadlines import Deadlines
from minisgl.api.engine import ChatPrompt, TextPrompt, TokenPrompt
from minisgl.commands import serve
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish, RequestOptions, SamplingParams


def check_late(error: Any, seconds: str = "3", tokens: int = 0) -> None:
    assert isinstance(error, RequestError)
    assert (error.status, error.code, error.param) == (504, "timeout", "timeout")
    assert error.message == f"The request was not finished within its timeout of {seconds} s ({tokens} tokens were generated)."


# ---------------- whatever stands still
def test_a_deadline_reaches_the_client_as_an_error_with_what_was_said_before() -> None:
    w = World(3, fake_config(max_running=1))
    running = w.submit(talker(6, 40), 40, RequestOptions(timeout=3.0))
    waiting = w.submit(prompt(6, 3), 4, RequestOptions(timeout=3.0))
    other = w.submit(prompt(6, 4), 4)
    while not w.answers[running]:
        w.system.step()
    w.system.clock = 3.5
    w.system.run()
    said = w.answers[running]
    check_late(w.ends[running], tokens=len(said))
    check_late(w.ends[waiting])
    assert said == expected_tokens(talker(6, 40), 40, VOCAB, (EOS,))[: len(said)]
    assert w.ends[other] in (Finish.STOP, Finish.LENGTH)
    assert w.gateway.stats["timeouts"] == w.gateway.timeouts == 2
    assert w.machine.idle
    w.close()


@pytest.mark.parametrize("hangs", ["scheduler", "worker0", "detokenizer"])
def test_a_deadline_is_kept_while_an_actor_hangs(hangs: str) -> None:
    w = World(1, fake_config(tp=1))
    uid = w.submit(talker(6, 40), 40, RequestOptions(timeout=3.0))
    while not w.answers[uid]:
        w.system.step()
    w.system.actors[hangs].receive = lambda _: None  # type: ignore[method-assign]
    w.system.actors[hangs].idle = lambda: False  # type: ignore[method-assign]
    w.system.run()
    assert w.system.clock == 3.0
    check_late(w.ends[uid], tokens=len(w.answers[uid]))
    assert w.gateway.open_requests == 0


def test_the_time_in_the_tokenizer_and_in_the_checker_counts() -> None:
    front = Front(1, None)
    g, told = front.gateway, list[Any]()
    options = RequestOptions(timeout=3.0)
    for name in front.names:
        front.system.actors[name].receive = lambda _: None  # type: ignore[method-assign]
    g.open(TextPrompt("a"), SamplingParams(), told.append, options)
    g.open(ChatPrompt(b"{}"), SamplingParams(), told.append, options)
    g.tokenize(TextPrompt("a"), told.append, options)
    g.detokenize((1,), False, told.append, options)
    g.check_grammar("{}", "guided_json", told.append, options)  # there is no checker at all
    front.system.run()
    assert len(told) == 5
    for error in told:
        check_late(error)
    assert g.open_requests == 0
    assert front.collector.prompts == {}


def test_all_questions_and_choices_of_a_call_have_one_deadline_which_begins_with_the_call() -> None:
    front, told = Front(1, None), list[Any]()
    engine = Callers(front.gateway).call("me")
    began = engine._began  # type: ignore[attr-defined]
    options = RequestOptions(timeout=2.0)
    front.system.clock = began + 1.5  # a grammar was looked at
    engine.check_grammar("{}", "guided_json", told.append, options)
    for _ in range(2):
        engine.open(TokenPrompt((1, 2)), SamplingParams(), told.append, options)
    front.gateway.tick(began + 1.999)
    assert told == []
    front.gateway.tick(began + 2.0)
    assert len(told) == 3
    for error in told:
        check_late(error, "2")


def test_a_request_that_misses_its_deadline_is_cancelled_once_and_nothing_comes_after_it() -> None:
    front, told = Front(1, None), list[Any]()
    uid = front.gateway.open(TokenPrompt((1, 2)), SamplingParams(), told.append, RequestOptions(timeout=1.0))
    front.system.run()
    assert front.collector.cancelled == {uid}
    assert [str(e) for e in told if isinstance(e, RequestError)] == [str(told[0])]
    front.gateway.close(uid)
    front.system.run()
    assert len(told) == 1


# ---------------- to the moment
def test_tick_says_how_long_it_is_to_the_next_deadline() -> None:
    front, told = Front(1, None), list[Any]()
    g = front.gateway

    def start(timeout: float) -> int:
        return g.open(TokenPrompt((1,)), SamplingParams(), told.append, RequestOptions(timeout=timeout))

    assert g.tick(0.0) == 0.5
    start(0.3)
    late = start(0.25)
    assert g.tick(0.0) == 0.25
    g.close(late)
    assert g.tick(0.0) == 0.3
    start(9.0)
    assert g.tick(0.1) == pytest.approx(0.2)
    assert g.tick(0.4) == 0.5
    assert len(told) == 1


def test_a_deadline_before_the_next_tick_is_announced_and_a_later_one_is_not() -> None:
    front, calls = Front(1, None), list[float]()
    g = front.gateway
    g.sooner = lambda: calls.append(1)

    def start(timeout: float) -> None:
        g.open(TokenPrompt((1,)), SamplingParams(), lambda _: None, RequestOptions(timeout=timeout))

    g.tick(0.0)
    start(0.0)
    start(0.6)
    assert not calls
    start(0.2)
    assert len(calls) == 1
    start(0.3)
    assert len(calls) == 1, "the tick that comes now sees it"
    start(0.1)
    assert len(calls) == 2


def test_the_server_looks_at_the_clock_again_when_a_deadline_comes_first() -> None:
    class Clock:
        seconds = [0.5, 0.001, 0.5, 0.5]  # what each tick asks for
        ticks = 0

        def tick(self) -> float:
            self.ticks += 1
            return self.seconds[self.ticks - 1]

        supervisor = SimpleNamespace(spawned=0)

        def fds(self) -> list[int]:
            return []

    async def main() -> None:
        server: Any = serve._Server.__new__(serve._Server)
        server.system, server.watched, server.clock, server.done = Clock(), set(), None, asyncio.Event()
        server.closed, server.spawned = False, 0
        server.tick()
        first = server.clock
        server.done.set()  # it drains: deadlines are kept all the same
        server.tick()
        assert first.cancelled(), "one timer at a time"
        while server.system.ticks < 3:  # noqa: ASYNC110  a timer of a millisecond
            await asyncio.sleep(0)
        server.clock.cancel()

    asyncio.run(main())


def test_many_deadlines_at_the_same_moment_end_over_several_ticks() -> None:
    front, told = Front(1, None), list[Any]()
    for _ in range(600):
        front.gateway.open(TokenPrompt((1,)), SamplingParams(), told.append, RequestOptions(timeout=1.0))
    sizes = []
    while (seconds := front.gateway.tick(1.0)) == 0.0:
        sizes.append(len(told))
    assert seconds == 0.5
    assert sizes == [256, 512]
    assert len(told) == 600


# ---------------- the heap
@pytest.mark.parametrize("seed", range(10))
def test_the_heap_agrees_with_a_list_and_does_not_grow(seed: int) -> None:
    rng, deadlines, want, now = random.Random(seed), Deadlines(), dict[int, float](), 0.0
    most = entries = 0
    for uid in range(2000):
        want[uid] = deadlines.add(uid, now, rng.choice((0.5, 5.0, 1e6)))
        for gone in rng.sample(range(uid + 1), min(uid, 2)):
            deadlines.discard(gone)
            want.pop(gone, None)
        now += 0.01
        assert deadlines.next == min(want.values(), default=float("inf"))
        if rng.random() < 0.2:
            passed = [u for u, _ in deadlines.passed(now, 1000)]
            assert passed == sorted((u for u, when in want.items() if when <= now), key=lambda u: (want[u], u))
            for u in passed:
                del want[u]
        assert len(deadlines) == len(want)
        most, entries = max(most, len(want)), max(entries, len(deadlines._heap))
    assert entries <= 66 + 2 * most


# ---------------- whoever leaves
def test_the_pages_of_a_client_that_leaves_are_seen_to_be_free_while_the_step_still_runs() -> None:
    w = World(1, fake_config(tp=1))
    first, second = w.submit(talker(6, 40), 40), w.submit(prompt(6, 5), 4)
    while not w.answers[first]:
        w.system.step()
    w.system.actors["worker0"].idle = lambda: False  # type: ignore[method-assign]  # a step that takes very long
    w.system.clock = 2.0
    third = w.submit(prompt(6, 7), 4)  # its arrival has the scheduler look at the clock
    w.system.run()
    assert w.machine.inflight
    assert w.gateway.stats["running_requests"] + w.gateway.stats["waiting_requests"] == 3
    for uid in (first, second, third):
        w.gateway.close(uid)
    w.system.run()
    stats = w.gateway.stats
    assert w.machine.inflight
    assert stats["running_requests"] == stats["waiting_requests"] == 0
    assert stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]
    assert w.system.clock < 2.1

"""Trials: who kills the engine is found among innocents, and nobody else is refused."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from minisgl.api.trials import Trials


@dataclass(eq=False)
class Request:
    prompt: int
    kills_at: int = 1 << 30  # when it has said so much
    delivered: list[int] = field(default_factory=list)
    deaths: int = 0
    said_at_death: int = 0

    @property
    def ids(self) -> Any:
        return np.array([self.prompt], np.int32)


class Engine:
    """Runs what the trials allow, all in one step, and dies of whom it must; requests end with ten tokens."""

    def __init__(self, requests: list[Request], slots: int = 1 << 30) -> None:
        self.open, self.refused, self.deaths, self.now = list(requests), [], 0, 0.0
        self.trials: Trials[Request] = Trials()
        self._slots = slots

    def step(self) -> None:
        trials = self.trials
        trials.acquitted()
        trials.next()
        running = [trials.current] if trials.current else [r for r in self.open if not trials.suspected(r)][: self._slots]
        if any(len(r.delivered) >= r.kills_at for r in running):
            self.deaths += 1
            if trials.judge(running, self.now):
                self.refused += [r for r in self.open if trials.knows(r.ids, self.now)]
                self.open = [r for r in self.open if r not in self.refused]
            return
        for r in running:
            r.delivered.append(1)
            if len(r.delivered) == 10:
                self.open.remove(r)
                trials.withdraw(r)

    def run(self) -> None:
        for _ in range(1000):
            if not self.open:
                return
            self.step()
        raise AssertionError("no end")


def test_a_request_that_kills_is_found_among_innocents_and_dies_alone() -> None:
    poison = Request(99, 0)
    engine = Engine([*(Request(i) for i in range(20)), poison])
    engine.run()
    assert engine.refused == [poison]
    assert engine.deaths == 3
    assert not engine.trials.open


def test_it_is_found_also_behind_tokens_that_it_has_said() -> None:
    engine = Engine([Request(1), Request(2, 5), Request(3)])
    engine.run()
    assert [r.prompt for r in engine.refused] == [2]
    assert engine.deaths == 3


@pytest.mark.parametrize("seed", range(40))
def test_any_number_of_them_is_found_and_all_others_are_answered(seed: int) -> None:
    rng = random.Random(seed)
    killers = [Request(100 + i, rng.randrange(10)) for i in range(rng.randrange(1, 4))]
    others = [Request(i) for i in range(rng.randrange(12))]
    requests = killers + others
    rng.shuffle(requests)
    engine = Engine(requests, rng.choice((2, 4, 99)))
    engine.run()
    assert set(engine.refused) == set(killers)
    assert all(len(r.delivered) == 10 for r in others)


def test_deaths_with_new_tokens_in_between_make_nobody_a_suspect() -> None:
    trials: Trials[Request] = Trials()
    r = Request(1)
    for _ in range(9):
        assert trials.judge([r], 0.0) is False
        assert not trials.open
        r.delivered.append(1)


def test_two_deaths_without_a_token_make_suspects_who_are_acquitted_by_their_next_one() -> None:
    trials: Trials[Request] = Trials()
    a, b = Request(1), Request(2)
    for _ in range(2):
        assert trials.judge([a, b], 0.0) is False
    assert trials.next() is a
    assert trials.next() is None  # one at a time
    assert trials.suspected(b)
    assert trials.acquitted() is None
    a.delivered.append(1)
    assert trials.acquitted() is a
    assert a.deaths == 0
    assert trials.next() is b
    b.delivered.append(1)
    assert trials.acquitted() is b
    assert not trials.open


def test_who_leaves_during_or_before_a_trial_makes_room_for_the_next() -> None:
    trials: Trials[Request] = Trials()
    a, b, c = (Request(i) for i in range(3))
    for _ in range(2):
        trials.judge([a, b, c], 0.0)
    assert trials.next() is a
    trials.withdraw(b)
    trials.withdraw(a)
    assert trials.next() is c
    trials.withdraw(c)
    assert not trials.open


def test_the_prompt_of_poison_is_refused_for_an_hour_with_those_who_wait_with_it() -> None:
    trials: Trials[Request] = Trials()
    poison, same, other = Request(7), Request(7), Request(8)
    for _ in range(2):
        trials.judge([poison, same, other], 5.0)
    assert trials.next() is poison
    assert trials.judge([poison], 10.0)
    assert not trials.suspected(same)
    assert trials.next() is other
    assert trials.knows(poison.ids, 10.0 + 3599.0)
    assert not trials.knows(poison.ids, 10.0 + 3600.0)
    assert not trials.knows(other.ids, 11.0)


def test_a_suspect_that_could_not_begin_is_tried_first_and_not_again_counted() -> None:
    trials: Trials[Request] = Trials()
    a, b = Request(1), Request(2)
    for _ in range(2):
        trials.judge([a, b], 0.0)
    assert trials.next() is a
    trials.put_back()
    assert trials.next() is a
    assert trials.judge([], 0.0) is False  # died before it was sent
    assert trials.next() is a
    assert a.deaths == 2


def test_the_memory_of_poison_is_bounded() -> None:
    trials: Trials[Request] = Trials()
    for i in range(1100):
        r = Request(i)
        trials.judge([r], 0.0)
        trials.judge([r], 0.0)
        trials.next()
        assert trials.judge([r], 0.0)
    assert not trials.knows(Request(0).ids, 1.0)
    assert trials.knows(Request(1099).ids, 1.0)

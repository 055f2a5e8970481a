"""Random loads for the step machine, recorded as they run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from conftest import Loop, prompt

from minisgl.actors.scheduler.interface import Event, Output
from minisgl.journal.recorder import Recorder, Writer
from minisgl.journal.replay import Replay
from minisgl.plan import FAILED, NOT_A_NUMBER, StepPlan
from minisgl.sampling_params import RequestOptions


class Kept:
    """A sink that keeps the bytes of its parts."""

    error, due = "", False

    def __init__(self, parts: list[bytearray]) -> None:
        self.parts = parts

    def begin(self, data: bytes) -> None:
        self.due = False
        self.parts.append(bytearray(data))

    def write(self, data: bytes) -> None:
        self.parts[-1] += data

    def flush(self, now: float) -> float:
        return float("inf")

    def close(self) -> None: ...


class Recorded(Loop):
    """A Loop whose machine is watched by writers with and without token ids; `parts` has the bytes of their parts."""

    def __init__(self, tokens: tuple[bool, ...] = (True, False), broken: float = 0.0, **limits: Any) -> None:
        super().__init__(**limits)
        self.parts: dict[bool, list[bytearray]] = {kind: [] for kind in tokens}
        self.writers = {kind: Writer(Kept(self.parts[kind]), {"run": "test"}, kind) for kind in tokens}
        self.recorder = Recorder(self.machine, batch=16)  # loads are short
        self.plain_step = self.machine.step
        self.machine.step = self._watched  # type: ignore[method-assign]
        self.times, self.decided, self.broken = random.Random(0), 0, broken
        for writer in self.writers.values():
            self.recorder.add(writer)

    def _watched(self, inbox: list[Event], now: float) -> Output:
        out = self.plain_step(inbox, now)
        self.decided += len(self.recorder._costs.made)
        self.recorder.saw(inbox, now, out)
        return out

    def _launch(self, plan: StepPlan) -> None:
        """Steps take a time, so that the cost model has something to fit."""
        super()._launch(plan)
        rows = len(plan.ids) + 3 * len(self.machine.inflight[-1].slots)
        result = self.pending[-1]
        result.busy_us = 200 + 20 * rows + self.times.randrange(30)
        if self.times.random() < self.broken and len(result.tokens):
            row = self.times.randrange(len(result.tokens))
            result.tokens[row] = self.times.choice([FAILED, NOT_A_NUMBER])
        if self.times.random() < 5 * self.broken and result.scores is not None:
            result.scores.logprobs[self.times.randrange(len(result.scores.logprobs))] = np.nan

    def rotate(self) -> None:
        """Begin another part."""
        for writer in self.writers.values():
            writer.sink.due = True  # type: ignore[misc]


def random_load(seed: int, rotations: float = 0.05, **limits: Any) -> Recorded:
    """Arrivals with common beginnings, cancellations, flushes, salts, priorities, clients, late results."""
    rng = random.Random(seed)
    settings: dict[str, Any] = {
        "slots": rng.choice([2, 4, 7]),
        "num_pages": rng.choice([16, 24, 40]),
        "max_steps_in_flight": rng.choice([1, 2, 2, 3]),
        "step_tokens": rng.choice([9, 16, 40]),
        "broken": rng.choice([0.0, 0.02]),
        "itl_target": rng.choice([0.0, None, 0.002]),
        "order": rng.choice(["prefix", "arrival"]),
        "grammar_waits_for_token": rng.random() < 0.5,
    }
    loop = Recorded(**(settings | limits))
    trunks = [prompt(rng.randrange(1, 30), i) for i in range(4)]
    said: list[list[int]] = []
    for _ in range(rng.randrange(40, 100)):
        for _ in range(rng.choice([0, 0, 0, 1, 1, 3])):
            ids = [*rng.choice(trunks), *prompt(rng.randrange(1, 12), rng.randrange(1, 20))]
            if said and rng.random() < 0.3:
                ids = [*rng.choice(said)[:40], 5]
            more: dict[str, Any] = {}
            if rng.random() < 0.3:
                more["stop_token_ids"] = tuple(rng.sample(range(1, 23), rng.randrange(1, 4)))
            if rng.random() < 0.2:
                more["logit_bias"] = ((3, 0.0), (4, 0.0))
            if rng.random() < 0.2:
                more["repetition_penalty"] = 1.0 + 1e-12
            if rng.random() < 0.2:
                more["ignore_eos"] = True
            if rng.random() < 0.2:
                more["grammar"] = 'root ::= "é€😀"' * rng.randrange(1, 4)
            if rng.random() < 0.2:
                more |= {"logprobs": rng.randrange(3), "echo": rng.random() < 0.5}
            options = RequestOptions(
                pooling="" if {"logprobs", "grammar"} & more.keys() else rng.choice(["", "", "", "", "mean", "last"]),
                priority=rng.choice([0, 0, 0, 1, -3]),
                cache_salt=rng.choice(["", "", "pepper", "curry"]),
                client=rng.randrange(3),
                call=rng.randrange(6),
            )
            loop.add(ids[:50], rng.randrange(1, 24), options, **more)
            said.append(ids)
        if loop.asked and rng.random() < 0.06:
            loop.drop(rng.choice(list(loop.asked)))
        if rng.random() < 0.03:
            loop.flush()
        loop.now += rng.choice([0.0, 0.0001, 0.003, 0.01])
        loop.step(rng.choice([None, None, 0, 1, 2]))
        if rng.random() < 0.1:
            loop.recorder.rest(loop.now + rng.choice([0, 1]))
        if rng.random() < rotations:
            loop.rotate()
    for _ in range(3000):
        loop.now += 0.01
        loop.step()
        if loop.machine.idle:
            break
    while loop.recorder.rest(loop.now + 1) < float("inf"):
        pass
    return loop


def replayed(parts: list[bytearray]) -> Replay:
    """All parts, lived through again."""
    replay = Replay()
    for data in parts:
        replay.next_part(bytes(data))
        while replay.advance():
            pass
    return replay

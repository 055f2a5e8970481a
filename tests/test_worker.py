"""The worker actor: when it lets its runner prepare for later steps, and when its runner leaves the group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import oracle_config

from minisgl.actors.arenas import Arenas, close_arenas, create_arenas
from minisgl.actors.messages import Capacity
from minisgl.actors.ring import RingWriter
from minisgl.actors.worker import WorkerActor
from minisgl.plan import PlanKind, StepPlan


class Clock:
    """A Context whose time stands still until it is told otherwise."""

    name = "worker0"
    time = 100.0

    def now(self) -> float:
        return self.time

    def send(self, to: str, msg: Any) -> None:
        """Nobody listens."""

    def stop(self) -> None:
        """The loop around the actor ends."""


class SlowStarter:
    """A runner with three things to prepare."""

    left = 3
    closed = False

    def max_pages(self) -> int:
        return 4

    def allocate(self, num_pages: int) -> None:
        """Nothing to make."""

    def prepare(self) -> bool:
        self.left -= 1
        return self.left > 0

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def arenas() -> Iterator[Arenas]:
    made, fds = create_arenas(oracle_config(tp=1))
    yield made
    close_arenas(fds)


def test_a_runner_prepares_before_the_first_plan_and_in_pauses_but_not_between_steps(arenas: Arenas) -> None:
    clock, runner = Clock(), SlowStarter()
    worker = WorkerActor(clock, 0, arenas, lambda: runner)  # type: ignore[arg-type, return-value]
    worker.started()
    assert worker.idle() is False  # there is no cache yet: nothing can be prepared
    assert runner.left == 3
    worker.capacity(Capacity(4))
    assert worker.idle() is True
    assert runner.left == 2
    worker._planned = clock.time  # a plan has come
    assert worker.idle() is True  # stays awake, and waits
    assert runner.left == 2
    clock.time += 1
    assert worker.idle() is True
    assert runner.left == 1
    assert worker.idle() is False  # all is done: it may sleep
    assert (runner.left, worker.idle(), runner.left) == (0, False, 0)


@pytest.mark.parametrize("told", [True, False])
def test_a_rank_leaves_its_group_where_all_do_and_not_when_it_fails_alone(arenas: Arenas, told: bool) -> None:
    runner = SlowStarter()
    worker = WorkerActor(Clock(), 0, arenas, lambda: runner)  # type: ignore[arg-type, return-value]
    worker.started()
    if told:
        RingWriter(arenas.plans).publish(StepPlan(0, kind=PlanKind.STOP).pack())
        worker.idle()
    worker.stopping()
    assert runner.closed is told

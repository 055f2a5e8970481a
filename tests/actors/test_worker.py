"""The worker actor: when it lets its runner prepare for later steps, and when its runner leaves the group."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from conftest import World, fake_config

from minisgl.actors.messages import Capacity, MayCapture, WorkerArmed
from minisgl.actors.runtime.ring import RingReader, RingWriter
from minisgl.actors.runtime.shared_memory import Arenas, Memory
from minisgl.actors.worker import IdleCapture, WorkerActor
from minisgl.model.common.finished import Finished
from minisgl.model.fake_runner import FakeRunner
from minisgl.plan import PlanKind, StepPlan


class Clock:
    """A Context whose time stands still until a test sets it."""

    name = "worker0"
    time = 100.0

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def now(self) -> float:
        return self.time

    def send(self, to: str, msg: Any) -> None:
        self.sent.append(msg)

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

    def capture_ahead(self) -> bool:
        self.left -= 1
        return self.left > 0

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def arenas(request: pytest.FixtureRequest) -> Iterator[Arenas]:
    """Of one worker, or as many as a test has in its mark."""
    memory = Memory(fake_config(tp=getattr(request, "param", 1)))
    yield memory.arenas
    memory.close()


def test_a_runner_prepares_before_the_first_plan_and_in_pauses_but_not_between_steps(arenas: Arenas) -> None:
    clock, runner = Clock(), SlowStarter()
    worker = WorkerActor(clock, 0, arenas, lambda: runner)  # type: ignore[arg-type, return-value]
    worker.started()
    assert worker.idle() is False  # there is no cache yet: nothing can be prepared
    assert runner.left == 3
    worker.capacity(Capacity(4))
    assert worker.idle() is True
    assert runner.left == 2
    assert worker._idle_capture is not None
    worker._idle_capture.plan_came(StepPlan(0))
    assert worker.idle() is True  # stays awake, and waits
    assert runner.left == 2
    clock.time += 1
    assert worker.idle() is True
    assert runner.left == 1
    assert worker.idle() is False  # all is done: it may sleep
    assert (runner.left, worker.idle(), runner.left) == (0, False, 0)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_rank_leaves_its_group_where_all_do_and_not_when_it_fails_alone(arenas: Arenas, ordered: bool) -> None:
    runner = SlowStarter()
    worker = WorkerActor(Clock(), 0, arenas, lambda: runner)  # type: ignore[arg-type, return-value]
    worker.started()
    if ordered:
        RingWriter(arenas.plans).publish(StepPlan(0, kind=PlanKind.STOP).pack())
        worker.idle()
    worker.stopping()
    assert runner.closed is ordered


@pytest.mark.parametrize("arenas", [2], indirect=True)
def test_of_several_ranks_the_first_asks_and_all_prepare_when_the_plan_says_so(arenas: Arenas) -> None:
    clock, runners = Clock(), [SlowStarter(), SlowStarter()]
    workers = [WorkerActor(clock, rank, arenas, lambda r=rank: runners[r]) for rank in range(2)]  # type: ignore[arg-type, misc]
    for worker in workers:
        worker.started()
        worker.capacity(Capacity(4))
    clock.sent.clear()
    assert [workers[1].idle(), workers[0].idle(), workers[0].idle()] == [False, True, False]
    assert [type(m) for m in clock.sent] == [MayCapture]
    assert [r.left for r in runners] == [3, 3]  # none captures alone
    plans = RingWriter(arenas.plans)
    for left in (2, 1, 0):
        plans.publish(StepPlan(0, kind=PlanKind.CAPTURE).pack())
        for worker in workers:
            assert worker.idle() is True
        assert [r.left for r in runners] == [left, left]
        workers[0].idle()
    assert [type(m) for m in clock.sent] == [MayCapture] * 3  # not a fourth time: nothing is left


def test_the_scheduler_lets_ranks_prepare_only_when_all_can_and_nothing_is_to_be_done() -> None:
    world = World(0, fake_config(tp=2))
    plans = RingReader(world.arenas.plans, 1)
    while plans.take() is not None:
        pass
    scheduler = world.scheduler

    def kinds() -> list[PlanKind]:
        world.scheduler.idle()
        found = []
        while (raw := plans.take()) is not None:
            found.append(StepPlan.unpack(raw).kind)
        return found

    scheduler._armed.remove(1)
    scheduler.receive(MayCapture())
    assert kinds() == []  # rank 1 has no cache yet
    scheduler.receive(WorkerArmed(1))
    assert kinds() == [PlanKind.CAPTURE]
    assert kinds() == []  # once for each request
    world.submit([1, 2, 3], 5)
    while not scheduler.machine or not scheduler.machine.inflight:
        world.system.step()
    kinds()
    scheduler.receive(MayCapture())
    assert PlanKind.CAPTURE not in kinds()
    world.close()


class Recorder(FakeRunner):
    """Records its calls, in order."""

    left = 0  # of what there is to prepare
    events: list[int]  # steps, or -1

    def allocate(self, num_pages: int) -> None:
        super().allocate(num_pages)
        self.events = []

    def capture_ahead(self) -> bool:
        self.events.append(-1)
        self.left -= 1
        return self.left > 0

    def launch(self, plan: StepPlan) -> Finished:
        self.events.append(plan.step)
        return super().launch(plan)


def busy_world(seed: int) -> tuple[list[list[int]], dict[int, list[int]], dict[int, list[int]]]:
    """Requests come while three ranks have things to prepare: (what each rank did, answers, answers without preparing)."""
    answers = []
    for left in (12, 0):
        rng, world = random.Random(seed), World(seed, fake_config(tp=3))
        for rank, runner in enumerate(world.runners):
            assert isinstance(runner, Recorder)
            runner.left, runner.events = left, []
            world.system.actors[f"worker{rank}"]._idle_capture._finished = left == 0  # type: ignore[attr-defined]
        world.system._asleep.clear()
        for _ in range(25):
            if rng.random() < 0.4:
                world.submit([rng.randrange(20) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 9))
            for _ in range(rng.randrange(60)):
                world.system.step()
        world.system.run()
        answers.append(world.answers)
        if left:
            events = [runner.events for runner in world.runners if isinstance(runner, Recorder)]
        world.close()
    return events, answers[0], answers[1]


def test_ranks_prepare_between_the_same_two_steps_and_answers_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conftest.FakeRunner", Recorder)
    monkeypatch.setattr("minisgl.actors.worker._PAUSE_SECONDS", 0.0)
    between = 0
    for seed in range(30):
        events, with_pauses, without = busy_world(seed)
        assert events[0] == events[1] == events[2]
        assert events[0].count(-1) >= 12  # one that was asked for before a step, and again behind it, finds nothing left
        assert with_pauses == without
        between += sum(a == -1 and b > 0 for a, b in pairwise(events[0]))
    assert between > 20  # not only before all steps, or behind them


def test_ranks_that_prepared_by_themselves_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conftest.FakeRunner", Recorder)
    monkeypatch.setattr("minisgl.actors.worker._PAUSE_SECONDS", 0.0)

    def alone(self: IdleCapture) -> bool:
        if not self._finished:
            self.capture()
        return not self._finished

    monkeypatch.setattr(IdleCapture, "use_pause", alone)
    differ = 0
    for seed in range(10):
        events, _, _ = busy_world(seed)
        differ += not events[0] == events[1] == events[2]
    assert differ > 5


def test_a_scheduler_that_let_ranks_prepare_between_steps_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.actors.scheduler.step_machine.StepMachine.idle", True)
    with pytest.raises(AssertionError):
        test_the_scheduler_lets_ranks_prepare_only_when_all_can_and_nothing_is_to_be_done()

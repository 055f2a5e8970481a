"""Steps of a device that runs beside its worker: by CUDA events, here of a pretended GPU, or by what the worker sees."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import World, fake_config, talker

from minisgl.actors.messages import Trace
from minisgl.model.fake_runner import FakeRunner
from minisgl.plan import StepPlan, StepResult
from minisgl.tracing import worker
from minisgl.tracing.assemble import assemble, head, pack
from minisgl.tracing.observe import observe
from minisgl.tracing.summary import Track, parse
from scripts.check.trace import faults

STEP, LAUNCH = 4_000_000, 100_000  # nanoseconds


class Clock:
    """Of the host; the GPU's goes on, too, and began `AHEAD` nanoseconds before."""

    AHEAD = 777_000_000_000

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def __call__(self) -> int:
        return self.now


class Event:
    """As torch.cuda.Event."""

    clock: Clock
    gpu_free = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = 0

    def record(self) -> None:
        self.at = max(Event.clock.now, Event.gpu_free) + Clock.AHEAD

    def synchronize(self) -> None:
        Event.clock.now = max(Event.clock.now, self.at - Clock.AHEAD)

    def elapsed_time(self, other: Event) -> float:
        return float(np.float32((other.at - self.at) / 1e6))


class Pending:
    """A step on the GPU, or, without `events`, on a device of which nothing is known."""

    def __init__(self, result: StepResult, *, events: bool) -> None:
        self._result, clock = result, Event.clock
        began = max(clock.now, Event.gpu_free)
        self.until = Event.gpu_free = began + STEP
        if events:
            self.start, self.end = Event(True), Event(True)
            self.start.at, self.end.at = began + Clock.AHEAD, self.until + Clock.AHEAD
        clock.now += LAUNCH

    def done(self) -> bool:
        return Event.clock.now >= self.until

    def result(self) -> StepResult:
        return self._result


class Gpu(FakeRunner):
    """Answers as the fake runner does, and later."""

    events = True

    def launch(self, plan: StepPlan) -> Any:
        return Pending(super().launch(plan).result(), events=self.events)


def traced(lag: int, *, events: bool) -> tuple[dict[int, Track], list[int]]:
    """The trace of one request, and when the GPU finished its steps.  Time passes while all wait for the GPU."""
    Event.clock, Event.gpu_free = Clock(), 0
    world = World(None, fake_config(tp=1, lag=lag))
    actor, parts = world.system.actors["worker0"], [head(1, 1)]
    runner = Gpu(world.config, world.machine.limits.num_pages)
    runner.events = events
    runner.allocate(world.machine.limits.num_pages)
    actor._runner = runner
    probes = [
        observe(a.ctx, a, ship=lambda m: parts.append(pack(m.name, len(m.name), m.data)), clock=Event.clock)
        for a in world.system.actors.values()
    ]
    for probe in probes:
        probe(Trace(on=True))
    ended: list[int] = []
    world.submit(talker(9, 12), 12)
    post = actor._post

    def posting() -> bool:
        Event.clock.now += 1000
        return bool(post())

    actor._post = posting
    while not world.ends:
        before = Event.gpu_free
        world.system.step()
        if Event.gpu_free != before:
            ended.append(Event.gpu_free)
    for probe in probes:
        probe(Trace(on=False))
    world.close()
    tracks = parse(assemble(b"".join(parts)))
    assert not list(faults(tracks))
    return tracks, ended


def steps_of(tracks: dict[int, Track]) -> list[tuple[int, int]]:
    [device] = [t for t in tracks.values() if t.name == "device"]
    return [(e.begin, e.end) for e in device.events if e.name == "step"]


@pytest.mark.parametrize("mark", [worker._MARK_NS, 10_000_000])
def test_the_events_of_a_gpu_become_times_of_the_host(monkeypatch: pytest.MonkeyPatch, mark: int) -> None:
    monkeypatch.setattr(worker, "_MARK_NS", mark)  # with a small one the marks are renewed
    for lag in (1, 2):
        tracks, ended = traced(lag, events=True)
        found = steps_of(tracks)
        assert len(found) == len(ended)
        for (begin, end), truth in list(zip(found, ended, strict=True))[1:]:
            assert abs(end - truth) < 2000  # float32
            assert abs(end - begin - STEP) < 4000


def test_a_device_without_events_is_busy_from_a_launch_to_its_end() -> None:
    tracks, ended = traced(2, events=False)
    found = steps_of(tracks)
    assert len(found) == len(ended)
    for (begin, end), truth in zip(found, ended, strict=True):
        assert truth <= end <= truth + LAUNCH + 3000
        assert begin < truth
    assert all(a[1] <= b[0] for a, b in pairwise(found))

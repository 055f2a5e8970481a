"""Probes among real actors in one thread, on a clock that ticks whenever it is read."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from conftest import EOS, VOCAB, World, fake_config, random_traffic, talker
from tracing.test_perfetto import packed

from minisgl.actors.messages import Trace, Traced
from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.actors.wire import BadMessage
from minisgl.model.fake_runner import expected_tokens
from minisgl.plan import StepPlan
from minisgl.sampling_params import Finish, SamplingParams
from minisgl.simulation.gpu import CostModel, Work
from minisgl.simulation.replica import Log, Replica
from minisgl.tracing.assemble import assemble, head, pack
from minisgl.tracing.observe import observe
from minisgl.tracing.summary import Track, overlap, parse
from scripts.check.trace import faults


class Tracer:
    """Probes of all actors of a world, and what they have sent."""

    def __init__(self, world: World) -> None:
        self.parts, self.enough = [head(1, 1)], 0
        self.world = world
        clock = itertools.count(1_000_000, 700).__next__
        actors = world.system.actors
        self.pids = {name: 100 + i for i, name in enumerate(actors)}  # they are of one process
        self.probes = {name: observe(actor.ctx, actor, ship=self.said, clock=clock) for name, actor in actors.items()}

    def said(self, m: Traced) -> None:
        self.parts.append(pack(m.name, self.pids[m.name], m.data))
        self.enough += m.enough

    def begin(self, **order: Any) -> None:
        for probe in self.probes.values():
            probe(Trace(on=True, **order))

    def end(self) -> dict[int, Track]:
        for probe in self.probes.values():
            probe(Trace(on=False))
        tracks = parse(assemble(b"".join(self.parts)))
        assert not list(faults(tracks))
        return tracks


def events(tracks: dict[int, Track], process: str, track: str) -> list[Any]:
    return [e for t in tracks.values() if (t.process, t.name) == (process, track) for e in t.events]


def shadowed(world: World) -> list[str]:
    """What has a method of its own instead of its class's."""
    owners: list[Any] = [world.machine, *world.runners]
    for actor in world.system.actors.values():
        owners += [actor, actor.ctx]
    return [name for owner in owners for name in vars(owner) if hasattr(type(owner), name) and callable(getattr(owner, name))]


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_every_hop_of_mixed_requests_has_an_arrow_and_every_request_its_tokens(seed: int, lag: int) -> None:
    world = World(seed, fake_config(lag=lag))
    tracer = Tracer(world)
    tracer.begin()
    want = random_traffic(world, seed)
    tracks = tracer.end()
    received = {"Generate", "Track", "Tokens", "Text", "Started", "take plan", "take result"}
    seen = [e for t in tracks.values() for e in t.events if e.name in received]
    assert all(e.ends for e in seen)
    assert {e.name for e in seen} == received
    steps = world.machine.counters.steps
    for rank in range(2):
        done = [e.args["step"] for e in events(tracks, f"worker{rank}", "device") if e.name == "step"]
        assert done == list(range(steps))
    phases = events(tracks, "scheduler", "scheduler")
    assert all(len(e.starts) == 2 for e in phases if e.name == "publish")  # both ranks
    assert [e.args["step"] for e in phases if e.name == "take result"] == list(range(steps))
    said = {int(t.name.split()[1]): [e.name for e in t.events] for t in tracks.values() if t.name.startswith("request ")}
    finished = [uid for uid, end in world.ends.items() if end is not Finish.ABORT]
    assert finished
    for uid in finished:
        assert said[uid].count("token") == len(want[uid])
        assert said[uid][-1] == "end"
    world.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_trace_that_begins_and_ends_between_any_two_events_is_sound(seed: int) -> None:
    world = World(seed, fake_config(lag=1 + seed % 3))
    tracer = Tracer(world)
    prompts = [talker(9 + i, 12, first=i) for i in range(6)]
    uids = [world.submit(ids, 12) for ids in prompts]
    for _ in range(40 + 13 * seed):
        world.system.step()
    tracer.begin()
    for _ in range(150 + 31 * seed):
        world.system.step()
    tracks = tracer.end()
    assert tracks
    world.system.run()
    assert [world.answers[uid] for uid in uids] == [expected_tokens(ids, 12, VOCAB, (EOS,)) for ids in prompts]
    assert not shadowed(world)
    world.close()


def test_nothing_is_left_when_a_trace_has_ended_and_it_can_begin_again() -> None:
    world = World(1, fake_config())
    tracer = Tracer(world)
    assert not shadowed(world)
    for _ in range(2):
        tracer.begin()
        tracer.begin()  # again: it runs already
        assert {"send", "receive", "_plan", "_flush", "_launch", "_take", "idle"} <= set(shadowed(world))
        random_traffic(world, 3, n=3)
        assert events(tracer.end(), "worker0", "device")
        assert not shadowed(world)
    world.close()


def test_the_scheduler_says_when_the_steps_asked_for_have_come() -> None:
    world = World(None, fake_config())
    tracer = Tracer(world)
    tracer.begin(steps=5)
    random_traffic(world, 2, n=2, abort=0)
    assert tracer.enough == 1
    tracks = tracer.end()
    assert max(e.args["step"] for e in events(tracks, "worker0", "device") if e.name == "step") >= 4
    world.close()


def test_a_scheduler_that_has_no_machine_yet_refuses_to_be_traced() -> None:
    world = World(None, fake_config())
    actor = world.scheduler
    actor.machine, machine = None, actor.machine
    with pytest.raises(BadMessage):
        observe(actor.ctx, actor)(Trace(on=True))
    with pytest.raises(BadMessage):
        actor.receive(Trace(on=True))  # nobody observes it
    actor.machine = machine
    world.close()


@pytest.mark.parametrize("lag", [1, 2])
def test_plans_overlap_with_steps_at_lag_2_and_never_at_lag_1(lag: int) -> None:
    """Structure, not time: whether a plan goes out before the result of the one before has come."""
    world = World(None, fake_config(lag=lag))
    tracer = Tracer(world)
    tracer.begin()
    world.submit(talker(9, 30), 30)
    world.system.run()
    phases = events(tracer.end(), "scheduler", "scheduler")
    inflight, most = 0, 0
    for e in phases:
        inflight += (e.name == "publish") - (e.name == "take result")
        most = max(most, inflight)
    assert most == lag
    world.close()


# ---------------- the overlap of a schedule under virtual time
class _Constant(CostModel):
    def seconds(self, work: Work) -> float:
        return 0.004


class _Traced(Replica):
    """Notes what its scheduler and its GPU do, and when."""

    work: list[Any]
    gpu: list[Any]

    def call(self) -> Any:
        now = self.wake
        out = super().call()
        self.work.append(("", round(now * 1e9), round(self._scheduler_free * 1e9), "step", None, None))
        return out

    def _run(self, plan: StepPlan) -> None:
        before = self.busy
        super()._run(plan)
        end = round(self._gpu_free * 1e9)
        self.gpu.append(("device", end - round((self.busy - before) * 1e9), end, "step", {"step": plan.step}, None))


def simulated(lag: int) -> dict[str, Any]:
    limits = SchedulerLimits(
        slots=8,
        num_pages=100,
        page_size=16,
        max_context=512,
        step_tokens=64,
        max_steps_in_flight=lag,
        vocab_size=100,
        eos_ids=(),
        itl_target=0.0,
    )
    replica = _Traced(limits, _Constant(), 0.001, Log(4))
    replica.work, replica.gpu = [], []
    for uid in range(4):
        params = SamplingParams(max_tokens=20)
        replica.submit(Request(uid, np.arange(3, 23, dtype=np.int32) + uid * 20, 40, 0, params), 0.0)
    while replica.wake < np.inf:
        replica.call()
    parts = [pack("scheduler", 1, packed(replica.work)), pack("worker0", 2, packed(replica.gpu))]
    tracks = parse(assemble(head(1, 1) + b"".join(parts)))
    assert not list(faults(tracks))
    return overlap(tracks)


def test_lag_2_hides_the_scheduler_behind_the_device_and_lag_1_does_not() -> None:
    one, two = simulated(1), simulated(2)
    assert one["scheduler_hidden"] == 0
    assert one["device_busy"] == pytest.approx(4 / 5, abs=0.01)  # 4 ms of a step, then 1 ms of the scheduler
    assert two["device_busy"] > 0.99
    assert two["scheduler_hidden"] > 0.9
    assert one["steps"] <= two["steps"]

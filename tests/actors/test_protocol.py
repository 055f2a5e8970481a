"""The whole engine without a model, under seeded interleavings: real gateway, scheduler and workers around the fake runner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import EOS, VOCAB, World, fake_config, random_traffic

from minisgl.actors.messages import Stats
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.model.fake_runner import expected_tokens
from minisgl.plan import BIAS, EXTRA, StepLogprobs, StepPlan, StepResult
from minisgl.sampling_params import Finish

ROOMY, TIGHT = 160, 72  # KV tokens: enough for all, and so few that requests are evicted and retracted


def check_answers(world: World, want: dict[int, list[int]]) -> None:
    assert world.ends.keys() == want.keys(), "a request was never answered"
    for uid, expected in want.items():
        got, end = world.answers[uid], world.ends[uid]
        if end is Finish.ABORT:
            assert got == expected[: len(got)]
        else:
            assert got == expected
            assert end is (Finish.STOP if expected[-1] == EOS else Finish.LENGTH)


def run_world(seed: int, abort: float = 0.15, **engine: object) -> World:
    world = World(seed, fake_config(**engine))
    check_answers(world, random_traffic(world, seed, abort=abort))
    assert world.gateway.open_requests == 0
    assert world.machine.idle
    first, *others = world.runners
    for other in others:  # every rank ends in the same state without one message between ranks
        assert (first.kv == other.kv).all()
        assert (first.table == other.table).all()
        assert (first.kv_len == other.kv_len).all()
    world.close()
    return world


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
@pytest.mark.parametrize("kv_tokens", [ROOMY, TIGHT])
@pytest.mark.parametrize("block", range(4))
def test_text_is_the_reference_whatever_the_interleaving(lag: int, kv_tokens: int, block: int) -> None:
    for seed in range(block * 16, block * 16 + 16):
        run_world(seed, lag=lag, kv_tokens=kv_tokens)


def test_without_a_prefix_cache_the_text_is_the_same() -> None:
    for seed in range(24):
        run_world(seed, cache="none", kv_tokens=TIGHT)


@pytest.mark.parametrize("page_size", [1, 2, 8, 16])
def test_every_page_size_gives_the_same_text(page_size: int) -> None:
    for seed in range(12):
        run_world(seed, page_size=page_size, kv_tokens=80)


def test_the_tight_pool_really_retracts_and_evicts() -> None:
    retracted = sum(run_world(seed, kv_tokens=TIGHT).machine.counters.retractions for seed in range(20))
    assert retracted > 10


def test_a_second_turn_reads_its_history_from_the_cache(world) -> None:
    w = world(tp=1)
    ids = list(range(1, 15))
    first = w.submit(ids, 12)
    w.system.run()
    turn = ids + w.answers[first] + [5]
    second = w.submit(turn, 4)
    w.system.run()
    assert w.cached[first] == 0
    assert w.cached[second] == (len(ids + w.answers[first]) - 1) // 4 * 4  # the last answered token was never computed
    assert w.answers[second] == expected_tokens(turn, 4, VOCAB, (EOS,))


def test_identical_prompts_in_one_batch_share_pages_and_none_is_owned_twice(world) -> None:
    w = world(tp=1, step_tokens=60)
    ids = list(range(1, 18))
    for _ in range(3):
        w.submit(ids, 8)
    for _ in range(200):
        w.system.step()
        w.machine.check()
    w.system.run()
    assert all(tokens == expected_tokens(ids, 8, VOCAB, (EOS,)) for tokens in w.answers.values())


def test_an_aborted_request_gives_back_its_pages_in_every_phase() -> None:
    for phase in range(60):
        w = World(phase, fake_config())
        uid = w.submit(list(range(1, 20)), 20)
        for _ in range(phase):
            w.system.step()
        w.gateway.close(uid)
        w.system.run()
        assert w.machine.idle
        assert w.gateway.open_requests == 0
        w.close()


def test_decodes_get_a_token_in_every_step_while_long_prompts_arrive(world) -> None:
    w = world(tp=1, step_tokens=12, kv_tokens=1000)
    w.submit([1, 2, 3], 50, ignore_eos=True)
    plans = []
    inner = w.machine.step

    def spy(inbox, now):
        out = inner(inbox, now)
        if out.plan is not None:
            plans.append(len(w.machine.inflight[-1].slots) > 0)
        return out

    w.machine.step = spy
    while not w.machine.running or w.machine._prefilling:
        w.system.step()
    plans.clear()
    for i in range(6):
        w.submit([i + 4] * 40, 1)
    w.system.run()
    first = plans[:20]
    assert all(first), "a step computed prefill only while a request was decoding"


def test_a_prompt_that_does_not_fit_does_not_block_those_behind_it(world) -> None:
    w = world(tp=1, kv_tokens=64, max_running=3)
    w.submit(list(range(1, 10)), 30, ignore_eos=True)  # takes most of the pool as it grows
    for _ in range(60):
        w.system.step()
    big = w.submit([7] * 52, 2)
    small = w.submit([8, 9], 2)
    order = []
    while len(w.ends) < 3:
        w.system.step()
        order.extend(u for u in w.ends if u not in order)
    assert order.index(small) < order.index(big)


def test_a_tiny_plan_ring_never_loses_a_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl.actors.runtime import shared_memory

    real = shared_memory.create_ring
    monkeypatch.setattr(
        shared_memory, "create_ring", lambda name, readers, n: real(name, readers, 4096 if name == "plans" else n)
    )
    for seed in range(60):
        run_world(seed, lag=4)


def test_results_that_come_while_a_plan_waits_for_room_are_not_a_livelock(monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl.actors.runtime import shared_memory

    real = shared_memory.create_ring
    monkeypatch.setattr(
        shared_memory, "create_ring", lambda name, readers, n: real(name, readers, 4096 if name == "plans" else n)
    )
    w = World(None, fake_config(lag=4))
    silent = w.system.actors["worker1"]
    idle = silent.idle
    silent.idle = lambda: False  # one rank falls far behind
    for i in range(8):
        w.submit([i + 1] * 30, 10, ignore_eos=True)
    assert w.system.run(max_events=20_000) < 20_000, "somebody spins"
    silent.idle = idle
    w.system._asleep.discard("worker1")
    w.system.run()
    assert len(w.ends) == 8
    w.close()


# ---------------- the tests notice: each mutant breaks one rule of the protocol
def _by_slot(self: StepMachine, result, out) -> None:
    sent = self.inflight[0]
    self.inflight[0] = replace(sent, epochs=self.table.epoch[sent.slots])  # the present owners of the slots
    TAKE(self, result, out)


def _cache_unwritten(self: StepMachine, slot: int) -> None:
    self.table.planned[slot] = self.table.length[slot]  # pretend that every known token has been written
    RELEASE(self, slot)


def _free_shared(self: StepMachine, slot: int) -> None:
    self.table.n_shared[slot] = 0  # forget that the cache owns the prefix
    RELEASE(self, slot)


def _keep_duplicates(self: StepMachine, slot: int, full: int, remap: bool) -> int:
    return PUBLISH(self, slot, full, remap=False)  # free the duplicates but leave the row on them


def _forget_tail(self, slots, pages) -> None:
    index = self.n_pages[slots]
    self.pages[slots, index] = pages
    self.n_pages[slots] = index + 1


TAKE, RELEASE, PUBLISH = StepMachine._take_result, StepMachine._release, StepMachine._publish_prefix
MUTANTS = {
    "results are matched to the slot's new owner": (StepMachine, "_take_result", _by_slot),
    "an unwritten position is cached": (StepMachine, "_release", _cache_unwritten),
    "pages of the cache are freed with the request": (StepMachine, "_release", _free_shared),
    "duplicates are freed but still read": (StepMachine, "_publish_prefix", _keep_duplicates),
    "the token at a page boundary is lost at lag 1": (SlotTable, "grant_decode", _forget_tail),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_test_notices_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, broken = MUTANTS[name]
    monkeypatch.setattr(owner, method, broken)
    caught = 0
    for seed in range(40):
        try:
            run_world(seed, abort=0.1, lag=1 + seed % 3, kv_tokens=(ROOMY, TIGHT)[seed % 2])
        except Exception:  # whatever breaks first: a check, an assertion of the test, an index
            caught += 1
    assert caught > 0


def test_a_result_that_does_not_match_its_plan_is_refused() -> None:
    w = World(None, fake_config(tp=1))
    w.submit([1, 2, 3], 4)
    while not w.machine.inflight:
        w.system.step()
    with pytest.raises(RuntimeError, match="result"):
        w.machine.step([StepResult(99, np.zeros(1, np.int32))], 0.0)


def test_plans_and_results_with_everything_in_them_survive_the_ring() -> None:
    rng = np.random.default_rng(0)
    extras = np.array([(3, 0.5, -1, 1.5, 2, 2, 1, 3), (1, 0, 0, 1, -1, 0, 0, 0), (0, 0, 0, 1, 0, 1, 0, 0)], EXTRA)
    bias = np.array([(5, 0.25, 0), (7, -1, 9), (1, 100, 2)], BIAS)
    numbers = {name: rng.integers(0, 99, n).astype(np.int32) for name, n in (("history", 4), ("targets", 3), ("ids", 5))}
    plan = StepPlan(4, extras=extras, bias=bias, **numbers)
    for decode in (None, np.array([1, 2], np.int32)):
        plan.decode = decode
        back = StepPlan.unpack(plan.pack())
        for name in ("extras", "bias", "history", "targets", "ids"):
            assert getattr(back, name).tolist() == getattr(plan, name).tolist(), name
        for raw in (plan.pack()[:-1], plan.pack() + b"\0"):
            with pytest.raises(ValueError, match=r"plan 4 has|buffer"):
                StepPlan.unpack(raw)
    for m, w in ((3, 0), (2, 4)):
        scores = StepLogprobs(
            rng.random(m, np.float32), np.arange(m * w, dtype=np.int32).reshape(m, w), rng.random((m, w), np.float32)
        )
        raw = StepResult(7, np.array([5, 9], np.int32), 3, 2, 1, scores).pack()
        got = StepResult.unpack(raw)
        assert got.scores is not None
        assert (got.step, got.tokens.tolist(), got.busy_us, got.launch_us) == (7, [5, 9], 3, 1)
        assert got.scores.logprobs.tolist() == scores.logprobs.tolist()
        assert got.scores.top_ids.tolist() == scores.top_ids.tolist()
        assert got.scores.top_logprobs.tolist() == scores.top_logprobs.tolist()
        for bad in (raw[:-1], raw + b"\0", raw[: -4 * m * (1 + 2 * w) - 3]):
            with pytest.raises(ValueError, match="bytes"):
                StepResult.unpack(bad)


def test_a_result_carries_what_the_step_took_and_the_machine_adds_it_up() -> None:
    sent = StepResult(7, np.array([5, 9], np.int32), busy_us=1200, idle_us=3, launch_us=80, warmups=2)
    got = StepResult.unpack(sent.pack())
    assert (got.step, got.tokens.tolist(), got.busy_us, got.idle_us, got.launch_us, got.warmups) == (7, [5, 9], 1200, 3, 80, 2)
    with pytest.raises(ValueError, match="header says"):
        StepResult.unpack(sent.pack() + b"\0")
    w = World(None, fake_config(tp=1))
    w.submit([1, 2, 3], 1)
    while not w.machine.inflight:
        w.system.step()
    inflight = w.machine.inflight[0]
    w.machine.step([StepResult(inflight.step, np.zeros(1, np.int32), busy_us=1200, idle_us=3, launch_us=80, warmups=2)], 0.0)
    stats = w.machine.stats()
    assert (stats["busy_us"], stats["idle_us"], stats["launch_us"], stats["warmups"]) == (1200, 3, 80, 2)


def test_statistics_are_not_told_between_two_steps_of_a_busy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, fake_config())
    rest, send = [], world.scheduler.ctx.send

    def watch(to: str, message: object) -> None:
        if isinstance(message, Stats):
            rest.append(world.machine.idle)
        send(to, message)

    monkeypatch.setattr(world.scheduler.ctx, "send", watch)
    world.submit([1, 2, 3], 40)
    world.system.run()
    assert rest[-1]
    assert len(rest) <= 3
    world.close()

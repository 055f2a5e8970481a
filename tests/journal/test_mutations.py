"""One changed line in the policy is found at its first different plan; another fit of the step times is not a change."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest
from journal.loads import Recorded, random_load, replayed

from minisgl.actors.scheduler.admission import Admission
from minisgl.actors.scheduler.fair_queue import FairQueue
from minisgl.actors.scheduler.running_batch import RunningBatch
from minisgl.actors.scheduler.step_cost import StepCosts
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.cache.radix import RadixCache
from minisgl.journal.replay import Divergence, Replay

MUTATIONS: tuple[tuple[type, str, str, str], ...] = (
    (
        StepMachine,
        "_plan_decode",
        "table.planned[slots] + 1 < table.limit[slots]",
        "table.planned[slots] + 2 < table.limit[slots]",
    ),
    (StepMachine, "_prefill_budget", "self.limits.step_tokens - decode_rows", "self.limits.step_tokens - 2 * decode_rows"),
    (StepMachine, "_publish", "full > self.table.n_shared[slot]", "full > self.table.n_shared[slot] + 1"),
    (StepMachine, "_finish_reasons", "table.length[slots] >= table.limit[slots]", "table.length[slots] > table.limit[slots]"),
    (Admission, "_next_candidate", "(found[r.uid], -r.finish, -r.order)", "(-found[r.uid], -r.finish, -r.order)"),
    (Admission, "_has_pages_for", "others += len(self.running)", "others += 2 * len(self.running)"),
    (Admission, "_retract", "victim or max(", "victim or min("),
    (Admission, "_is_being_computed", "any(np.array_equal", "any(False and np.array_equal"),
    (FairQueue, "enter", "tokens * flow.rivals", "tokens"),
    (FairQueue, "serve", "self.time += tokens / self.weight", "self.time += tokens"),
    (RunningBatch, "_make_room", "self.cache.evict(missing)", "self.cache.evict(missing + 1)"),
    (RadixCache, "match", "(len(ids) - 1) // self.page_size", "(len(ids) - 2) // self.page_size"),
    (RadixCache, "release", "walk = walk.parent", "walk = walk.parent; self._unused.move_to_end(next(iter(self._unused)))"),
)


@pytest.fixture(scope="module")
def loops() -> list[Recorded]:
    """Loads of many kinds, with little memory."""
    return [random_load(seed, **more) for seed, more in ((1, {}), (2, {"num_pages": 16}), (3, {}), (7, {"num_pages": 16}))]


def mutate(monkeypatch: pytest.MonkeyPatch, cls: type, name: str, old: str, new: str) -> None:
    """Have a method with one line changed."""
    method = getattr(cls, name)
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count(old) == 1, (name, old)
    space: dict[str, Any] = {}
    exec(compile(source.replace(old, new), "mutated", "exec"), vars(sys.modules[cls.__module__]), space)
    monkeypatch.setattr(cls, name, space[name])


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m[1]}")
def test_a_changed_line_is_found_at_its_first_different_plan(
    loops: list[Recorded], monkeypatch: pytest.MonkeyPatch, mutation: tuple[type, str, str, str]
) -> None:
    mutate(monkeypatch, *mutation)
    found = 0
    for loop in loops:
        replay = Replay()
        at = 0
        try:
            for data in loop.parts[True]:
                replay.next_part(bytes(data))
                while replay.advance():
                    if replay.output.plan is not None:
                        assert replay.output.plan.pack() == loop.plans[at].pack()
                        at += 1
        except Divergence:  # at the first plan that is not that of the loop
            found += 1
    assert found, "no load notices this"


def test_another_processor_whose_fits_differ_replays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = random_load(11, itl_target=None)
    assert loop.decided > 20, "nothing was taken from the fit"

    def differs(self: StepCosts, *args: Any) -> Any:
        raise AssertionError("a replay asks the fit")

    for name in ("slack", "prefill_within", "prefill_beside", "rows_within_step", "seconds"):
        monkeypatch.setattr(StepCosts, name, differs)
    for parts in loop.parts.values():
        assert replayed(parts).steps > 20

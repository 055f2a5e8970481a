"""The plan builder and the reading of results, where requests of different kinds meet in one step."""

from __future__ import annotations

import numpy as np
import pytest

from minisgl.actors.scheduler.plan_builder import InFlight, PlanBuilder
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.cache.kept import KeptPages
from minisgl.cache.radix import RadixCache
from minisgl.plan import DRAW, POOL, StepResult
from minisgl.sampling_params import RequestOptions, SamplingParams

NO_PAGES = np.zeros(0, np.int32)


def request(uid: int, pooling: str = "", **params: object) -> Request:
    ids = np.array([uid, 8, 9], np.int32)
    return Request(uid, ids, 8, 0, SamplingParams(**params), RequestOptions(pooling=pooling))


def one_step(*requests: Request) -> tuple[SlotTable, dict[int, tuple[int, Request]], InFlight]:
    """A step in which every request joins, is prefilled and draws."""
    cache = RadixCache(4)
    table = SlotTable(4, 4, KeptPages(16, 4).ids, cache.root)
    builder, running = PlanBuilder(table, ()), {}
    for r in requests:
        slot = table.take(r, cache.root, NO_PAGES)
        running[r.uid] = (slot, r)
        builder.join(slot, r)
        builder.chunk(slot, r, 0, 3)
    plan, inflight = builder.build(0, NO_PAGES, False, 0)
    assert plan.prefill["n_ids"].tolist() == [3] * len(requests)
    assert [bool(flags & DRAW) for flags in plan.prefill["sample"].tolist()] == [True] * len(requests)
    assert [bool(flags & POOL) for flags in plan.prefill["sample"].tolist()] == [bool(r.options.pooling) for r in requests]
    return table, running, inflight


def test_tokens_vectors_and_failures_of_one_result_go_to_different_places() -> None:
    requests = request(1), request(2, grammar="x"), request(3, pooling="last"), request(4)
    table, running, inflight = one_step(*requests)
    plain, bound, pooled, gone = (running[r.uid][0] for r in requests)
    table.give(gone)
    vector = np.array([[0.5, 1.5]], np.float32)
    rows = inflight.read(StepResult(0, np.array([5, -1, 6, 7], np.int32), vectors=vector), table, running)
    assert (rows.slots.tolist(), rows.tokens.tolist()) == ([plain], [5])
    assert rows.failed == {bound: -1}
    assert [(slot, v.tolist()) for slot, v in rows.vectors] == [(pooled, [0.5, 1.5])]
    assert rows.wasted == 1
    assert rows.logprobs is None


def test_a_result_of_another_plan_or_without_its_vectors_is_refused() -> None:
    table, running, inflight = one_step(request(1), request(2, pooling="mean"))
    tokens = np.array([5, 6], np.int32)
    with pytest.raises(RuntimeError, match="result 1 has 2 rows, plan 0 has 2"):
        inflight.read(StepResult(1, tokens, vectors=np.zeros((1, 2), np.float32)), table, running)
    with pytest.raises(RuntimeError, match="result 0 has 1 rows, plan 0 has 2"):
        inflight.read(StepResult(0, tokens[:1], vectors=np.zeros((1, 2), np.float32)), table, running)
    with pytest.raises(RuntimeError, match="lacks vectors"):
        inflight.read(StepResult(0, tokens), table, running)


def test_page_grants_of_a_slot_end_with_its_owner() -> None:
    table, _, _ = one_step(request(1), request(2))
    for slot in (0, 1):
        table.grant_prefill(slot, 0, np.array([1, 2, 3], np.int32), np.array([slot + 7], np.int32))
    table.grant(np.array([0, 1]), np.array([1, 1]), np.array([3, 4], np.int32))
    table.give(0)
    assert table.take_grants().tolist() == [(1, 0, 8), (1, 1, 4)]
    assert len(table.take_grants()) == 0

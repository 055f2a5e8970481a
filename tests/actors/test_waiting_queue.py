"""The wait queue: order, accounting, and that its length appears in no cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.waiting_queue import WaitQueue
from minisgl.sampling_params import RequestOptions, SamplingParams


def request(uid: int, priority: int = 0, n: int = 3) -> Request:
    return Request(uid, np.zeros(n, np.int32), n + 1, 0, SamplingParams(), RequestOptions(priority=priority))


def uids(queue: WaitQueue, n: int = 100) -> list[int]:
    return [r.uid for r in queue.front(n)]


def test_higher_priorities_come_first_and_equals_in_order_of_arrival() -> None:
    queue = WaitQueue()
    for uid, priority in enumerate((0, 5, 0, -5, 5)):
        queue.add(request(uid, priority))
    assert uids(queue) == [1, 4, 0, 2, 3]
    assert uids(queue, 2) == [1, 4]


def test_a_retracted_request_stands_before_its_equals_and_behind_the_more_important() -> None:
    queue = WaitQueue()
    for uid, priority in enumerate((0, 1, 0)):
        queue.add(request(uid, priority))
    queue.add(request(9), front=True)
    assert uids(queue) == [1, 9, 0, 2]


def test_an_unknown_request_cannot_be_removed_and_one_is_removed_once() -> None:
    queue = WaitQueue()
    queue.add(request(1))
    assert queue.remove(7) is None
    removed = queue.remove(1)
    assert removed is not None
    assert removed.uid == 1
    assert queue.remove(1) is None
    assert len(queue) == queue.tokens == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(-2, 2), st.integers(1, 5)), max_size=60))
def test_the_queue_agrees_with_a_sorted_list(steps: list[tuple[int, int, int, int]]) -> None:
    queue, model = WaitQueue(), []
    for n, (what, uid, priority, size) in enumerate(steps):
        known = next((m for m in model if m[2] == uid), None)
        if what == 2 or known:
            assert (queue.remove(uid) is not None) == (known is not None)
            model = [m for m in model if m[2] != uid]
        else:
            queue.add(request(uid, priority, size), front=what == 1)
            model.append((-priority, -n if what == 1 else n, uid, size))
        model.sort(key=lambda m: m[:2])
        assert uids(queue) == [m[2] for m in model]
        assert queue.tokens == sum(m[3] for m in model)
        assert len(queue) == len(model)
        assert all((u in queue) == any(m[2] == u for m in model) for u in range(10))


def test_looking_at_the_front_adding_and_removing_compare_few_requests() -> None:
    compared = 0

    class Counting(float):
        def __lt__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return float.__lt__(self, other)  # type: ignore[operator]

        __hash__ = float.__hash__

    queue = WaitQueue()
    for uid in range(5000):
        r = request(uid)
        r.finish = Counting(uid * 7919 % 5000)
        queue.add(r)
    for call in (lambda: queue.front(16), lambda: queue.remove(4321), lambda: queue.add(request(5001))):
        compared = 0
        call()
        assert compared <= 20


def test_the_fair_order_stands_between_priority_and_arrival() -> None:
    queue = WaitQueue()
    for uid, (priority, finish) in enumerate(((0, 90.0), (0, 30.0), (-1, 1.0), (0, 30.0), (1, 500.0))):
        r = request(uid, priority)
        r.finish = finish
        queue.add(r)
    assert uids(queue) == [4, 1, 3, 0, 2]
    r = request(9)
    r.finish = 1000.0
    queue.add(r, front=True)
    assert uids(queue) == [4, 9, 1, 3, 0, 2]

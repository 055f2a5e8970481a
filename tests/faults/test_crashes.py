"""No request is lost and no token contradicted, whichever actors die, and whenever: seeds, and each point of a scenario.

scripts/check/crashes.py runs many more.
"""

from __future__ import annotations

import crash_scenario
import pytest
from conftest import cases
from crash_faults import FAULTS, planted
from test_tokenizer_pool import Front

from minisgl.actors.messages import EngineReady, Hello

SCENARIO, STRIDE = 7, 10


@pytest.mark.parametrize("name", ["checker", "detokenizer", "scheduler", "tokenizer", "worker0", "worker1"])
def test_an_actor_may_die_at_each_point_of_a_scenario(name: str) -> None:
    points = crash_scenario.finish(crash_scenario.make(SCENARIO)).cluster.points[name]
    for k in range(1, points + 1, 1 if points < 30 else STRIDE):
        run = crash_scenario.finish(crash_scenario.make(SCENARIO, {name: (1, k)}))
        assert run.cluster.deaths == {name: 1}, k


@pytest.mark.parametrize("block", range(5))
def test_actors_may_die_at_any_time_also_several_and_during_recovery(block: int) -> None:
    died = kept = 0
    for i in range(cases(30)):
        run = crash_scenario.finish(crash_scenario.disturbed(block + 5 * i))
        died += sum(run.cluster.deaths.values())
        kept += run.cluster.kept
    assert died > 30
    assert kept > 30, "no scheduler has begun with the pages of the one before"


def test_what_a_process_said_before_it_died_says_nothing_of_the_next() -> None:
    front = Front(1, 0)
    gateway = front.gateway
    gateway.pids |= {"scheduler": 7, "detokenizer": 8}
    gateway.lost(["scheduler", "detokenizer"], front.memory.arenas.requests)
    for m in (EngineReady(100, 6), Hello("scheduler", 6), Hello("detokenizer", 6)):
        gateway.receive(m)
    assert (gateway.state, gateway.engine_up, gateway.down) == ("recovering", False, ["detokenizer", "scheduler"])
    for m in (EngineReady(100, 7), Hello("scheduler", 7), Hello("detokenizer", 8)):
        assert gateway.state == "recovering"
        gateway.receive(m)
    assert gateway.state == "ready"
    front.memory.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_these_tests_notice_when(fault: str) -> None:
    with planted(fault):
        for seed in range(400):
            try:
                crash_scenario.finish(crash_scenario.disturbed(seed, *FAULTS[fault][1:]))
            except Exception:  # whatever breaks first: a comparison, a check of the books, an actor
                return
    pytest.fail("nothing was noticed")

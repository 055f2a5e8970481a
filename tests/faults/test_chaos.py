"""Kills under load: nobody's answer is lost, repeated or changed.  A small run of scripts/check/chaos.py on the fake engine.

Skipped where the server knows no --max-restarts: there it ends with the first of its children.
"""

from __future__ import annotations

import asyncio

import pytest

from scripts.check.chaos import attack
from scripts.lib.storm import Options, knows

KILLS = 40


@pytest.mark.skipif(not knows("max_restarts"), reason="a server that cannot restart its processes")
def test_forty_kills_under_load_change_no_answer_and_leave_nothing() -> None:
    quiet = frozenset({"kill", "leave", "slow", "http", "sockets"})  # no long stops, no disk of its own
    options = Options("fake", KILLS, 1, (0.02, 0.2), attacks=quiet, clients=4, cases=34, tokens=90, hang=60.0)
    figures, found = asyncio.run(attack(options))
    assert found == [], options.reproducer()
    assert figures["kills"] == KILLS
    assert figures["lost"] == 0


def test_attacks_without_kills_change_no_answer_and_leave_nothing() -> None:
    attacks = frozenset({"stop", "leave", "slow", "http", "sockets", "disk"})
    options = Options("fake", 0, 2, (0.02, 0.2), attacks=attacks, seconds=5.0, clients=4, cases=17, tokens=60, hang=60.0)
    figures, found = asyncio.run(attack(options))
    assert found == [], options.reproducer()
    assert figures["requests"] >= 17

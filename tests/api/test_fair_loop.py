"""The event loop hands out few events in a turn, forgets none, and sees the engine's in every turn."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import pytest

from minisgl.api.http import fair_loop
from minisgl.api.http.fair_loop import FairLoop

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio cannot be told the loop")


def run(preferred: bool, n: int = 200) -> tuple[list[int], list[int]]:
    """`n` sockets that are readable for ever, and a pipe that is written to in every turn.

    Returns, for each turn, how many sockets were read, and in which turns the pipe was.
    """

    async def main() -> tuple[list[int], list[int]]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, FairLoop)
        turns, seen, pairs = [0], list[int](), [socket.socketpair() for _ in range(n)]
        read = set[int]()

        def one(i: int) -> None:
            turns[-1] += 1
            read.add(i)

        for i, (a, b) in enumerate(pairs):
            b.send(b"x")
            loop.add_reader(a, one, i)
        inner, outer = os.pipe()

        def pipe() -> None:
            os.read(inner, 1)
            seen.append(len(turns))

        loop.add_reader(inner, pipe)
        if preferred:
            loop.prefer([inner])
        os.write(outer, b"x")
        while len(turns) < 40:
            await asyncio.sleep(0)
            turns.append(0)
            if len(seen) and seen[-1] == len(turns) - 1:
                os.write(outer, b"x")
        assert len(read) == n, "somebody was never looked at"
        loop.prefer([])
        loop.remove_reader(inner)
        for fd in (inner, outer):
            os.close(fd)
        for a, b in pairs:
            loop.remove_reader(a)
            a.close()
            b.close()
        return turns, seen

    return fair_loop.run(main())


def test_a_turn_has_few_events_and_everybody_has_his() -> None:
    turns, _ = run(False)
    assert max(turns) == fair_loop._EVENTS


def test_what_is_preferred_is_seen_in_every_turn_however_many_others_are_ready() -> None:
    _, waits = run(False)
    _, seen = run(True)
    assert len(seen) >= 19, "every second turn: it is written to in the one and read in the next"
    assert len(waits) < 10


def test_a_preferred_descriptor_may_be_closed_before_it_is_forgotten() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, FairLoop)
        inner, outer = os.pipe()
        loop.add_reader(inner, lambda: None)
        loop.prefer([inner])
        loop.remove_reader(inner)
        os.close(inner)
        os.close(outer)
        loop.prefer([])

    fair_loop.run(main())

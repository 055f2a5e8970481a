"""A journal that ends anywhere, or is damaged anywhere: what is whole replays, and nothing else is believed."""

from __future__ import annotations

import random
from io import BytesIO

import pytest
from conftest import cases
from journal.loads import random_load, replayed

from minisgl.errors import UserError
from minisgl.journal.format import Parser
from minisgl.journal.replay import Divergence, Replay, records


@pytest.fixture(scope="module")
def part() -> bytes:
    return bytes(random_load(2).parts[False][-1])


def test_cut_at_any_byte_the_whole_records_are_read(part: bytes) -> None:
    ends = [*(r.offset for r in records(BytesIO(part))), len(part)][1:]
    for cut in range(len(part)):
        parser = Parser()
        found = sum(1 for _ in parser.feed(part[:cut])) if cut < 3000 or cut in ends or cut % 97 == 0 else None
        whole = sum(end <= cut for end in ends)
        assert found in (None, whole)


def test_cut_anywhere_what_is_whole_replays(part: bytes) -> None:
    rng = random.Random(1)
    complete = replayed([bytearray(part)]).steps
    for _ in range(cases(30)):
        cut = rng.randrange(len(part))
        replay = replayed([bytearray(part[:cut])])
        assert replay.steps <= complete
        assert replay.torn < len(part)


def test_fed_a_byte_at_a_time_it_is_the_same(part: bytes) -> None:
    replay, steps = Replay(), 0
    for i in range(0, len(part), 7):
        replay.feed(part[i : i + 7])
        while replay.advance():
            steps += 1
    assert steps == replayed([bytearray(part)]).steps
    assert not replay.torn


def test_a_bit_that_has_turned_ends_the_part_before_its_record(part: bytes) -> None:
    rng = random.Random(2)
    offsets = [r.offset for r in records(BytesIO(part))]
    for _ in range(cases(60)):
        at = rng.randrange(16, len(part))
        damaged = bytearray(part)
        damaged[at] ^= 1 << rng.randrange(8)
        before = sum(offset <= at for offset in offsets) - 1
        assert sum(1 for _ in Parser().feed(bytes(damaged))) <= before + (before < 0)


def test_other_bytes_are_no_journal() -> None:
    rng = random.Random(3)
    for n in (0, 1, 15, 16, 17, 100, 1000):
        data = rng.randbytes(n)
        if n:
            with pytest.raises(UserError, match="no journal"):
                list(Parser().feed(data))
        else:
            assert list(Parser().feed(data)) == []


def test_parts_of_which_one_is_torn_go_on_with_the_next_snapshot() -> None:
    loop = next(loop for loop in map(random_load, range(20, 40)) if len(loop.parts[True]) > 2)
    parts = loop.parts[True]
    torn = bytearray(parts[0][: len(parts[0]) * 2 // 3])
    replay = replayed([torn, *parts[1:]])
    assert replay.machine is not None
    assert replay.machine.counters.steps == loop.machine.counters.steps


def test_a_part_that_does_not_follow_the_one_before_is_a_difference() -> None:
    parts = random_load(9).parts[True]
    replay = Replay(bytes(parts[0]))
    while replay.advance():
        pass
    assert replay.machine is not None
    replay.machine.waiting._added += 1
    replay.next_part(bytes(parts[1]))
    with pytest.raises(Divergence, match="begins with another state: added: recorded"):
        replay.advance()

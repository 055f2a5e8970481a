"""The broadcast ring: nothing lost, nothing twice, nothing torn, nothing overwritten."""

from __future__ import annotations

import os
import random

import pytest

from minisgl.actors.runtime.ring import RingReader, RingWriter, create_ring
from minisgl.actors.runtime.status import Board, Line, create_board


@pytest.fixture
def ring():
    fds = []

    def make(readers: int = 1, capacity: int = 4096):
        spec, fd = create_ring("test", readers, capacity)
        fds.append(fd)
        return spec

    yield make
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("seed", range(20))
def test_every_reader_gets_every_record_in_order_whatever_the_sizes(ring, seed: int) -> None:
    rng = random.Random(seed)
    spec = ring(readers=3)
    writer, readers = RingWriter(spec), [RingReader(spec, r) for r in range(3)]
    sent: list[bytes] = []
    got: list[list[bytes]] = [[], [], []]
    for _ in range(600):
        payload = rng.randbytes(rng.choice([0, 1, 15, 16, 17, 300, 1500]))
        if writer.has_room(len(payload)):
            writer.publish(payload)
            sent.append(payload)
        else:
            with pytest.raises(BufferError):
                writer.publish(payload)
        who = rng.randrange(3)
        for _ in range(rng.randrange(4)):
            if (record := readers[who].take()) is not None:
                got[who].append(record)
    for who, reader in enumerate(readers):
        while (record := reader.take()) is not None:
            got[who].append(record)
        assert got[who] == sent
    assert len(sent) > 100


def test_an_unread_record_is_never_overwritten(ring) -> None:
    spec = ring(readers=2)
    writer, fast, slow = RingWriter(spec), RingReader(spec, 0), RingReader(spec, 1)
    n = 0
    while writer.has_room(400):
        writer.publish(n.to_bytes(400, "little"))
        n += 1
        fast.take()
    assert not fast.pending()
    with pytest.raises(BufferError):
        writer.publish(bytes(400))
    assert [int.from_bytes(slow.take() or b"", "little") for _ in range(n)] == list(range(n))
    writer.publish(bytes(400))


def test_a_half_visible_record_is_not_there_yet(ring) -> None:
    spec = ring()
    writer, reader = RingWriter(spec), RingReader(spec)
    writer.publish(b"hello")
    for offset in range(16 + 5):  # any byte of header or payload that is not visible yet
        writer._data[offset] ^= 1
        assert reader.take() is None
        writer._data[offset] ^= 1
    assert reader.take() == b"hello"


def test_a_record_that_can_never_fit_is_refused(ring) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        RingWriter(ring()).publish(bytes(4000))


def test_flags_tell_the_other_side_whom_to_ring(ring) -> None:
    spec = ring(readers=2)
    writer, readers = RingWriter(spec), [RingReader(spec, r) for r in range(2)]
    assert writer.parked() == []
    readers[1].park(True)
    assert writer.parked() == [1]
    readers[1].park(False)
    assert writer.parked() == []
    writer.starve(True)
    assert readers[0].starved()
    writer.starve(False)
    assert not readers[0].starved()


def test_a_line_of_the_board_is_what_its_process_last_wrote() -> None:
    spec, fd = create_board(("api", "scheduler"))
    mine = Board(spec, "scheduler")
    mine.report(7, True)
    line = Board(spec).line("scheduler")
    assert (line.pid, line.step, line.busy, line.beat_ns) == (0, 7, True, 0)
    mine.beat()
    alive = Board(spec).line("scheduler")
    assert (alive.pid, alive.step, alive.busy, alive.step_ns) == (os.getpid(), 7, True, line.step_ns)
    assert alive.beat_ns >= line.step_ns > 0
    Board(spec).clear("scheduler")
    assert Board(spec).line("scheduler") == Line(0, 7, False, 0, 0)
    assert Board(spec).line("api").pid == 0
    os.close(fd)

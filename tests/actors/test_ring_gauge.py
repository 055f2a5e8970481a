"""What a gauge says of a ring is what its writer and its readers have made of it."""

from __future__ import annotations

import os
import random

import pytest

from minisgl.actors.runtime.ring import RingReader, RingWriter, create_ring
from minisgl.api.rings import RingGauge


@pytest.mark.parametrize("seed", range(20))
def test_a_gauge_counts_what_the_slowest_reader_has_not_read(seed: int) -> None:
    """Records of all lengths, round and round the buffer."""
    rng = random.Random(seed)
    readers = rng.choice([1, 1, 3])
    spec, fd = create_ring("test", readers, 4096)
    writer, gauge = RingWriter(spec), RingGauge(spec)
    mine = [RingReader(spec, rank) for rank in range(readers)]
    read = [0] * readers
    published = 0
    for _ in range(500):
        payload = bytes(rng.randrange(700))
        if rng.random() < 0.5 and writer.has_room(len(payload)):
            writer.publish(payload)
            published += 1
        rank = rng.randrange(readers)
        read[rank] += mine[rank].take() is not None
        n, size, capacity = gauge.depth()
        assert n == published - min(read)
        assert 0 <= size <= capacity == spec.capacity
        assert (size > 0) >= (n > 0)
    assert published > 50
    os.close(fd)


def test_a_gauge_that_is_overtaken_ends_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that stands at another position than where it was looked for has been written over since."""
    spec, fd = create_ring("test", 1, 4096)
    writer, gauge, reader = RingWriter(spec), RingGauge(spec), RingReader(spec)
    for _ in range(3):
        writer.publish(bytes(40))
    at = reader._words[0] // 3
    gauge._data[at + 8 : at + 16] = (1 << 40).to_bytes(8, "little")
    assert gauge.depth()[0] == 1
    monkeypatch.setattr("minisgl.api.rings._MOST", 1)
    assert gauge.depth()[0] == 1
    os.close(fd)

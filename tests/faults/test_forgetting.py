"""Pages that may hold NaN leave the prefix cache; those that a sound request has read stay."""

from __future__ import annotations

import numpy as np

from minisgl.cache.radix import RadixCache


def test_a_forgotten_path_is_found_no_more_down_to_what_a_sound_request_has_read() -> None:
    cache = RadixCache(2)
    ids = np.arange(12, dtype=np.int32)
    good, _, _ = cache.extend(cache.root, ids[:4], np.array([0, 1], np.int32))
    cache.root.refs += 1
    cache.release(good, sound=True)
    handle, _ = cache.acquire(cache.match(ids[:5]))
    handle, _, _ = cache.extend(handle, ids[4:10], np.array([2, 3, 4], np.int32))
    assert cache.match(ids).num_pages == 5
    cache.forget(handle)
    assert cache.match(ids).num_pages == 2
    cache.check()
    cache.release(handle)
    assert sorted(cache.flush().tolist()) == [0, 1, 2, 3, 4]
    cache.check()

"""Keyed hashes of tokens: equal beginnings stay equal, different ones differ, and the key is what decides."""

from __future__ import annotations

import random

import numpy as np

from minisgl.journal.keyed import _SIP, Key, _siphash, ends


def hashed(key: Key, ids: list[int], salt: str = "") -> list[int]:
    tokens = np.array(ids, np.int32)
    return key.hashes(key.scan(key.start(salt), tokens), tokens).tolist()


def test_a_hash_is_a_function_of_all_tokens_before_and_the_token_itself() -> None:
    rng, key = random.Random(1), Key((7,))
    for _ in range(30):
        n = rng.randrange(1, 300)
        ids = [rng.choice([rng.randrange(200_000), rng.randrange(1 << 31)]) for _ in range(n)]
        whole = hashed(key, ids)
        at = rng.randrange(n)
        assert hashed(key, ids[:at]) == whole[:at]
        other = [*ids[:at], ids[at] ^ 1, *ids[at + 1 :]]
        assert [a == b for a, b in zip(whole, hashed(key, other), strict=True)] == [True] * at + [False] * (n - at)
        assert not set(whole) & set(hashed(Key((7,)), ids))
        assert not set(whole) & set(hashed(key, ids, "salt"))


def test_token_by_token_is_the_same_as_at_once() -> None:
    rng, key = random.Random(2), Key((7,))
    ids = [rng.randrange(100_000) for _ in range(200)]
    state, found = key.start(""), []
    for at, token in enumerate(ids):
        one = np.array([token], np.int32)
        states = key.scan(state, one, at)
        state = states[:, -1]
        found += key.hashes(states, one).tolist()
    assert found == hashed(key, ids)


def test_hashes_are_no_token_ids_and_say_which_end_answers() -> None:
    rng, key = random.Random(3), Key((7, 900))
    ids = [rng.choice([7, 8, 900, rng.randrange(1000)]) for _ in range(3000)]
    found = np.array(hashed(key, ids), np.int32)
    assert found.min() >= 1 << 30
    assert ends(found).tolist() == [t in (7, 900) for t in ids]
    assert len(set(found.tolist())) > 2990


def test_the_mixing_is_siphash() -> None:
    """Against a plain version of the rounds, on numbers."""

    def left(x: int, n: int) -> int:
        return (x << n | x >> (64 - n)) & ((1 << 64) - 1)

    def rounds(v: list[int], n: int) -> list[int]:
        a, b, c, d = v
        for _ in range(n):
            a = (a + b) % (1 << 64)
            b = left(b, 13) ^ a
            a = left(a, 32)
            c = (c + d) % (1 << 64)
            d = left(d, 16) ^ c
            a = (a + d) % (1 << 64)
            d = left(d, 21) ^ a
            c = (c + b) % (1 << 64)
            b = left(b, 17) ^ c
            c = left(c, 32)
        return [a, b, c, d]

    rng = random.Random(4)
    key, words = [rng.getrandbits(64) for _ in range(2)], [rng.getrandbits(64) for _ in range(3000)]
    want = []
    for word in words:
        a, b, c, d = (x ^ k for x, k in zip(_SIP, (*key, *key), strict=True))
        a, b, c, d = rounds([a, b, c, d ^ word], 1)
        a, b, c, d = rounds([a ^ word, b, c ^ 0xFF, d], 3)
        want.append(a ^ b ^ c ^ d)
    assert _siphash([np.uint64(k) for k in key], np.array(words, np.uint64)).tolist() == want

"""Keyed hashes in the place of token ids: equal beginnings stay equal, and nothing else can be read from them.

The number for a token is a function of a random key, which is stored nowhere, of all tokens before it and of itself.  So the
radix tree of a replay has the shape of the real one, without a word of anybody's prompt.  Its 31 bits are

    bit 30       1: so no hash is mistaken for a token id
    bits 29..1   the hash
    bit 0        1: the token ends answers (EOS)

Two polynomials over the tokens, modulo the prime 2^31 - 1 and at secret points, take in the sequence (the universal hash of
Carter and Wegman, 1979, with secret tables for the tokens); SipHash (Aumasson and Bernstein, 2012) with one and three rounds
makes the output of them.  A polynomial is a scan, so a prompt, and the rows of a step, are a few numpy calls.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from minisgl.arrays import I32

U64 = npt.NDArray[np.uint64]
_P = np.uint64((1 << 31) - 1)
_MARK = 1 << 30
_LOW = 18  # bits of a token id that have a table of their own
NOTHING = np.zeros(0, np.int32)


class Key:
    """A random key, and the functions that it makes.  A state is u64[2, ...]: the two polynomials so far."""

    def __init__(self, eos_ids: tuple[int, ...]) -> None:
        rng = np.random.Generator(np.random.PCG64(secrets.randbits(256)))
        self._low: U64 = rng.integers(1, int(_P), (2, 1 << _LOW), np.uint64)  # by the low bits of a token id
        self._high: U64 = rng.integers(1, int(_P), (2, 1 << (31 - _LOW)), np.uint64)
        self._high[:, 0] = 0
        points = [secrets.randbelow(int(_P) - 3) + 2 for _ in range(2)]
        self._point: U64 = np.array(points, np.uint64)
        self._inverse: U64 = np.array([pow(x, -1, int(_P)) for x in points], np.uint64)
        self._powers, self._inverses = self._point[:, None] ** np.uint64(0), self._point[:, None] ** np.uint64(0)
        self._sip = [np.uint64(secrets.randbits(64)) for _ in range(2)]
        self._salt_key = secrets.token_bytes(32)
        self._eos = np.array(sorted(eos_ids), np.int64)

    def salt(self, salt: str) -> str:
        """A name for a salt; none for none."""
        return hashlib.blake2b(salt.encode(), key=self._salt_key, digest_size=8).hexdigest() if salt else ""

    def start(self, salt: str) -> U64:
        """The state u64[2] before the first token."""
        raw = hashlib.blake2b(salt.encode(), key=self._salt_key, digest_size=16, person=b"start").digest()
        state: U64 = np.frombuffer(raw, np.uint64) % _P
        return state

    def scan(self, state: U64, ids: npt.NDArray[Any]) -> U64:
        """The states u64[2, n] after each of the tokens i32[n], which follow `state` u64[2]."""
        n = len(ids)
        if n == 0:
            return np.zeros((2, 0), np.uint64)
        while self._powers.shape[1] < n:
            self._powers, self._inverses = _doubled(self._powers, self._point), _doubled(self._inverses, self._inverse)
        terms = self._terms(ids) * self._inverses[:, :n] % _P
        sums = np.cumsum(terms, axis=1) + (self._point * state % _P)[:, None]
        found: U64 = sums % _P * self._powers[:, :n] % _P
        return found

    def advance(self, states: U64, ids: npt.NDArray[Any]) -> U64:
        """The states u64[2, n] after one more token each."""
        found: U64 = (states * self._point[:, None] + self._terms(ids)) % _P
        return found

    def _terms(self, ids: npt.NDArray[Any]) -> U64:
        high = ids >> _LOW
        if not high.any():  # but for vocabularies that do not exist
            return self._low.take(ids, axis=1)
        found: U64 = (self._low[:, ids & ((1 << _LOW) - 1)] + self._high[:, high]) % _P
        return found

    def hashes(self, states: U64, ids: npt.NDArray[Any]) -> I32:
        """The numbers i32[n] for the tokens i32[n] that ended in `states` u64[2, n]."""
        mixed = _siphash(self._sip, states[0] << np.uint64(31) | states[1])
        ends = np.isin(ids, self._eos)
        found: I32 = (_MARK | (mixed >> np.uint64(35)).astype(np.int64) << 1 | ends).astype(np.int32)
        return found


def _doubled(powers: U64, point: U64) -> U64:
    """x^0 .. x^(2n-1) from x^0 .. x^(n-1)."""
    n = powers.shape[1]
    top = np.array([pow(int(x), n, int(_P)) for x in point], np.uint64)
    return np.concatenate((powers, powers * top[:, None] % _P), axis=1)


_SIP = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
_BLOCK = 4096  # words that are mixed at a time: they and the state stay in the processor's nearest cache


def _siphash(key: list[Any], words: U64) -> U64:
    """SipHash-1-3 of blocks of one word, without the block for the length."""
    mixed = np.empty(len(words), np.uint64)
    for at in range(0, len(words), _BLOCK):
        part = words[at : at + _BLOCK]
        v = [np.full(len(part), np.uint64(c) ^ k) for c, k in zip(_SIP, (*key, *key), strict=True)]
        scratch = np.empty(len(part), np.uint64)
        v[3] ^= part
        _sip_round(v, scratch)
        v[0] ^= part
        v[2] ^= np.uint64(0xFF)
        for _ in range(3):
            _sip_round(v, scratch)
        mixed[at : at + _BLOCK] = v[0] ^ v[1] ^ v[2] ^ v[3]
    return mixed


def _sip_round(v: list[U64], scratch: U64) -> None:
    v0, v1, v2, v3 = v
    for to, other, n in ((v0, v1, 13), (v2, v3, 16), (v0, v3, 21), (v2, v1, 17)):
        np.add(to, other, out=to)
        _rotate(other, n, scratch)
        np.bitwise_xor(other, to, out=other)
        if n in (13, 17):
            _rotate(to, 32, scratch)


def _rotate(v: U64, n: int, scratch: U64) -> None:
    """Rotate to the left, in place."""
    np.left_shift(v, np.uint64(n), out=scratch)
    np.right_shift(v, np.uint64(64 - n), out=v)
    v |= scratch


def ends(hashes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which of these numbers stand for a token that ends answers."""
    found: npt.NDArray[np.bool_] = (hashes & 1).astype(np.bool_)
    return found

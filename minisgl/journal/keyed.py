"""Keyed hashes in the place of token ids: equal beginnings stay equal, and nothing else can be read from them.

The number for a token is a function of a random key, which is stored nowhere, of all tokens before it and of itself.  So the
radix tree of a replay has the shape of the real one, without a word of anybody's prompt.  Its 31 bits are

    bit 30       1: so no hash is mistaken for a token id
    bits 29..1   the hash
    bit 0        1: the token ends answers (EOS)

Two sums modulo 2^64 of each token times a secret number for its place take in the sequence, and of each sum the upper half
counts (multilinear hashing: Dietzfelbinger, 1996; Lemire and Kaser, 2014): two given sequences have the same halves with
probability 2^-64, whatever their length.  SipHash (Aumasson and Bernstein, 2012) with one and three rounds makes the number of
them.  A sum is a scan, so a prompt, and the rows of many steps, are a few numpy calls.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from minisgl.arrays import I32

U64 = npt.NDArray[np.uint64]
_MARK = 1 << 30
_HALF, _ONE = np.uint64(32), np.uint64(1)  # one more than the token: nothing adds nothing
NOTHING = np.zeros(0, np.int32)


class Key:
    """A random key, and the functions that it makes.  A state is u64[2, ...]: the two sums so far."""

    def __init__(self, eos_ids: tuple[int, ...]) -> None:
        self._random = np.random.Generator(np.random.PCG64(secrets.randbits(256)))
        self._factors: U64 = np.zeros((2, 0), np.uint64)  # by place in the sequence
        self._sip = [np.uint64(secrets.randbits(64)) for _ in range(2)]
        self._salt_key = secrets.token_bytes(32)
        self._eos = sorted(eos_ids)

    def salt(self, salt: str) -> str:
        """A name for a salt; none for none."""
        return hashlib.blake2b(salt.encode(), key=self._salt_key, digest_size=8).hexdigest() if salt else ""

    def start(self, salt: str) -> U64:
        """The state u64[2] before the first token."""
        raw = hashlib.blake2b(salt.encode(), key=self._salt_key, digest_size=16, person=b"start").digest()
        return np.frombuffer(raw, np.uint64)

    def scan(self, state: U64, ids: npt.NDArray[Any], first: int = 0) -> U64:
        """The states u64[2, n] after each of the tokens i32[n], which follow `first` others and `state` u64[2]."""
        self._reach(first + len(ids))
        found: U64 = self._factors[:, first : first + len(ids)] * (ids.astype(np.uint64) + _ONE)
        np.cumsum(found, axis=1, out=found)
        found += state[:, None]
        return found

    def terms(self, ids: npt.NDArray[Any], places: npt.NDArray[Any]) -> U64:
        """What each of the tokens i32[n], at its place in its sequence, adds to the state: u64[2, n]."""
        self._reach(int(places.max(initial=-1)) + 1)
        found: U64 = self._factors.take(places, axis=1)
        found *= ids.astype(np.uint64) + _ONE
        return found

    def _reach(self, end: int) -> None:
        """Have numbers for all places before `end`."""
        if end > self._factors.shape[1]:
            more = self._random.integers(0, 1 << 64, (2, max(4096, end)), np.uint64)  # at least as many again
            self._factors = np.concatenate((self._factors, more), axis=1)

    def hashes(self, states: U64, ids: npt.NDArray[Any]) -> I32:
        """The numbers i32[n] for the tokens i32[n] that ended in `states` u64[2, n]."""
        mixed = _siphash(self._sip, states[0] >> _HALF << _HALF | states[1] >> _HALF)
        found: I32 = (mixed >> np.uint64(34)).astype(np.int32)
        found |= _MARK | 1
        ends = np.zeros(len(ids), np.bool_)
        for eos in self._eos:
            ends |= ids == eos
        found ^= ~ends
        return found


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

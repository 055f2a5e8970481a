"""Routers choose the replica that gets an arriving request.

`round-robin` takes turns.  `prefix` sends a request where it would wait for the fewest prompt tokens:

    argmin over replicas of   backlog + (prompt - prefix believed to be cached there)

`backlog` holds the prompt tokens sent there whose first answer token has not come yet, without those believed cached, and
DECODE_TOKENS for every open request, which takes part of every step.  Ties go to the replica with the fewest open requests.
With idle replicas the prefix decides; under load the backlog outweighs it, so no separate threshold for imbalance is needed.

The router does not query replicas for their caches.  For each, it remembers an LRU of hashes of the prompt prefixes (one per
HASH_TOKENS) that it sent there, as large as its KV cache.  The hash of a block covers everything before it, so the set of
hashes is the tree.
(Cf. Mooncake's conductor, Qin et al. 2024, which also weighs prefix against queue; the formula here is simpler.)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from itertools import cycle, takewhile

from minisgl.arrays import I32

HASH_TOKENS = 256
DECODE_TOKENS = 64


class RoundRobin:
    """Takes turns and ignores the load."""

    def __init__(self, replicas: int) -> None:
        self._turns = cycle(range(replicas))

    def route(self, uid: int, ids: I32) -> int:
        """The replica for a prompt."""
        return next(self._turns)

    def started(self, uid: int) -> None:
        """A request has its first token."""

    def finished(self, uid: int) -> None:
        """A request has ended."""


class PrefixRouter:
    """The prefix router; see the formula above.  `capacity`: tokens of KV cache per replica."""

    def __init__(self, replicas: int, capacity: int) -> None:
        self._most = max(1, capacity // HASH_TOKENS)
        self._seen: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(replicas)]
        self._backlog = [0] * replicas
        self._open = [0] * replicas
        self._where: dict[int, tuple[int, int]] = {}  # uid -> (replica, tokens in its backlog)

    def route(self, uid: int, ids: I32) -> int:
        """The replica for a prompt."""
        hashes = _prefix_hashes(ids)
        missing = [len(ids) - HASH_TOKENS * sum(1 for _ in takewhile(seen.__contains__, hashes)) for seen in self._seen]
        waits = [b + m + DECODE_TOKENS * n for b, m, n in zip(self._backlog, missing, self._open, strict=True)]
        chosen = min(range(len(waits)), key=lambda r: (waits[r], self._open[r], r))
        seen = self._seen[chosen]
        for key in reversed(hashes):  # the beginning of a prompt is then the most recent: it is evicted last
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > self._most:
            seen.popitem(last=False)
        self._backlog[chosen] += missing[chosen]
        self._open[chosen] += 1
        self._where[uid] = (chosen, missing[chosen])
        return chosen

    def started(self, uid: int) -> None:
        """A request has its first token."""
        replica, tokens = self._where[uid]
        self._backlog[replica] -= tokens
        self._where[uid] = (replica, 0)

    def finished(self, uid: int) -> None:
        """A request has ended."""
        replica, tokens = self._where.pop(uid)
        self._backlog[replica] -= tokens
        self._open[replica] -= 1


def _prefix_hashes(ids: I32) -> list[bytes]:
    """One chained hash per whole block of HASH_TOKENS."""
    out: list[bytes] = []
    key = b""
    for at in range(0, len(ids) - HASH_TOKENS + 1, HASH_TOKENS):
        key = hashlib.blake2b(ids[at : at + HASH_TOKENS].tobytes(), key=key, digest_size=8).digest()
        out.append(key)
    return out

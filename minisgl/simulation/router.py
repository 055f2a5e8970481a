"""Routers choose the replica that gets an arriving request.  A policy is a function of what the router knows; see ROUTERS.

    def shortest_prompt_queue(fleet: Fleet, ids: I32) -> int:      # a policy of your own: add it to ROUTERS
        return fleet.least(fleet.backlog)                          # ties: the first of them

`round-robin` takes turns, `least-loaded` counts open requests.  The others look at the prompt; they differ in what they know of
the caches and in how they weigh it against the load.  docs/capacity.md has the table, with the sources.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile

import numpy as np

from minisgl.arrays import I32, I64
from minisgl.simulation.prefix_index import PrefixIndex

HASH_TOKENS = 256
DECODE_TOKENS = 64
AFFINITY_SHARE = 0.3  # cache_aware: the least share of a prompt that must match (vllm-router 0.1.17: --cache-threshold)
IMBALANCE = (64, 1.5)  # cache_aware: --balance-abs-threshold and --balance-rel-threshold


# ---------------- policies
def round_robin(fleet: Fleet, ids: I32) -> int:
    """Takes turns and ignores the load."""
    return int(fleet.routed.sum()) % len(fleet.routed)


def least_loaded(fleet: Fleet, ids: I32) -> int:
    """The replica with the fewest open requests; among equals, the one that has had the fewest."""
    return fleet.least(fleet.open, fleet.routed)


def prefix(fleet: Fleet, ids: I32) -> int:
    """Where a request waits for the fewest prompt tokens, as far as the router remembers what it sent.

    argmin of   backlog + (prompt - prefix believed to be cached there) + DECODE_TOKENS * open requests

    With idle replicas the prefix decides; under load the backlog outweighs it, so no threshold for imbalance is needed.  (Cf.
    Mooncake's conductor, Qin et al. 2024, which also weighs prefix against queue; the formula here is simpler.)
    """
    return fleet.least(fleet.backlog - fleet.remembered(ids) + DECODE_TOKENS * fleet.open, fleet.open)


def cache_aware(fleet: Fleet, ids: I32) -> int:
    """Prefix affinity, as `cache_aware` of the SGLang router and vllm-router: an approximate tree of what was sent where.

    Where the loads differ much, the fewest open requests win; otherwise the longest match, if that is a large part of the
    prompt.  The tree does not notice evictions.
    """
    most, fewest = int(fleet.open.max()), int(fleet.open.min())
    found = fleet.sent_before(ids)
    imbalanced = most - fewest > IMBALANCE[0] and most > IMBALANCE[1] * fewest
    if imbalanced or found.max() <= AFFINITY_SHARE * len(ids):
        return least_loaded(fleet, ids)
    return fleet.least(-found, fleet.open)


def exact(fleet: Fleet, ids: I32) -> int:
    """KV-aware routing: the fewest tokens to compute, from the pages that each replica really has, by its KV events.

    argmin of   backlog + (prompt - cached there)

    as `kv_aware` of vllm-router 0.1.17, which takes the least cost in tokens.  Ties: the fewest open requests, then the fewest
    ever.
    """
    return fleet.least(fleet.backlog - fleet.cached(ids), fleet.open, fleet.routed)


def longest(fleet: Fleet, ids: I32) -> int:
    """The longest prefix that is really cached, whatever the load, which only breaks ties.  The upper end of affinity."""
    return fleet.least(-fleet.cached(ids), fleet.open, fleet.routed)


Policy = Callable[["Fleet", I32], int]
ROUTERS: dict[str, Policy] = {
    "round-robin": round_robin,
    "least-loaded": least_loaded,
    "cache-aware": cache_aware,
    "prefix": prefix,
    "exact": exact,
    "longest": longest,
}


# ---------------- what they know
class Fleet:
    """What a router knows of its replicas; all arrays are i64[replicas].

    `open`: requests sent there that have not ended; `routed`: requests ever sent there; `backlog`: prompt tokens sent there
    whose first answer token has not come, without those that the policy believed cached.
    """

    def __init__(self, policy: Policy, replicas: int, kv_tokens: int, page_size: int = 16) -> None:
        """`kv_tokens`: the KV cache of a replica, which bounds what `remembered` remembers of it."""
        self.open, self.routed, self.backlog = (np.zeros(replicas, np.int64) for _ in range(3))
        self.index = PrefixIndex(page_size, replicas)  # what the caches have: they enter it themselves
        self._policy = policy
        self._sent = PrefixIndex(page_size, replicas)
        self._probed = False  # the policy asks `sent_before`, so what is sent is entered
        self._memory: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(replicas)]
        self._most = max(1, kv_tokens // HASH_TOKENS)
        self._hashes: list[bytes] = []
        self._found: I64 | None = None
        self._where: dict[int, tuple[int, int]] = {}  # uid -> (replica, tokens in its backlog)

    # ---------------- for policies
    def least(self, *costs: I64) -> int:
        """The replica with the least cost; among equals that with the least second cost, and so on, then the first."""
        return int(np.lexsort(costs[::-1])[0])

    def cached(self, ids: I32) -> I64:
        """Tokens of the prompt that each replica has in its cache, exactly."""
        self._found = self.index.found(ids)
        return self._found

    def sent_before(self, ids: I32) -> I64:
        """Tokens of the prompt that were once sent to each replica, whether or not it still has them."""
        self._probed, self._found = True, self._sent.found(ids)
        return self._found

    def remembered(self, ids: I32) -> I64:
        """The same from an LRU memory for each replica, as large as its KV cache: chained hashes of HASH_TOKENS tokens."""
        self._hashes = _prefix_hashes(ids)
        known = (sum(1 for _ in takewhile(seen.__contains__, self._hashes)) for seen in self._memory)
        self._found = HASH_TOKENS * np.fromiter(known, np.int64, len(self._memory))
        return self._found

    # ---------------- for the simulation
    def route(self, uid: int, ids: I32) -> int:
        """The replica for a prompt."""
        self._found, self._hashes = None, []
        chosen = self._policy(self, ids)
        missing = len(ids) - (0 if self._found is None else int(self._found[chosen]))
        seen = self._memory[chosen]
        for key in reversed(self._hashes):  # the beginning of a prompt is then the most recent: it is evicted last
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > self._most:
            seen.popitem(last=False)
        if self._probed:
            whole = len(ids) // self.index.page_size * self.index.page_size
            self._sent.store(ids[:whole].tobytes(), chosen)
        self.backlog[chosen] += missing
        self.open[chosen] += 1
        self.routed[chosen] += 1
        self._where[uid] = (chosen, missing)
        return chosen

    def started(self, uid: int) -> None:
        """A request has its first token."""
        replica, tokens = self._where[uid]
        self.backlog[replica] -= tokens
        self._where[uid] = (replica, 0)

    def finished(self, uid: int) -> None:
        """A request has ended."""
        replica, tokens = self._where.pop(uid)
        self.backlog[replica] -= tokens
        self.open[replica] -= 1


def _prefix_hashes(ids: I32) -> list[bytes]:
    """One chained hash per whole block of HASH_TOKENS."""
    out: list[bytes] = []
    key = b""
    for at in range(0, len(ids) - HASH_TOKENS + 1, HASH_TOKENS):
        key = hashlib.blake2b(ids[at : at + HASH_TOKENS].tobytes(), key=key, digest_size=8).digest()
        out.append(key)
    return out

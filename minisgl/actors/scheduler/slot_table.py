"""The slot table: the state of every running request, as numpy columns indexed by slot.

Columns instead of objects, so that a step over 4,096 requests is a constant number of numpy calls.  Runs in the scheduler
process.

    position:   0 .............. planned ........ length ........ limit
                | KV written by    | token known,   | tokens still
                | published plans  | KV not planned | to come

`planned` may run ahead of `length` by the plans in flight.  The token ids of KV page p are mirrored in `page_ids[p]`, so the
ids of a request are read back through its page table; its newest token, which may have no page yet, is in `tail`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I32
from minisgl.cache.radix import Node
from minisgl.plan import GRANT


class SlotTable:
    """All columns; see the picture above.  `max_pages` is the length of a page table row, `page_ids` i32[pages, page_size]."""

    def __init__(self, slots: int, max_pages: int, page_ids: I32, root: Node) -> None:
        self.page_size = page_ids.shape[1]
        self.uid = np.full(slots, -1, np.int64)
        self.epoch = np.zeros(slots, np.int64)  # counts the owners of a slot, so that results for a former owner are recognised
        self.length = np.zeros(slots, np.int32)  # tokens known: prompt and received
        self.planned = np.zeros(slots, np.int32)  # KV positions written once every published plan has run
        self.limit = np.zeros(slots, np.int32)  # the request ends when it has this many tokens
        self.n_pages = np.zeros(slots, np.int32)  # pages granted
        self.n_shared = np.zeros(slots, np.int32)  # leading pages that belong to the cache
        self.tail = np.zeros(slots, np.int32)  # newest known token
        self.ignore_eos = np.zeros(slots, np.bool_)
        self.logprobs = np.full(slots, -1, np.int32)  # alternatives to report for each token; -1: no log probabilities
        self.sampling_extra = np.zeros(slots, np.bool_)  # the workers hold extras of this slot, perhaps a former owner's
        self.has_grammar = np.zeros(slots, np.bool_)  # the workers hold a grammar of this slot, perhaps a former owner's
        self.pages = np.zeros((slots, max_pages), np.int32)
        self.handle: list[Node] = [root] * slots
        self.page_ids = page_ids
        self.stop_ids: dict[int, frozenset[int]] = {}  # slot -> stop_token_ids, for the few requests that have any
        self.with_logprobs: set[int] = set()  # slots whose owners report log probabilities
        self.with_grammar: set[int] = set()  # slots whose owners have a grammar
        self._grants: list[npt.NDArray[np.void]] = []  # changes of `pages` that the next plan brings to the workers
        self._free = list(range(slots - 1, -1, -1))

    def take_over(self) -> None:
        """The workers have served another scheduler: each slot may have extras and a grammar of an owner that nobody knows."""
        self.sampling_extra[:] = self.has_grammar[:] = True

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def take(self, request: Request, handle: Node, cached: I32) -> int:
        """Give `request` a free slot; `cached`: the pages of its cached prefix.  Raises IndexError if no slot is free."""
        slot, p = self._free.pop(), request.params
        self.uid[slot] = request.uid
        self.length[slot] = len(request.ids)
        self.planned[slot] = len(cached) * self.page_size
        self.limit[slot] = request.limit
        self.n_pages[slot] = self.n_shared[slot] = len(cached)
        self.tail[slot] = request.ids[-1]
        self.ignore_eos[slot] = p.ignore_eos
        self.grant(slot, np.arange(len(cached)), cached)
        self.handle[slot] = handle
        if p.stop_token_ids:
            self.stop_ids[slot] = frozenset(p.stop_token_ids)
        if p.logprobs is not None:
            self.logprobs[slot] = p.logprobs
            self.with_logprobs.add(slot)
        if p.grammar:
            self.with_grammar.add(slot)
        return slot

    def give(self, slot: int) -> None:
        """Free a slot.  From now on, tokens in flight for it belong to no request."""
        self.epoch[slot] += 1
        self.uid[slot] = self.logprobs[slot] = -1
        self.stop_ids.pop(slot, None)
        self.with_logprobs.discard(slot)
        self.with_grammar.discard(slot)
        self._grants = [rows[rows["slot"] != slot] for rows in self._grants]
        self._free.append(slot)

    def grant(self, slots: I32 | int, index: npt.NDArray[np.integer], pages: I32) -> None:
        """Put `pages` at the places `index` of page tables: here now, on the workers with the next plan."""
        self.pages[slots, index] = pages
        rows = np.zeros(len(pages), GRANT)
        rows["slot"], rows["index"], rows["page"] = slots, index, pages
        self._grants.append(rows)

    def take_grants(self) -> npt.NDArray[np.void]:
        """All grants since the last call, as rows of plan.GRANT."""
        grants, self._grants = self._grants, []
        return np.concatenate(grants) if grants else np.zeros(0, GRANT)

    def row(self, slot: int, start: int, end: int) -> I32:
        """Page numbers `start` to `end` of a slot (a copy)."""
        return np.copy(self.pages[slot, start:end])

    def ids(self, slot: int) -> I32:
        """All known tokens of a running request, i32[length]."""
        n = int(self.length[slot])
        pages = self.row(slot, 0, min(-(-n // self.page_size), int(self.n_pages[slot])))
        known = self.page_ids[pages].reshape(-1)[:n]
        # A page is granted before its second token is known, so only the newest token can lack one.
        return known if len(known) == n else np.append(known, self.tail[slot])

    def append(self, slots: I32, tokens: I32) -> None:
        """Enter one sampled token for each slot (each slot at most once)."""
        at = self.length[slots]
        index = at // self.page_size
        paged = index < self.n_pages[slots]
        s = slots[paged]
        self.page_ids[self.pages[s, index[paged]], at[paged] % self.page_size] = tokens[paged]
        self.tail[slots] = tokens
        self.length[slots] = at + 1

    def grant_decode(self, slots: I32, pages: I32) -> None:
        """Give each slot its next page; the token that opens it is entered if it is known already (it then is the newest)."""
        index = self.n_pages[slots]
        self.grant(slots, index, pages)
        self.n_pages[slots] = index + 1
        known = self.length[slots] > index * self.page_size
        self.page_ids[pages[known], 0] = self.tail[slots[known]]

    def grant_prefill(self, slot: int, start: int, ids: I32, pages: I32) -> None:
        """Append `pages` to a slot and enter the prompt tokens `ids` at positions from `start` on."""
        n = int(self.n_pages[slot])
        self.grant(slot, np.arange(n, n + len(pages)), pages)
        self.n_pages[slot] = n + len(pages)
        at = np.arange(start, start + len(ids))
        self.page_ids[self.pages[slot, at // self.page_size], at % self.page_size] = ids

"""What stands in a journal for token ids: themselves (`PlainIds`), or keyed hashes (`HashedIds`).

Both follow the rows of published plans, because a result says tokens by row, and a hash needs all tokens before.  Runs in the
process of the scheduler, outside of its steps.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisgl.actors.scheduler.interface import Output
from minisgl.actors.scheduler.plan_builder import InFlight
from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I32, I64
from minisgl.journal.keyed import NOTHING, U64, Key
from minisgl.journal.requests import veil
from minisgl.plan import StepResult
from minisgl.sampling_params import SamplingParams

Path = Sequence[tuple[int, int]]  # numbers of nodes from the root down, and how many tokens lead to the end of each
_SLICE = 1 << 14  # tokens that are hashed at a time


@dataclass(slots=True)
class Tokens:
    """Ids that are still to be written: `ids` i32[n] once `settle` has run, and the places of stop tokens among them."""

    ids: I32
    stops: list[int] = field(default_factory=list)


class Said:
    """Whose tokens the machine has taken from the results of one inbox."""

    def __init__(self, output: Output, results: int) -> None:
        self.results = results
        taken = [rows.uids[rows.counts > 0] for rows in output.outputs]
        self.uids: I64 = np.concatenate(taken) if taken else np.zeros(0, np.int64)
        self._left: Counter[int] | None = None

    def confirm(self, uids: I64) -> list[bool]:
        """Which of these owners of rows, in the order of results, have had their token taken."""
        if self._left is None:
            self._left = Counter(self.uids.tolist())
        left, found = self._left, []
        for uid in uids.tolist():
            found.append(left[uid] > 0)
            left[uid] -= 1
        return found


class PlainIds:
    """Writes token ids as they are."""

    hashed = False

    def salt(self, salt: str) -> str:
        return salt

    def params(self, params: SamplingParams) -> SamplingParams:
        return params

    def request(self, request: Request, ids: I32, path: Path = ()) -> Tokens:
        """A request comes, or was there when the journal began, with all its tokens; `path`: the nodes that it holds then."""
        return Tokens(ids)

    def node(self, number: int, parent: int, key: bytes, salt: str) -> Tokens:
        """The tokens of a node of the radix tree; parents (-1: none) come before their children."""
        return Tokens(np.frombuffer(key, np.int32))

    def sent(self, plan: InFlight, uids: I64) -> None:
        """A plan was published; `uids`: the owners of all slots after that."""

    def result(self, result: StepResult, epochs: I64, said: Said) -> Tokens:
        """A result came; `epochs`: of all slots before that; `said`: what the machine made of it and its neighbours."""
        return Tokens(result.tokens)

    def ended(self, uid: int) -> None:
        """A request has left."""

    def settling(self) -> Iterator[None]:
        """Fill in the ids of all tokens since the last call, in slices."""
        yield from ()

    def settle(self) -> None:
        """All slices of `settling`."""
        for _ in self.settling():
            pass


_Due = tuple[Tokens, Any, U64, I32]  # tokens, which of their rows (None: all), states, ids


@dataclass(slots=True)
class _Rows:
    """Who owns the rows of a published plan: places in the array of states."""

    slots: I32
    epochs: I64
    places: I64


class HashedIds(PlainIds):
    """Writes keyed hashes, see keyed.py."""

    hashed = True

    def __init__(self, key: Key, slots: int) -> None:
        self.key = key
        self._places: dict[int, int] = {}  # uid -> place
        self._free: list[int] = []
        self._states: U64 = np.zeros((2, 0), np.uint64)  # by place
        self._uids: I64 = np.full(0, -1, np.int64)  # by place
        self._stops: dict[int, frozenset[int]] = {}  # place -> stop tokens
        self._by_slot: I64 = np.zeros(slots, np.int64)  # slot -> place
        self._owners: I64 = np.full(slots, -1, np.int64)  # slot -> uid
        self._inflight: deque[_Rows] = deque()
        self._nodes: dict[int, U64] = {}
        self._due: list[_Due] = []

    def salt(self, salt: str) -> str:
        return self.key.salt(salt)

    def params(self, params: SamplingParams) -> SamplingParams:
        return veil(params)

    def request(self, request: Request, ids: I32, path: Path = ()) -> Tokens:
        if not self._free:
            n = len(self._places)  # all there are
            more = max(64, n)
            self._free = list(range(n + more - 1, n - 1, -1))
            self._states = np.concatenate((self._states, np.zeros((2, more), np.uint64)), axis=1)
            self._uids = np.append(self._uids, np.full(more, -1))
        place = self._places[request.uid] = self._free.pop()
        self._uids[place] = request.uid
        states = self.key.scan(self.key.start(request.options.cache_salt), ids)
        self._states[:, place] = states[:, -1]
        if request.params.stop_token_ids:
            self._stops[place] = frozenset(request.params.stop_token_ids)
        for number, end in path:
            self._nodes[number] = states[:, end - 1]
        return self._hash(states, ids)

    def node(self, number: int, parent: int, key: bytes, salt: str) -> Tokens:
        ids = np.frombuffer(key, np.int32)
        if parent < 0:
            self._nodes[number] = self.key.start(salt)
            return Tokens(ids)
        if ids[0] < 0:  # forgotten: if a running request holds it, its tokens are known from there
            return Tokens(ids)
        states = self.key.scan(self._nodes[parent], ids)
        self._nodes[number] = states[:, -1]
        return self._hash(states, ids)

    def sent(self, plan: InFlight, uids: I64) -> None:
        for slot in np.flatnonzero(uids != self._owners).tolist():
            self._by_slot[slot] = self._places.get(int(uids[slot]), 0)
        self._owners = uids
        self._inflight.append(_Rows(plan.slots, plan.epochs, self._by_slot[plan.slots]))

    def result(self, result: StepResult, epochs: I64, said: Said) -> Tokens:
        rows, tokens = self._inflight.popleft(), result.tokens
        written = Tokens(np.where(tokens < 0, tokens, 0).astype(np.int32))
        took = np.flatnonzero((epochs[rows.slots] == rows.epochs) & (tokens >= 0))
        if said.results > 1 or len(took) != len(said.uids):  # some of these are not taken
            took = took[said.confirm(self._uids[rows.places[took]])]
        if len(took):
            places, drawn = rows.places[took], tokens[took]
            states = self._states[:, places] = self.key.advance(self._states[:, places], drawn)
            self._due.append((written, took, states, drawn))
            if self._stops:
                ends = zip(took.tolist(), places.tolist(), drawn.tolist(), strict=True)
                written.stops = [row for row, place, token in ends if token in self._stops.get(place, ())]
        return written

    def ended(self, uid: int) -> None:
        if (place := self._places.pop(uid, None)) is not None:
            self._stops.pop(place, None)
            self._free.append(place)

    def _hash(self, states: U64, ids: I32) -> Tokens:
        written = Tokens(NOTHING)
        self._due.append((written, None, states, ids))
        return written

    def settling(self) -> Iterator[None]:
        due, self._due = self._due, []
        self._nodes.clear()
        first = size = 0
        for i, (_, _, _, ids) in enumerate(due, 1):
            size += len(ids)
            if size >= _SLICE or i == len(due):
                self._fill(due[first:i])
                first, size = i, 0
                yield

    def _fill(self, due: list[_Due]) -> None:
        hashes = self.key.hashes(np.concatenate([d[2] for d in due], axis=1), np.concatenate([d[3] for d in due]))
        at = 0
        for written, rows, _, ids in due:
            part, at = hashes[at : at + len(ids)], at + len(ids)
            if rows is None:
                written.ids = part
            else:
                written.ids[rows] = part

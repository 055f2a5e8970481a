"""What stands in a journal for token ids: themselves (`PlainIds`), or keyed hashes (`HashedIds`).

Both follow the rows of published plans, because a result says tokens by row, and a hash needs all tokens before.  Runs in the
process of the scheduler, outside of its steps.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from minisgl.actors.scheduler.interface import Output
from minisgl.actors.scheduler.plan_builder import InFlight
from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I32, I64, U8
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
    """Whose tokens the machine has taken from the results of one inbox, `results` of them."""

    def __init__(self, output: Output, results: int) -> None:
        self.results, self.outputs = results, output.outputs
        self._left: Counter[int] | None = None

    def whole(self, result: StepResult) -> U8 | None:
        """If all tokens of a result have been taken for certain, who ended with them: reasons by row."""
        if self.results == len(self.outputs) == 1 and len(self.outputs[0].tokens) == len(result.tokens):
            return self.outputs[0].finish
        return None

    def confirm(self, uids: I64) -> list[bool]:
        """Which of these owners of rows, in the order of results, have had their token taken."""
        if self._left is None:
            self._left = Counter(uid for rows in self.outputs if len(rows.tokens) for uid in rows.uids.tolist())
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

    def joined(self, slots: Sequence[int], uids: Sequence[int]) -> None:
        """These slots have these owners from the next plan on."""

    def sent(self, plan: InFlight) -> None:
        """A plan was published."""

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


_Due = tuple[Tokens, U64, I32]  # tokens, their states, ids


@dataclass(slots=True)
class _Drawn:
    """The tokens of a result that the machine has taken; `rows` of it, or all."""

    written: Tokens
    rows: I64 | None
    places: I64
    ids: I32


class HashedIds(PlainIds):
    """Writes keyed hashes, see keyed.py."""

    hashed = True

    def __init__(self, key: Key, slots: int) -> None:
        self.key = key
        self._places: dict[int, int] = {}  # uid -> place
        self._free: list[int] = []
        self._left: list[int] = []  # free after the next `settling`
        self._states: U64 = np.zeros((2, 0), np.uint64)  # by place
        self._known: I64 = np.zeros(0, np.int64)  # by place: the tokens in its state
        self._uids: I64 = np.zeros(0, np.int64)  # by place
        self._stops: dict[int, frozenset[int]] = {}  # place -> stop tokens
        self._by_slot: I64 = np.zeros(slots, np.int64)  # slot -> place
        self._slots, self._owners = b"", self._by_slot  # the rows of the last plan, and their places
        self._inflight: deque[tuple[InFlight, I64]] = deque()  # with the places of its rows
        self._nodes: dict[int, tuple[U64, int]] = {}  # state, and how many tokens are in it
        self._due: list[_Due] = []
        self._drawn: list[_Drawn] = []

    def salt(self, salt: str) -> str:
        return self.key.salt(salt)

    def params(self, params: SamplingParams) -> SamplingParams:
        return veil(params)

    def request(self, request: Request, ids: I32, path: Path = ()) -> Tokens:
        if not self._free:
            n = len(self._uids)
            more = max(64, n)
            self._free = list(range(n + more - 1, n - 1, -1))
            self._states = np.concatenate((self._states, np.zeros((2, more), np.uint64)), axis=1)
            self._known, self._uids = (np.append(column, np.zeros(more, np.int64)) for column in (self._known, self._uids))
        place = self._places[request.uid] = self._free.pop()
        states = self.key.scan(self.key.start(request.salt), ids)
        self._uids[place], self._known[place], self._states[:, place] = request.uid, len(ids), states[:, -1]
        if request.params.stop_token_ids:
            self._stops[place] = frozenset(request.params.stop_token_ids)
        for number, end in path:
            self._nodes[number] = states[:, end - 1], end
        return self._hash(states, ids)

    def node(self, number: int, parent: int, key: bytes, salt: str) -> Tokens:
        ids = np.frombuffer(key, np.int32)
        if parent < 0:
            self._nodes[number] = self.key.start(salt), 0
            return Tokens(ids)
        if ids[0] < 0:  # forgotten: if a running request holds it, its tokens are known from there
            return Tokens(ids)
        state, known = self._nodes[parent]
        states = self.key.scan(state, ids, known)
        self._nodes[number] = states[:, -1], known + len(ids)
        return self._hash(states, ids)

    def joined(self, slots: Sequence[int], uids: Sequence[int]) -> None:
        self._slots, self._by_slot[slots] = b"", [self._places[uid] for uid in uids]

    def sent(self, plan: InFlight) -> None:
        if (slots := plan.slots.tobytes()) != self._slots:
            self._slots, self._owners = slots, self._by_slot.take(plan.slots)
        self._inflight.append((plan, self._owners))

    def result(self, result: StepResult, epochs: I64, said: Said) -> Tokens:
        (sent, places), tokens = self._inflight.popleft(), result.tokens
        rows, finish = None, said.whole(result)
        if finish is not None:
            written = Tokens(NOTHING)
            ended = finish.nonzero()[0].tolist() if self._stops else []
        else:
            written = Tokens(np.where(tokens < 0, tokens, 0).astype(np.int32))
            rows = np.flatnonzero((epochs[sent.slots] == sent.epochs) & (tokens >= 0))
            rows = rows[said.confirm(self._uids[places[rows]])]
            places, tokens = places[rows], tokens[rows]
            ended = list(range(len(rows))) if self._stops else []
        for i in ended:
            if int(tokens[i]) in self._stops.get(int(places[i]), ()):
                written.stops.append(i if rows is None else int(rows[i]))
        if len(tokens):
            self._drawn.append(_Drawn(written, rows, places, tokens))
        return written

    def ended(self, uid: int) -> None:
        if (place := self._places.pop(uid, None)) is not None:
            self._stops.pop(place, None)
            self._left.append(place)

    def _hash(self, states: U64, ids: I32) -> Tokens:
        written = Tokens(NOTHING)
        self._due.append((written, states, ids))
        return written

    def settling(self) -> Iterator[None]:
        due, self._due = self._due, []
        self._nodes.clear()
        first = size = 0
        for i, (_, _, ids) in enumerate(due, 1):
            size += len(ids)
            if size >= _SLICE or i == len(due):
                self._fill(due[first:i])
                first, size = i, 0
                yield
        drawn, self._drawn = self._drawn, []
        first = size = 0
        for i, result in enumerate(drawn, 1):
            size += len(result.ids)
            if size >= _SLICE or i == len(drawn):
                self._advance(drawn[first:i])
                first, size = i, 0
                yield
        self._free += self._left
        self._left = []

    def _fill(self, due: list[_Due]) -> None:
        hashes = self.key.hashes(np.concatenate([d[1] for d in due], axis=1), np.concatenate([d[2] for d in due]))
        at = 0
        for written, _, ids in due:
            written.ids, at = hashes[at : at + len(ids)], at + len(ids)

    def _advance(self, drawn: list[_Drawn]) -> None:
        """Take the drawn tokens of results into the states, and hash them.  A run of results for the same rows is a table."""
        key, states, ids = self.key, [], np.concatenate([d.ids for d in drawn])
        first = at = 0
        for i, result in enumerate(drawn, 1):
            places = result.places
            if i < len(drawn) and drawn[i].places is places:
                continue
            lines, end = np.arange(i - first)[:, None], at + (i - first) * len(places)
            sums = key.terms(ids[at:end], (self._known.take(places) + lines).reshape(-1)).reshape(2, i - first, -1)
            sums[:, 0] += self._states.take(places, axis=1)
            np.cumsum(sums, axis=1, out=sums)
            self._states[:, places] = sums[:, -1]
            self._known[places] += i - first
            states.append(sums.reshape(2, -1))
            first, at = i, end
        hashes, at = key.hashes(np.concatenate(states, axis=1), ids), 0
        for result in drawn:
            part, at = hashes[at : at + len(result.ids)], at + len(result.ids)
            if result.rows is None:
                result.written.ids = part
            else:
                result.written.ids[result.rows] = part

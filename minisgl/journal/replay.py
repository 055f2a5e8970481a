"""Reads journals: records, parts, and the machine at every step.  This file is what others build on.

    for replay in steps(path): ...                          the machine after each call, from all parts of a journal
    replay = Replay(); replay.feed(data); replay.advance()  the same of a stream that goes on
    for record in records(open(path, "rb")): ...            every whole record of a part, as plain values

A replay runs the real step machine on what the real one was given.  Its plans are compared with the recorded ones: `Divergence`
says, in plain words, at which step another decision came out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, Any

import msgpack
import numpy as np

from minisgl.actors.scheduler.interface import Add, Drop, Event, Flush, Output
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import F32
from minisgl.errors import UserError
from minisgl.journal import keyed
from minisgl.journal.decisions import GivenCosts, Unasked
from minisgl.journal.files import parts_of
from minisgl.journal.format import VERSION, Kind, Parser, Record
from minisgl.journal.identity import PlainIds
from minisgl.journal.recorder import ended, outcome
from minisgl.journal.requests import make_limits, make_request, unpack
from minisgl.journal.snapshot import freeze, thaw
from minisgl.plan import StepLogprobs, StepResult

Call = Callable[[StepMachine, list[Event], float, int | None], Output]
_CHUNK = 1 << 20
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_APART = ("ghosts", "since", "inflight")  # of a snapshot: not compared


def steps(path: str, replay: Replay | None = None) -> Iterator[Replay]:
    """A journal in files, lived through: the same Replay after each of its calls.  Raises as Replay does, and OSError."""
    replay = replay or Replay()
    for name in parts_of(path):
        replay.next_part()
        with open(name, "rb") as file:
            while data := file.read(_CHUNK):
                replay.feed(data)
                while replay.advance():
                    yield replay


def records(file: IO[bytes]) -> Iterator[Record]:
    """The records of one part, in order.  A torn end is left out.  Raises UserError if this is no journal."""
    parser = Parser()
    while data := file.read(_CHUNK):
        yield from parser.feed(data)


class Divergence(Exception):
    """A replay has come to another decision than the one that was recorded."""


class _Ends:
    """Stands for the table of EOS tokens where ids are hashes."""

    def __getitem__(self, tokens: Any) -> Any:
        return keyed.ends(tokens)


class Replay:
    """A machine that lives through a journal again.

    `machine` is in the state after the last record; `now` and `output` are those of its last call, `events` its inbox, `head`
    the values of the part, `record` what was read last.  Feed it bytes (`feed`), then call `advance` until it returns False:
    then it needs more bytes.  `call` makes a call of the machine, given the step that it plans by the record (None: none).
    """

    def __init__(self, data: bytes = b"") -> None:
        self._parser = Parser()
        self._records: deque[Record] = deque()
        self.machine: StepMachine | None = None
        self.head: dict[str, Any] = {}
        self.now = 0.0
        self.output = Output()
        self.events: list[Event] = []
        self.calls = self.steps = self.requests = 0  # so far: calls of the machine, their plans, new requests
        self.record: Record | None = None
        self.fed = 0  # bytes
        self.call: Call = lambda machine, inbox, now, step: machine.step(inbox, now)
        self._given = GivenCosts()
        self.feed(data)

    def feed(self, data: bytes | memoryview) -> None:
        """Take in the next bytes of the same part or stream.  Raises UserError if this is no journal."""
        self._records.extend(self._parser.feed(data))
        self.fed += len(data)

    def next_part(self, data: bytes = b"") -> None:
        """The next bytes begin another part.  One that was torn is not continued: the next begins with its snapshot."""
        if self.torn:
            self.machine = None
        self._parser = Parser()
        self.feed(data)

    @property
    def torn(self) -> int:
        """Bytes that are no whole record (yet)."""
        return self._parser.torn

    def advance(self) -> bool:
        """Make the next recorded call of the machine.  False: there is no further record yet.

        Raises Divergence if another plan comes out, UserError for a journal of another version.
        """
        while self._records:
            record = self._records.popleft()
            self.record = record
            if record.kind == Kind.PART:
                self._begin(record.values)
            elif record.kind == Kind.SNAPSHOT:
                self._snapshot(record.values)
            elif self.machine is None:
                raise UserError("the journal has a step before its first snapshot")
            else:
                self._step(self.machine, *record.values)
                return True
        return False

    def _begin(self, head: dict[str, Any]) -> None:
        if head["version"] != VERSION:
            raise UserError(f"the journal has version {head['version']}; this minisgl reads version {VERSION}")
        if head.get("run") != self.head.get("run") or head["part"] != self.head.get("part", head["part"]) + 1:
            self.machine = None
        self.head = head

    def _snapshot(self, state: dict[str, Any]) -> None:
        if self.machine is None:
            self.machine = thaw(state, make_limits(self.head["limits"]))
            self.machine.costs = self._given = GivenCosts()
            if self.head["hashed"]:
                self.machine._is_eos = _Ends()  # type: ignore[assignment]
            return
        mine = msgpack.unpackb(msgpack.packb(freeze(self.machine, PlainIds())), strict_map_key=False)
        for name, value in state.items():
            if name not in _APART and (found := _first_difference(name, value, mine.get(name))):
                raise Divergence(f"part {self.head['part']} begins with another state: {found}")

    def _step(self, machine: StepMachine, now: float, events: list[Any], decisions: list[float], want: list[Any]) -> None:
        self.now, self.events = now, [self._event(machine, kind, values) for kind, *values in events]
        self.calls += 1
        self._given.given = deque(decisions)
        try:
            self.output = self.call(machine, self.events, now, want[1][0] if want[1] else None)
        except Unasked:
            raise Divergence(self._where(want) + "more was asked of the cost model than when it was recorded") from None
        except _FAULTS as e:
            raise Divergence(self._where(want) + f"it went on when it was recorded; now {type(e).__name__}: {e}") from e
        got = outcome(self.output, self.head["hashed"], ended(self.output))
        if got != want:
            raise Divergence(self._where(want) + _difference(want, got))
        self.steps += want[1] is not None
        if self._given.given:
            raise Divergence(self._where(want) + "less was asked of the cost model than when it was recorded")

    def _where(self, want: list[Any]) -> str:
        step = want[1][0] if want[1] else f"after {self.machine.counters.steps if self.machine else 0}"
        return f"call {self.calls} of the machine (step {step}, time {self.now:.6f}): "

    def _event(self, machine: StepMachine, kind: str, values: list[Any]) -> Event:
        if kind == "add":
            uid, raw, *rest = values
            self.requests += 1
            return Add(make_request(uid, unpack(raw), rest))
        if kind == "result":
            return self._result(machine, values)
        return Drop(values[0]) if kind == "drop" else Flush()

    def _result(self, machine: StepMachine, values: list[Any]) -> StepResult:
        step, raw, busy, idle, launch, warmups, scores, vectors, *stops = values
        tokens, found = unpack(raw), None
        for sent in machine.inflight:
            for row in stops[0] if stops and sent.step == step else ():  # these tokens are stop tokens of their requests
                slot = int(sent.slots[row])
                machine.table.stop_ids[slot] = machine.table.stop_ids.get(slot, frozenset()) | {int(tokens[row])}
        if scores is not None:
            n, width, broken = scores
            logprobs: F32 = np.zeros(n, np.float32)
            logprobs[broken] = np.nan
            found = StepLogprobs(logprobs, np.zeros((n, width), np.int32), np.zeros((n, width), np.float32))
        pooled = np.zeros((vectors, 0), np.float32) if vectors else None
        return StepResult(step, tokens, busy, idle, launch, found, pooled, warmups)


def _first_difference(name: str, there: Any, here: Any) -> str:
    """Where two plain values differ first, in words; nothing if they are equal."""
    if there == here or name == "counters.misses":  # with hashed ids nobody knows which pages were evicted
        return ""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(f"{name}.{key}", there.get(key), here.get(key)) for key in {**there, **here}]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(there, here, strict=True))]
    else:
        return f"{name}: recorded {_short(there)}, now {_short(here)}"
    return next((found for row in pairs if (found := _first_difference(*row))), "")


def _short(value: Any) -> str:
    if isinstance(value, bytes) and len(value) % 4 == 0:
        value = unpack(value).tolist()
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


_PARTS = (
    "step",
    "joins (slot, cached tokens)",
    "prompt chunks (slot, flags, tokens)",
    "decoding slots",
    "page grants (slot, place, page)",
)


def _difference(want: list[Any], got: list[Any]) -> str:
    """The first difference between two outcomes, in words."""
    if want[1] is None or got[1] is None:
        if want[1] != got[1]:
            return "a plan was recorded, none came now" if want[1] else "no plan was recorded, one came now"
    elif want[:2] != got[:2]:
        for name, a, b in zip(_PARTS, want[1], got[1], strict=True):
            if a != b:
                return f"{name}: recorded {_plain(a)}, now {_plain(b)}"
        return "the plan has other parameters of its new requests than those recorded"
    for name, a, b in zip(("started (request, cached tokens)", "ended (request, reason)"), want[2:], got[2:], strict=True):
        if a != b:
            return f"{name}: recorded {a}, now {b}"
    return f"recorded {want}, now {got}"


def _plain(part: Any) -> Any:
    return "as in the plan before" if part is None else unpack(part).tolist() if isinstance(part, bytes) else part

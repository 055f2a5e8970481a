"""The recorder: a Watcher that keeps references to what the machine was given, and writes records of it when there is time.

The step pays for `saw`: references, and copies of two small columns.  Everything else, hashes, digests and packing, is done in
`rest`, when the scheduler has nothing to do, or, where it always has, a batch at a time.  One machine has one recorder and any
number of writers: a file, and a stream for those who watch.

A call of the machine that changes nothing leaves no record: one that has all its plans in flight, or holds the next one back,
and one without anything to plan after another like it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import msgpack
import numpy as np

from minisgl.actors.scheduler.interface import Add, Drop, Event, Output
from minisgl.actors.scheduler.plan_builder import InFlight
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import I32, I64
from minisgl.journal.decisions import RecordedCosts
from minisgl.journal.format import MAGIC, VERSION, Kind, frame
from minisgl.journal.identity import HashedIds, PlainIds, Said, Tokens
from minisgl.journal.keyed import Key
from minisgl.journal.requests import limits_of, pack
from minisgl.journal.snapshot import capture, request_values
from minisgl.plan import StepPlan, StepResult

BATCH = 64  # calls of the machine that are written together,
BATCH_SECONDS = 0.07  # unless the first of them is older;
LATEST_SECONDS = 0.095  # then the scheduler is woken for it, where no step has done that
SLICE_SECONDS = 0.001  # of work on the beginning of a part, between two looks at the mail
MAX_HELD = 1024  # calls that wait for it


class Call(NamedTuple):
    """One call of the machine."""

    inbox: list[Event]
    now: float
    output: Output
    decisions: list[float]
    sent: InFlight | None  # its plan
    joined: I64 | None  # the owners of the plan's new slots
    ids: list[tuple[I32, int]]  # of the requests in the inbox, with `scored`
    epochs: I64  # by slot, after the call


class Sink(Protocol):
    """Where the bytes of a journal go.  `error`: why they cannot any longer; `due`: another part may begin."""

    error: str

    @property
    def due(self) -> bool: ...

    def begin(self, data: bytes) -> None:
        """Begin a part with these bytes."""

    def write(self, data: bytes) -> None:
        """Append to the part."""

    def flush(self, now: float) -> float:
        """Send on what waits, if that is due.  Returns when it is."""

    def close(self) -> None:
        """Nothing follows."""


class Writer:
    """Turns calls of the machine into records, for one sink.  `info`: what else a part says of itself."""

    def __init__(self, sink: Sink, info: dict[str, Any], tokens: bool) -> None:
        self.sink, self._info, self._tokens = sink, info, tokens
        self.part = -1
        self._key: Key | None = None
        self._ids = PlainIds()
        self._pack = msgpack.Packer().pack
        self._beginning: Iterator[None] | None = None
        self._epochs: I64 = np.zeros(0, np.int64)

    def begin(self, machine: StepMachine) -> None:
        """Begin a part: MAGIC, what it is a part of, and the state of the machine, between two of its calls.  See `begun`."""
        limits = machine.limits
        if not self._tokens:
            self._key = self._key or Key(machine._eos_ids)
            self._ids = HashedIds(self._key, limits.slots)
        self.part += 1
        head = {**self._info, "version": VERSION, "part": self.part, "hashed": self._ids.hashed, "limits": limits_of(limits)}
        self._beginning = self._begin(head, *capture(machine, self._ids))
        self._epochs = machine.table.epoch.copy()

    def _begin(self, head: dict[str, Any], state: dict[str, Any], work: Iterator[None]) -> Iterator[None]:
        yield from work
        self.sink.begin(MAGIC + frame(Kind.PART, head) + frame(Kind.SNAPSHOT, state))

    def begun(self, seconds: float = math.inf) -> bool:
        """Whether the part has begun, after working on it for about so long: until then nothing can be written."""
        end = time.perf_counter() + seconds
        while self._beginning is not None:
            if next(self._beginning, self) is self:
                self._beginning = None
            if time.perf_counter() >= end:
                break
        return self._beginning is None

    def fail(self, e: Exception) -> None:
        """The journal cannot go on."""
        logging.getLogger("minisgl").exception("the journal cannot go on")
        self.sink.error, self._beginning = repr(e), None

    def write(self, calls: list[Call]) -> None:
        """Write a record for each of these calls."""
        steps = [self._step(call) for call in calls]
        self._ids.settle()
        for _, later in steps:
            for event, at, tokens in later:
                event[at] = pack(tokens.ids)
                if tokens.stops:
                    event.append(tokens.stops)
        self.sink.write(b"".join([frame(Kind.STEP, values, self._pack) for values, _ in steps]))

    def _step(self, call: Call) -> tuple[list[Any], list[tuple[list[Any], int, Tokens]]]:
        """The values of a STEP, and the ids that are not settled yet, with their places."""
        events: list[Any] = []
        later: list[tuple[list[Any], int, Tokens]] = []
        said: Said | None = None
        arrivals = iter(call.ids)
        for event in call.inbox:
            if isinstance(event, StepResult):
                said = said or Said(call.output, _results(call.inbox))
                row, at, tokens = result_values(event), 2, self._ids.result(event, self._epochs, said)
            elif isinstance(event, Add):
                ids, scored = next(arrivals)
                tokens = self._ids.request(event.request, ids)
                row, at = ["add", *request_values(event.request, self._ids)], 2
                row[-1] = scored
            else:
                events.append(["drop", event.uid] if isinstance(event, Drop) else ["flush"])
                continue
            events.append(row)
            later.append((row, at, tokens))
        if call.sent is not None and call.output.plan is not None:
            if call.joined is not None:
                self._ids.joined(call.output.plan.new_slots["slot"].tolist(), call.joined.tolist())
            self._ids.sent(call.sent)
        gone = ended(call.output)
        for uid in (*(uid for uid, _ in gone), *(uid for uid, _ in call.output.vectors)):
            self._ids.ended(uid)
        self._epochs = call.epochs
        return [call.now, events, call.decisions, outcome(call.output, self._ids.hashed, gone)], later


def _results(inbox: list[Event]) -> int:
    return 1 if len(inbox) == 1 else sum(isinstance(event, StepResult) for event in inbox)


def result_values(result: StepResult) -> list[Any]:
    """A result: its step, its tokens (filled in later), its times; of log probabilities only where they are no numbers."""
    scores = None
    if result.scores is not None:
        broken = np.flatnonzero(np.isnan(result.scores.logprobs)).tolist()
        scores = [len(result.scores.logprobs), result.scores.top_ids.shape[1], broken]
    times = (result.busy_us, result.idle_us, result.launch_us, result.warmups)
    return ["result", result.step, b"", *times, scores, 0 if result.vectors is None else len(result.vectors)]


def ended(output: Output) -> list[list[int]]:
    """[uid, finish] of the requests that ended."""
    return [
        [uid, why]
        for rows in output.outputs
        if np.count_nonzero(rows.finish)
        for uid, why in zip(rows.uids.tolist(), rows.finish.tolist(), strict=True)
        if why
    ]


def outcome(output: Output, hashed: bool, gone: list[list[int]]) -> list[Any]:
    """What a call decided, short: a digest of its plan, the plan's outline, who started and who has `gone`, see `ended`."""
    plan, started = output.plan, [list(pair) for pair in output.started]
    return [b"", None, started, gone] if plan is None else [digest(plan, hashed), outline(plan), started, gone]


def digest(plan: StepPlan, hashed: bool) -> bytes:
    """Equal for equal plans of the same outline; with hashed ids up to tokens and texts.  Nothing if the outline has it all."""
    more = (plan.new_slots, plan.ids, plan.extras, plan.bias, plan.history, plan.targets, plan.grammars, plan.said)
    if not any(map(len, more)):
        return b""
    if not hashed:
        return blake2b(plan.pack(), digest_size=8).digest()
    sizes = f"{len(plan.ids)} {len(plan.history)} {len(plan.targets)} {len(plan.said)} ".encode()
    rows = (plan.new_slots, plan.extras["slot"], plan.grammars)
    return blake2b(sizes + b"".join(r.tobytes() for r in rows), digest_size=8).digest()


def outline(plan: StepPlan) -> list[Any]:
    """The plan for people: step, joins [slot, cached tokens], chunks [slot, flags, tokens], decode slots i32[n] (None: as in
    the plan before), page grants i32[3 n] (slot, place, page)."""
    new = plan.new_slots
    joins = [list(pair) for pair in zip(new["slot"].tolist(), new["kv_len"].tolist(), strict=True)] if len(new) else []
    decode = None if plan.decode is None else pack(plan.decode)
    chunks = [list(row) for row in plan.prefill.tolist()]
    return [plan.step, joins, chunks, decode, plan.page_grants.tobytes()]


class Recorder:
    """Watches one machine for some writers, which are told when to begin a part.  `batch`: calls that are written together."""

    def __init__(self, machine: StepMachine, batch: int = BATCH) -> None:
        self._machine, self._batch = machine, batch
        self._inner = machine.costs
        self._costs = machine.costs = RecordedCosts(machine.costs)
        self._most = machine.limits.max_steps_in_flight
        self._quiet = False
        self._first = 0.0  # when the first of the calls was made
        self._calls: list[tuple[Any, ...]] = []  # values of Call
        self.wrote = False  # in `saw`
        self.writers: list[Writer] = []

    def add(self, writer: Writer) -> None:
        """Have a writer begin, between two calls of the machine."""
        self._write(math.inf)
        writer.begin(self._machine)
        self.writers.append(writer)

    def remove(self, writer: Writer) -> None:
        """End a writer: it gets what has happened."""
        self._write(math.inf)
        self.writers.remove(writer)

    def close(self) -> None:
        """Leave the machine as it was."""
        self._write(math.inf)
        self._machine.costs = self._inner

    def saw(self, inbox: list[Event], now: float, output: Output) -> None:
        """The machine was called.  Runs in the step: see above."""
        machine, costs, plan = self._machine, self._costs, output.plan
        decisions = costs.made
        if plan is None:
            entered = not output.again_in and len(machine.inflight) < self._most
            quiet = entered and not machine._prefilling and not len(machine.waiting)
            if not inbox and (not entered or (quiet and self._quiet)):
                decisions.clear()
                return
            self._quiet = quiet
        else:
            self._quiet = False
        costs.made = []
        ids = []
        for event in inbox:
            if type(event) is Add:
                ids.append((event.request.ids, event.request.scored))
        table, calls = machine.table, self._calls
        if not calls:
            self._first = now
        sent = joined = None
        if plan is not None:
            sent = machine.inflight[-1]
            if len(plan.new_slots):
                joined = table.uid[plan.new_slots["slot"]]
        calls.append((inbox, now, output, decisions, sent, joined, ids, table.epoch.copy()))
        if len(calls) >= 2 * self._batch:
            self._write(SLICE_SECONDS if len(calls) < MAX_HELD else math.inf)
            self.wrote = True

    def rest(self, now: float) -> float:
        """The scheduler has nothing to do: write what has come, if it is much or old.  Returns when it will be old."""
        if not self._begun(SLICE_SECONDS):
            return now
        if not self._calls:
            return math.inf
        if len(self._calls) < self._batch and now < self._first + BATCH_SECONDS:
            return self._first + LATEST_SECONDS
        self._write(math.inf)
        return math.inf

    def _write(self, seconds: float) -> None:
        """Write all calls, unless a part takes more `seconds` to begin.  What goes wrong ends a journal, not the scheduler."""
        if not self._begun(seconds):
            return
        calls, self._calls = list(map(Call._make, self._calls)), []
        for writer in self.writers if calls else ():
            try:
                writer.write(calls)
                if writer.sink.due:
                    writer.begin(self._machine)
            except Exception as e:
                writer.fail(e)

    def _begun(self, seconds: float) -> bool:
        """Whether all writers have begun their parts, after so much work on each."""
        done = True
        for writer in self.writers:
            try:
                done &= writer.begun(seconds)
            except Exception as e:
                writer.fail(e)
        return done

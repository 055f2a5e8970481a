"""Sends the requests of the ledger to the engine, and once more after its deaths, behind what they have said.

The names of requests in the engine change with each sending, so what the dead have sent and arrives later is recognised.
Runs in the api process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

import minisgl.actors.messages as msg
from minisgl.actors.runtime.actor import Context
from minisgl.actors.runtime.ring import RingSpec, RingWriter
from minisgl.api.ledger import Entry
from minisgl.api.trials import Trials
from minisgl.arrays import I32


class Dispatcher:
    """The tokenized requests: those that wait for the engine, those that are with it, and the suspects (trials.py).

    `ledger`: the open requests by uid, kept by the gateway.  `new_name`: gives a number that no request has had.
    """

    def __init__(self, ctx: Context, ring: RingSpec, ledger: Mapping[int, Entry], new_name: Callable[[], int]) -> None:
        self.engine_up = False  # the scheduler takes requests
        self.sent: dict[int, Entry] = {}  # the requests that are with the engine, by name
        self._ctx = ctx
        self._ring = RingWriter(ring)
        self._ledger = ledger
        self._new_name = new_name
        self._backlog: deque[Entry] = deque()  # requests that wait for the engine, or for room in the ring
        self._trials: Trials[Entry] = Trials()
        self._oldest = 0  # names below are forgotten by the detokenizer

    # ---------------- a request
    def is_poison(self, ids: I32) -> bool:
        """Whether this prompt has killed the engine, within the last hour."""
        return self._trials.knows(ids, self._ctx.now())

    def submit(self, entry: Entry) -> None:
        """Send a request whose prompt's ids are known, as soon as the engine takes it and the ring has room."""
        self._backlog.append(entry)
        self._flush_backlog()

    def cancel(self, entry: Entry) -> None:
        """End a request in the engine, if it is there.  It has no name there any longer."""
        if entry.name:
            self._ctx.send("scheduler", msg.Cancel(entry.name))
            del self.sent[entry.name]
            entry.name, entry.started = 0, False

    def drop(self, entry: Entry) -> None:
        """A request has left the ledger."""
        self.sent.pop(entry.name, None)
        if self._trials.open:
            self._trials.withdraw(entry)
            self.go_on()

    # ---------------- the way to the engine
    def heard(self) -> None:
        """Requests have said something: the one on trial is acquitted by that."""
        if self._trials.open:
            self.go_on()

    def go_on(self) -> None:
        """Stop the request on trial when it is acquitted, and begin the next trial; after the last one, all others go on."""
        if (entry := self._trials.acquitted()) is not None:
            self.cancel(entry)
            self._backlog.append(entry)
        entry = self._trials.next() if self.engine_up else None
        if entry is not None and entry.ids is not None and not self._send(entry, entry.ids):
            self._trials.put_back()
            self._ring.starve(True)
        else:
            self._flush_backlog()

    def _flush_backlog(self) -> None:
        """Send the requests that fit in the ring; the scheduler sends Wake when it has made room for the rest."""
        if self._trials.open:
            return
        while self._backlog and self.engine_up:
            entry = self._backlog[0]
            if entry.uid in self._ledger and entry.ids is not None and not self._send(entry, entry.ids):
                self._ring.starve(True)
                return
            self._backlog.popleft()
        self._ring.starve(False)

    def _send(self, entry: Entry, prompt: I32) -> bool:
        """Pass a request on, with what it has said so far.  False: the ring has no room for it now.

        Its first name is its uid, unless the detokenizer was told to forget that.
        """
        ids = np.append(prompt, np.array(entry.delivered, np.int32)) if entry.delivered else prompt
        raw = ids.astype("<i4", copy=False).tobytes()
        if not self._ring.has_room(len(raw)):
            return False
        self._ring.publish(raw)
        entry.name = entry.uid if entry.fresh and entry.uid >= self._oldest else self._new_name()
        self.sent[entry.name] = entry
        sizes = len(ids), len(prompt), entry.max_tokens
        message = msg.Generate(entry.name, *sizes, entry.seed, entry.params, entry.options)
        self._ctx.send("scheduler", message)
        entry.fresh = False
        return True

    # ---------------- deaths of the engine
    @property
    def on_trial(self) -> bool:
        """Whether a request that is suspected of killing the engine runs, alone."""
        return self._trials.current is not None

    @property
    def waiting(self) -> bool:
        """Whether requests wait for the engine, or are with it."""
        return bool(self.sent) or bool(self._backlog)

    def engine_lost(self, ring: RingSpec) -> None:
        """The scheduler has died.  `ring`: for the next one."""
        self.engine_up, self._ring = False, RingWriter(ring)

    def recall(self, oldest: int, guilty: bool) -> list[int]:
        """The engine has died, or what it said was lost with the detokenizer: take all requests back.  `replay` must follow.

        `oldest`: names from there on have not been given.  `guilty`: a request may have ended it.  Returns the uids of those
        that are poison, to be refused before.
        """
        self._oldest = oldest
        self._ctx.send("detokenizer", msg.Forget(oldest))
        sent = list(self.sent.values())
        on_trial = self._trials.current  # it runs alone, so it was in flight, whatever was heard of it
        in_flight = [e for e in sent if guilty and (e.started or e is on_trial)]
        poison = self._trials.judge(in_flight, now := self._ctx.now())
        for entry in sent:
            if self.engine_up:
                self.cancel(entry)
            entry.name, entry.started = 0, False
            entry.logprobs.clear()  # of tokens that were not delivered
        self.sent.clear()
        self._backlog.clear()
        if not poison:
            return []
        return [e.uid for e in self._ledger.values() if e.ids is not None and self._trials.knows(e.ids, now)]

    def replay(self) -> None:
        """Send every request again, behind what it has said, as soon as the engine takes requests."""
        idle = (entry for entry in self._ledger.values() if entry.ids is not None and not entry.name)
        self._backlog = deque(sorted((e for e in idle if not self._trials.suspected(e)), key=lambda e: e.uid))
        self.go_on()

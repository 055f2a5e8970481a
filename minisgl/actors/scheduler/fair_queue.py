"""The fair order: who is served next, and who makes room when slots or pages are short.  Pure; runs in the scheduler process.

Weighted fair queueing (Demers, Keshav and Shenker 1989; Parekh and Gallager 1993) over prompt tokens.  A *client* is an API
key or an address; a *call* is one of its HTTP requests, with a row for each of its prompts times `n`.  Clients have equal
weights, and the calls of a client share its weight, so a call is a flow of weight 1 / calls of its client.  A request gets its
`finish` once, when it comes: the virtual time at which an ideally fair server would have computed its prompt.  Serving in the
order of `finish` puts short prompts before long ones, and nobody waits for ever: virtual time goes on with every token, so
whoever comes later has a later start.

Every operation takes constant time; the sorted queue of waiting requests is waiting_queue.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from minisgl.actors.scheduler.request import Request


@dataclass(slots=True)
class _Flow:
    """One call with prompts to compute."""

    finish: float  # of its last request
    requests: int = 0


class FairQueue:
    """Virtual time, and how many rows every client and every call holds."""

    def __init__(self) -> None:
        self.time = 0.0  # in tokens: it goes on by one when every client with prompts to compute has got one
        self.rows: Counter[int] = Counter()  # client -> running requests
        self.call_rows: Counter[tuple[int, int]] = Counter()  # (client, call) -> running requests
        self._flows: dict[int, dict[int, _Flow]] = {}  # client -> call -> prompts that wait or are being computed

    def enter(self, request: Request, tokens: int) -> None:
        """A request waits, with so many tokens to compute.  One that has run before starts anew, before its call's others."""
        options = request.options
        calls = self._flows.setdefault(options.client, {})
        flow = calls.setdefault(options.call, _Flow(self.time))
        start = self.time if request.resumed else max(self.time, flow.finish)
        request.finish = start + tokens * len(calls)
        flow.finish = max(flow.finish, request.finish)
        flow.requests += 1

    def leave(self, request: Request) -> None:
        """The prompt of a request has been computed, or the request is gone."""
        options = request.options
        calls = self._flows[options.client]
        calls[options.call].requests -= 1
        if not calls[options.call].requests:
            del calls[options.call]
            if not calls:
                del self._flows[options.client]

    def serve(self, tokens: int) -> None:
        """So many prompt tokens are planned."""
        self.time += tokens / max(1, len(self._flows))

    def hold(self, request: Request, n: int) -> None:
        """A request gets a slot (`n` = 1) or gives it back (-1)."""
        options = request.options
        self.rows[options.client] += n
        self.call_rows[options.client, options.call] += n
        if not self.call_rows[options.client, options.call]:
            del self.call_rows[options.client, options.call]
            if not self.rows[options.client]:
                del self.rows[options.client]

    def claim(self, request: Request) -> tuple[int, int, int, int]:
        """Requests with equal claims get the same answer of `yields`."""
        options = request.options
        rows, call_rows = self.rows[options.client], self.call_rows[options.client, options.call]
        return options.priority, options.client, rows, call_rows

    def burden(self, request: Request) -> tuple[int, int, int, float, int]:
        """The largest is retracted first: unimportant, of a client and a call that hold many rows, late in the fair order."""
        options = request.options
        rows, call_rows = self.rows[options.client], self.call_rows[options.client, options.call]
        return -options.priority, rows, call_rows, request.finish, request.order

    def yields(self, row: Request, to: Request) -> bool:
        """Whether a running request makes room for a waiting one: it is less important, or its client (within a client, its
        call) holds at least twice the rows that the other's will hold.  So nobody's last row is taken, and nobody takes back
        what was taken from him."""
        mine, yours = row.options, to.options
        if mine.priority != yours.priority:
            return mine.priority < yours.priority
        if mine.client != yours.client:
            return self.rows[mine.client] >= 2 * (self.rows[yours.client] + 1)
        return self.call_rows[mine.client, mine.call] >= 2 * (self.call_rows[yours.client, yours.call] + 1)

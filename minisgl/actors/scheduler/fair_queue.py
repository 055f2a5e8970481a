"""The fair order: who is served next, and who makes room when slots or pages are short.  Pure; runs in the scheduler process.

Weighted fair queueing (Demers, Keshav and Shenker 1989; Parekh and Gallager 1993) over prompt tokens.  A *client* is an API
key or an address; a *call* is one of its HTTP requests, with a row for each of its prompts times `n`.  A call is a flow.  A
client's shortest call has weight 1, as if it were alone, and the k-th 1 / k.  A request gets its `finish` once, when it comes:
the virtual time at which an ideally fair server, which works on all flows at once in proportion to their weights, would have
computed its prompt.  Serving in the order of `finish` puts short prompts before long ones, and
nobody waits for ever: virtual time goes on with every token, and who comes later starts later.

Every operation takes logarithmic time or less; the sorted queue of waiting requests is waiting_queue.py.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

from minisgl.actors.scheduler.request import Request

Call = tuple[int, int]  # (client, call)


@dataclass(slots=True)
class _Flow:
    """A call that the ideal server works on."""

    finish: float  # of its last request
    tokens: int = 0  # of all its requests
    rivals: int = 1  # calls of its client that were no longer when it last grew, itself included; its weight is 1 / rivals


class FairQueue:
    """The virtual time of the ideal server, and how many rows every client and every call holds in ours."""

    def __init__(self) -> None:
        self.time = 0.0  # in tokens of a flow of weight 1
        self.weight = 0.0  # of all flows
        self.rows: Counter[int] = Counter()  # client -> running requests
        self.call_rows: Counter[Call] = Counter()  # running requests
        self._flows: dict[Call, _Flow] = {}
        self._ends: list[tuple[float, Call]] = []  # a heap of the flows by `finish`, or by an earlier value of it
        self._sizes: Counter[tuple[int, int]] = Counter()  # (client, bits of the number of tokens) -> flows

    def enter(self, request: Request, tokens: int) -> None:
        """A request has so many tokens to compute.  One that has run before does not queue behind the others of its call."""
        key = client, _ = request.options.client, request.options.call
        flow = self._flows.get(key)
        if fresh := flow is None:
            flow = self._flows[key] = _Flow(self.time)
        else:
            self._count(client, flow, -1)
        flow.tokens += tokens
        flow.rivals = 1 + sum(self._sizes[client, size] for size in range(1 + flow.tokens.bit_length()))
        self._count(client, flow, 1)
        request.finish = (self.time if request.resumed else flow.finish) + tokens * flow.rivals
        flow.finish = max(flow.finish, request.finish)
        if fresh:
            heapq.heappush(self._ends, (request.finish, key))

    def _count(self, client: int, flow: _Flow, n: int) -> None:
        """A flow begins (`n` = 1) or ends (-1); one that grows does both."""
        self.weight += n / flow.rivals
        key = client, flow.tokens.bit_length()
        self._sizes[key] += n
        if not self._sizes[key]:
            del self._sizes[key]

    def serve(self, tokens: float) -> None:
        """So many prompt tokens are planned, or could have been: virtual time goes on, and flows end."""
        while self._ends:
            end, key = self._ends[0]
            until = (end - self.time) * self.weight
            if until > tokens:
                self.time += tokens / self.weight
                return
            tokens, self.time = tokens - until, end
            flow = self._flows[key]
            if flow.finish > end:
                heapq.heapreplace(self._ends, (flow.finish, key))
            else:
                heapq.heappop(self._ends)
                del self._flows[key]
                self._count(key[0], flow, -1)

    def rest(self) -> None:
        """No prompt is left: the ideal server has computed them, too, where the cache has helped less than it might."""
        if self._flows:
            self._flows.clear()
            self._ends.clear()
            self._sizes.clear()
            self.weight = 0.0

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

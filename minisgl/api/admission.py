"""Admission control: refuses, before anything is done for them, requests that would only wait.  Pure; runs in the api process.

A request is counted from the moment it is accepted, by its client: among those that are open (--max-open-requests); until its
first step, among those that wait (--max-queue); and with its prompt's tokens, once they are known, among the tokens that wait
(--max-queued-tokens).  Tokens are the bound that matters: they determine how long a new request would wait.  What has been
accepted is never refused later, whatever is done again after a crash.

Fair between clients (API keys; without keys, addresses): where all places are taken, a client that holds less than its share of
them, places / clients that hold one, is still admitted, to one of RESERVE more places.  So whoever takes all places takes them
from himself.
"""

from __future__ import annotations

from dataclasses import dataclass

from minisgl.config import ServerConfig
from minisgl.errors import RequestError

RESERVE = 0.1  # more places, as a share of the limit, for clients below their share


class Places:
    """Places of one kind, and how many of them each client holds."""

    def __init__(self) -> None:
        self.taken = 0
        self._held: dict[int, int] = {}  # by client, only of those that hold some

    def has_room(self, most: int, client: int, n: int = 1) -> bool:
        """Whether `client` may take `n` more, where there are `most`."""
        if self.taken + n <= most:
            return True
        mine = self._held.get(client, 0)
        clients = len(self._held) + (client not in self._held)
        return clients > 1 and mine * clients < most and self.taken < most + max(1, int(RESERVE * most))

    def take(self, client: int, n: int = 1) -> None:
        self.taken += n
        self._held[client] = self._held.get(client, 0) + n

    def give_back(self, client: int, n: int = 1) -> None:
        self.taken -= n
        self._held[client] -= n
        if not self._held[client]:
            del self._held[client]


@dataclass(slots=True)
class _Counted:
    """What one open request is counted for."""

    client: int
    waits: bool
    runs: bool = False
    tokens: int = 0


class AdmissionControl:
    """The counts of all open requests.  `slots`: requests that the engine runs at the same time.

    `prefill_rate`: prompt tokens per second, as the scheduler has measured it; 0: not known yet.
    """

    def __init__(self, slots: int) -> None:
        self.prefill_rate = 0
        self.open, self.waiting, self.tokens = Places(), Places(), Places()
        self._slots = slots
        self._running = 0
        self._counted: dict[int, _Counted] = {}  # by uid

    def check(self, server: ServerConfig, client: int, *, generates: bool) -> None:
        """Refuse what would find no place, by its client alone.  Raises RequestError (429).

        `generates`: it has to wait for a slot of the engine; otherwise it only asks the tokenizer or the checker.
        """
        if not self.open.has_room(server.max_open_requests, client):
            raise self._refusal(f"The server has {self.open.taken} open requests, its limit", 1)
        if not generates:
            return
        # Requests that find a free slot do not wait, although they have not started yet.
        free = max(0, self._slots - self._running)
        if server.max_queue and not self.waiting.has_room(server.max_queue + free, client):
            raise self._refusal(f"The server has {self.waiting.taken} requests waiting", 5)
        self._check_tokens(server, client, 1)

    def _check_tokens(self, server: ServerConfig, client: int, n: int) -> None:
        """An empty queue takes any request.  Raises RequestError (429)."""
        if server.max_queued_tokens and self.tokens.taken and not self.tokens.has_room(server.max_queued_tokens, client, n):
            raise self._refusal(f"The server has requests with {self.tokens.taken} prompt tokens waiting", 5)

    def _refusal(self, fact: str, otherwise: int) -> RequestError:
        """429, with the seconds that the queue takes, or `otherwise` as long as nobody knows."""
        rate = self.prefill_rate
        retry = max(1, min(30, round(self.tokens.taken / rate))) if rate else otherwise
        text = f"{fact}; try again in {retry} s."
        return RequestError(text, status=429, code="server_overloaded", retry_after=retry)

    # ---------------- the life of a request
    def enter(self, uid: int, client: int, *, generates: bool) -> None:
        """A request has been accepted."""
        self._counted[uid] = _Counted(client, generates)
        self.open.take(client)
        if generates:
            self.waiting.take(client)

    def read(self, uid: int, n: int, server: ServerConfig) -> None:
        """The prompt of a request has `n` tokens.  Raises RequestError (429) if so many may not wait; it has to leave then."""
        if (counted := self._counted.get(uid)) is None or counted.tokens:
            return
        self._check_tokens(server, counted.client, n)
        counted.tokens = n
        self.tokens.take(counted.client, n)

    def start(self, uid: int) -> None:
        """The engine computes a part of it: it waits no longer.  Said again, nothing changes."""
        if (counted := self._counted.get(uid)) is not None and counted.waits:
            self._wait_no_longer(counted)
            counted.runs = True
            self._running += 1

    def leave(self, uid: int) -> None:
        """A request has ended, however.  Said again, nothing changes."""
        if (counted := self._counted.pop(uid, None)) is None:
            return
        self.open.give_back(counted.client)
        if counted.waits:
            self._wait_no_longer(counted)
        elif counted.runs:
            self._running -= 1

    def _wait_no_longer(self, counted: _Counted) -> None:
        counted.waits = False
        self.waiting.give_back(counted.client)
        if counted.tokens:
            self.tokens.give_back(counted.client, counted.tokens)

"""Logs how requests end: a line for each with `--log-requests`, otherwise counts of the refused ones by reason.

A line has numbers and names from closed sets, never the text of a prompt or an answer.  Runs in the api process, on the thread
of its event loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from minisgl.api.engine import Chunk, OnChunk, Prompt
from minisgl.errors import RequestError
from minisgl.logs import REQUEST, say
from minisgl.sampling_params import SamplingParams

LEFT = 499  # the status of a request whose client has left, as nginx has it
_MAX_PARAM = 60  # characters of a field's name, which a client may have made up


class Failure(NamedTuple):
    """The part of a RequestError that is kept.  The exception itself would keep its frames alive, and with them the body."""

    status: int
    code: str
    param: str | None


class Account:
    """Accumulates the facts about one request until it ends.  Whoever answers it sets `status` and calls `fail`.

    Choices of one prompt count its tokens once.  Times in seconds.  `caller`: headers that say which trace it belongs to.
    """

    def __init__(self, request_log: RequestLog, route: str, kind: str, request_id: str) -> None:
        self.route, self.kind, self.request_id = route, kind, request_id
        self.status = LEFT  # until there is an answer
        self.began = request_log.now()
        self.caller: Mapping[str, str] = {}
        self._request_log = request_log
        self.try_again()

    def try_again(self) -> None:
        """Forget what was counted: the request is answered anew."""
        self.failure: Failure | None = None
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.finish: list[str] = []  # the different reasons, in the order of their coming
        self.params: SamplingParams | None = None  # of the first prompt
        self.thought_tokens = self.answers = 0
        self.first = self.last = 0.0  # when the first token came, and the end of the answer that was the last to end
        self.queued_at = self.started_at = 0.0  # of its prompt: when it came to the scheduler, and its first step
        self._prompt: Prompt | None = None  # the latest

    def fail(self, error: RequestError) -> None:
        """The request ends with this error."""
        self.failure = Failure(error.status, error.code or error.kind, error.param)

    def watch(self, prompt: Prompt, on_chunk: OnChunk, params: SamplingParams | None = None) -> OnChunk:
        """`on_chunk`, with the chunks of an answer to `prompt` counted on their way where somebody wants to know."""
        if not self._request_log.watches:
            return on_chunk
        fresh, self._prompt = prompt is not self._prompt, prompt
        self.params, opened = self.params or params, self._request_log.now()

        def count(item: Chunk | RequestError) -> None:
            nonlocal fresh
            if isinstance(item, RequestError):
                if self.failure is None:
                    self.fail(item)
            else:
                n = len(item.token_ids)
                if not self.first and (n or item.finish):
                    self.first, self.started_at = self._request_log.now(), opened + item.waited
                    self.queued_at = self.started_at - item.queued
                if fresh:
                    fresh = False
                    self.prompt_tokens += item.prompt_tokens
                    self.cached_tokens += item.cached_tokens
                self.completion_tokens += n
                if item.finish:
                    self.last = self._request_log.now()
                    self.thought_tokens += item.thought_tokens
                    self.answers += 1
                    if (reason := item.finish.reason or "") not in self.finish:
                        self.finish.append(reason)
            on_chunk(item)

        return count


class RequestLog:
    """Makes the accounts of all requests.  `each`: print a line for every request; `on_end`: is called when one has ended."""

    def __init__(self, each: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self.each, self.now = each, now
        self.refused: Counter[tuple[int, str]] = Counter()  # by status and code; LoadLines prints and clears them
        self.last_end = 0.0
        self.on_begin: Callable[[], object] = lambda: None
        self.on_end: Callable[[Account, float], object] | None = None

    @property
    def watches(self) -> bool:
        """Whether anybody wants to know what is counted in chunks."""
        return self.each or self.on_end is not None

    @contextmanager
    def request(self, route: str, kind: str, request_id: str) -> Iterator[Account]:
        """A context with the account of one request, which ends with the context."""
        self.on_begin()
        account = Account(self, route, kind, request_id)
        try:
            yield account
        finally:
            self._end(account)

    def refuse(self, route: str, request_id: str, error: RequestError) -> None:
        """Note a request that was refused before it could be read."""
        if not self.each and self.on_end is None:  # nobody looks at it alone
            self.on_begin()
            self.last_end = self.now()
            self.refused[error.status, error.code or error.kind] += 1
            return
        with self.request(route, "http", request_id) as account:
            account.status = error.status
            account.fail(error)

    def _end(self, account: Account) -> None:
        self.last_end = now = self.now()
        failure, status = account.failure, account.status
        if self.each:
            self._report(account, now)
        elif (failure is not None or status >= 400) and status != LEFT:
            self.refused[failure[:2] if failure is not None else (status, "")] += 1
        if self.on_end is not None:
            self.on_end(account, now)

    def _report(self, account: Account, now: float) -> None:
        failure, status, generated = account.failure, account.status, bool(account.first)
        finish = "abort" if status == LEFT else "error" if failure is not None else "+".join(account.finish) or None
        code = None if failure is None else failure.code
        param = None if failure is None or failure.param is None else failure.param[:_MAX_PARAM]
        ttft = 1000 * (account.first - account.began) if generated else None
        total = 1000 * (now - account.began)
        parts = [f"{account.kind + ' ' if account.kind != 'http' else ''}{account.route} {status}"]
        if code is not None:
            parts[0] += f" {code}" + (f" ({param})" if param else "")
        if ttft is not None:
            parts += [f"{account.prompt_tokens} + {account.completion_tokens} tokens", f"{account.cached_tokens} cached"]
            parts += [f"TTFT {ttft:.0f} ms"]
        parts += [f"{total:.0f} ms", *([finish] if finish not in (None, "error") else [])]
        say(
            REQUEST,
            f"{account.request_id} {', '.join(parts)}",
            id=account.request_id,
            kind=account.kind,
            route=account.route,
            status=status,
            code=code,
            param=param,
            prompt_tokens=account.prompt_tokens if generated else None,
            completion_tokens=account.completion_tokens if generated else None,
            cached_tokens=account.cached_tokens if generated else None,
            ttft_ms=None if ttft is None else round(ttft, 1),
            total_ms=round(total, 1),
            finish_reason=finish,
        )

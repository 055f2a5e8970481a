"""Prints load lines: throughput, queue, prefix cache and KV cache every few seconds under load, and once when the load ends.

The numbers are counted in any case, by the scheduler and for GET /metrics, so a token costs nothing more.  Runs in the
api process, on its event loop, whose timer runs only while there is load.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from minisgl.api.http.metrics import Metered, kv_shares
from minisgl.api.request_log import RequestLog
from minisgl.logs import LOAD, REFUSED, say

SECONDS = 5.0  # between two lines
_REASONS = 8  # as many kinds of refusals are named


class Timer(Protocol):
    """A call that has been ordered for later."""

    def cancel(self) -> None: ...


Later = Callable[[float, Callable[[], None]], Timer]


class _Counts(NamedTuple):
    """Totals since the start, in tokens unless the name says otherwise."""

    computed: int  # of prompts
    generated: int
    looked_up: int  # of prompts, in the prefix cache
    found: int
    preemptions: int
    warmups: int


class LoadLines:
    """The lines about load and refusals.  `later`: the event loop's call_later."""

    def __init__(self, engine: Metered, request_log: RequestLog, later: Later) -> None:
        self._engine, self._request_log, self._later = engine, request_log, later
        self._timer: Timer | None = None
        self._began = self._since = 0.0  # of the load, and of what the next line is about
        self._last = _Counts(0, 0, 0, 0, 0, 0)
        self._was_busy = False  # by the latest line
        request_log.on_begin = self.wake

    def wake(self) -> None:
        """A request has come: begin to measure, unless that has begun."""
        if self._timer is None:
            self._began = self._since = self._request_log.now()
            self._last = self._counts()
            self._timer = self._later(SECONDS, self._tick)

    def close(self) -> None:
        """Print what has not been printed.  Later requests print nothing."""
        self._request_log.on_begin = lambda: None
        if self._timer is not None:
            self._timer.cancel()
            self._report()

    def _tick(self) -> None:
        self._report()
        idle = not self._engine.open_requests
        self._timer = None if idle else self._later(SECONDS, self._tick)

    def _report(self) -> None:
        counts, busy = self._counts(), bool(self._engine.open_requests)
        until = self._request_log.now() if busy else max(self._request_log.last_end, self._since)
        # A scheduler that has been started again counts from zero.
        done = _Counts(*(b - a if b >= a else b for a, b in zip(self._last, counts, strict=True)))
        if busy or self._was_busy or any(done):
            self._report_load(done, max(until - self._since, 1e-3), until - self._began, busy)
        self._was_busy = busy
        if self._request_log.refused:
            _report_refused(self._request_log.refused)
            self._request_log.refused.clear()
        self._since, self._last = self._request_log.now(), counts

    def _report_load(self, done: _Counts, seconds: float, since_began: float, busy: bool) -> None:
        stats = defaultdict(int, self._engine.stats)
        filled, used = kv_shares(stats)
        known = stats["total_pages"] > 0
        fields: dict[str, Any] = {
            "running": stats["running_requests"] if busy else 0,
            "waiting": max(self._engine.open_requests - stats["running_requests"], 0) if busy else 0,
            "prompt_tokens_per_s": round(done.computed / seconds, 1),
            "generated_tokens_per_s": round(done.generated / seconds, 1),
            "cache_hit_share": round(done.found / done.looked_up, 3) if done.looked_up else None,
            "kv_used_share": round(busy * used, 3) if known else None,
            "kv_filled_share": round(filled, 3) if known else None,
            "preemptions": done.preemptions,
            "warmups": done.warmups,
            "seconds": round(seconds, 1),
            "load_seconds": round(since_began, 1),
            "idle": not busy,
        }
        hits, kv = fields["cache_hit_share"], fields["kv_filled_share"]
        parts = [
            f"{fields['running']} running, {fields['waiting']} waiting",
            f"{fields['prompt_tokens_per_s']:g} tok/s in, {fields['generated_tokens_per_s']:g} tok/s out",
            *([f"cache hits {100 * hits:.0f} %"] if hits is not None else []),
            *([f"KV cache {100 * kv:.0f} % filled, {100 * fields['kv_used_share']:.0f} % in use"] if kv is not None else []),
            *([f"{done.preemptions} preempted"] if done.preemptions else []),
            *([f"{done.warmups} compiled meanwhile"] if done.warmups else []),
            *([f"idle after {since_began:.1f} s"] if not busy else []),
        ]
        say(LOAD, f"load: {', '.join(parts)}", **fields)

    def _counts(self) -> _Counts:
        stats = defaultdict(int, self._engine.stats)
        names = ("prompt_tokens", "cached_tokens", "retractions", "warmups")
        return _Counts(stats["prefill_tokens"], self._engine.metrics.generation_tokens, *(stats[name] for name in names))


def _report_refused(refused: Counter[tuple[int, str]]) -> None:
    kinds = refused.most_common()
    named = [f"{n} x {status} {code}".rstrip() for (status, code), n in kinds[:_REASONS]]
    if more := sum(n for _, n in kinds[_REASONS:]):
        named.append(f"{more} for other reasons")
    reasons = [{"status": status, "code": code or None, "count": n} for (status, code), n in kinds]
    say(REFUSED, f"refused {refused.total()}: {', '.join(named)}", total=refused.total(), reasons=reasons)

"""Makes figures of what a server tells: readings of its /metrics, and the differences between them.  No terminal."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

WINDOW = 10.0  # seconds that rates and percentiles are about
_OURS = "minisgl_"


class Reading:
    """The numbers of GET /metrics at one time.  `health`: what GET /health says.  Raises ValueError for what is none."""

    def __init__(self, at: float, metrics: str, health: dict[str, Any]) -> None:
        self.at = at
        self.state = str(health.get("status", "unknown"))
        self.trouble = [
            f"{name} {fact}"
            for key, fact in (("down", "is being started"), ("still", "stands still"))
            for name in health.get(key) or ()
        ]
        self._values: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        lines = (line for line in metrics.splitlines() if line.startswith(_OURS))
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                name = sample.name.removeprefix(_OURS)
                self._values.setdefault(name, {})[frozenset(sample.labels.items())] = float(sample.value)
        if "num_requests_running" not in self._values:
            raise ValueError("it has no metrics of minisgl")

    def get(self, name: str, **labels: str) -> float:
        """A number, 0 where there is none."""
        return self._values.get(name, {}).get(frozenset(labels.items()), 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The numbers of a name by one of their labels, summed over the others."""
        out: dict[str, float] = {}
        for labels, value in self._values.get(name, {}).items():
            key = dict(labels).get(label, "")
            out[key] = out.get(key, 0.0) + value
        return out


class Readings:
    """The readings of the last WINDOW seconds.  `events`: what has happened between them, the latest last: (when, what)."""

    def __init__(self) -> None:
        self._all: deque[Reading] = deque()
        self.events: deque[tuple[float, str]] = deque(maxlen=50)

    def add(self, reading: Reading) -> None:
        if self._all:
            self._note(self._all[-1], reading)
        self._all.append(reading)
        while len(self._all) > 2 and reading.at - self._all[0].at > WINDOW:
            self._all.popleft()

    @property
    def last(self) -> Reading:
        return self._all[-1]

    @property
    def seconds(self) -> float:
        """What they span; 0 after the first."""
        return self._all[-1].at - self._all[0].at

    def increase(self, name: str, **labels: str) -> float:
        """By how much a counter has grown; one that is smaller than before has begun again from zero."""
        return _grown(self._all[0].get(name, **labels), self.last.get(name, **labels))

    def rate(self, name: str, **labels: str) -> float | None:
        """Its growth in a second; None as long as there is one reading."""
        return self.increase(name, **labels) / self.seconds if self.seconds > 0 else None

    def share(self, part: str, whole: str) -> float | None:
        """The growth of a counter as a share of another's, since the server's start where that has not grown."""
        if (n := self.increase(whole)) > 0:
            return self.increase(part) / n
        return self.last.get(part) / self.last.get(whole) if self.last.get(whole) else None

    def quantile(self, name: str, q: float) -> float | None:
        """A quantile of a histogram's latest observations, or of all where there are none; None where there never was one."""
        before, after = (r.by(f"{name}_bucket", "le") for r in (self._all[0], self.last))
        grown = {le: _grown(before.get(le, 0.0), n) for le, n in after.items()}
        return _quantile(grown, q) or _quantile(after, q)

    def _note(self, old: Reading, new: Reading) -> None:
        if old.state != new.state:
            self.events.append((new.at, f"the engine was {old.state}, and is {new.state}"))
        self.events.extend((new.at, what) for what in new.trouble if what not in old.trouble)
        for name, label, text in (
            ("restarts_total", "process", "{} was started again"),
            ("http_connections_closed_total", "reason", "connections ended early ({})"),
        ):
            before = old.by(name, label)
            for key, n in new.by(name, label).items():
                if more := _grown(before.get(key, 0.0), n):
                    self.events.append((new.at, _times(more, text.format(key))))
        for name, labels, text in (
            ("request_success_total", {"finished_reason": "error"}, "requests failed"),
            ("request_timeouts_total", {}, "requests missed their deadline"),
            ("num_preemptions_total", {}, "requests were preempted"),
            ("num_warmups_total", {}, "graphs or kernels were compiled while a step waited"),
            ("nan_requests_total", {}, "requests had logits that are no finite numbers"),
        ):
            if more := _grown(old.get(name, **labels), new.get(name, **labels)):
                self.events.append((new.at, _times(more, text)))


def _grown(before: float, after: float) -> float:
    return after - before if after >= before else after


def _times(n: float, text: str) -> str:
    return f"{n:.0f} x {text}" if n != 1 else text


def _quantile(buckets: dict[str, float], q: float) -> float | None:
    """From counts by upper bound ("le", cumulative), linear within a bucket as Prometheus has it; None without observations."""
    counts = sorted((float(le), n) for le, n in buckets.items())
    if not counts or counts[-1][1] <= 0:
        return None
    rank, low, below = q * counts[-1][1], 0.0, 0.0
    for bound, n in counts:
        if n >= rank and n > below:
            return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (n - below)
        low, below = bound, n
    return low

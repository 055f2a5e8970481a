"""What became of the requests of one run, and the figures that follow from it.  Pure; scripts/bench use it, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisgl.arrays import F64


@dataclass(slots=True)
class Outcome:
    """What became of a request.  Times in seconds on the client's clock."""

    late: float = 0.0
    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)  # when text came, or each token
    prompt: int = 0
    cached: int = 0
    tokens: int = 0
    error: str = ""

    @property
    def answered(self) -> bool:
        """Whether there is an answer."""
        return not self.error and bool(self.pieces)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.pieces[0] - self.sent

    @property
    def tpot(self) -> float:
        """Mean seconds for each later token; 0 where there is none."""
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1) if self.tokens > 1 else 0.0


def spread(seconds: Sequence[float] | F64) -> dict[str, float] | None:
    """Percentiles in milliseconds; None of nothing."""
    if not len(seconds):
        return None
    ms = np.asarray(seconds) * 1e3
    found = {f"p{p}": round(float(np.percentile(ms, p)), 2) for p in (50, 90, 99)}
    return {**found, "max": round(float(ms.max()), 2)}


def gaps(done: Sequence[Outcome]) -> F64:
    """All pauses within the answers, in seconds."""
    found: F64 = np.concatenate([np.diff(o.pieces) for o in done]) if done else np.zeros(0)
    return found


def summary(outcomes: Sequence[Outcome], seconds: float, ttft_ms: float, tpot_ms: float) -> dict[str, Any]:
    """The figures of one run; `goodput` is the share of requests within `ttft_ms` and `tpot_ms`."""
    done = [o for o in outcomes if o.answered]
    good = sum(o.ttft * 1e3 <= ttft_ms and o.tpot * 1e3 <= tpot_ms for o in done)
    prompts, tokens = sum(o.prompt for o in done), sum(o.tokens for o in done)
    return {
        "requests": len(outcomes),
        "completed": len(done),
        "errors": dict(Counter(o.error for o in outcomes if o.error)),
        "seconds": round(seconds, 2),
        "requests_s": round(len(done) / seconds, 3),
        "output_tok_s": round(tokens / seconds, 1),
        "total_tok_s": round((prompts + tokens) / seconds, 1),
        "ttft_ms": spread([o.ttft for o in done]),
        "tpot_ms": spread([o.tpot for o in done if o.tokens > 1]),
        "itl_ms": spread(gaps(done)),
        "e2e_ms": spread([o.pieces[-1] - o.sent for o in done]),
        "goodput": round(good / len(outcomes), 4),
        "cached": round(sum(o.cached for o in done) / prompts, 4) if prompts else None,
        "lateness_ms": round(max(o.late for o in outcomes) * 1e3, 1),
    }


def figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, float]:
    """The figures that runs are compared by, unrounded; without those that these answers do not have."""
    done = [o for o in outcomes if o.answered]
    later, pauses = [o.tpot for o in done if o.tokens > 1], gaps(done)
    found = {"tok_s": sum(o.tokens for o in done) / seconds}
    if done:
        found["ttft_ms"] = float(np.mean([o.ttft for o in done])) * 1e3
    if later:
        found["tpot_ms"] = float(np.mean(later)) * 1e3
        found["itl_p99_ms"] = float(np.percentile(pauses, 99)) * 1e3
        found["tok_s_user"] = 1e3 / found["tpot_ms"] if found["tpot_ms"] else 0.0
    return {name: value for name, value in found.items() if value > 0}

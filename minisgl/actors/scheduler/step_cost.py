"""The cost model: learns from measured steps how long a step takes.  Pure; runs in the scheduler process and in the simulator.

    seconds = c0 + c1 * prefill tokens + c2 * decode rows + c3 * context of the decode rows

fitted by recursive least squares with forgetting (Plackett 1950; see Ljung, "System Identification", 11.2), so that it
follows a machine that warms up or is shared.  In information form, damped towards the last fit: where a feature does not vary
for hours, its coefficient stays as it was, and nothing grows.  Four numbers and a 4 x 4 matrix: about 20 us per step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from minisgl.arrays import F64

_FORGET, _FORGET_FAST = 0.995, 0.5  # a step; the second after a step that took much less time than expected
_MIN_SAMPLES = 16
_STEP = 0.1  # seconds: a step with decodes that takes longer is felt by those who read
_STEP_ALONE = 0.2  # seconds of a step without decodes: who comes meanwhile waits for all plans in flight
_SHARE = 0.75  # of the time of a step's decodes, for prompts beside them
_LEAST_SHARE = 0.1  # where that would take a step beyond _STEP
_PAUSE = 8  # steps without prompts after a chunk that took more than its share, at most: the fit may be wrong;
_PAUSE_SECONDS = 0.06  # and no more steps than take so long
_ROWS_SHARE = 0.5  # of _STEP, that rows may take before no more of them start
_LEAST_ROWS = 16  # that run at the same time, even if a step takes longer than _STEP: fewer do not use the machine
_LEAST = 8  # prompt tokens of a step that has any: every chunk reads the KV of its prompt's beginning
_BURST = 0.06  # seconds of a step for prompts, where the steps before it had none
_MARGIN, _LATE = 0.1, 1.5e-3  # how wrong the time of a step may be, as a share and in seconds
_DAMPING = 1e-4  # of the scale of one sample: how much evidence it takes to move a coefficient
_SCALE = np.array([1.0, 1e-2, 1e-1, 1e-5])  # brings the features to the same size


def features(prefill_tokens: int, decode_rows: int, context: int) -> F64:
    """The row of the regression for one step."""
    x: F64 = np.array([1.0, prefill_tokens, decode_rows, context]) * _SCALE
    return x


class StepCosts:
    """The fit.  Once it has observed enough steps, `prefill_within` converts a time into prefill tokens."""

    def __init__(self) -> None:
        self.samples = 0
        self.longest = 32  # prompt tokens of a step observed so far
        self._credit = 0.0  # seconds that prompts may still take
        self._alone = 0.0  # seconds per token of the last long step without decodes, its overhead included
        self._w: F64 = np.zeros(4)
        self._a: F64 = np.zeros((4, 4))  # sum of x x^T, forgetting
        self._b: F64 = np.zeros(4)  # sum of x seconds

    def observe(self, x: F64, seconds: float) -> None:
        """Take in one step with `features` x.

        Outliers (a stopped process) count as ten times the expected.  Leaving them out would blind the fit for good to any step
        that it underestimates that much, such as the first long chunk after many decodes.
        """
        self.samples += 1
        tokens = round(x[1] / _SCALE[1])
        self.longest = max(self.longest, tokens)
        if tokens and not x[2] and seconds > _STEP_ALONE / 4:
            self._alone = seconds / tokens
        expected = float(self._w @ x)
        if self.samples > _MIN_SAMPLES:
            seconds = min(seconds, 10 * max(expected, 1e-6))
        # What else runs on this machine only makes a step longer: a short one is the truth, and what contradicts it is past.
        forget = _FORGET_FAST if tokens and seconds < 0.6 * expected else _FORGET
        self._a = forget * self._a + np.outer(x, x)
        self._b = forget * self._b + x * seconds
        self._w = self._w + np.linalg.solve(self._a + _DAMPING * np.eye(4), self._b - self._a @ self._w)

    @property
    def known(self) -> bool:
        """Whether enough steps have been observed to rely on the fit."""
        return self.samples >= _MIN_SAMPLES

    def seconds(self, prefill_tokens: int, decode_rows: int, context: int) -> float:
        """The expected time of a step."""
        return float(self._w @ features(prefill_tokens, decode_rows, context))

    def slack(self, running: Iterable[F64], now: float, since: float) -> float:
        """Seconds from `now` for which the workers have enough to do, by the fit, with a margin for what it does not know.

        `running`: the features of the steps in flight, whose first one began at `since`.  0 where nothing is known.
        """
        if not self.known:
            return 0.0
        expected = sum(float(self._w @ x) for x in running)
        return max(0.0, since + (1 - _MARGIN) * expected - _LATE - now)

    @property
    def per_token(self) -> float:
        """The expected time of a prompt token; not above 0 where nothing is known of it."""
        return float(self._w[1] * _SCALE[1]) if self.known else 0.0

    def prefill_within(self, seconds: float, decode_rows: int, context: int) -> int:
        """How many prefill tokens a step with these decodes can take in `seconds`; may be negative.

        Never more than twice what has been observed: a fit says nothing of steps that are unlike all before.
        """
        if self.per_token <= 0:
            return 2 * self.longest
        return min(2 * self.longest, int((seconds - self.seconds(0, decode_rows, context)) / self.per_token))

    def prefill_beside(self, decode_rows: int, context: int, least: float) -> int:
        """How many prefill tokens a step with these decodes may take so that prompts get _SHARE of the time of the decodes.

        And `least` seconds.  What steps without prompts leave over is kept, up to _BURST seconds, so that now and then a short
        prompt is computed in one go.  Few tokens are not worth a chunk; where that takes too long, the next steps are without.
        Without decodes a step only has to end soon enough for those who come.
        """
        if not decode_rows:
            most = 2 * self.longest
            return max(_LEAST, min(most, int(_STEP_ALONE / self._alone))) if self._alone else most
        decodes = self.seconds(0, decode_rows, context)
        room = max(least, 1e-3, min(_SHARE * decodes, max(_STEP - decodes, _LEAST_SHARE * decodes)))
        pause = min(_PAUSE, max(1.0, _PAUSE_SECONDS / max(decodes, 1e-3)))
        self._credit = min(max(self._credit, -pause * room) + room, max(_BURST, room))
        if self.per_token <= 0:
            return 2 * self.longest
        return min(2 * self.longest, max(_LEAST, int(self._credit / self.per_token))) if self._credit > 0 else 0

    def rows_within_step(self, rows: int, context: int) -> int:
        """How many rows may decode so that they leave room for prompts within _STEP, given `rows` and their context."""
        per_row = float(self._w[2] * _SCALE[2]) + float(self._w[3] * _SCALE[3]) * context / max(1, rows)
        if not self.known or per_row <= 0:
            return 1 << 30
        return max(_LEAST_ROWS, int((_ROWS_SHARE * _STEP - self.seconds(0, 0, 0)) / per_row))

    def spend(self, prefill_tokens: int) -> None:
        """A step beside decodes is planned with so many prefill tokens."""
        self._credit -= prefill_tokens * max(0.0, self.per_token)


class PrefillRate:
    """Prompt tokens per second, averaged over windows of half a second in which requests were waiting."""

    def __init__(self) -> None:
        self.per_second = 0.0  # 0: not known yet
        self._start: tuple[float, int] | None = None  # of the window: (when, tokens then)

    def observe(self, now: float, tokens: int, waiting: bool) -> None:
        """Take in the total of prompt tokens planned by `now`; `waiting`: some request has not started yet."""
        if self._start is None or not waiting:
            self._start = (now, tokens)
        elif now - self._start[0] >= 0.5:
            rate = (tokens - self._start[1]) / (now - self._start[0])
            self.per_second = 0.5 * (self.per_second + rate) if self.per_second else rate
            self._start = (now, tokens)

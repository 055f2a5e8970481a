"""What the machine takes from fits of measured times: recorded as inputs, because another processor would fit otherwise.

A fit solves equations in floating point, whose last digit depends on the library and the processor, and a budget of prompt
tokens is a rounded quotient of such numbers.  So a journal has the answers of the fit, and a replay repeats them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from minisgl.actors.scheduler.step_cost import StepCosts
from minisgl.arrays import F64


class RecordedCosts(StepCosts):
    """Answers as another StepCosts does, whose state it shares, and keeps the answers in `made`."""

    __slots__ = ("made",)

    def __init__(self, costs: StepCosts) -> None:
        self.__dict__ = costs.__dict__
        self.made: list[float] = []

    def slack(self, running: Iterable[F64], now: float, since: float) -> float:
        self.made.append(value := super().slack(running, now, since))
        return value

    def prefill_within(self, seconds: float, decode_rows: int, context: int) -> int:
        self.made.append(value := super().prefill_within(seconds, decode_rows, context))
        return value

    def prefill_beside(self, decode_rows: int, context: int, least: float) -> int:
        self.made.append(value := super().prefill_beside(decode_rows, context, least))
        return value

    def rows_within_step(self, rows: int, context: int) -> int:
        self.made.append(value := super().rows_within_step(rows, context))
        return value


class Unasked(Exception):
    """The machine asks the fit for more than it did when the journal was written."""


class GivenCosts(StepCosts):
    """Gives the recorded answers, in their order, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.given: deque[float] = deque()

    def _next(self) -> float:
        if not self.given:
            raise Unasked
        return self.given.popleft()

    def observe(self, x: F64, seconds: float) -> None:
        self.samples += 1

    def slack(self, running: Iterable[F64], now: float, since: float) -> float:
        return float(self._next())

    def prefill_within(self, seconds: float, decode_rows: int, context: int) -> int:
        return int(self._next())

    def prefill_beside(self, decode_rows: int, context: int, least: float) -> int:
        return int(self._next())

    def rows_within_step(self, rows: int, context: int) -> int:
        return int(self._next())

    def spend(self, prefill_tokens: int) -> None:
        pass

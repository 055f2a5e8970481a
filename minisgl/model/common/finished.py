"""A step that has finished by the time its launch returns, as on a CPU.  Runs in the workers."""

from __future__ import annotations

from dataclasses import dataclass

from minisgl.plan import StepResult


@dataclass(frozen=True, slots=True)
class Finished:
    """The step, in the form in which actors/worker.py takes launched steps (Pending)."""

    _result: StepResult

    def done(self) -> bool:
        """Whether `result` returns without waiting.  Never blocks."""
        return True

    def result(self) -> StepResult:
        """The step's tokens and times."""
        return self._result

"""What a step costs, learned from measured steps.  Pure; runs in the scheduler process and in the simulator.

    seconds = c0 + c1 * prefill tokens + c2 * decode rows + c3 * context of the decode rows

fitted by recursive least squares with forgetting (Plackett 1950; see Ljung, "System Identification", 11.2), so that it
follows a machine that warms up or is shared.  In information form, damped towards the last fit: where a feature does not vary
for hours, its coefficient stays as it was, and nothing grows.  Four numbers and a 4 x 4 matrix: some 20 us per step.
"""

from __future__ import annotations

import numpy as np

from minisgl.arrays import F64

_FORGET = 0.995
_MIN_SAMPLES = 16
_DAMPING = 1e-4  # of the scale of one sample: how much evidence it takes to move a coefficient
_SCALE = np.array([1.0, 1e-2, 1e-1, 1e-5])  # brings the features to the same size


def features(prefill_tokens: int, decode_rows: int, context: int) -> F64:
    """The row of the regression for one step."""
    x: F64 = np.array([1.0, prefill_tokens, decode_rows, context]) * _SCALE
    return x


class StepCosts:
    """The fit.  `observe` measured steps, then ask how many prefill tokens fit in a time."""

    def __init__(self) -> None:
        self.samples = 0
        self._w: F64 = np.zeros(4)
        self._a: F64 = np.zeros((4, 4))  # sum of x x^T, forgetting
        self._b: F64 = np.zeros(4)  # sum of x seconds

    def observe(self, x: F64, seconds: float) -> None:
        """Take in one step with `features` x.

        Outliers (a stopped process) count as ten times the expected.  To leave them out would make the fit blind for good to
        whatever it underestimates that much, such as the first long chunk after many decodes.
        """
        self.samples += 1
        expected = float(self._w @ x)
        if self.samples > _MIN_SAMPLES:
            seconds = min(seconds, 10 * max(expected, 1e-6))
        self._a = _FORGET * self._a + np.outer(x, x)
        self._b = _FORGET * self._b + x * seconds
        self._w = self._w + np.linalg.solve(self._a + _DAMPING * np.eye(4), self._b - self._a @ self._w)

    @property
    def known(self) -> bool:
        """Whether enough has been seen to rely on it."""
        return self.samples >= _MIN_SAMPLES

    def seconds(self, prefill_tokens: int, decode_rows: int, context: int) -> float:
        """The expected time of a step."""
        return float(self._w @ features(prefill_tokens, decode_rows, context))

    def prefill_within(self, seconds: float, decode_rows: int, context: int) -> int:
        """How many prefill tokens a step with these decodes can take in `seconds`; may be negative."""
        per_token = float(self._w[1] * _SCALE[1])
        if per_token <= 0:
            return 1 << 30
        return int((seconds - self.seconds(0, decode_rows, context)) / per_token)

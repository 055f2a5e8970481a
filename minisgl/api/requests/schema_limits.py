"""What the grammar library can follow of formats and numbers, which it computes as floats.  Pure; runs in the api process."""

from __future__ import annotations

import contextlib
from typing import Any

FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
_MOST = 1 << 53  # integers beyond are not exact
_LEAST = 1e-15  # of the fractions that bounds can have


def exact(value: Any) -> bool:
    """Whether the library can write a constant as it is."""
    if isinstance(value, list):
        return all(map(exact, value))
    if isinstance(value, dict):
        return all(map(exact, value.values()))
    return not isinstance(value, int) or abs(value) <= _MOST


def bounded(value: Any) -> bool:
    """Whether the library can compare with a number."""
    return isinstance(value, int | float) and (value == 0 or _LEAST <= abs(value) <= _MOST)


def divides(value: float) -> bool:
    """Whether the library knows the multiples of a number: of those of 32 bits and up to 20 decimals."""
    with contextlib.suppress(OverflowError):
        scaled = float(abs(value))
        for _ in range(20):
            if scaled.is_integer():
                return 0 < scaled < 1 << 32
            scaled *= 10
    return False

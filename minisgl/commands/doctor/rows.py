"""The rows of `minisgl doctor`, and what its checks share.  Standard library only: it also runs where nothing is installed."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Fact:
    """What a check has found.

    state: "ok"; "absent" (not here, and no fault); "better" (it works, and could work better); "missing" (a feature does not
    work).  means: the consequence; mend: a command.
    """

    found: str
    means: str = ""
    mend: str = ""
    state: str = "ok"


class Missing(Exception):
    """A feature does not work; `mend` is the command that mends it."""

    def __init__(self, found: str, mend: str = "", means: str = "") -> None:
        super().__init__(found)
        self.fact = Fact(found, means, mend, "missing")


@dataclass(frozen=True, slots=True)
class Check:
    """One feature.  needed: without it no model can be served."""

    feature: str
    needed: bool
    look: Callable[[], Fact | str]


@dataclass(frozen=True, slots=True)
class Row:
    """A Fact about a feature, in one line each."""

    feature: str
    state: str
    found: str
    means: str
    mend: str
    needed: bool


def rows_of(checks: Iterable[Check]) -> Iterator[Row]:
    """Carry the checks out.  Whatever one meets becomes its row."""
    for check in checks:
        try:
            fact = check.look()
        except Missing as e:
            fact = e.fact
        except Exception as e:  # also what no check thinks of ends as a row
            fact = Fact(f"{type(e).__name__}: {e}", state="missing")
        if isinstance(fact, str):
            fact = Fact(fact)
        found, means = (" ".join(text.split())[:300] for text in (fact.found, fact.means))
        yield Row(check.feature, fact.state, found, means, fact.mend, check.needed)


def pip(*packages: str) -> str:
    """The command that installs packages into this environment."""
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


def has(module: str) -> bool:
    """Whether a module is installed.  Does not import it."""
    return importlib.util.find_spec(module) is not None


def read(path: str) -> str:
    """A small file of the kernel; "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""

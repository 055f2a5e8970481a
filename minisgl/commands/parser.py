"""The parser of every command: no abbreviations, one line for a mistake, and a proposal for a flag that does not exist.

Standard library only, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from minisgl.commands import other_engines

_GLUED = re.compile(r"-[A-Za-z]\S")  # one dash and several letters: argparse would take -hx for -h


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags are written out, and whose positional arguments may stand between them.

    With `engine`, the flags of vLLM, SGLang and llama.cpp mean the same here where we have the same, and otherwise explain
    themselves; what a command needs not be told is said on stderr.
    """

    def __init__(self, *, engine: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._engine = engine
        self._typed: dict[str, str] = {}  # our flag -> the other engine's flag that was typed

    def parse_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The arguments as a Namespace.  Exits with code 2 and one line about the first mistake."""
        words = list(sys.argv[1:] if args is None else args)
        if self._engine:
            try:
                words, self._typed, notes = other_engines.translate(words, self._own())
            except ValueError as e:
                self.error(str(e))
            for note in notes:
                print(f"{self.prog}: {note}", file=sys.stderr)
        for word in words[: words.index("--")] if "--" in words else words:
            if _GLUED.match(word) and word.partition("=")[0] not in self._own():
                self.error(self._unknown(word))
        found, rest = self.parse_known_intermixed_args(words, namespace)
        if rest:
            self.error(self._unknown(next((word for word in rest if word.startswith("-")), rest[0])))
        return found

    def error(self, message: str) -> NoReturn:
        """One line instead of the usage, which is long; names the flag as it was typed."""
        for ours, typed in self._typed.items():
            if f"{ours}:" in message and ours != typed:
                message += f"; you wrote {typed}"
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` shows all flags)\n")

    def _own(self) -> dict[str, bool]:
        """Our flags, and whether a value follows."""
        return {flag: action.nargs != 0 for action in self._actions for flag in action.option_strings}

    def _unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"unexpected argument {word!r}"
        own = self._own()
        known = {name: name for name in own} | {n: o for n, o in other_engines.SAME.items() if self._engine and o in own}
        begins = [name for name in own if len(flag) > 3 and name.startswith(flag)]
        close = begins or difflib.get_close_matches(flag, known, 1, 0.7)
        return f"unknown flag {flag}" + (f": did you mean {known[close[0]]}?" if close else "")

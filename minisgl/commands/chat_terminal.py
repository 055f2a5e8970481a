"""Reads the messages of the terminal chat and prints answers, thoughts and notes.  Standard library only."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import sys
from pathlib import Path

from minisgl.commands.chat_wrap import Wrap

_CONTROL = {c: None for c in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(c) not in "\n\t"}
_PASTE_SECONDS = 0.02  # nobody types a line in so short a time


def strip_control(text: str) -> str:
    """Text that is safe to print: without control characters (ESC and the C1 introducers among them) but newline and tab."""
    return text.translate(_CONTROL)


class Terminal:
    """Reads messages and prints answers; colours, prompts and line editing only on a terminal."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self._colours = interactive and "NO_COLOR" not in os.environ
        self._bracketed = False  # the terminal marks what is pasted, and readline takes it as one line
        self._thinking = False
        self._wrap: Wrap | None = Wrap() if interactive else None  # of what is streamed now

    def edit_lines(self) -> None:
        """Arrow keys, pasted text as one message, and a history in a file."""
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        path = Path(state, "minisgl", "chat_history")
        with contextlib.suppress(ImportError, OSError):  # a Python without readline, a place that cannot be written
            import readline

            if "libedit" not in (readline.__doc__ or ""):  # it knows neither the setting nor the marks
                readline.parse_and_bind("set enable-bracketed-paste on")
                self._bracketed = True
            readline.set_history_length(1000)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch()
            atexit.register(readline.write_history_file, path)
            readline.read_history_file(path)

    def read(self) -> str | None:
        """The next message; None at the end of the input.

        It has several lines where they end in a backslash, or were pasted together.
        """
        lines: list[str] = []
        while True:
            try:
                line = input(("... " if lines else "> ") if self.interactive else "")
            except EOFError:
                return "\n".join(lines) if lines else None
            if line.endswith("\\"):
                lines.append(line[:-1])
            elif self._more_was_pasted():
                lines.append(line)
            else:
                return "\n".join([*lines, line])

    def _more_was_pasted(self) -> bool:
        """Whether another line is there at once, where the terminal does not mark what is pasted."""
        if not self.interactive or self._bracketed:
            return False
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])

    def write(self, text: str) -> None:
        """A piece of an answer, at once."""
        self.end_thought()
        print(self._wrapped(strip_control(text)), end="", flush=True)

    def end_answer(self) -> None:
        """The answer is whole: print what was kept of it, and end the line."""
        print(self._wrap.end() if self._wrap else "", flush=True)

    def _wrapped(self, text: str) -> str:
        return self._wrap.add(text) if self._wrap else text

    def think(self, text: str) -> None:
        """A piece of a thought: dim, or between marks where there are no colours; apart from the answers like a note."""
        if not self._colours and not self._thinking:
            self._aside(self._wrapped("[thought] "), end="")
        self._thinking = True
        self._aside(self._wrapped(strip_control(text)), end="")

    def end_thought(self) -> None:
        """What comes now is no thought any more."""
        if self._thinking:
            rest = self._wrap.end() if self._wrap else ""
            self._aside(rest if self._colours else f"{rest} [/thought]")
        self._thinking = False

    def note(self, text: str) -> None:
        """A remark about the conversation: dim on a terminal, otherwise on stderr, apart from the answers."""
        self._aside(strip_control(text))

    def _aside(self, text: str, end: str = "\n") -> None:
        text = f"\x1b[2m{text}\x1b[0m" if self._colours and text else text
        print(text, end=end, file=sys.stdout if self.interactive else sys.stderr, flush=True)

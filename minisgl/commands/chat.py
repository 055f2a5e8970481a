"""Runs `python -m minisgl chat`: talks to a running server from a terminal, over its HTTP API.  Standard library only."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

from minisgl.commands.chat_http import ChatError, Server, Usage
from minisgl.commands.parser import Parser

DEFAULT_URL = "http://127.0.0.1:8000"
_HELP = """\
/reset          forget the conversation
/system TEXT    set the system message; without TEXT show it
/history        show the conversation
/exit, /quit    leave (so does ^D)
A backslash at the end of a line continues the message on the next one.  ^C stops an answer."""
_CONTROL = {c: None for c in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(c) not in "\n\t"}


def strip_control(text: str) -> str:
    """Text that is safe to print: without control characters (ESC and the C1 introducers among them) but newline and tab."""
    return text.translate(_CONTROL)


def run(argv: list[str]) -> int:
    """Chat until the end of the input.  Exit code: 0, 1 if there is no server or (without a terminal) an answer failed."""
    args = _parse_args(argv)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        server = Server(args.url)
        model = server.model()
    except ChatError as e:
        print(f"minisgl chat: {e}", file=sys.stderr)
        return 1
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed, "model": args.model}
    terminal = Terminal(interactive)
    chat = Chat(server, {k: v for k, v in options.items() if v is not None}, args.system, terminal)
    if interactive:
        terminal.edit_lines()
        terminal.note(f"{args.model or model} at {args.url}; /help shows the commands")
    try:
        chat.loop()
    except KeyboardInterrupt:
        return 130
    return 1 if chat.failed and not interactive else 0


def _parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="minisgl chat", description="Chat with a running server.", epilog="Type /help inside.")
    parser.add_argument("--url", default=DEFAULT_URL, help="the server (%(default)s)")
    parser.add_argument("--model", help="name of the model; default: the server's")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--seed", type=int, metavar="SEED", help="makes answers repeatable")
    return parser.parse_args(argv)


# ---------------- the terminal
class Terminal:
    """Reads messages and prints answers; colours, prompts and line editing only on a terminal."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self._colours = interactive and "NO_COLOR" not in os.environ

    @staticmethod
    def edit_lines() -> None:
        """Arrow keys, and a history in a file."""
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        path = Path(state, "minisgl", "chat_history")
        with contextlib.suppress(ImportError, OSError):  # a Python without readline, a place that cannot be written
            import readline

            readline.set_history_length(1000)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch()
            atexit.register(readline.write_history_file, path)
            readline.read_history_file(path)

    def read(self) -> str | None:
        """The next message, of several lines where they end in a backslash; None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                line = input(("... " if lines else "> ") if self.interactive else "")
            except EOFError:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def write(self, text: str) -> None:
        """A piece of an answer, at once."""
        print(strip_control(text), end="", flush=True)

    def note(self, text: str) -> None:
        """A remark about the conversation: dim on a terminal, otherwise on stderr, apart from the answers."""
        text = strip_control(text)
        print(
            f"\x1b[2m{text}\x1b[0m" if self._colours else text, file=sys.stdout if self.interactive else sys.stderr, flush=True
        )


# ---------------- the conversation
class Chat:
    """The messages so far, and the commands."""

    def __init__(self, server: Server, options: dict[str, Any], system: str | None, terminal: Terminal) -> None:
        self.messages: list[dict[str, str]] = []
        self.system = system
        self.failed = False
        self._server = server
        self._options = options
        self._terminal = terminal

    def loop(self) -> None:
        """Until the end of the input or /exit."""
        while True:
            try:
                line = self._terminal.read()
            except KeyboardInterrupt:
                if not self._terminal.interactive:
                    raise
                print()
                self._terminal.note("^D or /exit leaves")
                continue
            if line is None:
                if self._terminal.interactive:
                    print()
                return
            word, _, rest = line.strip().partition(" ")
            if word in ("/exit", "/quit"):
                return
            if word.startswith("/") and word[1:].isalpha():
                self._command(word, rest.strip())
            elif line.strip():
                self._turn(line)

    def _command(self, word: str, rest: str) -> None:
        note = self._terminal.note
        if word == "/reset":
            self.messages.clear()
            note("the conversation is forgotten")
        elif word == "/system":
            self.system = rest or self.system
            note(f"system: {self.system or '(none)'}")
        elif word == "/history":
            for message in self._all():
                note(f"{message['role']}: {message['content']}")
        else:
            note(_HELP if word == "/help" else f"there is no command {word}; /help shows those that exist")

    def _all(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def _turn(self, text: str) -> None:
        """One turn.  The received part of an answer that was stopped or cut off stays in the conversation."""
        self.messages.append({"role": "user", "content": text})
        turn = _Turn()
        error = None
        stream = self._server.stream({**self._options, "messages": self._all()})
        try:
            with contextlib.closing(stream):
                for piece in stream:
                    turn.add(piece)
                    if isinstance(piece, str):
                        self._terminal.write(piece)
        except KeyboardInterrupt:
            if not self._terminal.interactive:
                raise
            turn.stopped = True
        except ChatError as e:
            error = str(e)
            self.failed = True
        if turn.text or not (error or turn.stopped):
            print(flush=True)
            self.messages.append({"role": "assistant", "content": turn.text})
            self._terminal.note(turn.summary())
        else:
            self.messages.pop()  # a question without an answer would leave two in a row
        if error:
            self._terminal.note(f"error: {error}")


class _Turn:
    """One answer as it comes in, with its times."""

    def __init__(self) -> None:
        self.text = ""
        self.usage: Usage | None = None
        self.stopped = False
        self._start = time.monotonic()
        self._first = self._last = 0.0

    def add(self, piece: str | Usage) -> None:
        if isinstance(piece, Usage):
            self.usage = piece
            return
        self._last = time.monotonic()
        self._first = self._first or self._last
        self.text += piece

    def summary(self) -> str:
        """Tokens, cached tokens, tokens per second after the first, time to the first."""
        parts = ["stopped"] if self.stopped else []
        if self.usage:
            parts.append(f"{self.usage.prompt} + {self.usage.completion} tokens")
            parts.append(f"{self.usage.cached} cached")
            if self.usage.completion > 1 and self._last > self._first:
                parts.append(f"{(self.usage.completion - 1) / (self._last - self._first):.1f} tok/s")
        if self._first:
            parts.append(f"TTFT {self._first - self._start:.2f} s")
        return f"[{', '.join(parts)}]"

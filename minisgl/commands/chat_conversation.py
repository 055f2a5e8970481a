"""Holds the conversation of the terminal chat: its commands, its turns and what is forgotten.  Standard library only."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Generator
from typing import Any

from minisgl.commands.chat_http import ChatError, Piece, Served, Server, Usage
from minisgl.commands.chat_repeats import Repeats
from minisgl.commands.chat_terminal import Terminal

_COMMAND = re.compile(r"/[a-z]+", re.IGNORECASE)
_OVERFLOW = "context_length_exceeded"
_LOADING_SECONDS = 0.5  # between two questions whether the model is loaded
_HELP = """\
/reset          forget the conversation
/system TEXT    set the system message; without TEXT show it
/system -       have no system message any more (or: /system clear)
/tokens N       the longest answer, in tokens; 0: what the context has left; without N show it
/history        show the conversation
/exit, /quit    leave (so does ^D, and ^C twice)
A pasted text of several lines is one message.  A backslash at the end of a line continues the message on the next one.
^C stops an answer.  When the context is full, the oldest turns are forgotten."""


def default_bound(context: int | None) -> int:
    """The longest answer where the user names none: small models, which have small contexts, often do not find an end."""
    return 1024 if context is None else min(max(1024, context // 8), max(1, context // 2))


class Conversation:
    """The messages so far, and the commands.  `bound`: tokens of the longest answer; 0: what the context has left."""

    def __init__(self, server: Server, served: Served, options: dict[str, Any], system: str | None, terminal: Terminal) -> None:
        self.messages: list[dict[str, str]] = []
        self.system = system
        self.bound = 0
        self.allow_repeats = False
        self.failed = False
        self._server = server
        self._context = served.context
        self._options = options
        self._terminal = terminal

    def loop(self) -> None:
        """Until the end of the input, /exit, or ^C twice at the prompt: the first may have been meant for the answer."""
        leaving = False
        while True:
            try:
                line = self._terminal.read()
            except KeyboardInterrupt:
                if not self._terminal.interactive:
                    raise
                print()
                if leaving:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more is no reason for a traceback at the end
                    return
                leaving = True
                self._terminal.note("^D or /exit leaves, and so does ^C now")
                continue
            leaving = False
            if line is None:
                if self._terminal.interactive:
                    print()
                return
            word, _, rest = line.strip().partition(" ")
            if word in ("/exit", "/quit"):
                return
            if _COMMAND.fullmatch(word) and (word == "/system" or "\n" not in line.strip()):
                self._command(word.lower(), rest.strip())
            elif line.strip():
                self._turn(line)

    # ---------------- commands
    def _command(self, word: str, rest: str) -> None:
        note = self._terminal.note
        if word == "/reset":
            self.messages.clear()
            note("the conversation is forgotten")
        elif word == "/system":
            if rest:
                self.system = None if rest in ("-", "clear") else rest
            note(f"system: {self.system or '(none)'}")
        elif word == "/tokens":
            if rest and not rest.isdecimal():
                note(f"/tokens takes a number, not {rest}")
                return
            self.bound = int(rest or self.bound)
            note(f"longest answer: {f'{self.bound} tokens' if self.bound else 'what the context has left'}")
        elif word == "/history":
            for message in self._all():
                note(f"{message['role']}: {message['content']}")
        else:
            note(_HELP if word == "/help" else f"there is no command {word}; /help shows those that exist")

    def _all(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    # ---------------- turns
    def _turn(self, text: str) -> None:
        """One turn.  The received part of an answer that was stopped or cut off stays in the conversation."""
        self.messages.append({"role": "user", "content": text})
        turn = self._answer_that_fits()
        note = self._terminal.note
        self._terminal.end_thought()
        if turn.text or not (turn.error or turn.stopped or turn.thought):
            self._terminal.end_answer()
            self.messages.append({"role": "assistant", "content": turn.text})
        else:
            self.messages.pop()  # a question without an answer would leave two in a row
        if turn.text or turn.thought or not (turn.error or turn.stopped):
            note(turn.summary())
        if turn.error:
            note(f"error: {turn.error}")
            self.failed = True
        elif turn.in_circles:
            note("stopped: the answer only repeats itself (--allow-repeats lets it go on)")
        elif turn.finish == "length" and not turn.stopped:
            note(self._cut_off(turn))

    def _answer_that_fits(self) -> _Turn:
        """Ask, with less until it fits into the context: a shorter answer, then without the oldest turns, then what is left.

        An answer is shortened to a quarter of its usual bound, not more, while there are turns to forget.  Nothing is forgotten
        for a question that gets no answer in the end.
        """
        bound, forgotten, before = self.bound, 0, list(self.messages)
        usual = default_bound(self._context)
        while True:
            turn = self._answer(bound, forgotten)
            if turn.text or turn.thought or not turn.error:
                return turn
            if turn.code != _OVERFLOW:
                self.messages = before
                return turn
            if bound > usual // 4:
                bound = min(usual, bound // 2)
            elif turns := self._forget():
                forgotten += turns
                bound = min(usual, self.bound)
            elif bound:
                bound = 0
            else:
                more = " and the system message (/system - removes it)" if self.system else ""
                turn.error = f"this message{more} is too long for the context; a shorter one may fit. {turn.error}"
                self.messages = before
                return turn

    def _forget(self) -> int:
        """Forget the oldest turns, an eighth of the conversation but never the open question.  Returns how many."""
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        enough = sum(len(m["content"]) for m in self.messages) // 8
        turns = gone = 0
        while turns + 1 < len(starts) and (turns == 0 or gone < enough):
            gone += sum(len(m["content"]) for m in self.messages[starts[turns] : starts[turns + 1]])
            turns += 1
        del self.messages[: starts[turns]]
        return turns

    def _answer(self, bound: int, forgotten: int) -> _Turn:
        """Ask once and show the answer as it comes."""
        turn = _Turn(bound)
        body = {**self._options, **({"max_tokens": bound} if bound else {}), "messages": self._all()}
        try:
            with contextlib.closing(self._stream(body)) as stream:
                for piece in stream:
                    if forgotten:
                        count = "the oldest turn" if forgotten == 1 else f"the oldest {forgotten} turns"
                        self._terminal.note(f"the context was full: {count} of the conversation had to be forgotten")
                        forgotten = 0
                    turn.add(piece)
                    if piece.thought:
                        self._terminal.think(piece.thought)
                    if piece.text:
                        self._terminal.write(piece.text)
                    if not self.allow_repeats and turn.repeats(piece):
                        break
        except KeyboardInterrupt:
            if not self._terminal.interactive:
                raise
            turn.stopped = True
        except ChatError as e:
            turn.error, turn.code = str(e), e.code
        return turn

    def _stream(self, body: dict[str, Any]) -> Generator[Piece, None, None]:
        """The pieces of an answer, as soon as the model is loaded.  Raises ChatError."""
        waits = False
        while True:
            try:
                yield from self._server.stream(body)
                return
            except ChatError as e:
                if e.code != "model_loading":
                    raise
            if not waits:
                self._terminal.note("the model is still being loaded; the answer comes when it is")
            waits = True
            time.sleep(_LOADING_SECONDS)

    def _cut_off(self, turn: _Turn) -> str:
        """What to say of an answer that is longer than it may be."""
        tokens = turn.usage.completion if turn.usage else 0
        if turn.bound != self.bound or (self._context and turn.usage and turn.usage.prompt + tokens >= self._context):
            size = f" of {self._context} tokens" if self._context else ""
            return (
                f'cut off: the context{size} is full. "go on" or another message makes room by forgetting the oldest turns; '
                "/reset forgets all"
            )
        where = f"after {tokens} tokens" if tokens else "at the longest answer"
        more = f"/tokens {2 * max(tokens, self.bound)} (or --max-tokens) allows longer answers"
        if not turn.text:
            return f"cut off {where}, in the middle of a thought: {more}; then ask again"
        return f'cut off {where}: say "go on" for the rest; {more}'


class _Turn:
    """One answer as it comes in, with its times."""

    def __init__(self, bound: int) -> None:
        self.bound = bound  # tokens that it may have; 0: what the context has left
        self.text = self.thought = self.finish = self.error = self.code = ""
        self.usage: Usage | None = None
        self.stopped = self.in_circles = False
        self._in_text, self._in_thought = Repeats(), Repeats()
        self._start = time.monotonic()
        self._first = self._last = 0.0

    def add(self, piece: Piece) -> None:
        self.usage = piece.usage or self.usage
        self.finish = piece.finish or self.finish
        if piece.text or piece.thought:
            self._last = time.monotonic()
            self._first = self._first or self._last
            self.text += piece.text
            self.thought += piece.thought

    def repeats(self, piece: Piece) -> bool:
        """Whether the answer goes in circles since this piece, or the thought; the text then loses what says nothing new."""
        surplus = self._in_text.add(piece.text)
        self.text = self.text[: len(self.text) - surplus]
        self.in_circles = bool(surplus or self._in_thought.add(piece.thought))
        return self.in_circles

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

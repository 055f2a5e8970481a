"""Distributes prompts over the tokenizer actors, by load.  Runs in the api process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minisgl.actors.messages import Detokenize, Tokenize, Wake
from minisgl.actors.runtime.actor import Context
from minisgl.actors.runtime.ring import RingReader, RingSpec
from minisgl.actors.runtime.shared_memory import tokenizer_names
from minisgl.actors.wire import BadMessage
from minisgl.api.engine import ChatPrompt, TextPrompt
from minisgl.arrays import I32
from minisgl.errors import InvalidParam, context_overflow

CHARS_PER_TOKEN = 8  # a prompt longer than this many characters per token of context is refused before it is tokenized


@dataclass(slots=True, eq=False)
class _Tokenizer:
    name: str
    ring: RingReader
    load: int = 0  # characters of the prompts that it is reading


class Tokenizers:
    """Sends each prompt to the tokenizer with the smallest load, and takes the token ids from its ring."""

    def __init__(self, ctx: Context, rings: tuple[RingSpec, ...], max_context: int) -> None:
        self._ctx = ctx
        self._max_context = max_context
        self._all = [_Tokenizer(n, RingReader(r)) for n, r in zip(tokenizer_names(len(rings)), rings, strict=True)]
        self._reading: dict[int, tuple[_Tokenizer, int]] = {}  # uid -> the tokenizer that reads its prompt, characters

    @property
    def loads(self) -> list[int]:
        """Characters that each tokenizer is reading."""
        return [t.load for t in self._all]

    def send(self, uid: int, prompt: TextPrompt | ChatPrompt, source: str, reasoning: str = "") -> None:
        """Have a prompt tokenized; `take` or `drop` must follow.  `source`: the request field that holds the prompt.

        `reasoning`: the style of thoughts to look for at the end of a conversation.

        Raises RequestError if the prompt is far too long, or not valid text.
        """
        size = len(prompt.text) if isinstance(prompt, TextPrompt) else len(prompt.payload)
        if not prompt.keep and size > CHARS_PER_TOKEN * self._max_context + 4096:
            raise context_overflow(
                source, self._max_context, f"more than {size // CHARS_PER_TOKEN}", f"{size} characters in the {source}"
            )
        to = self._idlest()
        try:
            if isinstance(prompt, TextPrompt):
                self._ctx.send(to.name, Tokenize(uid, prompt.text, None, prompt.add_special, prompt.keep))
            else:
                self._ctx.send(to.name, Tokenize(uid, None, prompt.payload, False, prompt.keep, reasoning=reasoning))
        except UnicodeEncodeError as e:
            raise InvalidParam(source, f"{source} holds half of a surrogate pair, which is not text.") from e
        self._reading[uid] = to, size
        to.load += size

    def send_ids(self, uid: int, ids: I32, skip_special: bool) -> None:
        """Have the text of token ids made."""
        self._ctx.send(self._idlest().name, Detokenize(uid, ids, skip_special))

    def take(self, uid: int, n: int) -> I32:
        """The `n` ids that a Tokenized message announces: the next record in its sender's ring.  Raises BadMessage."""
        if uid not in self._reading:
            raise BadMessage(f"no tokenizer is reading the prompt of request {uid}")
        by, _ = self._reading[uid]
        ids = np.frombuffer(by.ring.take_now(4 * n), np.int32)
        self._answered(uid)
        if by.ring.starved():
            self._ctx.send(by.name, Wake())
        return ids

    def drop(self, uid: int) -> None:
        """Forget a prompt that its tokenizer has refused.  Does nothing for other requests."""
        self._answered(uid)

    def _idlest(self) -> _Tokenizer:
        return min(self._all, key=lambda t: t.load)

    def _answered(self, uid: int) -> _Tokenizer | None:
        by, size = self._reading.pop(uid, (None, 0))
        if by is not None:
            by.load -= size
        return by

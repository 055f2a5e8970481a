"""Distributes prompts over the tokenizer actors, by load.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
MAX_DEATHS = 3  # of a tokenizer over one prompt, which is refused then


@dataclass(slots=True, eq=False)
class _Tokenizer:
    name: str
    ring: RingReader
    load: int = 0  # characters of the prompts that it is reading
    records: dict[int, I32] = field(default_factory=dict)  # taken from the ring before their messages came


@dataclass(slots=True, eq=False)
class _Job:
    """A message that a tokenizer has not answered."""

    uid: int
    by: _Tokenizer
    message: Tokenize | Detokenize
    size: int
    deaths: int = 0  # of tokenizers whose next job it was


class Tokenizers:
    """Sends each prompt to the tokenizer with the smallest load, and takes the token ids from its ring.

    A job has a name on the wire that `new_name` gives, the uid of its request at first.  If its tokenizer dies it is sent again
    under another name, so that late answers of the dead one are not mistaken for those of the next.
    """

    def __init__(self, ctx: Context, rings: tuple[RingSpec, ...], max_context: int, new_name: Callable[[], int]) -> None:
        self._ctx = ctx
        self._max_context = max_context
        self._new_name = new_name
        self._all = [_Tokenizer(n, RingReader(r)) for n, r in zip(tokenizer_names(len(rings)), rings, strict=True)]
        self._jobs: dict[int, _Job] = {}  # by name, in the order in which they were sent

    @property
    def loads(self) -> list[int]:
        """Characters that each tokenizer is reading."""
        return [t.load for t in self._all]

    def __len__(self) -> int:
        return len(self._jobs)

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
        if isinstance(prompt, TextPrompt):
            message = Tokenize(uid, prompt.text, None, prompt.add_special, prompt.keep)
        else:
            message = Tokenize(uid, None, prompt.payload, False, prompt.keep, reasoning=reasoning)
        try:
            self._give(_Job(uid, self._idlest(), message, size))
        except UnicodeEncodeError as e:
            raise InvalidParam(source, f"{source} holds half of a surrogate pair, which is not text.") from e

    def send_ids(self, uid: int, ids: I32, skip_special: bool) -> None:
        """Have the text of token ids made; `drop` must follow."""
        self._give(_Job(uid, self._idlest(), Detokenize(uid, ids, skip_special), len(ids)))

    def take(self, name: int, n: int) -> tuple[int, I32] | None:
        """The uid and the `n` ids that a Tokenized message announces; None if it comes from a tokenizer that has died.

        Raises BadMessage if there is no such record.
        """
        if (job := self._jobs.get(name)) is None:
            return None
        by = job.by
        while name not in by.records:  # those before it belong to messages that come later, or were lost
            record = by.ring.take_now()
            if (whose := int.from_bytes(record[:8], "little")) in self._jobs:
                by.records[whose] = np.frombuffer(record, np.int32, offset=8)
        if len(by.records[name]) != n:
            raise BadMessage(f"the prompt of request {name} has {len(by.records[name])} tokens, not {n}")
        self._done(name)
        if by.ring.starved():
            self._ctx.send(by.name, Wake())
        return job.uid, by.records.pop(name)

    def drop(self, name: int) -> int | None:
        """The uid of a job that has been answered without ids; None if there is no such job."""
        return None if (job := self._done(name)) is None else job.uid

    def resend(self, name: str, started: bool) -> list[int]:
        """The tokenizer `name` has died; its successor gets what it had to do, except for requests that kill tokenizers.

        `started`: it took messages, and was not killed from outside.  Returns the uids of those requests.  Nothing of the dead
        one may be read afterwards.
        """
        by = next(t for t in self._all if t.name == name)
        by.records.clear()
        while by.ring.take() is not None:
            pass
        jobs = {k: job for k, job in self._jobs.items() if job.by is by}
        poison = []
        for at, (old, job) in enumerate(jobs.items()):
            self._done(old)
            job.deaths += at == 0 and started
            if job.deaths >= MAX_DEATHS:
                poison.append(job.uid)
            else:
                self._give(job, self._new_name())
        return poison

    def _give(self, job: _Job, name: int | None = None) -> None:
        if name is not None:
            job.message = replace(job.message, uid=name)
        self._ctx.send(job.by.name, job.message)
        self._jobs[job.message.uid] = job
        job.by.load += job.size

    def _idlest(self) -> _Tokenizer:
        return min(self._all, key=lambda t: t.load)

    def _done(self, name: int) -> _Job | None:
        if (job := self._jobs.pop(name, None)) is not None:
            job.by.load -= job.size
        return job

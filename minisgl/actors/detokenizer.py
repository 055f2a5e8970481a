"""The detokenizer actor.

Owns      for every running request: the half-finished character and the half-finished stop string at the end of its text.
Receives  Track, Tokens (scheduler).
Sends     Text (api), one per Tokens; Cancel (scheduler), when a stop string was found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minisgl.actors.actor import Actor, Context, on
from minisgl.actors.messages import Cancel, Text, Tokens, Track
from minisgl.config import Config
from minisgl.model.detokenize import DecodeState, StopMatcher
from minisgl.model.tokenizer import Tokenizer, load_tokenizer
from minisgl.types import Finish


@dataclass(slots=True, eq=False)
class _Stream:
    """The text of one request as it grows.  After a stop string it only waits for its end."""

    decode: DecodeState
    stops: StopMatcher
    n_cached: int


class DetokenizerActor(Actor):
    """Every token is looked up once; nothing of a stop string ever leaves."""

    def __init__(self, ctx: Context, config: Config) -> None:
        super().__init__(ctx)
        self.config = config
        self._tokenizer: Tokenizer | None = None
        self._streams: dict[int, _Stream] = {}

    def started(self) -> None:
        self._tokenizer = load_tokenizer(self.config.model)
        self._tokenizer.stream(skip_special=True)  # builds the table of tokens now, not during the first request

    @on(Track)
    def track(self, m: Track) -> None:
        if self._tokenizer is None:
            raise RuntimeError("the tokenizer is not loaded yet")
        self._streams[m.uid] = _Stream(self._tokenizer.stream(m.skip_special), StopMatcher(m.stop), m.n_cached)

    @on(Tokens)
    def tokens(self, m: Tokens) -> None:
        rows: list[tuple[int, int, int, int, str]] = []  # uid, count, finish, cached, text
        kept: list[int] = []
        at, tokens = 0, m.tokens.tolist()
        for uid, count, finish in zip(m.uids.tolist(), m.counts.tolist(), m.finish.tolist(), strict=True):
            new = tokens[at : at + count]
            at += count
            stream = self._streams.get(uid)
            if stream is None:
                if finish:  # it ended before it was started: its deadline passed in the queue
                    rows.append((uid, 0, finish, 0, ""))
                continue
            if finish:
                del self._streams[uid]
            if stream.stops.matched:  # api has had the end of this request
                continue
            text, end = _advance(stream, new, finish)
            if end and not finish:
                self.ctx.send("scheduler", Cancel(uid))
            rows.append((uid, count, end, stream.n_cached, text))
            kept.extend(new)
        if rows:
            uids, counts, ends, cached, texts = zip(*rows, strict=True)
            self.ctx.send(
                "api",
                Text(
                    np.array(uids, np.int64),
                    np.array(counts, np.uint8),
                    np.array(kept, np.int32),
                    np.array(ends, np.uint8),
                    np.array(cached, np.int32),
                    texts,
                ),
            )


def _advance(stream: _Stream, tokens: list[int], finish: int) -> tuple[str, int]:
    """(text that may be shown, how the request ends or 0) after the new tokens of one step.

    The last token of a request that ends with STOP is the EOS or stop token: it counts, but it has no text.
    """
    text = "".join(map(stream.decode.push, tokens[:-1] if finish == Finish.STOP else tokens))
    if finish:
        text += stream.decode.flush()
    text, matched = stream.stops.feed(text)
    if finish and not matched:
        rest, matched = stream.stops.flush()
        text += rest
    return text, Finish.STOP if matched else finish

"""The detokenizer actor.

Owns      for every running request: the half-finished character and the half-finished stop string at the end of its text,
          log probabilities of tokens that have not come yet, and the length of its thought, where the model writes such.
Receives  Track, Scores, Tokens (scheduler).
Sends     Started (api), one per Track; Text (api), one per Tokens; Logprobs (api), for requests that want them; ThoughtEnded
          (api), where there was one; Cancel (scheduler), when a stop string was found.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from minisgl.actors.messages import Cancel, Logprobs, Started, Text, ThoughtEnded, TokenLogprobs, Tokens, Track
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.config import Config
from minisgl.model.text.detokenize import DecodeState, StopMatcher
from minisgl.model.text.tokenizer import Tokenizer, load_tokenizer
from minisgl.reasoning import ThoughtCounter
from minisgl.sampling_params import Finish, SamplingParams


@dataclass(frozen=True, slots=True)
class _Score:
    """A token, its log probability, and its alternatives, most likely first."""

    token: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True, eq=False)
class _Stream:
    """The text of one request as it grows.  After a stop string it only waits for its end."""

    decode: DecodeState
    stops: StopMatcher
    n_cached: int
    params: SamplingParams
    free: int  # tokens to come in which no stop string is looked for
    chars: int = 0  # of its text so far, the prompt's included if that is shown
    prefix: str = ""  # the prompt, until it has been shown
    offsets: list[int] = field(default_factory=list)  # where the prompt's tokens begin, if they are to be scored
    scored: int = 0  # tokens of the prompt whose log probabilities have been told
    scores: deque[_Score] = field(default_factory=deque)  # of tokens that come with the next Tokens
    thought: ThoughtCounter | None = None  # while it may go on

    def push(self, token: int) -> str:
        text = self.decode.push(token)
        self.chars += len(text)
        if self.thought is not None:
            self.thought.feed(text)
        return text


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

    def _loaded(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RuntimeError("the tokenizer is not loaded yet")
        return self._tokenizer

    @on(Track)
    def track(self, m: Track) -> None:
        tokenizer, p = self._loaded(), m.params
        stream = _Stream(tokenizer.stream(p.skip_special_tokens), StopMatcher(p.stop), m.n_cached, p, p.min_tokens)
        self._streams[m.uid] = stream
        self.ctx.send("api", Started(m.uid, m.queued))
        if not p.echo:
            if style := self.config.server.reasoning_parser:
                stream.thought = ThoughtCounter(style)
            return
        pieces = []
        for token in m.prompt.tolist():
            stream.offsets.append(stream.chars)
            pieces.append(stream.push(token))
        stream.prefix = "".join(pieces)
        if tokenizer.strips_space and stream.prefix.startswith(" "):
            stream.prefix, stream.chars = stream.prefix[1:], stream.chars - 1
            stream.offsets = [max(0, at - 1) for at in stream.offsets]
        if p.logprobs is not None:
            report = _Report()
            report.add(m.uid, 0, _Score(int(m.prompt[0]), float("nan"), [], []))
            stream.scored = 1
            self.ctx.send("api", report.message(tokenizer))

    @on(TokenLogprobs)
    def scores(self, m: TokenLogprobs) -> None:
        report, at = _Report(), 0
        ids, values = m.top_ids.tolist(), m.top_logprobs.tolist()
        rows = (m.uids.tolist(), m.drawn.tolist(), m.tokens.tolist(), m.logprobs.tolist(), m.widths.tolist())
        for uid, drawn, token, logprob, width in zip(*rows, strict=True):
            score = _Score(token, logprob, ids[at : at + width], values[at : at + width])
            at += width
            stream = self._streams.get(uid)
            if stream is None or stream.stops.matched:
                continue
            if drawn:
                stream.scores.append(score)
            else:
                report.add(uid, stream.offsets[stream.scored], score)
                stream.scored += 1
        if report:
            self.ctx.send("api", report.message(self._loaded()))

    @on(Tokens)
    def tokens(self, m: Tokens) -> None:
        rows: list[tuple[int, int, int, int, str]] = []  # uid, count, finish, cached, text
        kept: list[int] = []
        report = _Report()
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
            if stream.params.max_tokens == 0 and new:  # the prompt alone was wanted: what it was continued with is not told
                rows.append((uid, 0, Finish.LENGTH, stream.n_cached, stream.prefix))
                continue
            if stream.scores and new:
                report.add(uid, stream.chars, stream.scores.popleft())
            text, end = _advance(stream, new, finish)
            if end and not finish:
                self.ctx.send("scheduler", Cancel(uid))
            if stream.thought is not None and (end or stream.thought.done):
                if n := stream.thought.count():
                    self.ctx.send("api", ThoughtEnded(uid, n))
                stream.thought = None
            rows.append((uid, count, end, stream.n_cached, text))
            kept.extend(new)
        if report:
            self.ctx.send("api", report.message(self._loaded()))
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
    text = "".join(map(stream.push, tokens[:-1] if finish == Finish.STOP else tokens))
    if finish:
        text += stream.decode.flush()
    prefix, stream.prefix = stream.prefix, ""
    if stream.free > 0:
        stream.free -= len(tokens)
        return prefix + text, finish
    text, matched = stream.stops.feed(text)
    if finish and not matched:
        rest, matched = stream.stops.flush()
        text += rest
    return prefix + text, Finish.STOP if matched else finish


class _Report:
    """A Logprobs message while it is being put together."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, _Score]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, uid: int, offset: int, score: _Score) -> None:
        self._rows.append((uid, offset, score))

    def message(self, tokenizer: Tokenizer) -> Logprobs:
        uids, offsets, scores = zip(*self._rows, strict=True)
        tops = [t for s in scores for t in s.top_ids]
        pieces = [tokenizer.piece(t) for s in scores for t in (s.token, *s.top_ids)]
        return Logprobs(
            np.array(uids, np.int64),
            np.array([s.token for s in scores], np.int32),
            np.array(offsets, np.int32),
            np.array([s.logprob for s in scores], np.float32),
            np.array([len(s.top_ids) for s in scores], np.uint8),
            np.array(tops, np.int32),
            np.array([x for s in scores for x in s.top_logprobs], np.float32),
            np.array([len(p) for p in pieces], np.int32),
            b"".join(pieces),
        )

"""Turns sampled tokens into text: whole characters only, and nothing of a stop string.  One detokenizer process per run.

Owns      for every running request: the incomplete character and the possible beginning of a stop string at the end of its
          text, log probabilities of tokens that have not come yet, and where its thoughts and tool calls are, if they are told
          apart.
Receives  Track, TokenLogprobs, Tokens (scheduler); Forget (api).
Sends     Started (api), one per Track; Text (api), one per Tokens; Logprobs (api), for requests with log probabilities;
          ThoughtEnded (api), one per thought; Cancel (scheduler), when a stop string was found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minisgl.actors.messages import Cancel, Forget, Logprobs, Started, Text, ThoughtEnded, TokenLogprobs, Tokens, Track
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.wire import BadMessage
from minisgl.api.parsers.outline import Outline, marks
from minisgl.config import Config
from minisgl.model.text.detokenize import DecodeState, StopMatcher
from minisgl.model.text.tokenizer import Tokenizer, load_tokenizer
from minisgl.sampling_params import Finish, SamplingParams


class _Score(NamedTuple):
    """A token, its log probability, and its alternatives, most likely first."""

    token: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


_Row = tuple[int, list[int], int, int, str]  # a row of Text: uid, tokens, finish, cached tokens, text
_Report = list[tuple[int, int, _Score]]  # uid, offset of the token's text, score: the rows of a Logprobs


@dataclass(slots=True, eq=False)
class _Stream:
    """The text of one request as it grows.  After a stop string, it only waits for its end."""

    decode: DecodeState
    stops: StopMatcher
    n_cached: int
    params: SamplingParams
    n_free: int  # tokens to come in which stop strings are ignored (min_tokens)
    chars: int = 0  # length of its text so far, with the prompt under `echo`
    prefix: str = ""  # the prompt, until it has been sent
    offsets: list[int] = field(default_factory=list)  # where the prompt's tokens begin, under `echo`
    n_scored: int = 0  # tokens of the prompt whose log probabilities have been sent
    scores: deque[_Score] = field(default_factory=deque)  # of tokens that come with the next Tokens
    outline: Outline | None = None  # of its thoughts and tool calls, while they matter
    counting: bool = False  # the tokens of its thoughts have not been told

    def push(self, token: int) -> str:
        text = self.decode.push(token)
        self.chars += len(text)
        return text

    def advance(self, tokens: list[int], finish: int) -> tuple[str, int]:
        """(text to send, finish) after the new tokens of one step; a stop string makes `finish` STOP.

        The last token of a request that ends with STOP is the EOS or stop token: it counts, but it has no text.
        """
        new = tokens[:-1] if finish == Finish.STOP else tokens
        prefix, self.prefix = self.prefix, ""
        free = self.n_free > 0
        if free:
            self.n_free -= len(tokens)
        if self.outline is not None:
            text, matched = self._outlined(self.outline, new, finish, free)
        else:
            text = "".join(map(self.push, new))
            if finish:
                text += self.decode.flush()
            text, matched = (text, False) if free else self.stops.feed(text)
        if finish and not matched:
            rest, matched = self.stops.flush()
            text += rest
        return prefix + text, Finish.STOP if matched else finish

    def _outlined(self, outline: Outline, new: list[int], finish: int, free: bool) -> tuple[str, bool]:
        """(text to send, whether a stop string was found) where they do not count everywhere, and nowhere if `free`."""
        parts = [part for token in new for part in outline.feed(self.push(token))]
        if finish:
            parts += outline.end(self.decode.flush())
        out, matched = "", False
        for counts, text in parts:
            # A stop string does not go on behind a part in which it does not count.
            shown, matched = self.stops.feed(text) if counts and not free else self.stops.flush()
            out += shown if matched or (counts and not free) else shown + text
            if matched:
                break
        return out, matched


class DetokenizerActor(Actor):
    """Looks every token up once."""

    _tokenizer: Tokenizer

    def __init__(self, ctx: Context, config: Config) -> None:
        super().__init__(ctx)
        self.config = config
        self._streams: dict[int, _Stream] = {}
        self._oldest = 0  # requests with smaller uids are forgotten

    def started(self) -> None:
        self._tokenizer = load_tokenizer(self.config.model)
        self._tokenizer.stream(skip_special=True)  # builds the table of tokens now, not during the first request

    @on(Forget)
    def forget(self, m: Forget) -> None:
        """Drop the requests before a restart, of the scheduler or of this process; some of their messages may still come."""
        self.ctx.forget("scheduler")
        self._oldest = m.below
        self._streams = {uid: stream for uid, stream in self._streams.items() if uid >= m.below}

    @on(Track)
    def track(self, m: Track) -> None:
        if m.uid < self._oldest:
            return
        p = m.params
        decode = self._tokenizer.stream(p.skip_special_tokens, marks(p.reasoning, p.tools))
        stream = _Stream(decode, StopMatcher(p.stop), m.n_cached, p, p.min_tokens)
        self._streams[m.uid] = stream
        self.ctx.send("api", Started(m.uid, m.queued))
        if p.echo:
            self._echo(m, stream)
        elif p.reasoning or (p.stop and p.tools):
            stream.outline = Outline(p.reasoning, p.thinking, p.tools if p.stop else "")
            stream.counting = p.reasoning != ""
        for token in m.said.tolist():  # the text of these tokens was sent; what follows depends on them
            self._advance(m.uid, [token], 0, [])

    def _echo(self, m: Track, stream: _Stream) -> None:
        """Begin the text with the prompt."""
        pieces = []
        for token in m.prompt.tolist():
            stream.offsets.append(stream.chars)
            pieces.append(stream.push(token))
        first = next((i for i, piece in enumerate(pieces) if piece), 0)
        dropped = len(pieces[first]) - len(opening := self._tokenizer.opening(int(m.prompt[first]), pieces[first]))
        stream.prefix = "".join([opening, *pieces[first + 1 :]])
        stream.chars -= dropped
        stream.offsets = [max(0, at - dropped) for at in stream.offsets]
        if m.params.logprobs is not None and not len(m.said):
            stream.n_scored = 1
            self._send_logprobs([(m.uid, 0, _Score(int(m.prompt[0]), float("nan"), [], []))])

    @on(TokenLogprobs)
    def scores(self, m: TokenLogprobs) -> None:
        report: _Report = []
        at, ids, values = 0, m.top_ids.tolist(), m.top_logprobs.tolist()
        rows = (m.uids.tolist(), m.drawn.tolist(), m.tokens.tolist(), m.logprobs.tolist(), m.widths.tolist())
        for uid, drawn, token, logprob, width in zip(*rows, strict=True):
            score = _Score(token, logprob, ids[at : at + width], values[at : at + width])
            at += width
            stream = self._streams.get(uid)
            if stream is None or stream.stops.matched:
                continue
            if drawn:
                stream.scores.append(score)
            elif stream.n_scored >= len(stream.offsets):
                raise BadMessage(f"a score of a token that the prompt of request {uid} does not have")
            else:
                report.append((uid, stream.offsets[stream.n_scored], score))
                stream.n_scored += 1
        self._send_logprobs(report)

    @on(Tokens)
    def tokens(self, m: Tokens) -> None:
        rows: list[_Row] = []
        report: _Report = []
        at, tokens = 0, m.tokens.tolist()
        for uid, count, finish in zip(m.uids.tolist(), m.counts.tolist(), m.finish.tolist(), strict=True):
            if (row := self._advance(uid, tokens[at : at + count], finish, report)) is not None:
                rows.append(row)
            at += count
        self._send_logprobs(report)
        if rows:
            self.ctx.send("api", _text(rows))

    def _advance(self, uid: int, new: list[int], finish: int, report: _Report) -> _Row | None:
        """The text of one request after a step; None: there is nothing to send."""
        stream = self._streams.get(uid)
        if stream is None:  # it was cancelled in the queue, before any Track
            return (uid, [], finish, 0, "") if finish else None
        if finish:
            del self._streams[uid]
        if stream.stops.matched:  # its end has been sent
            return None
        if stream.params.max_tokens == 0 and new:  # only the prompt is sent, not the token drawn after it
            return (uid, [], Finish.LENGTH, stream.n_cached, stream.prefix)
        if stream.scores and new:
            report.append((uid, stream.chars, stream.scores.popleft()))
        text, end = stream.advance(new, finish)
        if end and not finish:
            self.ctx.send("scheduler", Cancel(uid))
        if stream.outline is not None:
            if stream.counting and (end or stream.outline.thought_over):
                stream.counting = False
                if n := stream.outline.thought_tokens:
                    self.ctx.send("api", ThoughtEnded(uid, n))
            if stream.outline.over:
                stream.outline = None
        return (uid, new, end, stream.n_cached, text)

    def _send_logprobs(self, report: _Report) -> None:
        if report:
            self.ctx.send("api", _logprobs(report, self._tokenizer))


def _text(rows: Sequence[_Row]) -> Text:
    uids, tokens, ends, cached, texts = zip(*rows, strict=True)
    return Text(
        np.array(uids, np.int64),
        np.array([len(new) for new in tokens], np.uint8),
        np.array([token for new in tokens for token in new], np.int32),
        np.array(ends, np.uint8),
        np.array(cached, np.int32),
        texts,
    )


def _logprobs(report: _Report, tokenizer: Tokenizer) -> Logprobs:
    uids, offsets, scores = zip(*report, strict=True)
    tokens, logprobs, top_ids, top_logprobs = zip(*scores, strict=True)
    pieces = [tokenizer.piece(t) for s in scores for t in (s.token, *s.top_ids)]
    return Logprobs(
        np.array(uids, np.int64),
        np.array(tokens, np.int32),
        np.array(offsets, np.int32),
        np.array(logprobs, np.float32),
        np.array([len(top) for top in top_ids], np.uint8),
        np.array([t for top in top_ids for t in top], np.int32),
        np.array([x for top in top_logprobs for x in top], np.float32),
        np.array([len(p) for p in pieces], np.int32),
        b"".join(pieces),
    )

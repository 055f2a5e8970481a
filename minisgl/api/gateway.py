"""Keeps the ledger of open requests and passes them between clients and the engine: the actor named "api".

Owns      the ledger: for every open request its prompt ids, parameters, seed and the tokens already delivered.  If any other
          actor dies, recovery.py starts another, and the request is replayed: it goes on behind prompt + delivered tokens.
Receives  Hello, Stopped, Failed (every actor); EngineReady, Rejected, Embedded, Evicted, Journaled, JournalBytes, Wake
          (scheduler); Tokenized, Detokenized, TokenizerInfo, Rejected (tokenizer); GrammarChecked, Rejected (checker);
          Started, Text, Logprobs, ThoughtEnded (detokenizer).
Sends     Tokenize, Detokenize, Wake (tokenizer); CheckGrammar (checker); Generate, Cancel, FlushCache, Journal (scheduler);
          Forget (detokenizer); Stop (all but the workers).

Runs in the api process; `open` and `close` are called by the HTTP routes, the batch socket and the LLM class on the same
thread.
"""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter, deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import minisgl.actors.messages as msg
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.ring import RingSpec, RingWriter
from minisgl.actors.runtime.shared_memory import Arenas, actor_names
from minisgl.actors.wire import BadMessage
from minisgl.api.admission import AdmissionControl
from minisgl.api.cache_reasons import CacheReasons, Recollection
from minisgl.api.deadlines import Deadlines
from minisgl.api.engine import ChatPrompt, Chunk, Kept, OnChunk, OnIds, OnText, Prompt, TextPrompt, TokenLogprob, TokenPrompt
from minisgl.api.journals import Journals
from minisgl.api.tokenizer_pool import MAX_DEATHS, Tokenizers
from minisgl.api.trials import Trials
from minisgl.api.watchdog import Watchdog
from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError, context_overflow, model_loading
from minisgl.grammar import after_thought, too_complex
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams

_UNFINISHED = Finish.NONE  # looked up once: the lookup of an enumeration's member costs more than the rest of a row
IMPOSSIBLE = -9999.0  # for minus infinity, which JSON lacks; OpenAI and vLLM write the same number
_TICK_SECONDS = 0.5  # between two looks at the clock while nothing is due
_AT_ONCE = 256  # requests that end by their deadlines in one tick
_MIX = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: consecutive uids become distant seeds


@dataclass(slots=True, eq=False)
class Entry:
    """One open request."""

    uid: int
    params: SamplingParams
    options: RequestOptions
    on_chunk: OnChunk
    source: str  # the request field that holds the prompt, for error messages
    ids: I32 | None = None  # prompt ids, known once tokenized
    max_tokens: int = 0
    seed: int = 0
    name: int = 0  # its uid on the way through the engine, another one for each replay; 0: it is not there
    fresh: bool = True  # it never was
    started: bool = False  # under this name
    cached: int = 0  # tokens of the prompt that the cache had
    shape: bytes = b""  # of a conversation, see Tokenized
    known: Recollection | None = None  # of its prompt
    heard: bool = False  # that its prompt is computed
    deaths: int = 0  # see trials.py
    said_at_death: int = 0
    queued: float = 0.0  # seconds of waiting for the first step
    thought_tokens: int = 0  # tokens of the thought, once it has ended
    delivered: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the tokens in the next Text message


class Gateway(Actor):
    """The actor "api".  Implements the `Engine` protocol of minisgl.api.engine."""

    def __init__(self, ctx: Context, config: Config, arenas: Arenas) -> None:
        super().__init__(ctx)
        self.config = config
        self.kept = Kept()
        self.num_pages = 0
        self.failure: str | None = None  # why the engine has failed, as a sentence for the operator
        self.crashed = False  # it has failed because processes died, not because it could not start
        self.stats: dict[str, int] = {}  # of the scheduler, at most a second old while it works
        self.tokenizer_info: dict[str, Any] = {}
        self.state = "starting"
        self.pids: dict[str, int] = {}  # of the processes that live; messages of others with the same name are late
        self.silent = set(actor_names(config.engine.tp, config.server.num_tokenizers))  # actors without a Hello so far
        self.hellos: dict[str, msg.Hello] = {}
        self.engine_up = False  # the scheduler takes requests
        self.engine_up_at = self.resumed = 0.0  # since when, and when the first request was started since the last death
        self.watchdog = Watchdog(arenas.board)
        self.journals = Journals(ctx, config.server)
        self.cache_reasons = CacheReasons(config)
        self.restarts: Counter[str] = Counter()  # by process
        self._tokenizers = Tokenizers(ctx, arenas.prompts, config.max_context, self._new_uid)
        self._requests = RingWriter(arenas.requests)
        self._ledger: dict[int, Entry] = {}
        self._sent: dict[int, Entry] = {}  # the requests that are with the engine, by name
        # Of `tokenize`, `detokenize` and `check_grammar`, by uid: the callback, and the request field that is asked about.
        self._questions: dict[int, tuple[Callable[[Any], None], str]] = {}
        self._grammars: dict[int, msg.CheckGrammar] = {}  # that the checker has not answered
        self._deaths = (0, 0)  # the grammar that was the next one when a checker died, and how often in a row
        self._backlog: deque[Entry] = deque()  # tokenized requests that wait for the engine, or for room in the ring
        self._trials: Trials[Entry] = Trials()
        self._last_uid = self._opened = 0
        self._oldest = 0  # names below are forgotten by the detokenizer
        self._admission = AdmissionControl(config.engine.max_running)
        self._deadlines = Deadlines()
        self._next_tick = 0.0  # when `tick` has asked to be called
        self.sooner: Callable[[], object] = lambda: None  # called when something is due before that
        self.timeouts = 0  # requests that missed their deadline
        self._stopped: set[str] = set()

    # ---------------- the Engine protocol
    @property
    def open_requests(self) -> int:
        return len(self._ledger) + len(self._questions)

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        self.check_open(options.client)
        self._check_vocabulary(params)
        if params.grammar:
            self._check_eos("response_format")
        self._opened += 1
        entry = Entry(self._new_uid(), params, options, on_chunk, _source(prompt, options), seed=self._seed(params))
        if isinstance(prompt, TokenPrompt):
            ids = self._check_ids(prompt.ids, entry.source)
            self._ledger[entry.uid] = entry
            self._enter(entry.uid, options, generates=True)
            try:
                self._start(entry, ids)
            except RequestError:
                self._leave(entry.uid)
                raise
            return entry.uid
        self._tokenizers.send(entry.uid, prompt, entry.source, params.reasoning)
        self._ledger[entry.uid] = entry
        self._enter(entry.uid, options, generates=True)
        return entry.uid

    def tokenize(self, prompt: TextPrompt | ChatPrompt, on_ids: OnIds, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        self.check_open(options.client, generates=False)
        uid, source = self._new_uid(), _source(prompt, DEFAULT_OPTIONS)
        self._tokenizers.send(uid, prompt, source)
        return self._ask(uid, on_ids, source, options)

    def detokenize(
        self, ids: Sequence[int], skip_special: bool, on_text: OnText, options: RequestOptions = DEFAULT_OPTIONS
    ) -> int:
        self.check_open(options.client, generates=False)
        checked, uid = self._check_ids(ids, "tokens"), self._new_uid()
        self._tokenizers.send_ids(uid, checked, skip_special)
        return self._ask(uid, on_text, "tokens", options)

    def check_grammar(self, grammar: str, field: str, on_grammar: OnText, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        self.check_open(options.client, generates=False)
        self._check_eos(field)
        m = msg.CheckGrammar(self._new_uid(), grammar, field)
        try:
            self.ctx.send("checker", m)
        except UnicodeEncodeError as e:
            raise InvalidParam(field, f"{field} holds half of a surrogate pair, which is not text.") from e
        self._grammars[m.uid] = m
        return self._ask(m.uid, on_grammar, field, options)

    def _ask(self, uid: int, on_answer: Callable[[Any], None], source: str, options: RequestOptions) -> int:
        self._questions[uid] = on_answer, source
        self._enter(uid, options, generates=False)
        return uid

    def close(self, uid: int) -> None:
        if (entry := self._ledger.get(uid)) is not None:
            self._cancel(entry)
        self._leave(uid)

    def accepted(self, uid: int) -> bool:
        return (entry := self._ledger.get(uid)) is None or entry.ids is not None

    def _new_uid(self) -> int:
        self._last_uid += 1
        return self._last_uid

    def _cancel(self, entry: Entry) -> None:
        """End a request in the engine, if it is there.  It has no name there any longer."""
        if entry.name:
            self.ctx.send("scheduler", msg.Cancel(entry.name))
            del self._sent[entry.name]
            entry.name, entry.started = 0, False

    def flush_cache(self) -> None:
        self.ctx.send("scheduler", msg.FlushCache())

    def check_open(self, client: int = 0, generates: bool = True) -> None:
        if self.state == "starting":
            raise model_loading()
        if self.state not in ("ready", "recovering"):
            raise RequestError("The server is shutting down.", status=503, code="server_draining", retry_after=5)
        self._admission.check(self.config.server, client, generates=generates)

    def _enter(self, uid: int, options: RequestOptions, *, generates: bool) -> None:
        """A request or a question is open from now on."""
        self._admission.enter(uid, options.client, generates=generates)
        if options.timeout:
            when = self._deadlines.add(uid, options.began or self.ctx.now(), options.timeout)
            self.wake_at = self._deadlines.next
            if when < self._next_tick:
                self._next_tick = when
                self.sooner()

    def _leave(self, uid: int) -> None:
        """It has ended, however.  Called again, does nothing."""
        entry = self._ledger.pop(uid, None)
        self._questions.pop(uid, None)
        self._grammars.pop(uid, None)
        self._admission.leave(uid)
        self._deadlines.discard(uid)
        self.wake_at = self._deadlines.next
        if entry is not None:
            if entry.known is not None:
                self.cache_reasons.end(entry.known, entry.delivered)
            self._sent.pop(entry.name, None)
            if self._trials.open:
                self._trials.withdraw(entry)
                self._go_on_with_trials()

    def _question(self, uid: int) -> tuple[Callable[[Any], None], str] | None:
        """The question with this uid, which is answered now; None for a request."""
        if (question := self._questions.get(uid)) is not None:
            self._leave(uid)
        return question

    def _check_eos(self, field: str) -> None:
        if not self.config.model.eos_ids:
            text = "A grammar needs a model with an EOS token, to end its answers."
            raise InvalidParam(field, text, "unsupported_value")

    def _check_vocabulary(self, params: SamplingParams) -> None:
        vocab = self.config.model.vocab_size
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", [t for t, _ in params.logit_bias])):
            if ids and max(ids) >= vocab:
                raise InvalidParam(name, f"{name} holds the token id {max(ids)}; this model's end at {vocab - 1}.")

    def _check_ids(self, ids: Sequence[int] | I32, field: str) -> I32:
        """The ids as an array.  Raises InvalidParam for one that the model does not have."""
        vocab = self.config.model.vocab_size
        try:
            values = np.asarray(ids, np.int64)
        except OverflowError:
            raise InvalidParam(field, f"{field} holds a number that is not a token id.") from None
        if len(values) and not 0 <= values.min() <= values.max() < vocab:
            bad = values[(values < 0) | (values >= vocab)][0]
            raise InvalidParam(field, f"token id {bad} is not in the vocabulary (0 to {vocab - 1}).")
        return values.astype(np.int32)

    def tick(self, now: float) -> float:
        """Do what is due at `now` (seconds of `ctx.now()`); returns the seconds until the next call, at the latest."""
        for uid, timeout in self._deadlines.passed(now, _AT_ONCE):
            self._expire(uid, timeout)
        seconds = max(0.0, min(_TICK_SECONDS, self._deadlines.next - now))
        self._next_tick, self.wake_at = now + seconds, self._deadlines.next
        return seconds

    def idle(self) -> bool:
        """Runs where all actors live in one thread, and nobody else calls `tick`."""
        self.tick(self.ctx.now())
        return False

    def _expire(self, uid: int, timeout: float) -> None:
        """End what has missed its deadline, wherever it is."""
        self.timeouts += 1
        self.stats = self.stats | {"timeouts": self.timeouts}
        entry, question = self._ledger.get(uid), self._questions.get(uid)
        self.close(uid)
        if entry is not None:
            entry.on_chunk(_timeout(timeout, len(entry.delivered)))
        elif question is not None:
            question[0](_timeout(timeout, 0))

    # ---------------- to the scheduler
    def _start(self, entry: Entry, ids: I32) -> None:
        """Enter the prompt's ids in the ledger and pass the request on.  Raises RequestError if it cannot be served."""
        n, context, requested = len(ids), self.config.max_context, entry.params.max_tokens
        if n == 0:
            raise InvalidParam(entry.source, f"{entry.source} is empty: there is nothing to continue.")
        drawn = 0 if requested == 0 or entry.options.pooling else requested or 1  # a token that is dropped needs no place
        if n + drawn > context:
            parts = f"{n} in the {entry.source}, {requested or 0} in the completion"
            raise context_overflow(entry.source, context, n + (requested or 0), parts)
        if self._trials.knows(ids, self.ctx.now()):
            raise _poison()
        self._admission.read(entry.uid, n, self.config.server)
        entry.ids, entry.known = ids, self.cache_reasons.recall(ids, entry.params, entry.options, entry.shape)
        if requested is None:
            bound = self.config.server.default_max_tokens
            requested = min(context - n, max(bound, entry.params.min_tokens) if bound else context)
        entry.max_tokens = requested
        self._backlog.append(entry)
        self._flush_backlog()

    def _seed(self, params: SamplingParams) -> int:
        """A request's own seed, or one that is drawn now and kept for a replay; 64 bits."""
        if params.seed is not None:
            return params.seed & 0xFFFFFFFFFFFFFFFF
        base = self.config.engine.sample_seed
        return (base + self._opened * _MIX) & 0xFFFFFFFFFFFFFFFF if base else secrets.randbits(64)

    def _flush_backlog(self) -> None:
        """Send the requests that fit in the ring; the scheduler sends Wake when it has made room for the rest."""
        if self._trials.open:
            return
        while self._backlog and self.engine_up:
            entry = self._backlog[0]
            if entry.uid in self._ledger and entry.ids is not None and not self._send(entry, entry.ids):
                self._requests.starve(True)
                return
            self._backlog.popleft()
        self._requests.starve(False)

    def _send(self, entry: Entry, prompt: I32) -> bool:
        """Pass a request on, with what it has said so far.  False: the ring has no room for it now.

        Its first name is its uid, unless the detokenizer was told to forget that.
        """
        ids = np.append(prompt, np.array(entry.delivered, np.int32)) if entry.delivered else prompt
        raw = ids.astype("<i4", copy=False).tobytes()
        if not self._requests.has_room(len(raw)):
            return False
        self._requests.publish(raw)
        entry.name = entry.uid if entry.fresh and entry.uid >= self._oldest else self._new_uid()
        self._sent[entry.name] = entry
        sizes = len(ids), len(prompt), entry.max_tokens
        message = msg.Generate(entry.name, *sizes, entry.seed, entry.params, entry.options)
        self.ctx.send("scheduler", message)
        entry.fresh = False
        return True

    # ---------------- from the actors
    @on(msg.Tokenized)
    def tokenized(self, m: msg.Tokenized) -> None:
        if (taken := self._tokenizers.take(m.uid, m.n)) is None:
            return
        uid, ids = taken
        if (question := self._question(uid)) is not None:
            question[0](tuple(ids.tolist()))
        elif (entry := self._ledger.get(uid)) is not None:  # otherwise its client has left
            entry.shape = m.shape
            if m.thinking is not None:
                entry.params = _thinking(entry.params, m.thinking)
            try:
                self._start(entry, ids)
            except RequestError as e:
                self._fail(entry, e)

    @on(msg.Detokenized)
    def detokenized(self, m: msg.Detokenized) -> None:
        uid = self._tokenizers.drop(m.uid)
        if uid is not None and (question := self._question(uid)) is not None:
            question[0](m.text)

    @on(msg.GrammarChecked)
    def grammar_checked(self, m: msg.GrammarChecked) -> None:
        if (question := self._question(m.uid)) is not None:
            question[0](m.grammar)

    @on(msg.TokenizerInfo)
    def keep_tokenizer_info(self, m: msg.TokenizerInfo) -> None:
        try:
            self.tokenizer_info = dict(json.loads(m.info))
        except (ValueError, TypeError, RecursionError) as e:
            raise BadMessage("its info is no JSON object") from e

    @on(msg.Embedded)
    def embedded(self, m: msg.Embedded) -> None:
        entry = self._sent.get(m.uid)
        if entry is not None and entry.ids is not None:
            if entry.known is not None:
                self.cache_reasons.prove(entry.known)
            self._leave(entry.uid)
            entry.on_chunk(Chunk("", (), Finish.STOP, len(entry.ids), 0, (), m.vector))

    @on(msg.Evicted)
    def evicted(self, m: msg.Evicted) -> None:
        if (entry := self._sent.get(m.uid)) is not None and entry.known is not None:
            entry.known.evicted = m.seconds

    @on(msg.Started)
    def request_started(self, m: msg.Started) -> None:
        if (entry := self._sent.get(m.uid)) is not None:
            self._admission.start(entry.uid)
            entry.started = True
            self.resumed = self.resumed or self.ctx.now()
            if not entry.delivered:
                entry.queued = m.queued

    @on(msg.ThoughtEnded)
    def thought_ended(self, m: msg.ThoughtEnded) -> None:
        if (entry := self._sent.get(m.uid)) is not None:
            entry.thought_tokens = m.tokens

    @on(msg.Text)
    def text(self, m: msg.Text) -> None:
        """Pass new text on, one row for each request that has some."""
        at = 0
        rows = zip(m.uids.tolist(), m.counts.tolist(), m.finish.tolist(), m.cached.tolist(), m.texts, strict=True)
        tokens = m.tokens.tolist()
        for uid, count, finish, cached, text in rows:
            new = tuple(tokens[at : at + count])
            at += count
            entry = self._sent.get(uid)
            if entry is None or entry.ids is None:
                continue
            if not entry.delivered:  # otherwise it runs again, and its answer so far may be cached as well
                entry.cached = cached
                if entry.known is not None and not entry.heard:
                    entry.heard = True
                    self.cache_reasons.begin(entry.known, entry.ids, cached, entry.options.explain_cache)
            entry.delivered.extend(new)
            end = _UNFINISHED
            if finish:
                end = Finish(finish)
                if (error := _failure(entry, end)) is not None:
                    self._fail(entry, error)
                    continue
                self._leave(entry.uid)
            logprobs: tuple[TokenLogprob, ...] = ()
            if entry.logprobs:
                logprobs, entry.logprobs = tuple(entry.logprobs), []
            n, params = len(entry.ids), entry.params
            explained = entry.known.explanation if end and entry.known is not None else None
            more = entry.queued, entry.thought_tokens, params.thinking, explained
            entry.on_chunk(Chunk(text, new, end, n, entry.cached, logprobs, None, *more))
        if self._trials.open:
            self._go_on_with_trials()

    @on(msg.Logprobs)
    def logprobs(self, m: msg.Logprobs) -> None:
        """Keep log probabilities until the Text message that follows, one row for each token.

        The texts of a row's token and of its `width` alternatives lie one behind the other in `pieces`.
        """
        top = at = start = 0
        sizes, ids, values = m.sizes.tolist(), m.top_ids.tolist(), m.top_logprobs.tolist()
        rows = (m.uids.tolist(), m.tokens.tolist(), m.offsets.tolist(), m.logprobs.tolist(), m.widths.tolist())
        for uid, token, offset, logprob, width in zip(*rows, strict=True):
            pieces = []
            for size in sizes[at : at + 1 + width]:
                pieces.append(m.pieces[start : start + size])
                start += size
            alternatives = zip(ids[top : top + width], pieces[1:], map(_finite, values[top : top + width]), strict=True)
            at, top = at + 1 + width, top + width
            entry = self._sent.get(uid)
            if entry is not None:
                known = None if math.isnan(logprob) else _finite(logprob)  # the first token of a prompt has none
                entry.logprobs.append(TokenLogprob(token, pieces[0], known, offset, tuple(alternatives)))

    @on(msg.Rejected)
    def rejected(self, m: msg.Rejected) -> None:
        if (uid := self._tokenizers.drop(m.uid)) is not None:
            question, entry = self._question(uid), self._ledger.get(uid)
        else:
            question, entry = self._question(m.uid), self._sent.get(m.uid)
        source = question[1] if question is not None else entry.source if entry is not None else ""
        text, param = m.text, m.param
        if source and param in ("messages", "prompt"):  # all that the other actors know of the prompt's field
            text, param = text.replace(f" the {param}", f" the {source}"), source
        error = RequestError(text, status=m.status, param=param, code=m.code, retry_after=m.retry_after)
        if question is not None:
            question[0](error)
        elif entry is not None:
            self._fail(entry, error)

    def _fail(self, entry: Entry, error: RequestError) -> None:
        self._leave(entry.uid)
        entry.on_chunk(error)

    @on(msg.Stats)
    def keep_stats(self, m: msg.Stats) -> None:
        mine = {"timeouts": self.timeouts, "journal_failures": self.journals.failures}
        self.stats = dict(zip(m.names, m.values.tolist(), strict=True)) | mine
        self._admission.prefill_rate = self.stats.get("prefill_tokens_per_s", 0)

    @on(msg.Wake)
    def wake(self, m: msg.Wake) -> None:
        self._go_on_with_trials()

    # ---------------- life and death
    @on(msg.Hello)
    def hello(self, m: msg.Hello) -> None:
        if self.pids.get(m.name, m.pid) == m.pid:
            self.silent.discard(m.name)
            self.hellos[m.name] = m
            self._become_ready()

    @on(msg.EngineReady)
    def engine_ready(self, m: msg.EngineReady) -> None:
        if self.pids.get("scheduler", m.pid) == m.pid:
            self.num_pages, self.engine_up, self.engine_up_at = m.num_pages, True, self.ctx.now()
            self.journals.engine_ready()
            self._become_ready()
            self._go_on_with_trials()

    @on(msg.Journaled)
    def journaled(self, m: msg.Journaled) -> None:
        self.journals.said(m)
        self.stats = self.stats | {"journal_failures": self.journals.failures}

    @on(msg.JournalBytes)
    def journal_bytes(self, m: msg.JournalBytes) -> None:
        self.journals.came(m)

    def _become_ready(self) -> None:
        if self.state in ("starting", "recovering") and self.engine_up and not self.silent:
            self.state, self.failure = "ready", None

    @on(msg.Stopped)
    def stopped(self, m: msg.Stopped) -> None:
        self._stopped.add(m.name)

    @on(msg.Failed)
    def failed(self, m: msg.Failed) -> None:
        if self.state == "starting":
            self.failure = m.text
            self._end("dead", "The engine could not start.")

    def expects(self, death: msg.ActorDied) -> bool:
        """Whether a process was to end, or nobody needs it any longer."""
        return death.name in self._stopped or self.state in ("stopped", "dead")

    def give_up(self, death: msg.ActorDied, sentence: str) -> None:
        """Fail every open request: a process has died and there will be no other.  `sentence`: for the operator."""
        self.failure, self.crashed = sentence, True
        self._end("dead", f"The engine failed while it served this request ({death.name} died).")

    # ---------------- recovery: what has died is about to start again
    @property
    def on_trial(self) -> bool:
        """Whether a request that is suspected of killing the engine runs, alone."""
        return self._trials.current is not None

    @property
    def waiting_for_replay(self) -> bool:
        """Whether requests have been sent again that were not started yet."""
        return bool(self._sent) or bool(self._backlog)

    @property
    def down(self) -> list[str]:
        return sorted(self.silent)

    def still(self, seconds: float) -> list[str]:
        return [name for name in self.watchdog.still(seconds) if name not in self.silent]

    def lost(self, names: Sequence[str], requests: RingSpec, own: AbstractSet[str] = frozenset()) -> None:
        """Processes have died, with all that was sent to them, and others have their names now: those get the same again.

        What the dead ones have sent and arrives later is recognised by the names of its requests.  `requests`: the ring for a
        new scheduler.  `own`: those that were not killed from outside, so that what they were doing may have ended them.
        """
        if self.state == "ready":
            self.state = "recovering"
        started = [name for name in names if name not in self.silent]
        self.silent.update(names)
        self.restarts.update(names)
        if "scheduler" in names:
            self.cache_reasons.lose()
            self.engine_up, self._requests = False, RingWriter(requests)
        elif "detokenizer" in names:
            self.ctx.send("scheduler", msg.Reconnect("detokenizer"))
        if "scheduler" in names or "detokenizer" in names:
            self._oldest = self._last_uid + 1
            self.ctx.send("detokenizer", msg.Forget(self._oldest))
            self._replay(guilty=not own.isdisjoint(names))
        if "checker" in names:
            self._ask_checker_again("checker" in started and "checker" in own)
        for name in names:
            if name.startswith("tokenizer"):
                for uid in self._tokenizers.resend(name, name in started and name in own):
                    self._refuse_poison(uid)

    def _ask_checker_again(self, started: bool) -> None:
        """Have grammars checked that were not, except for one that has ended several checkers: they are taken in order."""
        if started and self._grammars:
            first, (last, n) = next(iter(self._grammars)), self._deaths
            self._deaths = first, n + 1 if first == last else 1
            if self._deaths[1] >= MAX_DEATHS:
                self._refuse_poison(first)
        for question in self._grammars.values():
            self.ctx.send("checker", question)

    def _replay(self, guilty: bool) -> None:
        """Send every request again, behind what it has said, as soon as the engine takes requests.

        `guilty`: one of them may have ended it.
        """
        sent = list(self._sent.values())
        on_trial = self._trials.current  # it runs alone, so it was in flight, whatever was heard of it
        in_flight = [e for e in sent if guilty and (e.started or e is on_trial)]
        poison = self._trials.judge(in_flight, now := self.ctx.now())
        for entry in sent:
            if self.engine_up:
                self._cancel(entry)
            entry.name, entry.started = 0, False
            entry.logprobs.clear()  # of tokens that were not delivered
        self._sent.clear()
        self._backlog.clear()
        for entry in list(self._ledger.values()) if poison else ():
            if entry.ids is not None and self._trials.knows(entry.ids, now):
                self._refuse_poison(entry.uid)
        idle = (entry for entry in self._ledger.values() if entry.ids is not None and not entry.name)
        self._backlog = deque(sorted((e for e in idle if not self._trials.suspected(e)), key=lambda e: e.uid))
        self._go_on_with_trials()

    def _refuse_poison(self, uid: int) -> None:
        if (question := self._question(uid)) is not None:
            question[0](_poison())
        elif (entry := self._ledger.get(uid)) is not None:
            self._fail(entry, _poison())

    def _go_on_with_trials(self) -> None:
        """Stop the request on trial when it is acquitted, and begin the next trial; after the last one, all others go on."""
        if (entry := self._trials.acquitted()) is not None:
            self._cancel(entry)
            self._backlog.append(entry)
        entry = self._trials.next() if self.engine_up else None
        if entry is not None and entry.ids is not None and not self._send(entry, entry.ids):
            self._trials.put_back()
            self._requests.starve(True)
        else:
            self._flush_backlog()

    def drain(self) -> None:
        """Refuse new requests; open ones continue."""
        if self.state in ("starting", "ready", "recovering"):
            self.state = "draining"

    def end(self) -> None:
        """Fail every open request: the server shuts down."""
        self._end("stopped", "The server was shut down before this request was finished.")

    def _end(self, state: str, text: str) -> None:
        if self.state != "dead":
            self.state = state
        status, code = (500, "engine_error") if state == "dead" else (503, "server_draining")
        error = RequestError(text, status=status, code=code)
        for entry in list(self._ledger.values()):
            self._fail(entry, error)
        for uid, (on_answer, _) in list(self._questions.items()):
            self._leave(uid)
            on_answer(error)


def _finite(logprob: float) -> float:
    """A log probability that JSON can write."""
    return max(logprob, IMPOSSIBLE)


def _thinking(params: SamplingParams, thinking: bool) -> SamplingParams:
    """The parameters of a request whose prompt has been rendered: a grammar binds the answer behind the thought."""
    bound = after_thought(params.grammar, params.reasoning, begun=thinking) if params.grammar else ""
    return replace(params, thinking=thinking, grammar=bound)


def _source(prompt: Prompt, options: RequestOptions) -> str:
    """The request field that holds the prompt, for error messages."""
    usual = "input" if options.pooling else "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    return prompt.source or usual


def _poison() -> RequestError:
    text = (
        "This request has ended the engine three times: it is not tried again.  Please report it; another prompt, or other "
        "parameters, may work."
    )
    return RequestError(text, status=500, code="poison_request")


def _failure(entry: Entry, end: Finish) -> RequestError | None:
    """The error of a request that ended without an answer, None if it ended with one."""
    if end is Finish.ABORT:  # but the client is still here
        return RequestError("The request was aborted.", status=500, code="aborted")
    if end is Finish.GRAMMAR:
        return too_complex(len(entry.delivered))
    if end is Finish.NAN:
        text = f"The model computed logits that are not finite numbers, after {len(entry.delivered)} tokens of the answer."
        return RequestError(text, status=500, code="nan_logits")
    return None


def _timeout(seconds: float, generated: int) -> RequestError:
    """504: the deadline of a request has passed."""
    text = f"The request was not finished within its timeout of {seconds:g} s ({generated} tokens were generated)."
    return RequestError(text, status=504, param="timeout", code="timeout")

"""Keeps the ledger of open requests and passes them between clients and the engine: the actor named "api".

Owns      the ledger: for every open request its prompt ids, parameters, seed and the tokens already delivered.  If any other
          actor dies, recovery.py starts another, and the request is replayed: it goes on behind prompt + delivered tokens
          (dispatcher.py).
Receives  Hello, Stopped, Failed, Traced (every actor); EngineReady, Rejected, Embedded, Started, Evicted, Stats, Journaled,
          JournalBytes, Wake (scheduler); Tokenized, Detokenized, TokenizerInfo, Rejected (tokenizer); GrammarChecked, Rejected
          (checker); Started, Text, Logprobs, ThoughtEnded (detokenizer).
Sends     FlushCache, Reconnect, Journal (scheduler); for it, dispatcher.py: Generate, Cancel (scheduler), Forget (detokenizer),
          tokenizer_pool.py: Tokenize, Detokenize, Wake (tokenizer), grammar_checks.py: CheckGrammar (checker), and system.py:
          Stop (all but the workers), traces.py: Trace (every actor).

Runs in the api process; `open` and `close` are called by the HTTP routes, the batch socket and the LLM class on the same
thread.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import minisgl.actors.messages as msg
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.ring import RingSpec
from minisgl.actors.runtime.shared_memory import Arenas, actor_names
from minisgl.actors.wire import BadMessage
from minisgl.api.admission import AdmissionControl
from minisgl.api.cache_reasons import CacheReasons
from minisgl.api.deadlines import Deadlines
from minisgl.api.dispatcher import Dispatcher
from minisgl.api.engine import ChatPrompt, Chunk, Kept, OnChunk, OnIds, OnText, Prompt, TextPrompt, TokenLogprob, TokenPrompt
from minisgl.api.grammar_checks import GrammarChecks
from minisgl.api.journals import Journals
from minisgl.api.ledger import Entry, failure_of, poison, timed_out
from minisgl.api.logprob_rows import logprob_rows
from minisgl.api.request_checks import check_eos, check_ids, check_length, check_vocabulary, source_of, with_thinking
from minisgl.api.tokenizer_pool import Tokenizers
from minisgl.api.traces import Traces
from minisgl.api.watchdog import Watchdog
from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.errors import RequestError, model_loading
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams

_UNFINISHED = Finish.NONE  # looked up once: the lookup of an enumeration's member costs more than the rest of a row
_TICK_SECONDS = 0.5  # between two looks at the clock while nothing is due
_AT_ONCE = 256  # requests that end by their deadlines in one tick
_MIX = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: consecutive requests get distant seeds


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
        self.engine_up_at = self.resumed = 0.0  # when that began, and when the first request was started since the last death
        self.watchdog = Watchdog(arenas.board)
        self.journals = Journals(ctx, config.server)
        names = actor_names(config.engine.tp, config.server.num_tokenizers)
        self.traces = Traces(ctx, self, config.server.trace, config.server.trace_mb, lambda: self._traceable(names))
        self.cache_reasons = CacheReasons(config)
        self.restarts: Counter[str] = Counter()  # by process
        self._tokenizers = Tokenizers(ctx, arenas.prompts, config.max_context, self._new_uid)
        self._ledger: dict[int, Entry] = {}
        self._dispatcher = Dispatcher(ctx, arenas.requests, self._ledger, self._new_uid)
        self._sent = self._dispatcher.sent  # the requests that are with the engine, by name
        # Of `tokenize`, `detokenize` and `check_grammar`, by uid: the callback, and the request field that is asked about.
        self._questions: dict[int, tuple[Callable[[Any], None], str]] = {}
        self._grammars = GrammarChecks(ctx)
        self._last_uid = self._opened = 0
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
        check_vocabulary(self.config, params)
        if params.grammar:
            check_eos(self.config, "response_format")
        self._opened += 1
        entry = Entry(self._new_uid(), params, options, on_chunk, source_of(prompt, options), seed=self._seed(params))
        entry.began = self.ctx.now()
        if isinstance(prompt, TokenPrompt):
            ids = check_ids(self.config, prompt.ids, entry.source)
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
        uid, source = self._new_uid(), source_of(prompt, DEFAULT_OPTIONS)
        self._tokenizers.send(uid, prompt, source)
        return self._ask(uid, on_ids, source, options)

    def detokenize(
        self, ids: Sequence[int], skip_special: bool, on_text: OnText, options: RequestOptions = DEFAULT_OPTIONS
    ) -> int:
        self.check_open(options.client, generates=False)
        checked, uid = check_ids(self.config, ids, "tokens"), self._new_uid()
        self._tokenizers.send_ids(uid, checked, skip_special)
        return self._ask(uid, on_text, "tokens", options)

    def check_grammar(self, grammar: str, field: str, on_grammar: OnText, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        self.check_open(options.client, generates=False)
        check_eos(self.config, field)
        uid = self._new_uid()
        self._grammars.send(uid, grammar, field)
        return self._ask(uid, on_grammar, field, options)

    def _ask(self, uid: int, on_answer: Callable[[Any], None], source: str, options: RequestOptions) -> int:
        self._questions[uid] = on_answer, source
        self._enter(uid, options, generates=False)
        return uid

    def close(self, uid: int) -> None:
        if (entry := self._ledger.get(uid)) is not None:
            self._dispatcher.cancel(entry)
        self._leave(uid)

    def accepted(self, uid: int) -> bool:
        return (entry := self._ledger.get(uid)) is None or entry.ids is not None

    def _new_uid(self) -> int:
        self._last_uid += 1
        return self._last_uid

    def _traceable(self, names: Sequence[str]) -> list[str]:
        """The actors that can be traced now."""
        return [name for name in names if name not in self.silent and (self.engine_up or name != "scheduler")]

    def flush_cache(self) -> None:
        self.ctx.send("scheduler", msg.FlushCache())

    def processes(self) -> dict[str, tuple[int, float | None]]:
        """All that live, this one included: pid, and seconds since the last sign of life."""
        beats = self.watchdog.beat_ages()
        return {"api": (os.getpid(), None), **{name: (pid, beats.get(name)) for name, pid in self.pids.items()}}

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
        self._grammars.drop(uid)
        self._admission.leave(uid)
        self._deadlines.discard(uid)
        self.wake_at = self._deadlines.next
        if entry is not None:
            if entry.known is not None:
                self.cache_reasons.end(entry.known, entry.delivered)
            self._dispatcher.drop(entry)

    def _question(self, uid: int) -> tuple[Callable[[Any], None], str] | None:
        """The question with this uid, which is answered now; None for a request."""
        if (question := self._questions.get(uid)) is not None:
            self._leave(uid)
        return question

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
            entry.on_chunk(timed_out(timeout, len(entry.delivered)))
        elif question is not None:
            question[0](timed_out(timeout, 0))

    # ---------------- to the scheduler
    def _start(self, entry: Entry, ids: I32) -> None:
        """Enter the prompt's ids in the ledger and pass the request on.  Raises RequestError if it cannot be served."""
        n = len(ids)
        max_tokens = check_length(self.config, n, entry.source, entry.params, entry.options)
        if self._dispatcher.is_poison(ids):
            raise poison()
        self._admission.read(entry.uid, n, self.config.server)
        entry.ids, entry.max_tokens = ids, max_tokens
        entry.known = self.cache_reasons.recall(ids, entry.params, entry.options, entry.shape)
        self._dispatcher.submit(entry)

    def _seed(self, params: SamplingParams) -> int:
        """A request's own seed, or one that is drawn now and kept for a replay; 64 bits."""
        if params.seed is not None:
            return params.seed & 0xFFFFFFFFFFFFFFFF
        base = self.config.engine.sample_seed
        return (base + self._opened * _MIX) & 0xFFFFFFFFFFFFFFFF if base else secrets.randbits(64)

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
                entry.params = with_thinking(entry.params, m.thinking)
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
            queued, waited = entry.queued, entry.waited
            entry.on_chunk(Chunk("", (), Finish.STOP, len(entry.ids), 0, (), m.vector, queued=queued, waited=waited))

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
                entry.queued, entry.waited = m.queued, self.ctx.now() - entry.began

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
                if (error := failure_of(entry, end)) is not None:
                    self._fail(entry, error)
                    continue
                self._leave(entry.uid)
            logprobs: tuple[TokenLogprob, ...] = ()
            if entry.logprobs:
                logprobs, entry.logprobs = tuple(entry.logprobs), []
            n, thinking, thought = len(entry.ids), entry.params.thinking, entry.thought_tokens
            explained = entry.known.explanation if end and entry.known is not None else None
            more = entry.queued, thought, thinking, entry.waited, explained
            entry.on_chunk(Chunk(text, new, end, n, entry.cached, logprobs, None, *more))
        self._dispatcher.heard()

    @on(msg.Logprobs)
    def logprobs(self, m: msg.Logprobs) -> None:
        """Keep log probabilities until the Text message that follows."""
        for name, logprob in logprob_rows(m):
            if (entry := self._sent.get(name)) is not None:
                entry.logprobs.append(logprob)

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
        self._dispatcher.go_on()

    # ---------------- life and death
    @property
    def engine_up(self) -> bool:
        """Whether the scheduler takes requests."""
        return self._dispatcher.engine_up

    @on(msg.Hello)
    def hello(self, m: msg.Hello) -> None:
        if self.pids.get(m.name, m.pid) == m.pid:
            self.silent.discard(m.name)
            self.hellos[m.name] = m
            if m.name != "scheduler":
                self.traces.joined(m.name)
            self._become_ready()

    @on(msg.EngineReady)
    def engine_ready(self, m: msg.EngineReady) -> None:
        if self.pids.get("scheduler", m.pid) == m.pid:
            self.num_pages, self._dispatcher.engine_up, self.engine_up_at = m.num_pages, True, self.ctx.now()
            self.journals.engine_ready()
            self.traces.joined("scheduler")
            self._become_ready()
            self._dispatcher.go_on()

    @on(msg.Journaled)
    def journaled(self, m: msg.Journaled) -> None:
        self.journals.said(m)
        self.stats = self.stats | {"journal_failures": self.journals.failures}

    @on(msg.Traced)
    def traced(self, m: msg.Traced) -> None:
        self.traces.said(m)

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
        return self._dispatcher.on_trial

    @property
    def waiting_for_replay(self) -> bool:
        """Whether requests wait for the engine, or are with it."""
        return self._dispatcher.waiting

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
        self.traces.lost(names)
        self.restarts.update(names)
        if "scheduler" in names:
            self.cache_reasons.lose()
            self._dispatcher.engine_lost(requests)
        elif "detokenizer" in names:
            self.ctx.send("scheduler", msg.Reconnect("detokenizer"))
        if "scheduler" in names or "detokenizer" in names:
            for uid in self._dispatcher.recall(self._last_uid + 1, guilty=not own.isdisjoint(names)):
                self._refuse_poison(uid)
            self._dispatcher.replay()
        if "checker" in names:
            for uid in self._grammars.resend("checker" in started and "checker" in own):
                self._refuse_poison(uid)
        for name in names:
            if name.startswith("tokenizer"):
                for uid in self._tokenizers.resend(name, name in started and name in own):
                    self._refuse_poison(uid)

    def _refuse_poison(self, uid: int) -> None:
        if (question := self._question(uid)) is not None:
            question[0](poison())
        elif (entry := self._ledger.get(uid)) is not None:
            self._fail(entry, poison())

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

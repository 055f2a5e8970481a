"""Matches answers against grammars: one matcher per slot reads the answer and masks the tokens that may not follow.

Every rank has its own matchers, fed with the same tokens, so all ranks sample alike and no mask is ever sent.  The library
(llguidance) computes a mask in tens of microseconds, from a lexer that grows with what it meets.  Answers that follow the same
grammar share their lexer, which makes it fast, and its exhaustion common: an answer whose lexer fails gets one of its own, and
fails alone.  A grammar is compiled in a thread beside the steps (`compile_ahead`); the scheduler admits its request then.  No
torch.  Runs in the workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import resource
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minisgl.arrays import I32, U32
from minisgl.grammar import limits
from minisgl.plan import StepPlan

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LAST_RESORT = -1e30  # the least logit of a token that the grammar allows, whatever else forbids it
CACHE_BYTES = 32 << 20  # of compiled grammars that nobody follows: schemas come again, and a prompt has n answers
GROWN_BYTES = 64 << 20  # by which lexers may grow; then the one that grew most is compiled anew
_NICE = 5  # of the thread that compiles


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens as grammars need them: their bytes (empty: the token has no text), special tokens, EOS tokens.

    encode: the tokenizer's tokens for a text.  Where the grammar allows only one text, it allows only these tokens.
    """

    tokens: Sequence[bytes]
    special: frozenset[int]
    eos_ids: tuple[int, ...]
    encode: Callable[[str], Sequence[int]] = lambda text: ()


class _Grammar:
    """A compiled grammar.  `beginning`: a matcher at the beginning of its answer, to be copied; copies share its lexer."""

    __slots__ = ("beginning", "grown", "text")

    def __init__(self, text: str, beginning: LLMatcher, grown: int) -> None:
        self.text, self.beginning = text, beginning
        self.grown = grown  # bytes, as far as it was seen


class Follower:
    """The way of one answer through its grammar."""

    __slots__ = ("alone", "grammar", "matcher", "said")

    def __init__(self, grammar: _Grammar, said: Sequence[int], eos: frozenset[int]) -> None:
        self.said: list[int] = []
        self.alone = False  # nobody shares its lexer
        self.start(grammar, said, eos)

    def start(self, grammar: _Grammar, said: Sequence[int], eos: frozenset[int]) -> None:
        """Follow a grammar that has been compiled anew."""
        self.grammar, self.matcher, self.said = grammar, grammar.beginning.deep_copy(), []
        for token in said:
            self.feed(token, eos)

    def feed(self, token: int, eos: frozenset[int]) -> None:
        if token not in eos and not self.matcher.is_stopped():  # with `ignore_eos`, more EOS follow
            self.matcher.consume_token(token)
            self.said.append(token)


class Grammars:
    """The matchers of all slots.  The vocabulary is read for the first grammar; without grammars this costs nothing.

    `memory`: bytes of this process.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary], memory: Callable[[], int] | None = None) -> None:
        self._load = vocabulary
        self._memory = memory or _resident
        self._tokenizer: LLTokenizer | None = None
        self._followers: dict[int, Follower] = {}
        self._kept: OrderedDict[str, _Grammar] = OrderedDict()  # the latest last
        self._eos: frozenset[int] = frozenset()
        self._ends: U32 = np.zeros(0, np.uint32)
        self._due: queue.SimpleQueue[str] = queue.SimpleQueue()  # texts for the thread
        self._made: queue.SimpleQueue[_Grammar | tuple[str, Exception]] = queue.SimpleQueue()  # what it has compiled
        self._asked: dict[str, list[int]] = {}  # by text, what waits for it
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the vocabulary

    def __bool__(self) -> bool:
        return bool(self._followers)

    def load_vocabulary(self) -> bool:
        """Read the vocabulary before the first grammar, about two seconds for 150,000 tokens.  False if it is there."""
        with self._lock:
            if self._tokenizer is not None:
                return False
            vocabulary = self._load()
            self._eos = frozenset(vocabulary.eos_ids)
            self._ends = _mask(vocabulary.eos_ids, len(vocabulary.tokens))
            self._tokenizer = tokenizer_of(vocabulary)
            return True

    # ---------------- ahead of the steps
    def compile_ahead(self, ticket: int, text: str) -> None:
        """Compile a grammar in a thread; `prepared` returns the ticket then."""
        waiting = self._asked.setdefault(text, [])
        waiting.append(ticket)
        if len(waiting) > 1:
            return
        if text in self._kept:
            self._made.put(self._kept[text])
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._compile_all, name="grammars", daemon=True)
            self._thread.start()
        self._due.put(text)

    def preparing(self) -> bool:
        """Whether something has been asked for that `prepared` has not returned."""
        return bool(self._asked)

    def prepared(self) -> list[int]:
        """The tickets of the grammars that have been compiled since the last call."""
        tickets: list[int] = []
        while not self._made.empty():
            made = self._made.get()
            if isinstance(made, tuple):  # a bug: `join` will meet it, where it can be seen
                tickets += self._asked.pop(made[0], [])
            else:
                self._keep(made)
                tickets += self._asked.pop(made.text, [])
        return tickets

    def _compile_all(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            text = self._due.get()
            try:
                self._made.put(self._compile(text))
            except Exception as e:
                self._made.put((text, e))

    def _compile(self, text: str) -> _Grammar:
        """Compile a grammar, and compute its first mask: this is where most of its lexer comes into being."""
        self.load_vocabulary()
        from llguidance import LLMatcher

        assert self._tokenizer is not None
        before = self._memory()
        beginning = LLMatcher(self._tokenizer, text, log_level=0, limits=limits())
        beginning.deep_copy().compute_bitmask()
        return _Grammar(text, beginning, max(len(text), self._memory() - before))

    def _keep(self, grammar: _Grammar) -> None:
        self._kept[grammar.text] = grammar
        self._kept.move_to_end(grammar.text)
        used = {f.grammar.text for f in self._followers.values()} | {grammar.text}
        spare = [g for g in self._kept.values() if g.text not in used]
        total = sum(g.grown for g in spare)
        for g in spare:
            if total <= CACHE_BYTES:
                break
            total -= self._kept.pop(g.text).grown

    def _grammar(self, text: str) -> _Grammar:
        if (grammar := self._kept.get(text)) is None:
            grammar = self._compile(text)  # only where it has been dropped since it was prepared
            self._keep(grammar)
        return grammar

    # ---------------- in a step
    def join(self, plan: StepPlan) -> None:
        """Start the grammars of a plan's new slots, and feed each the answer that its request had before it was retracted."""
        at = text_at = 0
        for slot, n_bytes, n_output in plan.grammars.tolist():
            self._followers.pop(slot, None)
            if n_bytes:
                grammar = self._grammar(plan.grammar_text[text_at : text_at + n_bytes].decode())
                self._followers[slot] = Follower(grammar, plan.said[at : at + n_output].tolist(), self._eos)
            text_at, at = text_at + n_bytes, at + n_output

    def rows(self, slots: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Indices of the `slots` that have a grammar."""
        return np.array([i for i, slot in enumerate(slots.tolist()) if slot in self._followers], np.int64)

    def masks(self, slots: npt.NDArray[np.integer]) -> tuple[U32, npt.NDArray[np.bool_]]:
        """Masks u32 [N, ceil(V / 32)] of N slots with grammars: bit t % 32 of word t // 32 is set if token t may follow.

        Also bool [N]: the grammar failed, because it became too complex.  Then, and at its end, only EOS may follow.
        """
        masks = np.empty((len(slots), len(self._ends)), np.uint32)
        failed = np.zeros(len(slots), np.bool_)
        before, slowest, longest = self._memory(), None, -1
        for i, slot in enumerate(slots.tolist()):
            follower = self._followers[slot]
            began = time.perf_counter_ns()
            masks[i] = self._allowed(follower)
            failed[i] = follower.matcher.is_error()
            if (took := time.perf_counter_ns() - began) > longest:
                longest, slowest = took, follower.grammar
        if slowest is not None and (grown := self._memory() - before) > 0:
            slowest.grown += grown  # what takes time is what grows
            self._shrink()
        return masks, failed

    def _allowed(self, follower: Follower) -> U32:
        """The mask of one answer."""
        bits = self._try(follower)
        if bits is None and not follower.alone and follower.matcher.is_error():  # perhaps because of others with its lexer
            self._kept.pop(follower.grammar.text, None)
            follower.alone = True
            follower.start(self._compile(follower.grammar.text), follower.said, self._eos)
            bits = self._try(follower)
        if bits is None:
            return self._ends
        # Where one of the model's EOS tokens may follow, any of them may.
        return bits | self._ends if (bits & self._ends).any() else bits

    def _try(self, follower: Follower) -> U32 | None:
        """The mask of the library, None if the answer has ended or the matcher has failed."""
        matcher = follower.matcher
        if matcher.is_stopped():
            return None
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: len(self._ends)]
        return None if matcher.is_stopped() else bits

    def _shrink(self) -> None:
        """Keep all lexers within a bound: compile the largest anew, which then knows the ways of its answers and no others."""
        grammars = {id(g): g for g in (*self._kept.values(), *(f.grammar for f in self._followers.values()))}
        if sum(g.grown for g in grammars.values()) <= GROWN_BYTES + CACHE_BYTES:
            return
        largest = max(grammars.values(), key=lambda g: g.grown)
        self._kept.pop(largest.text, None)
        following = [f for f in self._followers.values() if f.grammar is largest]
        if following:
            fresh = self._compile(largest.text)
            for follower in following:
                follower.start(fresh, follower.said, self._eos)
            if not following[0].alone:
                self._keep(fresh)
        _give_back()

    def matchers(self, slots: npt.NDArray[np.integer]) -> list[Follower]:
        """The ways of the present owners of slots with grammars."""
        return [self._followers[slot] for slot in slots.tolist()]

    def feed(self, followers: Sequence[Follower], tokens: I32) -> None:
        """Feed each the token that its owner sampled."""
        for follower, token in zip(followers, tokens.tolist(), strict=True):
            follower.feed(token, self._eos)

    def advance(self, slots: npt.NDArray[np.integer], tokens: I32) -> None:
        """Feed the tokens that slots with grammars sampled."""
        self.feed(self.matchers(slots), tokens)


def tokenizer_of(vocabulary: Vocabulary) -> LLTokenizer:
    """The vocabulary as the library needs it."""
    from llguidance import LLTokenizer

    return LLTokenizer(_Wrapper(vocabulary), slices=LLTokenizer.json_slices())  # type: ignore[arg-type]


def _resident() -> int:
    """Bytes of memory of this process that are no file's."""
    with open("/proc/self/statm", "rb") as f:
        _, resident, shared, *_ = map(int, f.read().split())
    return (resident - shared) * resource.getpagesize()


def _give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _mask(tokens: Sequence[int], vocab: int) -> U32:
    words = np.zeros(-(-vocab // 32), np.uint32)
    for t in tokens:
        words[t // 32] |= np.uint32(1 << t % 32)
    return words


def unpack(masks: U32, vocab: int) -> npt.NDArray[np.bool_]:
    """Masks u32 [N, ceil(vocab / 32)] -> bool [N, vocab]."""
    little = masks if sys.byteorder == "little" else masks.byteswap()
    return np.unpackbits(little.view(np.uint8), axis=1, count=vocab, bitorder="little").view(np.bool_)


class _Wrapper:
    """A vocabulary with the attributes that LLTokenizer reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted({*vocabulary.special, *vocabulary.eos_ids})
        self.eos_token_id = vocabulary.eos_ids[0]
        self._encode = vocabulary.encode
        none = set(self.special_token_ids)
        self._ids = {token: i for i, token in enumerate(self.tokens) if token and i not in none}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text, whose bytes join to exactly that text; not every tokenizer guarantees it."""
        raw = text.encode() if isinstance(text, str) else text
        ids = list(self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace")))
        if b"".join(self.tokens[t] for t in ids) == raw:
            return ids
        ids, at = [], 0
        while at < len(raw):
            sizes = range(min(self._longest, len(raw) - at), 0, -1)
            size = next((n for n in sizes if raw[at : at + n] in self._ids), 0)
            if not size:
                return []  # no token has this byte, so the text cannot be forced
            ids.append(self._ids[raw[at : at + size]])
            at += size
        return ids

"""Grammars at work: by slot, a matcher that has read the answer so far and says which tokens may follow.

Every rank has its own, fed with the same tokens, so all draw alike and no mask ever travels.  No torch.  The library
(llguidance) computes a mask in tens of microseconds and prepares no grammar for the vocabulary ahead, so that a grammar may
begin with any step.  Runs in the workers.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minisgl.arrays import I32, U32
from minisgl.plan import StepPlan

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Of a grammar that can be read in very many ways one step would take seconds, and everybody's: with these, some 20 ms.
_MAX_ROW, _MAX_STEP = 500, 10_000  # items of the parser
LAST_RESORT = -1e30  # the least logit of a token that the grammar allows, whatever else forbids it
_KEPT = 64  # grammars whose beginning is kept: the n answers to a prompt, and schemas that come again and again


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a grammar must know of a model: the bytes of every token (none: it has no text), special ones, those that end.

    `encode` is the tokenizer's way to write a text.  Where only one text can follow, its tokens are the only ones allowed.
    """

    tokens: Sequence[bytes]
    special: frozenset[int]
    eos_ids: tuple[int, ...]
    encode: Callable[[str], Sequence[int]] = lambda text: ()


class Grammars:
    """The matchers of all slots.  `vocabulary` is called for the first grammar; without any this costs nothing."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._load = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._matchers: dict[int, LLMatcher] = {}
        self._beginnings: OrderedDict[str, LLMatcher] = OrderedDict()
        self._eos: frozenset[int] = frozenset()
        self._ends: U32 = np.zeros(0, np.uint32)

    def __bool__(self) -> bool:
        return bool(self._matchers)

    def load_vocabulary(self) -> bool:
        """Read the vocabulary, about two seconds for 150,000 tokens, ahead of the first grammar.  False: that is done."""
        if self._tokenizer is not None:
            return False
        from llguidance import LLTokenizer

        vocabulary = self._load()
        self._eos = frozenset(vocabulary.eos_ids)
        self._ends = _mask(vocabulary.eos_ids, len(vocabulary.tokens))
        self._tokenizer = LLTokenizer(_Wrapper(vocabulary), slices=LLTokenizer.json_slices())  # type: ignore[arg-type]
        return True

    def join(self, plan: StepPlan) -> None:
        """Take in the grammars of a plan: the slots' new owners, with what they have said so far."""
        at = text_at = 0
        for slot, n_bytes, n_output in plan.grammars.tolist():
            self._matchers.pop(slot, None)
            if n_bytes:
                matcher = self._begin(plan.grammar_text[text_at : text_at + n_bytes].decode())
                for token in plan.said[at : at + n_output].tolist():
                    _feed(matcher, token, self._eos)
                self._matchers[slot] = matcher
            text_at, at = text_at + n_bytes, at + n_output

    def _begin(self, text: str) -> LLMatcher:
        self.load_vocabulary()
        from llguidance import LLMatcher, LLParserLimits

        if text not in self._beginnings:
            assert self._tokenizer is not None
            limits = LLParserLimits(max_items_in_row=_MAX_ROW, step_max_items=_MAX_STEP)
            self._beginnings[text] = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
            if len(self._beginnings) > _KEPT:
                self._beginnings.popitem(last=False)
        self._beginnings.move_to_end(text)
        return self._beginnings[text].deep_copy()

    def rows(self, slots: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Which of the rows that draw for `slots` are bound."""
        return np.array([i for i, slot in enumerate(slots.tolist()) if slot in self._matchers], np.int64)

    def masks(self, slots: npt.NDArray[np.integer]) -> tuple[U32, npt.NDArray[np.bool_]]:
        """u32 [N, ceil(V / 32)], bit t % 32 of word t // 32 set where token t may follow, for N bound slots; and bool [N]:
        the grammar has become too complex to go on with.  At its end, and where it failed, only EOS may follow."""
        masks = np.empty((len(slots), len(self._ends)), np.uint32)
        failed = np.zeros(len(slots), np.bool_)
        for i, slot in enumerate(slots.tolist()):
            matcher = self._matchers[slot]
            masks[i] = self._ends
            if not matcher.is_stopped():
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: len(self._ends)]
                if not matcher.is_stopped():
                    # Any of the model's EOS tokens ends what one of them may end.
                    masks[i] = bits | self._ends if (bits & self._ends).any() else bits
            failed[i] = matcher.is_error()
        return masks, failed

    def matchers(self, slots: npt.NDArray[np.integer]) -> list[LLMatcher]:
        """Of bound slots; they stay those of the slots' owners of now."""
        return [self._matchers[slot] for slot in slots.tolist()]

    def feed(self, matchers: Sequence[LLMatcher], tokens: I32) -> None:
        """A token for each that its owner has drawn."""
        for matcher, token in zip(matchers, tokens.tolist(), strict=True):
            _feed(matcher, token, self._eos)

    def advance(self, slots: npt.NDArray[np.integer], tokens: I32) -> None:
        """The tokens that bound slots have drawn."""
        self.feed(self.matchers(slots), tokens)


def _feed(matcher: LLMatcher, token: int, eos: frozenset[int]) -> None:
    if token not in eos and not matcher.is_stopped():  # after EOS nothing comes, unless it is ignored: then more of them
        matcher.consume_token(token)


def _mask(tokens: Sequence[int], vocab: int) -> U32:
    words = np.zeros(-(-vocab // 32), np.uint32)
    for t in tokens:
        words[t // 32] |= np.uint32(1 << t % 32)
    return words


def unpack(masks: U32, vocab: int) -> npt.NDArray[np.bool_]:
    """bool [N, vocab] of u32 [N, ceil(vocab / 32)]."""
    little = masks if sys.byteorder == "little" else masks.byteswap()
    return np.unpackbits(little.view(np.uint8), axis=1, count=vocab, bitorder="little").view(np.bool_)


class _Wrapper:
    """What LLTokenizer asks of a tokenizer."""

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
        """The tokens that a text is written with; they join to exactly that, which not every tokenizer sees to."""
        raw = text.encode() if isinstance(text, str) else text
        ids = list(self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace")))
        if b"".join(self.tokens[t] for t in ids) == raw:
            return ids
        ids, at = [], 0
        while at < len(raw):
            sizes = range(min(self._longest, len(raw) - at), 0, -1)
            size = next((n for n in sizes if raw[at : at + n] in self._ids), 0)
            if not size:
                return []  # no token has this byte: then no text of it can be forced
            ids.append(self._ids[raw[at : at + size]])
            at += size
        return ids

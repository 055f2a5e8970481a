"""Matches answers against grammars: one matcher per slot reads the answer and masks the tokens that may not follow.

Every rank has its own matchers, fed with the same tokens, so all ranks sample alike and no mask is ever sent.  The library
(llguidance) computes a mask in tens of microseconds and compiles no grammar for the vocabulary ahead, so a grammar may start in
any step.  No torch.  Runs in the workers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minisgl.arrays import I32, U32
from minisgl.plan import StepPlan

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Limits on the items of the parser.  A highly ambiguous grammar would stall the batch for seconds in one step: with these, it
# is stopped after some 20 ms.
_MAX_ROW, _MAX_STEP = 500, 10_000
LAST_RESORT = -1e30  # the least logit of a token that the grammar allows, whatever else forbids it
_KEPT = 64  # compiled grammars that are kept, for the n answers to a prompt and for schemas that come again


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens as grammars need them: their bytes (empty: the token has no text), special tokens, EOS tokens.

    encode: the tokenizer's tokens for a text.  Where the grammar allows only one text, it allows only these tokens.
    """

    tokens: Sequence[bytes]
    special: frozenset[int]
    eos_ids: tuple[int, ...]
    encode: Callable[[str], Sequence[int]] = lambda text: ()


class Grammars:
    """The matchers of all slots.  The vocabulary is read for the first grammar; without grammars this costs nothing."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._load = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._matchers: dict[int, LLMatcher] = {}
        self._beginning = functools.lru_cache(_KEPT)(self._compile)
        self._eos: frozenset[int] = frozenset()
        self._ends: U32 = np.zeros(0, np.uint32)

    def __bool__(self) -> bool:
        return bool(self._matchers)

    def load_vocabulary(self) -> bool:
        """Read the vocabulary before the first grammar, about two seconds for 150,000 tokens.  False if it is there."""
        if self._tokenizer is not None:
            return False
        from llguidance import LLTokenizer

        vocabulary = self._load()
        self._eos = frozenset(vocabulary.eos_ids)
        self._ends = _mask(vocabulary.eos_ids, len(vocabulary.tokens))
        self._tokenizer = LLTokenizer(_Wrapper(vocabulary), slices=LLTokenizer.json_slices())  # type: ignore[arg-type]
        return True

    def join(self, plan: StepPlan) -> None:
        """Start the grammars of a plan's new slots, and feed each the answer that its request had before it was retracted."""
        at = text_at = 0
        for slot, n_bytes, n_output in plan.grammars.tolist():
            self._matchers.pop(slot, None)
            if n_bytes:
                matcher = self._beginning(plan.grammar_text[text_at : text_at + n_bytes].decode()).deep_copy()
                for token in plan.said[at : at + n_output].tolist():
                    _feed(matcher, token, self._eos)
                self._matchers[slot] = matcher
            text_at, at = text_at + n_bytes, at + n_output

    def _compile(self, text: str) -> LLMatcher:
        """A matcher at the beginning of its answer, to be copied."""
        self.load_vocabulary()
        from llguidance import LLMatcher, LLParserLimits

        assert self._tokenizer is not None
        limits = LLParserLimits(max_items_in_row=_MAX_ROW, step_max_items=_MAX_STEP)
        return LLMatcher(self._tokenizer, text, log_level=0, limits=limits)

    def rows(self, slots: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Indices of the `slots` that have a grammar."""
        return np.array([i for i, slot in enumerate(slots.tolist()) if slot in self._matchers], np.int64)

    def masks(self, slots: npt.NDArray[np.integer]) -> tuple[U32, npt.NDArray[np.bool_]]:
        """Masks u32 [N, ceil(V / 32)] of N slots with grammars: bit t % 32 of word t // 32 is set if token t may follow.

        Also bool [N]: the grammar failed, because it became too complex.  Then, and at its end, only EOS may follow.
        """
        masks = np.empty((len(slots), len(self._ends)), np.uint32)
        failed = np.zeros(len(slots), np.bool_)
        for i, slot in enumerate(slots.tolist()):
            matcher = self._matchers[slot]
            masks[i] = self._ends
            if not matcher.is_stopped():
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: len(self._ends)]
                if not matcher.is_stopped():
                    # Where one of the model's EOS tokens may follow, any of them may.
                    masks[i] = bits | self._ends if (bits & self._ends).any() else bits
            failed[i] = matcher.is_error()
        return masks, failed

    def matchers(self, slots: npt.NDArray[np.integer]) -> list[LLMatcher]:
        """The matchers of the present owners of slots with grammars."""
        return [self._matchers[slot] for slot in slots.tolist()]

    def feed(self, matchers: Sequence[LLMatcher], tokens: I32) -> None:
        """Feed each matcher the token that its owner sampled."""
        for matcher, token in zip(matchers, tokens.tolist(), strict=True):
            _feed(matcher, token, self._eos)

    def advance(self, slots: npt.NDArray[np.integer], tokens: I32) -> None:
        """Feed the tokens that slots with grammars sampled."""
        self.feed(self.matchers(slots), tokens)


def _feed(matcher: LLMatcher, token: int, eos: frozenset[int]) -> None:
    if token not in eos and not matcher.is_stopped():  # with `ignore_eos`, more EOS follow
        matcher.consume_token(token)


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

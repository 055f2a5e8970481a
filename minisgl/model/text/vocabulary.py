"""A tokenizer's vocabulary as grammars need it.  No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minisgl.config import ModelSpec

if TYPE_CHECKING:
    pass
from minisgl.model.common.grammar import Vocabulary


def vocabulary_of(spec: ModelSpec) -> Vocabulary:
    """Of a checkpoint with EOS tokens."""
    from minisgl.model.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    eos_ids = tuple(t for t in spec.eos_ids if t < spec.vocab_size)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, False).tolist()
        return ids

    return Vocabulary([tokenizer.piece(t) for t in range(spec.vocab_size)], tokenizer.special_ids, eos_ids, encode)

"""Builds the vocabulary of a checkpoint for grammars: the bytes of every token, and the special ones.  No torch."""

from __future__ import annotations

from minisgl.config import ModelSpec
from minisgl.model.common.grammar import Vocabulary


def vocabulary_of(spec: ModelSpec) -> Vocabulary:
    """The vocabulary of a checkpoint."""
    from minisgl.model.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    eos_ids = tuple(t for t in spec.eos_ids if t < spec.vocab_size)
    pieces = [tokenizer.piece(t) for t in range(spec.vocab_size)]
    return Vocabulary(pieces, tokenizer.special_ids, eos_ids, lambda text: tokenizer.encode(text, False).tolist())

"""Builds the vocabulary of a checkpoint for grammars: the bytes of every token, and the special ones.  No torch."""

from __future__ import annotations

from minisgl.config import ModelSpec
from minisgl.model.common.grammar import Vocabulary
from minisgl.reasoning import STYLES


def vocabulary_of(spec: ModelSpec) -> Vocabulary:
    """The vocabulary of a checkpoint.  The tags of thoughts are text in it, for a grammar names them, special tokens or not."""
    from minisgl.model.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    eos_ids = tuple(t for t in spec.eos_ids if t < spec.vocab_size)
    pieces = [tokenizer.piece(t) for t in range(spec.vocab_size)]
    special = tokenizer.special_without(tuple(mark for style in STYLES.values() for mark in style.marks))
    return Vocabulary(pieces, special, eos_ids, lambda text: tokenizer.encode(text, False).tolist())

"""Computes the bytes of every token, for tokenizers whose tokens have bytes: byte-level BPE and SentencePiece.  No torch."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

SPACE = "\u2581"  # SentencePiece writes a space as this
_SENTENCEPIECE = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},  # not in every tokenizer
]


def token_bytes(backend: tokenizers.Tokenizer) -> list[bytes] | None:
    """The bytes of every token by id; None for a tokenizer whose tokens have no bytes of their own."""
    decoders = decoders_of(backend)
    kinds = [d["type"] for d in decoders]
    byte_level = kinds == ["ByteLevel"]
    if byte_level:
        to_bytes = _byte_level_bytes
    elif kinds in (["Metaspace"], ["ByteFallback", "Metaspace"]) and decoders[-1]["replacement"] == SPACE:
        to_bytes = _sentencepiece_bytes if len(kinds) > 1 else _metaspace_bytes
    elif decoders in (_SENTENCEPIECE, _SENTENCEPIECE[:-1]):
        to_bytes = _sentencepiece_bytes
    else:
        return None
    vocab = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, i in vocab.items():
        table[i] = to_bytes(token)
    for i, added in backend.get_added_tokens_decoder().items():
        if byte_level:
            table[i] = added.content.encode()  # added tokens are text, not the byte alphabet
        else:
            table[i] = to_bytes(backend.id_to_token(i) or "")  # as the normaliser writes it, if it is applied to the token
    return table


def decoders_of(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The settings of the backend's decoders, in order."""
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for every byte.  Printable ones are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(map(BYTE_ALPHABET.__getitem__, token))
    except KeyError:  # not in the byte alphabet: text
        return token.encode()


def _metaspace_bytes(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else _metaspace_bytes(token)

"""Adds what a directory says of its tokens beside tokenizer.json, as transformers does.  No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minisgl.errors import UserError
from minisgl.model.checkpoint.files import is_id, read_json

_CONFIG = "tokenizer_config.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def complete(backend: tokenizers.Tokenizer, path: str, vocab_size: int) -> None:
    """Add the tokens that tokenizer_config.json, special_tokens_map.json and added_tokens.json name and tokenizer.json lacks.

    A token keeps its id if it is in the vocabulary, else it gets the next one.  Special tokens for which the model, of
    `vocab_size` tokens, has no embedding are left out.  Raises UserError naming the file and a token with another id.
    """
    config = read_json(path, _CONFIG, optional=True)
    decoder = config.get("added_tokens_decoder")
    listed = _listed(os.path.join(path, _CONFIG), decoder) if isinstance(decoder, dict) else []
    if not isinstance(decoder, dict):
        config = {**config, **read_json(path, "special_tokens_map.json", optional=True)}
    special = [_special(value) for value in _special_values(config)]
    if not isinstance(decoder, dict):
        listed = _legacy(path, {token.content for token in special})
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(listed, key=lambda pair: pair[0]):
        if repr(token) in known:
            continue
        backend.add_tokens([token])
        if (found := backend.token_to_id(token.content)) != i:
            raise UserError(f"{path}: token {token.content!r:.80} has the id {i} in {_CONFIG}, and {found} in tokenizer.json.")
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in special:
        found = backend.token_to_id(token.content)
        if token.content and token.content not in added and (_next_id(backend) if found is None else found) < vocab_size:
            backend.add_tokens([token])
            added.add(token.content)


def _listed(source: str, decoder: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """The (id, token) pairs of `added_tokens_decoder`."""
    out = []
    for i, token in decoder.items():
        if not is_id(i) or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise UserError(f"{source}: added_tokens_decoder has {i!r:.40}: {token!r:.80}, which is no token.")
        out.append((int(i), AddedToken(token["content"], **{key: bool(token[key]) for key in _FLAGS if key in token})))
    return out


def _legacy(path: str, special: set[str]) -> list[tuple[int, AddedToken]]:
    """The (id, token) pairs of added_tokens.json that tokenizer.json does not have."""
    source = os.path.join(path, "added_tokens.json")
    tokens = read_json(source, optional=True)
    if not all(type(i) is int for i in tokens.values()):
        raise UserError(f"{source}: should map the texts of tokens to ids.")
    added = read_json(path, "tokenizer.json").get("added_tokens") or []
    known = {token.get("content") for token in added if isinstance(token, dict)}
    return [
        (i, AddedToken(text, normalized=text not in special, special=text in special))
        for text, i in tokens.items()
        if text not in known
    ]


def _special_values(config: dict[str, Any]) -> Iterator[Any]:
    for key in _NAMED:
        yield config.get(key)
    for key in _LISTS:
        values = config.get(key) or []
        yield from values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()


def _special(value: Any) -> AddedToken:
    """The special token that a text or an object describes; one without text if it is neither."""
    if not isinstance(value, dict):
        return AddedToken(value if isinstance(value, str) else "", special=True)
    flags = {key: bool(value[key]) for key in _FLAGS if key in value}
    return AddedToken(value["content"] if isinstance(value.get("content"), str) else "", **{**flags, "special": True})


def _next_id(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in (0, *backend.get_added_tokens_decoder())))

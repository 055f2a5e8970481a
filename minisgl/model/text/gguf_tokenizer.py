"""Rebuilds the tokenizer inside a GGUF file as a `tokenizers.Tokenizer`.  No torch, no transformers.

`tokenizer.ggml.model` names the algorithm: "gpt2" is byte-level BPE with explicit merges, where `tokenizer.ggml.pre` names the
rule that splits the text before the merges; "llama" is SentencePiece's BPE, whose merges follow from the scores of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_vocabulary import CONTROL, UNKNOWN, USER_DEFINED, GGUFVocabulary, read_vocabulary
from minisgl.model.checkpoint.metadata import Metadata, shown
from minisgl.model.text.gguf_splits import SPLITS, Splits
from minisgl.model.text.guard import one_sentence
from minisgl.model.text.sentencepiece import SPACE, SentencePiece, usable
from minisgl.model.text.token_bytes import BYTE_ALPHABET

_SPECIAL = (CONTROL, UNKNOWN, USER_DEFINED)  # types of tokens that are found in the text before anything else


def build(values: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that the metadata describes.  Raises UserError naming the file and the key that cannot be used."""
    fields = Metadata(f"--model {source}", values)
    kind = fields.get("tokenizer.ggml.model")
    vocabulary = read_vocabulary(fields)
    if not vocabulary.tokens:
        raise UserError(f"--model {source}: tokenizer.ggml.tokens is missing: there is no tokenizer.")
    with one_sentence(f"--model {source}: its tokenizer cannot be built"):  # the library checks merges against the vocabulary
        if kind == "gpt2":
            return _byte_level(fields, vocabulary)
        if kind == "llama":
            return cast(Tokenizer, _sentencepiece(fields, vocabulary))
    raise UserError(f"--model {source}: tokenizer.ggml.model {shown(kind)} is not supported (known: gpt2, llama).")


def _byte_level(fields: Metadata, vocabulary: GGUFVocabulary) -> Tokenizer:
    splits = _splits(fields)
    merges = fields.strings("tokenizer.ggml.merges")
    if not merges or not all(" " in m[1:] for m in merges):
        raise UserError(f"{fields.source}: tokenizer.ggml.merges is missing or damaged.")
    # A merge is two tokens with a space between them; byte-level tokens hold no space.  Of equal ones the first counts.
    pairs = dict.fromkeys((left, right) for left, _, right in (m.partition(" ") for m in merges))
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(pairs), ignore_merges=splits.whole))
    absent = "".join(c for c in BYTE_ALPHABET if c not in vocab)
    tokenizer.pre_tokenizer = splits.pre_tokenizer(absent)
    tokenizer.decoder = decoders.ByteLevel()
    if fields.get("tokenizer.ggml.pre") == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # of Qwen's own tokenizer; llama.cpp leaves it out
    _add_special(tokenizer, vocabulary)
    before, after = _around(fields, vocabulary, splits.begins)
    used = {vocabulary.tokens[i]: i for i in (*before, *after)}
    if used:
        template = [*(vocabulary.tokens[i] for i in before), "$A", *(vocabulary.tokens[i] for i in after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(used.items()))
    return tokenizer


def _splits(fields: Metadata) -> Splits:
    pre = fields.get("tokenizer.ggml.pre")
    pre = "default" if pre is None else pre
    if not isinstance(pre, str) or pre not in SPLITS:
        raise UserError(f"{fields.source}: tokenizer.ggml.pre {shown(pre)} is not supported (known: {', '.join(SPLITS)}).")
    return SPLITS[pre]


def _sentencepiece(fields: Metadata, vocabulary: GGUFVocabulary) -> SentencePiece:
    tokens, scores = vocabulary.tokens, fields.get("tokenizer.ggml.scores")
    if not usable(scores, len(tokens)):
        raise UserError(f"{fields.source}: tokenizer.ggml.scores is missing or has not one score per token.")
    unknown = None if vocabulary.unknown is None else tokens[vocabulary.unknown]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    _add_special(backend, vocabulary)
    special = [token for token, kind in zip(tokens, vocabulary.types, strict=True) if kind in _SPECIAL]
    phi3 = any(name in str(fields.get("general.name")).lower() for name in ("phi-3", "phi3"))
    return SentencePiece(
        backend,
        tokens,
        scores,
        special=special,
        stripped={*special, "</s>"} - {"<unk>", "<s>", "<|endoftext|>"} if phi3 else (),
        unknown=vocabulary.unknown,
        space_prefix=prefix,
        around=_around(fields, vocabulary, True),
    )


def _add_special(tokenizer: Tokenizer, vocabulary: GGUFVocabulary) -> None:
    """They keep their ids."""
    for kinds, add in (((CONTROL, UNKNOWN), tokenizer.add_special_tokens), ((USER_DEFINED,), tokenizer.add_tokens)):
        texts = [token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in kinds and token]
        add([AddedToken(text, normalized=False, special=kinds != (USER_DEFINED,)) for text in texts])


def _around(fields: Metadata, vocabulary: GGUFVocabulary, begins: bool) -> tuple[list[int], list[int]]:
    """The tokens that `add_special` puts before and after a text: BOS and EOS, where the metadata says so."""
    found: list[list[int]] = []
    for name, token, default in (("bos", vocabulary.bos, begins), ("eos", vocabulary.eos, False)):
        added = fields.flag(f"tokenizer.ggml.add_{name}_token", default)
        if added and token is None:
            raise UserError(
                f"{fields.source}: tokenizer.ggml.{name}_token_id is missing, and texts have that token around them."
            )
        found.append([token] if added and token is not None else [])
    return found[0], found[1]

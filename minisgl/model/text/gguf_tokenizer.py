"""Rebuilds the tokenizer inside a GGUF file as a `tokenizers.Tokenizer`.  No torch, no transformers.

`tokenizer.ggml.model` names the algorithm: "gpt2" is byte-level BPE with explicit merges, where `tokenizer.ggml.pre` names the
rule that splits the text before the merges; "llama" is SentencePiece's BPE, whose merges follow from the scores of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minisgl.errors import UserError

_CONTROL, _NORMAL, _USER_DEFINED = 3, 1, 4  # tokenizer.ggml.token_type
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_STYLES = {  # how a text is split: values of tokenizer.ggml.pre
    "gpt2": ("default", "gpt-2", "gpt2"),
    "llama3": ("llama-bpe", "llama-v3", "llama3"),
    "qwen2": ("qwen2",),
    "smollm": ("smollm",),
}
_PRE = {pre: style for style, names in _STYLES.items() for pre in names}


def build(fields: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that the metadata describes.  Raises UserError naming the file and the key that cannot be used."""
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise UserError(f"--model {source}: tokenizer.ggml.tokens is missing or is no list of strings: there is no tokenizer.")
    types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"--model {source}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens.")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(fields, tokens, source)
        elif kind == "llama":
            tokenizer = _sentencepiece(fields, tokens, types, source)
        else:
            raise UserError(f"--model {source}: tokenizer.ggml.model {kind!r:.80} is not supported (known: gpt2, llama).")
        _add_special(tokenizer, tokens, types)
    except UserError:
        raise
    except Exception as e:  # the library checks the merges against the vocabulary
        raise UserError(f"--model {source}: its tokenizer cannot be built: {e}.") from e
    _add_bos_eos(tokenizer, fields, tokens)
    return tokenizer


def _byte_level(fields: Mapping[str, Any], tokens: list[str], source: str) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE:
        raise UserError(f"--model {source}: tokenizer.ggml.pre {pre!r:.80} is not supported (known: {', '.join(_PRE)}).")
    style = _PRE[pre]
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) and " " in m[1:] for m in merges):
        raise UserError(f"--model {source}: tokenizer.ggml.merges is missing or damaged.")
    # A merge is two tokens with a space between them; byte-level tokens hold no space.
    pairs = [(left, right) for left, _, right in (m.partition(" ") for m in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=style == "llama3"))
    tokenizer.pre_tokenizer = _pre_tokenizer(style)
    tokenizer.decoder = decoders.ByteLevel()
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizer(style: str) -> pre_tokenizers.PreTokenizer:
    if style == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if style == "smollm":  # every digit by itself
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _pre_tokenizer("gpt2")])
    pattern = Regex(_LLAMA3 if style == "llama3" else _QWEN2)
    split = pre_tokenizers.Split(pattern, behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], types: list[int], source: str) -> Tokenizer:
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"--model {source}: tokenizer.ggml.scores is missing or has not one score per token.")
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocab=vocab,
        merges=merges_from_scores(normal, scores),
        unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def merges_from_scores(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the highest score: every way to split a token is a merge of that rank.

    This is also how a `tokenizer.json` is made from a SentencePiece model.
    """
    ranked = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[i], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control and user-defined tokens are found in the text before anything else; they keep their ids."""
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        texts = [token for token, t in zip(tokens, types, strict=True) if t == kind]
        add([AddedToken(text, normalized=False, special=kind == _CONTROL) for text in texts])


def _add_bos_eos(tokenizer: Tokenizer, fields: Mapping[str, Any], tokens: list[str]) -> None:
    """Make `add_special` put BOS and EOS around a text, where the metadata says so."""
    sentencepiece = fields.get("tokenizer.ggml.model") == "llama"
    llama3 = _PRE.get(fields.get("tokenizer.ggml.pre", "")) == "llama3"
    template: list[str] = ["$A"]
    used: dict[str, int] = {}
    for name, at, default in (("bos", 0, sentencepiece or llama3), ("eos", 2, False)):
        i = fields.get(f"tokenizer.ggml.{name}_token_id")
        if fields.get(f"tokenizer.ggml.add_{name}_token", default) and isinstance(i, int) and 0 <= i < len(tokens):
            template.insert(at, tokens[i])
            used[tokens[i]] = i
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(used.items()))

"""The tokenizers of GGUF files against llama.cpp's algorithms, written slowly: tokens, splits, ends of texts."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_vocabulary import CONTROL, USER_DEFINED, GGUFVocabulary, read_vocabulary
from minisgl.model.checkpoint.metadata import Metadata
from minisgl.model.text import gguf_tokenizer
from minisgl.model.text.gguf_splits import SPLITS

BYTES = [f"<0x{b:02X}>" for b in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(pieces: dict[str, float], types: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    """Metadata of a file with these pieces and scores; `types`: other types than that of normal tokens."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [(types or {}).get(p, 1) for p in pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
    } | {f"tokenizer.ggml.{k}": v for k, v in more.items()}


def byte_level(tokens: list[str], merges: list[str], **more: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    } | {f"tokenizer.ggml.{k}": v for k, v in more.items()}


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """llama.cpp's llm_tokenizer_spm_session by its definition: the best join of all, the leftmost of equals, again."""
    symbols = list(text)
    while True:
        unions = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not unions:
            break
        _, i = min(unions)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [t for s in symbols for t in ([s] if s in scores else [f"<0x{b:02X}>" for b in s.encode()])]


def expected(text: str, scores: dict[str, float], special: list[str]) -> list[str]:
    """The longest special tokens first; plain text at the beginning and behind a special token begins with a space."""
    fragments: list[tuple[bool, str]] = [(False, text)]
    for token in sorted(special, key=lambda s: -len(s)):
        cut: list[tuple[bool, str]] = []
        for found, fragment in fragments:
            parts = [fragment] if found else fragment.split(token)
            for n, part in enumerate(parts):
                cut += ([(True, token)] if n else []) + [(found, part)]
        fragments = cut
    out: list[str] = []
    begins = True
    for found, fragment in fragments:
        if found:
            out.append(fragment)
        elif fragment:
            out += joined((" " if begins else "").replace(" ", "▁") + fragment.replace(" ", "▁"), scores)
        begins = found or (begins and not fragment)
    return out


@pytest.mark.parametrize("seed", range(12))
def test_sentencepiece_joins_the_leftmost_of_the_best_scores_as_llama_cpp_does(seed: int) -> None:
    rng = random.Random(seed)
    letters = "ab▁" if seed % 3 else "a▁"
    pieces = {"".join(rng.choices(letters, k=rng.randint(1, 5))): 0.0 for _ in range(25)}
    pieces = {piece: float(rng.choice((0, 0, -1, -2, -3))) for piece in pieces}  # of which many are equal
    fields = sentencepiece(pieces, {rng.choice(list(pieces)): 4, rng.choice(list(pieces)): 5}, add_bos_token=False)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (2, 3, 4)]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    backend = gguf_tokenizer.build(fields, "x")
    for _ in range(60):
        text = "".join(rng.choices([*letters.replace("▁", " "), " " * 17, "é", "<s>", "<unk>", "\n"], k=rng.randint(0, 14)))
        assert backend.encode(text).tokens == expected(text, scores, special), text


def test_runs_of_spaces_are_cut_from_the_left() -> None:
    scores = {"▁" * n: -float(n) for n in (2, 4, 8, 16)} | {"▁": -9.0}
    backend = gguf_tokenizer.build(sentencepiece(scores, add_bos_token=False), "x")
    assert backend.encode(" " * 19).tokens == joined("▁" * 20, scores) == ["▁" * 16, "▁" * 4]


def test_a_long_token_and_a_long_text_cost_no_more_than_their_length() -> None:
    scores = {"a" * n: float(n) for n in (1, 2, 4)} | {"b" * 300_000: 0.0}
    backend = gguf_tokenizer.build(sentencepiece(scores), "x")
    assert len(backend.encode("a" * 50_000).ids) == 1 + 3 + 12_500  # BOS, a space in three bytes


def test_sentencepiece_begins_with_bos_and_ends_with_eos_as_the_file_says() -> None:
    assert gguf_tokenizer.build(sentencepiece({"▁a": 0.0}), "x").encode("a").tokens == ["<s>", "▁a"]
    fields = sentencepiece({"a": 0.0}, add_bos_token=False, add_eos_token=True, add_space_prefix=False, eos_token_id=259)
    assert gguf_tokenizer.build(fields, "x").encode("a").tokens == ["a", "a"]
    backend = gguf_tokenizer.build(sentencepiece({"▁a": 0.0}), "x")
    assert backend.encode("a", add_special_tokens=False).ids == [259]
    with pytest.raises(TypeError):
        backend.encode("\ud800")


# ---------------- the splits of byte-level vocabularies
@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["ab", "'", "s", "Ġ", "123", "456", "7", "!?", "Ġ", "Ġx"]),
        ("gpt-2", ["ab", "'s", "Ġ1234567", "!?", "Ġ", "Ġx"]),
        ("llama-bpe", ["ab", "'s", "Ġ", "123", "456", "7", "!?", "Ġ", "Ġx"]),
        ("deepseek-r1-qwen", ["ab", "'s", "Ġ", *"1234567", "!?", "Ġ", "Ġx"]),
        ("qwen2", ["ab", "'s", "Ġ", *"1234567", "!?", "Ġ", "Ġx"]),
        ("tekken", ["ab", "'s", "Ġ", *"1234567", "!?", "Ġ", "Ġx"]),
        ("gpt-4o", ["ab's", "Ġ", "123", "456", "7", "!?", "Ġ", "Ġx"]),
        ("smollm", ["ab", "'s", "Ġ", *"1234567", "!?", "Ġ", "Ġx"]),
        ("deepseek-v3", ["ab", "'s", "Ġ", "123", "456", "7", "!?", "Ġ", "Ġx"]),
        ("falcon", ["ab", "'", "s", "Ġ", "123", "456", "7", "!?", "Ġ", "Ġx"]),
    ],
)
def test_every_pre_tokenizer_splits_as_llama_cpp_s_expressions_do(pre: str, pieces: list[str]) -> None:
    splitter = SPLITS[pre].pre_tokenizer()
    found = [piece for piece, _ in splitter.pre_tokenize_str("ab's 1234567!?  x")]
    assert found == pieces


def test_tekken_splits_words_by_case_and_prefers_whole_tokens() -> None:
    pieces = [p for p, _ in SPLITS["tekken"].pre_tokenizer().pre_tokenize_str("camelCase ABc")]
    assert pieces == ["camel", "Case", "ĠABc"]
    fields = byte_level([*ALPHABET, "hello", "<s>"], ["h e"], pre="tekken", bos_token_id=len(ALPHABET) + 1)
    fields["tokenizer.ggml.tokens"].append("he")
    assert gguf_tokenizer.build(fields, "x").encode("hello").tokens == ["<s>", "hello"]


def test_an_unknown_pre_tokenizer_is_refused_by_name_and_a_missing_one_is_llama_cpp_s_default() -> None:
    fields = byte_level([*ALPHABET, "ab"], ["a b"])
    with pytest.raises(UserError, match=r"x: tokenizer\.ggml\.pre 'klingon' is not supported"):
        gguf_tokenizer.build(fields | {"tokenizer.ggml.pre": "klingon"}, "x")
    assert gguf_tokenizer.build(fields, "x").encode("12345").tokens == list("12345")
    assert [p for p, _ in gguf_tokenizer.build(fields, "x").pre_tokenizer.pre_tokenize_str("12345")] == ["123", "45"]


def test_no_merge_reaches_across_a_byte_that_is_no_token() -> None:
    tokens = [c for c in ALPHABET if c != "Ċ"] + ["ab"]
    backend = gguf_tokenizer.build(byte_level(tokens, ["a b"], pre="bloom"), "x")
    assert backend.encode("a\nb").tokens == ["a", "b"]


def test_bos_that_is_added_but_missing_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.bos_token_id is missing"):
        gguf_tokenizer.build(byte_level([*ALPHABET, "ab"], ["a b"], pre="llama-bpe"), "x")


# ---------------- what ends a text
def vocabulary(tokens: list[str], **more: Any) -> GGUFVocabulary:
    values = {"tokenizer.ggml.tokens": tokens} | {f"tokenizer.ggml.{k}": v for k, v in more.items()}
    return read_vocabulary(Metadata("x.gguf", values))


@pytest.mark.parametrize(
    "name", ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "</s>"]
)
def test_the_ends_of_turns_are_known_by_their_names(name: str) -> None:
    found = vocabulary(["a", "<|endoftext|>", "b", name], token_type=[1, 3, 1, 1], eos_token_id=1)
    assert found.ends == (1, 3)
    assert found.types[3] == CONTROL  # whatever the file says


def test_declared_ends_come_first_and_fill_in_the_middle_ends_too() -> None:
    tokens = ["<|endoftext|>", "x", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"]
    assert vocabulary(tokens, eos_token_id=2, eot_token_id=1).ends == (2, 1, 0, 3, 4, 5)
    assert vocabulary(["x", "y"], eos_token_id=1, fim_pad_token_id=0).ends == (1, 0)
    assert vocabulary(["x", "y"]).ends == ()
    assert vocabulary([str(i) for i in range(5)], model="llama").ends == (2,)


def test_the_end_of_a_message_is_no_end_of_a_turn_where_others_are() -> None:
    tokens = ["<|start|>", "<|end|>", "<|return|>", "<|call|>"]
    found = vocabulary(tokens, token_type=[3] * 4, eos_token_id=2)
    assert found.ends == (2, 3)
    assert found.types == [USER_DEFINED, USER_DEFINED, CONTROL, CONTROL]
    assert vocabulary(["</s>", "<|tool_response>"], token_type=[3, 3], eos_token_id=1).ends == (1,)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"tokens": 7}, "tokens"),
        ({"tokens": ["a", 1]}, "tokens"),
        ({"tokens": ["a", "a"]}, "tokens"),
        ({"token_type": 1}, "token_type"),
        ({"token_type": ["a", "b"]}, "token_type"),
        ({"token_type": [1]}, "token_type"),
        ({"eos_token_id": 1 << 32}, "eos_token_id"),
        ({"eos_token_id": 2}, "eos_token_id"),
        ({"eos_token_id": [0, 1]}, "eos_token_id"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"fim_pad_token_id": -1}, "fim_pad_token_id"),
        ({"scores": [0.0, float("nan")], "model": "llama"}, "scores"),
        ({"scores": [0.0, None], "model": "llama"}, "scores"),
        ({"add_bos_token": 1, "scores": [0.0, 0.0], "model": "llama"}, "add_bos_token"),
        ({"merges": [7], "model": "gpt2"}, "merges"),
        ({"model": ["gpt2"]}, "model"),
        ({"pre": ["gpt2"], "model": "gpt2"}, "pre"),
    ],
)
def test_damaged_vocabularies_are_refused_by_their_key(fields: dict[str, Any], key: str) -> None:
    values = {f"tokenizer.ggml.{k}": v for k, v in ({"tokens": ["a", "b"]} | fields).items()}
    with pytest.raises(UserError, match=rf"x\.gguf: tokenizer\.ggml\.{key} ") as e:
        gguf_tokenizer.build(values, "x.gguf")
    assert "\n" not in str(e.value)


def test_the_stand_in_has_what_the_library_s_tokenizer_has() -> None:
    backend = gguf_tokenizer.build(sentencepiece({"▁a": 0.0}), "x")
    assert backend.id_to_token(259) == "▁a"
    assert backend.decode([1, 259], skip_special_tokens=True) == "a"
    assert isinstance(backend.decoder, tokenizers.decoders.Decoder)

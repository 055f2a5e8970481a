"""How byte-level BPE vocabularies split a text into words before the merges: the values of tokenizer.ggml.pre.  No torch.

The rules are those of llama.cpp: `llm_tokenizer_bpe` in its src/llama-vocab.cpp has the expressions, `llama_vocab::impl::load`
the names and the settings.  Each expression splits what the former ones have left in one piece; what lies between two matches
is a piece as well.
"""

# ruff: noqa: RUF001  classes of characters
from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_SHORT = "'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_QWEN2 = rf"{_ANY_CASE}|{_WORD}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_ANY_CASE}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
# A letter is upper case unless it is one of a-z, and lower case unless it is one of A-Z.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_LETTERS = (  # letters of the scripts that have cases
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫ"
    "ᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-"
    "ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt2": (_GPT2,),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "qwen35": (
        rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "digits": (r"\p{N}", _GPT2),
    "tekken": (rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_REST}",),
    "gpt4o": (rf"{_CASED % (_ANY_CASE + '?', _ANY_CASE + '?')}|\p{{N}}{{1,3}}|{_CASED_REST}",),
    "deepseek3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _PUNCTUATED),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[一-龥ࠀ-一가-\ud7ff]+",
        r"\p{N}+",
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    "viking": (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"),
    "seed-coder": (
        rf"{_ANY_CASE}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "bailing": (
        rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "ufakzeka": (rf"{_WORD}|\p{{N}}|{_REST}",),
    "minicpm5": (r"\p{N}{1,3}", rf"{_ANY_CASE}|{_WORD}|\p{{N}}+|{_REST}"),
    "laguna": (r"[^\n]+|[\n]+", _QWEN2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Splits:
    """One value of tokenizer.ggml.pre."""

    expressions: tuple[str, ...]
    whole: bool = False  # a word that is a token stays whole, whatever the merges say
    begins: bool = False  # a text begins with BOS unless tokenizer.ggml.add_bos_token says otherwise

    def pre_tokenizer(self, absent: str = "") -> pre_tokenizers.PreTokenizer:
        """`absent`: letters of the byte alphabet that are no tokens.  They are lost, and no merge reaches across them."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(e), behavior="isolated", invert=False) for e in self.expressions
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        if absent:
            steps.append(pre_tokenizers.Split(Regex(f"[{re.escape(absent)}]"), behavior="isolated", invert=False))
        return pre_tokenizers.Sequence(steps)


def _named(kind: str, names: str, *, whole: bool = False, begins: bool = False) -> dict[str, Splits]:
    return dict.fromkeys(names.split(), Splits(_EXPRESSIONS[kind], whole, begins))


SPLITS: dict[str, Splits] = {
    **_named("default", "default"),
    **_named("gpt2", "gpt-2 gpt2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling"),
    **_named("llama3", "llama-bpe llama-v3 llama3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", whole=True, begins=True),
    **_named("llama3", "dbrx smaug-bpe chatglm-bpe"),
    **_named("llama3", "glm4 glm5", whole=True),
    **_named("qwen2", "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    **_named("qwen35", "qwen35"),
    **_named("digits", "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    **_named("tekken", "tekken", whole=True, begins=True),
    **_named("gpt4o", "gpt-4o llama4 kanana2 talkie minimax-m2"),
    **_named("deepseek3", "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    **_named("deepseek-llm", "deepseek-llm"),
    **_named("deepseek-coder", "deepseek-coder"),
    **_named("falcon", "falcon"),
    **_named("bloom", "poro-chat bloom gpt3-finnish"),
    **_named("viking", "viking"),
    **_named("seed-coder", "seed-coder"),
    **_named("bailing", "bailingmoe bailingmoe2 llada-moe"),
    **_named("ufakzeka", "ufakzeka"),
    **_named("minicpm5", "minicpm5", whole=True),
    **_named("laguna", "laguna"),
}

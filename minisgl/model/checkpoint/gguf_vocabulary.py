"""Reads the vocabulary of a GGUF file: the tokens, their types, and which of them end a text.  No torch, no tokenizer.

Published files mark these tokens badly: a chat model may name `<|endoftext|>` as its EOS and end its turns with `<|im_end|>`.
So llama.cpp knows them by their names as well, and so does this module: `llama_vocab::impl::load` in llama.cpp's
src/llama-vocab.cpp, "auto-detect special tokens by text" and "maintain a list of tokens that cause end-of-generation".
"""

# ruff: noqa: RUF001  names of tokens
from __future__ import annotations

from dataclasses import dataclass

from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
_PREFIX = "tokenizer.ggml."
# Where a SentencePiece file names none.  (llama.cpp also has defaults for byte-level files: token 11, which is Falcon's.)
_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}
_ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> "
    "_<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["
)
_FIM = {  # fill-in-the-middle: part -> the other key that files have for it, names of its token
    "pre": ("prefix", "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>"),
    "suf": ("suffix", "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>"),
    "mid": ("middle", "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>"),
    "pad": ("", "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]"),
    "rep": ("", "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>"),
    "sep": ("", "<|file_sep|>"),
}
_TEXT = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # the channels of gpt-oss are shown


@dataclass(frozen=True, slots=True)
class GGUFVocabulary:
    """The tokens by id, and their types where names have overridden those of the file.

    `bos`, `eos` and `unknown` are None where there is no such token; `ends` has every id that ends a text, EOS first.
    """

    tokens: list[str]
    types: list[int]
    bos: int | None
    eos: int | None
    unknown: int | None
    ends: tuple[int, ...]


def read_vocabulary(fields: Metadata) -> GGUFVocabulary:
    """The vocabulary in the metadata; empty lists without tokens.  Raises UserError naming the key that is damaged."""
    tokens = fields.strings(f"{_PREFIX}tokens")
    types = _types(fields, len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise UserError(f"{fields.source}: {_PREFIX}tokens has {twice!r:.80} twice.")
    found = {part: _fim(fields, part, ids) for part in _FIM}
    by_name = [ids[name] for name in _ENDS.split() if name in ids]
    for token in (*by_name, *(i for named, i in found.values() if named and i is not None)):
        types[token] = CONTROL
    for name in _TEXT:
        if name in ids:
            types[ids[name]] = USER_DEFINED
    declared = [_special(fields, name, len(tokens)) for name in ("eos", "eot", "eom")]
    extra = {*by_name, *(i for part in ("pad", "rep", "sep") if (i := found[part][1]) is not None)}
    ends = tuple(dict.fromkeys([*(i for i in declared if i is not None), *sorted(extra)]))
    for name, kind in _not_ends({tokens[i] for i in ends if i < len(tokens)}).items():
        types[ids[name]] = kind
        ends = tuple(i for i in ends if i != ids[name])
    bos, unknown = (_special(fields, name, len(tokens)) for name in ("bos", "unknown"))
    return GGUFVocabulary(tokens, types, bos, declared[0], unknown, ends)


def _types(fields: Metadata, n: int) -> list[int]:
    key = f"{_PREFIX}token_type"
    types = fields.get(key)
    if types is None or not n:
        return [NORMAL] * n
    if not isinstance(types, list) or len(types) != n or not all(type(t) is int for t in types):
        size = f"{len(types)} entries" if isinstance(types, list) else repr(types)[:80]
        raise UserError(f"{fields.source}: {key} should be one number for each of the {n} tokens, has {size}.")
    return list(types)


def _special(fields: Metadata, name: str, n: int) -> int | None:
    """The token id under a key; None where there is none."""
    key = f"{_PREFIX}{name}_token_id"
    found = fields.token_ids(key)
    if len(found) > 1 or (found and n and found[0] >= n):
        raise UserError(f"{fields.source}: {key} is {fields.get(key)!r:.80}, which is no id of one of the {n} tokens.")
    default = _DEFAULTS.get(name, n) if fields.get(f"{_PREFIX}model") == "llama" else n
    return found[0] if found else default if default < n else None


def _fim(fields: Metadata, part: str, ids: dict[str, int]) -> tuple[bool, int | None]:
    """(whether only its name tells, id) of a token for filling in the middle."""
    other, names = _FIM[part]
    keys = (f"fim_{part}", other) if other else (f"fim_{part}",)
    declared = [i for name in keys if (i := _special(fields, name, len(ids))) is not None]
    if declared:
        return False, declared[-1]
    return True, next((ids[name] for name in names.split() if name in ids), None)


def _not_ends(names: set[str]) -> dict[str, int]:
    """Names that other vocabularies end with -> what they are in one that has all of these `names` for ends."""
    calls = names & {"<|call|>", "<|calls|>"}
    harmony = "<|end|>" in names and calls and names & {"<|return|>", "<|flush|>"}  # <|end|> ends a message, not the turn
    plain = "</s>" in names and names & {"<|tool_response>", "<|plamo:eos|>"}
    return ({"<|end|>": USER_DEFINED} if harmony else {}) | ({"</s>": NORMAL} if plain else {})

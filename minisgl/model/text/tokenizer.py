"""Text to token ids and back, for GGUF files and for directories in Hugging Face's layout.  No torch.

Built on the `tokenizers` library; `transformers` is imported only for a checkpoint that has no tokenizer.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from minisgl.arrays import I32
from minisgl.config import ModelSpec
from minisgl.errors import InvalidParam, RequestError, UserError
from minisgl.model.text.chat_template import ChatTemplate
from minisgl.model.text.detokenize import ByteStream, DecodeState, WindowStream

_PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
_SPACE = "\u2581"  # SentencePiece writes a space as this


class Tokenizer:
    """The tokenizer of one model.  `vocab_size` is the model's: ids at or above it have no embedding and are refused."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        template: ChatTemplate | None,
    ) -> None:
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self._backend = backend
        self._template = template
        backend.no_truncation()  # a tokenizer.json may carry the settings of its training
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._adds_bos = bos_id is not None and backend.encode("", add_special_tokens=True).ids[:1] == [bos_id]

    # ---------------- text -> ids
    def encode(self, text: str, add_special: bool, field: str = "prompt") -> I32:
        """i32[n].  The text of a special token becomes that token; `add_special` adds the tokenizer's own (BOS).

        A text that begins with BOS is not given a second one.  Raises InvalidParam naming `field` when the
        text is not Unicode or needs a token that the model does not have.
        """
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special)
        except TypeError as e:  # what the library says to half a surrogate pair
            raise InvalidParam(field, f"{field} holds a lone surrogate (half of a character), which is not text.") from e
        ids = np.array(encoding.ids, np.int32)
        if len(ids) and ids.max() >= self.vocab_size:
            token = self._backend.id_to_token(int(ids.max()))
            raise InvalidParam(field, f"{field} holds the token {token!r}, which this model has no embedding for.")
        return ids[1:] if add_special and self._adds_bos and ids[1:2].tolist() == [self.bos_id] else ids

    def encode_chat(self, payload: bytes) -> I32:
        """i32[n] of the JSON {"messages": [...], "kwargs": {...}}: the chat template's text.

        A tokenizer that begins texts with BOS begins a conversation with exactly one, whether or not the template writes it.
        Raises RequestError 400 when the payload is no conversation, or when there is no template or it refuses the messages.
        """
        if self._template is None:
            raise RequestError(
                "This model has no chat template: use /v1/completions with a prompt instead.",
                param="messages",
                code="no_chat_template",
            )
        try:
            request = json.loads(payload)
        except (ValueError, RecursionError) as e:
            raise InvalidParam("messages", f"messages cannot be read: {e}.") from e
        kwargs = request.get("kwargs") if isinstance(request, dict) else None
        if not isinstance(request, dict) or not isinstance(kwargs, dict | None):
            raise InvalidParam("messages", 'a conversation is {"messages": [...], "kwargs": {...}}.')
        text = self._template.render(request.get("messages"), kwargs or {})
        ids = self.encode(text, add_special=False, field="messages")
        if not self._adds_bos:
            return ids
        begun = next((i for i, token in enumerate(ids.tolist()) if token != self.bos_id), len(ids))
        return ids[begun - 1 :] if begun else np.array([self.bos_id, *ids.tolist()], np.int32)

    def describe(self) -> dict[str, Any]:
        """What a client needs to know that counts or encodes by itself: the special tokens, and the template's source."""

        def name(token: int | None) -> str | None:
            return None if token is None else self._backend.id_to_token(token)

        return {
            "tokenizer_class": type(self._backend.model).__name__,
            "vocab_size": self.vocab_size,
            "bos_token": name(self.bos_id),
            "bos_token_id": self.bos_id,
            "eos_token": name(next(iter(self.eos_ids), None)),
            "eos_token_id": next(iter(self.eos_ids), None),
            "eos_token_ids": list(self.eos_ids),
            "adds_bos": self.bos_id is not None and self.encode("a", True)[:1].tolist() == [self.bos_id],
            "chat_template": None if self._template is None else self._template.source,
        }

    # ---------------- ids -> text
    def decode(self, ids: Iterable[int], skip_special: bool) -> str:
        """The text of a whole sequence; incomplete characters become U+FFFD, ids that do not exist nothing."""
        if self._table is None:
            return self._decode_slowly(list(map(int, ids)), skip_special)
        state = self.stream(skip_special)
        text = "".join([*map(state.push, map(int, ids)), state.flush()])
        return text.removeprefix(" ") if self.strips_space else text

    def stream(self, skip_special: bool) -> DecodeState:
        """An empty DecodeState for the tokens that continue a text.

        Its pieces join to `decode` of the tokens, but for the space that SentencePiece drops at the very beginning of a
        text: a continuation needs it.
        """
        if self._table is None:
            return WindowStream(lambda ids: self._decode_slowly(ids, skip_special))
        return ByteStream(self._table, self._special if skip_special else frozenset())

    def piece(self, token: int) -> bytes:
        """The bytes of one token, perhaps less than a character; of a special token its name, b"" if there is no such id."""
        if self._table is None:
            return self._decode_slowly([token], False).encode()
        return self._table[token] if 0 <= token < len(self._table) else b""

    def _decode_slowly(self, ids: Sequence[int], skip_special: bool) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special)
        return text

    @cached_property
    def _decoders(self) -> list[dict[str, Any]]:
        """The settings of the backend's decoders, in order."""
        decoder = self._backend.decoder
        state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
        return list(state["decoders"]) if state["type"] == "Sequence" else [state]

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: `skip_special` leaves them out."""
        return self._special

    @property
    def strips_space(self) -> bool:
        """Whether the space at the very beginning of a text is dropped."""
        return bool(self._decoders[-1]["type"] == "Strip")

    @cached_property
    def _table(self) -> list[bytes] | None:
        """The bytes of every token by id; None for a tokenizer whose tokens have no bytes of their own."""
        kinds = [d["type"] for d in self._decoders]
        if kinds == ["ByteLevel"]:
            to_bytes = _byte_level_bytes
        elif _is_sentencepiece(self._decoders):
            to_bytes = _sentencepiece_bytes
        else:
            return None
        vocab = self._backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            table[i] = to_bytes(token)
        if kinds == ["ByteLevel"]:
            for i, added in self._backend.get_added_tokens_decoder().items():
                table[i] = added.content.encode()  # written as it is, not in the byte alphabet
        return table


def _is_sentencepiece(settings: list[dict[str, Any]]) -> bool:
    kinds = [d["type"] for d in settings]
    if kinds not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return False
    replace, strip = settings[0], settings[-1]
    if (replace["pattern"], replace["content"]) != ({"String": _SPACE}, " "):
        return False
    return kinds[-1] == "Fuse" or strip == {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for every byte.  Printable ones are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:  # not in the byte alphabet: text
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass
    return token.replace(_SPACE, " ").encode()


# ---------------- loading
def load_tokenizer(spec: ModelSpec, chat_template: str = "") -> Tokenizer:
    """Read the tokenizer that belongs to a checkpoint.  `chat_template`: a file to use instead of the checkpoint's own.

    Raises UserError naming the file that is missing or unusable.
    """
    load = _from_gguf if _in_gguf(spec) else _from_nothing if spec.format in ("random", "fake") else _from_directory
    backend, sources, specials = load(spec)
    for name, ids in (("bos_token", (spec.bos_id,)), ("eos_token", spec.eos_ids)):
        token = next((backend.id_to_token(i) for i in ids if i is not None), None)
        if token is not None:
            specials.setdefault(name, token)
    if chat_template:
        sources = {"default": _read_template(chat_template)}
    template = ChatTemplate(sources, specials) if sources else None
    if chat_template and template is not None and (fault := template.fault()) is not None:
        raise UserError(f"--chat-template {chat_template}: cannot be used: {fault}")
    return Tokenizer(backend, vocab_size=spec.vocab_size, bos_id=spec.bos_id, eos_ids=spec.eos_ids, template=template)


def _read_template(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except OSError as e:
        raise UserError(f"--chat-template {path}: cannot read it: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--chat-template {path}: is not UTF-8 text: {e.reason} at byte {e.start}.") from e


def chat_templates(spec: ModelSpec, chat_template: str = "") -> dict[str, str]:
    """The chat templates by name as they are written: of a checkpoint, or the one in the file `chat_template`.

    Raises UserError for files that cannot be read.
    """
    if chat_template:
        return {"default": _read_template(chat_template)}
    if _in_gguf(spec):
        from minisgl.model.checkpoint.gguf_file import GGUFFile

        return _gguf_templates(GGUFFile.open(spec.path).fields)
    return _directory_templates(spec.path) if spec.path else {}


_Loaded = tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]  # backend, templates by name, special tokens by name


def _in_gguf(spec: ModelSpec) -> bool:
    return spec.format == "gguf" or (spec.format == "fake" and spec.path != "")


def _from_gguf(spec: ModelSpec) -> _Loaded:
    from minisgl.model.checkpoint.gguf_file import GGUFFile
    from minisgl.model.text import gguf_tokenizer

    fields = GGUFFile.open(spec.path).fields
    sources = _gguf_templates(fields)
    tokens = fields.get("tokenizer.ggml.tokens") or []
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    short = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    specials = {short[name]: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return gguf_tokenizer.build(fields, spec.path), sources, specials


def _gguf_templates(fields: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    sources = {"default": fields[key]} if isinstance(fields.get(key), str) else {}
    for name in fields.get("tokenizer.chat_templates") or ():
        if isinstance(fields.get(f"{key}.{name}"), str):
            sources[name] = fields[f"{key}.{name}"]
    return sources


def _from_nothing(spec: ModelSpec) -> _Loaded:
    """For a model without files: every byte is a token."""
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE(dict(_ALPHABET), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend, {"default": _PLAIN_TEMPLATE} if spec.format == "fake" else {}, {}


def _from_directory(spec: ModelSpec) -> _Loaded:
    config = _read_json(os.path.join(spec.path, "tokenizer_config.json"))
    sources = _directory_templates(spec.path)
    specials = _special_tokens(_read_json(os.path.join(spec.path, "special_tokens_map.json"))) | _special_tokens(config)
    path = os.path.join(spec.path, "tokenizer.json")
    if not os.path.isfile(path):
        return _with_transformers(spec.path), sources, specials
    try:
        return tokenizers.Tokenizer.from_file(path), sources, specials
    except Exception as e:  # the library raises plain Exceptions
        raise UserError(f"{path}: cannot be used as a tokenizer: {e}.") from e


def _directory_templates(path: str) -> dict[str, str]:
    sources = _templates(_read_json(os.path.join(path, "tokenizer_config.json")).get("chat_template"))
    sources |= _templates(_read_json(os.path.join(path, "chat_template.json")).get("chat_template"))
    jinja = os.path.join(path, "chat_template.jinja")
    if os.path.isfile(jinja):
        with open(jinja, encoding="utf-8") as f:
            sources["default"] = f.read()
    return sources


def _with_transformers(path: str) -> tokenizers.Tokenizer:
    """The last resort: slow to import, but able to convert older formats."""
    try:
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False).backend_tokenizer
    except Exception as e:
        backend, why = None, f"transformers says: {e}"
    else:
        why = "transformers found no tokenizer there that the tokenizers library can run"
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UserError(f"--model {path}: there is no tokenizer.json in it, and {why:.500}. Add the model's tokenizer.json.")
    return backend


def _read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file.  Raises UserError if it is something else."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as JSON: {e}.") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, holds a {type(value).__name__}.")
    return value


def _templates(value: Any) -> dict[str, str]:
    """One template, or several with names."""
    if isinstance(value, str):
        return {"default": value}
    named = value if isinstance(value, list) else []
    return {str(t["name"]): t["template"] for t in named if isinstance(t, dict) and isinstance(t.get("template"), str)}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ...: each a string or an object with its `content`."""
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
    return {k: v for k, v in texts.items() if isinstance(v, str)}

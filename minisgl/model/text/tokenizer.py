"""Encodes text to token ids and decodes them again, with the tokenizer of a checkpoint of any format.  No torch.

Built on the `tokenizers` library; `transformers` is imported only for a checkpoint that has no tokenizer.json.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import cache, cached_property
from typing import Any

import numpy as np
import tokenizers

from minisgl.arrays import I32
from minisgl.config import ModelSpec
from minisgl.errors import InvalidParam, RequestError, UserError
from minisgl.model.checkpoint.files import check_size, read_json, reason
from minisgl.model.text.added_tokens import complete
from minisgl.model.text.chat_format import chat_templates, in_gguf
from minisgl.model.text.chat_template import ChatTemplate
from minisgl.model.text.conversation import shape_of
from minisgl.model.text.detokenize import ByteStream, DecodeState, WindowStream
from minisgl.model.text.guard import check_tokenizer, one_sentence
from minisgl.model.text.token_bytes import BYTE_ALPHABET, SPACE, decoders_of, token_bytes

_KEPT = 8  # templates of requests, compiled


class Tokenizer:
    """The tokenizer of one model.  `vocab_size` is the model's: ids at or above it have no embedding and are refused.

    `special_ids` are tokens that are no text; `skip_special` leaves them out.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        spec: ModelSpec,
        template: ChatTemplate | None,
        specials: Mapping[str, str] | None = None,
    ) -> None:
        self.vocab_size, self.bos_id, self.eos_ids = spec.vocab_size, spec.bos_id, spec.eos_ids
        self._backend = backend
        self._template = template
        self._specials = specials or {}  # special tokens by name, for templates of requests
        self._given: dict[str, ChatTemplate] = {}  # the latest of them
        backend.no_truncation()  # a tokenizer.json may carry the settings of its training
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._adds_bos = self.bos_id is not None and backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    # ---------------- text -> ids
    def encode(self, text: str, add_special: bool, field: str = "prompt", keep: int = 0) -> I32:
        """i32[n].  The text of a special token becomes that token; `add_special` adds the tokenizer's own (BOS).

        `keep`: only so many tokens (0: all), of which the tokenizer's own are the last to go.

        A text that begins with BOS is not given a second one.  Raises InvalidParam naming `field` when the
        text is not Unicode or needs a token that the model does not have.
        """
        if keep:
            own = self._backend.num_special_tokens_to_add(is_pair=False) if add_special else 0
            self._backend.enable_truncation(max(keep, own))
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special)
        except TypeError as e:  # the library's error for half a surrogate pair
            raise InvalidParam(field, f"{field} holds a lone surrogate (half of a character), which is not text.") from e
        finally:
            if keep:
                self._backend.no_truncation()
        ids = self._checked(encoding.ids[: keep or None], field)
        return ids[1:] if add_special and self._adds_bos and ids[1:2].tolist() == [self.bos_id] else ids

    def _checked(self, encoded: list[int], field: str) -> I32:
        ids = np.array(encoded, np.int32)
        if len(ids) and ids.max() >= self.vocab_size:
            token = self._backend.id_to_token(int(ids.max()))
            raise InvalidParam(field, f"{field} holds the token {token!r}, which this model has no embedding for.")
        return ids

    def encode_chat(self, payload: bytes) -> I32:
        """i32[n] of a conversation, see `read_chat`."""
        return self.read_chat(payload)[0]

    def read_chat(self, payload: bytes) -> tuple[I32, list[tuple[int, int, int]]]:
        """i32[n] and the shape (see conversation.shape_of) of a conversation, as the chat template writes it.

        `payload`: the JSON {"messages": [...], "kwargs": {...}}.
        A tokenizer that begins texts with BOS begins a conversation with exactly one, whether or not the template writes it.
        Raises RequestError 400 when the payload is no conversation, when there is no template, or when it refuses the messages.
        """
        try:
            request = json.loads(payload)
        except (ValueError, RecursionError) as e:
            raise InvalidParam("messages", f"messages cannot be read: {e}.") from e
        kwargs = request.get("kwargs") if isinstance(request, dict) else None
        if not isinstance(request, dict) or not isinstance(kwargs, dict | None):
            raise InvalidParam("messages", 'a conversation is {"messages": [...], "kwargs": {...}}.')
        text = self._template_for(request.get("template")).render(request.get("messages"), kwargs or {})
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except TypeError as e:  # as in `encode`
            raise InvalidParam("messages", "messages holds a lone surrogate (half of a character), which is not text.") from e
        ids, more = self._checked(encoding.ids, "messages"), 0
        if self._adds_bos:
            begun = next((i for i, token in enumerate(ids.tolist()) if token != self.bos_id), len(ids))
            more = 1 - begun
            ids = ids[begun - 1 :] if begun else np.array([self.bos_id, *ids.tolist()], np.int32)

        def place(char: int) -> int | None:
            token = encoding.char_to_token(char)
            return None if token is None else token + more

        return ids, shape_of(request["messages"], text, place)

    def _template_for(self, given: str | None) -> ChatTemplate:
        """The template of a request, or the model's own.  Raises RequestError 400 if there is none."""
        if given:
            if given not in self._given:
                self._given = dict([*self._given.items()][1 - _KEPT :])
                self._given[given] = ChatTemplate({"default": given}, self._specials)
            if (fault := self._given[given].fault()) is not None:
                raise InvalidParam("chat_template", f"chat_template cannot be used: {fault}.")
            return self._given[given]
        if self._template is None:
            raise RequestError(
                "This model has no chat template: use /v1/completions with a prompt instead.",
                param="messages",
                code="no_chat_template",
            )
        return self._template

    def describe(self) -> dict[str, Any]:
        """The special tokens and the template's source, for clients that count or encode tokens themselves."""

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
        """The text of a whole sequence; an incomplete character becomes U+FFFD, an id that does not exist has no text."""
        if self._table is None:
            return self._decode_slowly(map(int, ids), self.special_ids if skip_special else frozenset())
        state, ids = self.stream(skip_special), list(map(int, ids))
        pieces = [*map(state.push, ids), state.flush()]
        first = next((i for i, piece in enumerate(pieces[:-1]) if piece), None)
        if first is not None:
            pieces[first] = self.opening(ids[first], pieces[first])
        return "".join(pieces)

    def stream(self, skip_special: bool, marks: Iterable[str] = ()) -> DecodeState:
        """An empty DecodeState for the tokens that continue a text.  Special tokens that hold one of `marks` are always shown.

        Its pieces join to `decode` of the tokens, except for the space that SentencePiece drops at the very beginning of a
        text: a continuation needs it.
        """
        skip = self.special_without(tuple(marks)) if skip_special else frozenset()
        if self._table is None:
            before = self._backend.encode("a", add_special_tokens=False).ids[:1]
            return WindowStream(lambda ids: self._decode_slowly(ids, skip), before)
        return ByteStream(self._table, skip)

    @cache  # noqa: B019  there is one tokenizer in a process
    def special_without(self, marks: tuple[str, ...]) -> frozenset[int]:
        """The special tokens that hold none of `marks`."""
        names = {i: self._backend.id_to_token(i) or "" for i in self.special_ids} if marks else {}
        return self.special_ids - {i for i, name in names.items() if any(mark in name for mark in marks)}

    def opening(self, token: int, piece: str) -> str:
        """The first piece of `stream` with text, that of `token`, as it is at the very beginning of a text: without a space."""
        if self._drops == "Metaspace":
            text = self._backend.id_to_token(token) or ""
            return text.replace(SPACE, "") if SPACE in text else piece
        return piece.removeprefix(" ") if self._drops == "Strip" else piece

    def piece(self, token: int) -> bytes:
        """The bytes of one token, perhaps less than a character; of a special token its name; b"" for an unknown id."""
        if self._table is None:
            return self._decode_slowly([token], frozenset()).encode()
        return self._table[token] if 0 <= token < len(self._table) else b""

    def _decode_slowly(self, ids: Iterable[int], skip: AbstractSet[int]) -> str:
        return str(self._backend.decode([i for i in ids if i not in skip], skip_special_tokens=False))

    @cached_property
    def _drops(self) -> str:
        """The kind of decoder that drops spaces at the very beginning of a text; "" for none."""
        if self._table is None:
            one = self._backend.encode("a", add_special_tokens=False).ids[:1]
            text = self._decode_slowly(one, frozenset())
            return "Strip" if self._decode_slowly(one * 2, frozenset()) == f"{text} {text}" else ""
        last = decoders_of(self._backend)[-1]
        kept = last["type"] == "Metaspace" and last["prepend_scheme"] == "never"
        return last["type"] if last["type"] in ("Strip", "Metaspace") and not kept else ""

    @cached_property
    def _table(self) -> list[bytes] | None:
        return token_bytes(self._backend)


# ---------------- loading
_WORD = (
    next(char for char, byte in BYTE_ALPHABET.items() if byte == ord(" ")) + "w"
)  # begins the words of a model without files
_PACKAGES = "pip install sentencepiece protobuf"
_CONVERT = 'python -c "from transformers import AutoTokenizer as T; T.from_pretrained({path!r}).save_pretrained({path!r})"'
_OLDER = ("*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json")
_Loaded = tuple[tokenizers.Tokenizer, dict[str, str], dict[str, str]]  # backend, special tokens and chat templates by name


def load_tokenizer(spec: ModelSpec, chat_template: str = "") -> Tokenizer:
    """Read the tokenizer that belongs to a checkpoint.  `chat_template`: a file to use instead of the checkpoint's own.

    Raises UserError naming the file that is missing or unusable.
    """
    load = _from_gguf if in_gguf(spec) else _one_token_per_byte if spec.format in ("random", "fake") else _from_directory
    backend, specials, templates = load(spec)
    for name, ids in (("bos_token", (spec.bos_id,)), ("eos_token", spec.eos_ids)):
        token = next((backend.id_to_token(i) for i in ids if i is not None), None)
        if token is not None:
            specials.setdefault(name, token)
    if chat_template:
        templates = chat_templates(spec, chat_template)
    template = ChatTemplate(templates, specials) if templates else None
    if chat_template and template is not None and (fault := template.fault()) is not None:
        raise UserError(f"--chat-template {chat_template}: cannot be used: {fault}")
    return Tokenizer(backend, spec, template, specials)


def _from_gguf(spec: ModelSpec) -> _Loaded:
    from minisgl.model.checkpoint.gguf_file import GGUFFile
    from minisgl.model.text import gguf_tokenizer

    fields = GGUFFile(spec.path).fields
    backend = gguf_tokenizer.build(fields, spec.path)
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    specials = {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return backend, specials, chat_templates(spec, fields=fields)


def _one_token_per_byte(spec: ModelSpec) -> _Loaded:
    """The tokenizer of a model without files.  A byte of a text is a token; other tokens, which only a model says, are words.

    Without a text for each token, streams would hold back what they cannot show, and measurements would see nothing of it.
    """
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = dict(BYTE_ALPHABET)
    words = {f"{_WORD}{i:x}": i for i in range(len(alphabet), spec.vocab_size)}
    backend = tokenizers.Tokenizer(models.BPE(alphabet | words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend, {}, chat_templates(spec)


def _from_directory(spec: ModelSpec) -> _Loaded:
    specials: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, token in read_json(spec.path, file, optional=True).items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                specials[name] = text
    templates = chat_templates(spec)
    path = os.path.join(spec.path, "tokenizer.json")
    if not os.path.isfile(path):
        backend = _with_transformers(spec.path)
    else:
        check_size(path)
        with one_sentence(f"{path}: cannot be used as a tokenizer"):
            backend = tokenizers.Tokenizer.from_file(path)
        complete(backend, spec.path, spec.vocab_size)
    check_tokenizer(backend, path)
    return backend, specials, templates


def _with_transformers(path: str) -> tokenizers.Tokenizer:
    """The last resort: slow to import, but able to convert older formats."""
    why, way = "none of the older files that transformers can convert", ""
    try:
        if any(glob.glob(pattern, root_dir=path) for pattern in _OLDER):
            from transformers import AutoTokenizer

            backend = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False).backend_tokenizer
            if isinstance(backend, tokenizers.Tokenizer) and backend.encode("a", add_special_tokens=False).ids:
                return backend
            why = "transformers found no tokenizer there that the tokenizers library can run"
    except Exception as e:
        why = f"transformers says: {reason(e)}"
        if glob.glob("*.model", root_dir=path) and importlib.util.find_spec("sentencepiece") is None:
            why = f"to convert a SentencePiece model, two packages have to be installed: {_PACKAGES}"
            way = f" Or write it where they are installed: {_CONVERT.format(path=path)}."
    raise UserError(f"--model {path}: there is no tokenizer.json in it, and {why:.500}.{way} Add the model's tokenizer.json.")

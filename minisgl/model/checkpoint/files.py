"""Reads the files of a checkpoint directory in Hugging Face's layout: JSON objects and safetensors.  No torch at import."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from minisgl.errors import UserError

# What programs put before the names of a model's tensors: torch.compile, DistributedDataParallel, PEFT; and the text part of a
# model that also takes images.
_WRAPPED = re.compile(r"(?:(?:^|(?<=\.))_orig_mod\.)|(?:^(?:module\.)+)|(?:^base_model\.model\.)")
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


MAX_TEXT = 8 << 20  # bytes of a file of settings
MAX_HEADER = 32 << 20  # bytes of the names and shapes in a *.safetensors file
_MAX_BYTES = {INDEX: 64 << 20, "tokenizer.json": 64 << 20}  # they grow with the model


def is_id(text: str) -> bool:
    """Whether a key of a JSON object is the number of a token."""
    return text.isascii() and text.isdigit() and len(text) < 10


def reason(error: BaseException) -> str:
    """What a library says, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_size(file: str) -> None:
    """Raises UserError for a file of settings that is too large to be one, or that is no file."""
    most = _MAX_BYTES.get(os.path.basename(file), MAX_TEXT)
    try:
        size = os.path.getsize(file)
    except OSError as e:
        raise UserError(f"{file}: cannot read it: {e.strerror}.") from e
    if size > most:
        raise UserError(f"{file}: has {size} bytes; more than {most >> 20} MiB are not read.")


def read_text(*path: str) -> str:
    """A file of UTF-8 text.  Raises UserError naming the file when it is something else or too large."""
    file = os.path.join(*path)
    check_size(file)
    try:
        with open(file, encoding="utf-8") as f:
            return f.read()
    except OSError as e:
        raise UserError(f"{file}: cannot read it: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: is not UTF-8 text: {e.reason} at byte {e.start}.") from e


def read_json(*path: str, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; `optional`: {} where there is no such file.  Raises UserError naming the file."""
    file = os.path.join(*path)
    if optional and not os.path.isfile(file):
        return {}
    try:
        text = read_text(file)
        value = json.loads(text)
        if _HALF.search(text):  # perhaps without its other half, and then it is no text that a library would take
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{file}: holds half of a surrogate pair, which is not text.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not valid JSON ({e}).") from e
    if not isinstance(value, dict):
        raise UserError(f"{file}: should hold a JSON object, holds a {type(value).__name__}.")
    return value


def weight_files(path: str) -> list[str]:
    """The *.safetensors files of a directory: those of its index, else model.safetensors, else all.  Raises UserError."""
    index = os.path.join(path, INDEX)
    if not os.path.isfile(index):
        single = os.path.join(path, SINGLE)
        return [single] if os.path.isfile(single) else sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and os.path.basename(n) == n for n in names.values()):
        raise UserError(f"{index}: weight_map should map tensor names to file names in the same directory.")
    return [os.path.join(path, n) for n in sorted(set(names.values()))]


def plain_name(stored: str) -> tuple[str, bool]:
    """The name of a tensor as a text model's own checkpoint has it, and whether `stored` says that it is of the text part."""
    name, before = stored, ""
    while name != before:
        name, before = _WRAPPED.sub("", name), name
    text = _TEXT.match(name)
    name = name[text.end() :] if text else name.removeprefix("model.")
    return (name if name.startswith("lm_head.") else f"model.{name}"), text is not None


class SafetensorsFiles:
    """All tensors of a directory's *.safetensors files by their plain names; remembers which were used.

    Where some names have the prefix of a text part, the others but the LM head's are of no concern here.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._used: set[str] = set()
        self._stored: dict[str, tuple[Any, str]] = {}  # plain name -> open file, name in it
        beside, text = set(), False
        for file in weight_files(path):
            opened = _open(file)
            for stored in map(str, opened.keys()):
                name, is_text = plain_name(stored)
                if name in self._stored:
                    raise UserError(f"--model {path}: {stored} and {self._stored[name][1]} are two names of one tensor.")
                self._stored[name] = opened, stored
                text |= is_text
                if not is_text and not name.startswith("lm_head."):
                    beside.add(name)
        self._beside = beside if text else set()

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stored if name not in self._beside)

    def _lazy(self, name: str) -> Any:
        file, stored = self._stored[name]
        return file.get_slice(stored)

    def dtype(self, name: str) -> str:
        """The dtype by its name in safetensors: "BF16", "F8_E4M3", ..."""
        return str(self._lazy(name).get_dtype())

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Any:
        """A lazy slice, and `name` counts as used.  Raises UserError naming a tensor that is missing or not of that shape."""
        if name not in self._stored:
            key = self.key_of(name)
            raise UserError(f"--model {self.path}: the checkpoint lacks the tensor {name}; see {key} in config.json.")
        self._used.add(name)
        lazy = self._lazy(name)
        if shape is not None:
            check_shape(self.path, name, tuple(lazy.get_shape()), shape)
        return lazy

    def key_of(self, name: str) -> str:
        """The key of config.json that decides whether there is a tensor `name`; `architectures` if no other does."""
        layer = re.match(r"model\.layers\.\d+\.", name)
        if layer and {n for n in self._stored if n.startswith(layer[0])} <= (set() if name not in self else set(self.unused())):
            return "num_hidden_layers"
        return next((key for part, key in _KEYS.items() if part in name), "architectures")

    def unused(self) -> list[str]:
        return [n for n in self if n not in self._used]


_KEYS = {  # part of a tensor's name -> the key of config.json that decides whether there is one
    "lm_head.": "tie_word_embeddings",
    ".bias": "attention_bias",
    ".experts.": "num_experts",
    "_scale": "quantization_config",
    "zeros": "quantization_config",
}


def _open(path: str) -> Any:
    from safetensors import SafetensorError, safe_open

    opener: Callable[..., Any] = safe_open
    try:
        with open(path, "rb") as f:  # a header of JSON behind its length
            header = int.from_bytes(f.read(8), "little")
        if header > MAX_HEADER:
            raise UserError(f"--model: {path} is damaged: its header would have {header} bytes. Download it again.")
        return opener(path, framework="pt")
    except FileNotFoundError as e:
        raise UserError(f"--model: {path} is named by the index but missing. Is the download complete?") from e
    except (SafetensorError, OSError) as e:
        raise UserError(f"--model: {path} is truncated or damaged ({reason(e)}). Download it again.") from e


# ---------------- complaints about tensors, of every format
_SIZES = {  # part of a tensor's name -> the keys of config.json that it depends on
    "attn": "hidden_size, num_attention_heads, num_key_value_heads, head_dim",
    "expert": "hidden_size, moe_intermediate_size, intermediate_size, num_experts",
    "mlp": "hidden_size, intermediate_size, num_experts",
    "ffn": "hidden_size, intermediate_size",
    "": "hidden_size, vocab_size",
}


def check_shape(path: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError naming the tensor and both shapes."""
    if found != expected:
        sizes = next(keys for part, keys in _SIZES.items() if part in name)
        raise UserError(f"--model {path}: {name} has shape {found}, the model's sizes make it {expected} ({sizes}).")


def missing(path: str, name: str) -> UserError:
    return UserError(f"--model {path}: the checkpoint lacks the tensor {name}. Is the download complete?")


def unexpected(path: str, names: Iterable[str], key: str = "") -> UserError:
    """`key`: of config.json, which decides whether there are such tensors."""
    names = [name[:80] for name in sorted(names)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return UserError(
        f"--model {path}: the checkpoint holds tensors that this architecture has no place for: "
        f"{', '.join(names[:3])}{more}{f' (see {key} in config.json)' if key else ''}."
    )

"""Weights of a checkpoint, one tensor at a time, only the rows or columns that a rank owns.  Runs in the workers.

A model asks for each tensor by its Hugging Face name and says which shape it expects; both formats answer alike.  Files are
memory-mapped, so ranks on one machine share the page cache and nobody holds a whole checkpoint in private memory.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import torch

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.gguf_file import GGUFFile
from minisgl.model.hf_spec import read_json
from minisgl.model.random_weights import RandomWeights
from minisgl.model.shard import Range


class Weights(Protocol):
    """An open checkpoint."""

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        """Tensor `name`, whose whole shape must be `shape`; only `rows` (dim 0) or `cols` (dim 1) of it if given.

        Contiguous, in the dtype that the weights were opened with.  Raises UserError naming a missing or mis-shaped tensor.
        """

    def finish(self) -> None:
        """Raise UserError if the checkpoint holds a tensor that nobody took: it is then another model than it says."""


def open_weights(spec: ModelSpec, dtype: torch.dtype) -> Weights:
    """Open the checkpoint that `spec` was read from; tensors come out as `dtype`, on the CPU."""
    if spec.format == "random":
        return RandomWeights(dtype, torch.device("cpu"))
    return GGUFWeights(spec, dtype) if spec.format == "gguf" else SafetensorsWeights(spec, dtype)


class SafetensorsWeights:
    """One *.safetensors file, or several with an index (without an index: all that are there)."""

    DTYPES = ("F32", "F16", "BF16", "U8")  # bytes are numbers to all the others, too

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._where = {}  # tensor name -> open file
        self._taken: set[str] = set()
        self._path = spec.path
        self._prefix = spec.weight_prefix
        ignore = r".*rotary_emb\.inv_freq" + (r"|(.*\.)?lm_head\.weight" if spec.tie_embeddings else "")
        self._ignore = re.compile(ignore + (f"|(?!{re.escape(spec.weight_prefix)}).*" if spec.weight_prefix else ""))
        for path in _safetensors_files(spec.path):
            file = _open_safetensors(path)
            self._where.update(dict.fromkeys(file.keys(), file))

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        name = self._prefix + name
        if name not in self._where:
            raise _missing(self._path, name)
        self._taken.add(name)
        tensor = self._where[name].get_slice(name)
        _check_shape(self._path, name, tuple(tensor.get_shape()), shape)
        if tensor.get_dtype() not in self.DTYPES:
            raise UserError(
                f"--model {self._path}: {name} has dtype {tensor.get_dtype()}; {', '.join(self.DTYPES)} are supported."
            )
        part = tensor[slice(*rows)] if rows else tensor[:, slice(*cols)] if cols else tensor[:]
        return _own(part, self._dtype)

    def finish(self) -> None:
        extra = [n for n in self._where if n not in self._taken and not self._ignore.fullmatch(n)]
        if extra:
            raise _extra(self._path, extra)


class GGUFWeights:
    """A GGUF file of the llama architecture, under Hugging Face names."""

    _FIXED: ClassVar = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "lm_head.weight": "output",
    }
    _IN_LAYER: ClassVar = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    _IGNORE = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")  # the first is part of the ModelSpec

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._file = GGUFFile.open(spec.path)
        self._head_dim = spec.head_dim
        self._dtype = dtype
        self._taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        stored = self._stored_name(name)
        if stored not in self._file.tensors:
            raise _missing(self._file.path, stored)
        self._taken.add(stored)
        _check_shape(self._file.path, stored, self._file.tensors[stored].shape, shape)
        part = torch.from_numpy(_writable(self._file.dequantize(stored, rows)))
        if cols:
            part = part[:, slice(*cols)]
        if stored.endswith(("attn_q.weight", "attn_k.weight")):
            part = halves_from_pairs(part, self._head_dim)
        return _own(part, self._dtype)

    def finish(self) -> None:
        extra = [n for n in self._file.tensors if n not in self._taken and not self._IGNORE.fullmatch(n)]
        if extra:
            raise _extra(self._file.path, extra)

    def _stored_name(self, name: str) -> str:
        if name in self._FIXED:
            return self._FIXED[name] + ".weight"
        _, _, layer, rest = name.split(".", 3)  # model.layers.<n>.<rest>.weight
        return f"blk.{layer}.{self._IN_LAYER[rest.removesuffix('.weight')]}.weight"


def halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads * head_dim, hidden] to the rotate-half layout.

    llama.cpp's files of this architecture rotate dimensions (2i, 2i + 1) of a head together; Hugging Face's rotate
    (i, i + head_dim / 2).
    """
    by_pair = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return by_pair.transpose(1, 2).reshape(weight.shape)


def _safetensors_files(path: str) -> list[str]:
    index = os.path.join(path, "model.safetensors.index.json")
    if not os.path.isfile(index):
        return sorted(glob.glob(os.path.join(path, "*.safetensors")))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and os.path.basename(n) == n for n in names.values()):
        raise UserError(f"{index}: weight_map should map tensor names to file names in the same directory.")
    return [os.path.join(path, n) for n in sorted(set(names.values()))]


def _open_safetensors(path: str) -> Any:
    from safetensors import SafetensorError, safe_open

    opener: Callable[..., Any] = safe_open
    try:
        return opener(path, framework="pt")
    except FileNotFoundError as e:
        raise UserError(f"--model: {path} is named by the index but missing. Is the download complete?") from e
    except (SafetensorError, OSError) as e:
        raise UserError(f"--model: {path} is truncated or damaged ({e}). Download it again.") from e


def _writable(array: Any) -> Any:
    """torch wants arrays it may write to; views of the file are read-only."""
    return array if array.flags.writeable else array.copy()


def _own(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of exactly the bytes it needs: a slice may share the storage of the whole."""
    out = part.to(dtype).contiguous()
    return out if out.untyped_storage().nbytes() == out.nbytes else out.clone()


def _check_shape(path: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise UserError(f"--model {path}: {name} has shape {found}, the model's sizes make it {expected}.")


def _missing(path: str, name: str) -> UserError:
    return UserError(f"--model {path}: the checkpoint lacks the tensor {name}. Is the download complete?")


def _extra(path: str, names: Iterable[str]) -> UserError:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return UserError(
        f"--model {path}: the checkpoint holds tensors that this architecture has no place for: {', '.join(names[:3])}{more}."
    )

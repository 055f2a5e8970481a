"""The tensors of *.safetensors files: plain, or linear layers quantised as the ModelSpec says.  Runs in the workers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.files import weight_files
from minisgl.model.checkpoint.quant_spec import settings_of
from minisgl.model.checkpoint.quantized import layer_of
from minisgl.model.checkpoint.weights import check_shape, extra, in_pieces, missing, own
from minisgl.model.common.shard import Range

DTYPES = ("F32", "F16", "BF16", "U8")  # bytes are numbers to all the others, too
# Scales of activations and of the KV cache: neither is quantised by them here.
_OTHER_SCALES = r"|.*\.(input|output|q|k|v)_scale|.*\.input_zero_point"

PRODUCT = re.compile(r".*\.self_attn\.\w+_proj\.weight|.*\.mlp\.\w+_proj\.weight|(.*\.)?lm_head\.weight")  # not of experts


class Files:
    """All tensors of some files by name; remembers which were used."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.used: set[str] = set()
        self._where: dict[str, Any] = {}  # tensor name -> open file
        for file in weight_files(path):
            opened = _open(file)
            self._where.update(dict.fromkeys(opened.keys(), opened))

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def dtype(self, name: str) -> str:
        """As safetensors calls it: "BF16", "F8_E4M3", ..."""
        return str(self._where[name].get_slice(name).get_dtype())

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Any:
        """A lazy slice.  Raises UserError naming a tensor that is missing or not of that shape."""
        if name not in self._where:
            raise missing(self.path, name)
        self.used.add(name)
        lazy = self._where[name].get_slice(name)
        if shape is not None:
            check_shape(self.path, name, tuple(lazy.get_shape()), shape)
        return lazy

    def unused(self) -> list[str]:
        return [n for n in self._where if n not in self.used]


class SafetensorsWeights:
    """One *.safetensors file, or several with an index; see `Weights`."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, lazy: bool = False) -> None:
        """`lazy`: see `open_weights`."""
        self._dtype, self._lazy = dtype, lazy
        self._files = Files(spec.path)
        self._settings = settings_of(spec.weight_format)
        self._prefix = spec.weight_prefix
        ignore = r".*rotary_emb\.inv_freq" + (r"|(.*\.)?lm_head\.weight" if spec.tie_embeddings else "")
        ignore += f"|(?!{re.escape(spec.weight_prefix)}).*" if spec.weight_prefix else ""
        self._ignore = re.compile(ignore + (_OTHER_SCALES if self._settings else ""))

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        name = self._prefix + name
        layer = layer_of(self._files, name, self._settings) if name.endswith(".weight") else None
        if layer is not None:
            check_shape(self._files.path, name, layer.shape, shape)
            span = cols or (0, shape[1])
            return in_pieces(lambda some: layer.read(some, span), rows or (0, shape[0]), span[1] - span[0], self._dtype)
        tensor = self._files.get(name, shape)
        if tensor.get_dtype() not in DTYPES:
            raise UserError(
                f"--model {self._files.path}: {name} has dtype {tensor.get_dtype()}; {', '.join(DTYPES)} are supported."
            )
        part = tensor[slice(*rows)] if rows else tensor[:, slice(*cols)] if cols else tensor[:]
        if self._lazy and PRODUCT.fullmatch(name) and part.dtype.is_floating_point:
            return part  # type: ignore[no-any-return]
        return own(part, self._dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that `take` knows, by the names they have in a checkpoint without quantisation."""
        out: dict[str, tuple[int, ...]] = {}
        for stored in self._files:
            name = re.sub(r"\.(qweight|weight_packed)$", ".weight", stored)
            layer = layer_of(self._files, name, self._settings)
            if layer is not None:
                out[name] = layer.shape
            elif self._files.dtype(stored) in DTYPES and not re.search(r"\.(scales|weight_scale\w*|\w+_scale)$", stored):
                out[name] = tuple(self._files.get(stored).get_shape())
        return out

    def finish(self) -> None:
        left = [n for n in self._files.unused() if not self._ignore.fullmatch(n) and not self._nothing(n)]
        if left:
            raise extra(self._files.path, left)

    def _nothing(self, name: str) -> bool:
        """AutoGPTQ gave every layer a bias, of zeros where the model has none."""
        return self._settings.get("method") == "gptq" and name.endswith(".bias") and not self._files.get(name)[:].any()


def _open(path: str) -> Any:
    from safetensors import SafetensorError, safe_open

    opener: Callable[..., Any] = safe_open
    try:
        return opener(path, framework="pt")
    except FileNotFoundError as e:
        raise UserError(f"--model: {path} is named by the index but missing. Is the download complete?") from e
    except (SafetensorError, OSError) as e:
        raise UserError(f"--model: {path} is truncated or damaged ({e}). Download it again.") from e

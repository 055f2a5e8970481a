"""Reads the tensors of *.safetensors files, plain or quantised as the ModelSpec says.  Runs in the workers."""

from __future__ import annotations

import re

import torch

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.files import SafetensorsFiles, check_shape, unexpected
from minisgl.model.checkpoint.quantized import layer_of
from minisgl.model.checkpoint.weights import in_pieces, own
from minisgl.model.common.shard import Range
from minisgl.model.common.weights import QuantizedWeight, Weight

DTYPES = ("F32", "F16", "BF16", "U8")  # U8: MXFP4 blocks and scales
# Scales of activations and of the KV cache: the engine quantises neither by them.
_OTHER_SCALES = r"|.*\.(input|output|q|k|v)_scale|.*\.input_zero_point"

PRODUCT = re.compile(r".*\.self_attn\.\w+_proj\.weight|.*\.mlp\.\w+_proj\.weight|(.*\.)?lm_head\.weight")  # not of experts


class SafetensorsWeights:
    """One *.safetensors file, or several with an index; see `Weights`."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, lazy: bool = False, *, packed: bool = False) -> None:
        """`lazy`, `packed`: see `open_weights`."""
        self._dtype, self._lazy, self._packed = dtype, lazy, packed
        self._files = SafetensorsFiles(spec.path)
        self._format = spec.weight_format
        self._ignore = re.compile(r".*rotary_emb\.inv_freq" + (_OTHER_SCALES if self._format else ""))

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        layer = layer_of(self._files, name, self._format) if name.endswith(".weight") else None
        if layer is not None:
            check_shape(self._files.path, name, layer.shape, shape)
            lines, span = rows or (0, shape[0]), cols or (0, shape[1])

            def dequantize() -> torch.Tensor:
                return in_pieces(lambda some: layer.read(some, span), lines, span[1] - span[0], self._dtype)

            if self._packed and (quants := layer.quants(lines, span)) is not None:
                return QuantizedWeight((lines[1] - lines[0], span[1] - span[0]), quants, dequantize)
            return dequantize()
        tensor = self._files.get(name, shape)
        found = tensor.get_dtype()
        if found not in DTYPES:
            raise UserError(f"--model {self._files.path}: {name} has dtype {found}; {', '.join(DTYPES)} are supported.")
        part = tensor[slice(*rows)] if rows else tensor[:, slice(*cols)] if cols else tensor[:]
        if self._lazy and PRODUCT.fullmatch(name) and part.dtype.is_floating_point:
            return part  # type: ignore[no-any-return]
        return own(part, self._dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that `take` knows, by the names they have in a checkpoint without quantisation."""
        out: dict[str, tuple[int, ...]] = {}
        for stored in self._files:
            name = re.sub(r"\.(qweight|weight_packed)$", ".weight", stored)
            layer = layer_of(self._files, name, self._format)
            if layer is not None:
                out[name] = layer.shape
            elif self._files.dtype(stored) in DTYPES and not re.search(r"\.(scales|weight_scale\w*|\w+_scale)$", stored):
                out[name] = tuple(self._files.get(stored).get_shape())
        return out

    def finish(self) -> None:
        left = [n for n in self._files.unused() if not self._ignore.fullmatch(n) and not self._is_zero_bias(n)]
        if left:
            raise unexpected(self._files.path, left, self._files.key_of(min(left)))

    def _is_zero_bias(self, name: str) -> bool:
        """AutoGPTQ gave every layer a bias, of zeros where the model has none."""
        gptq = self._format is not None and self._format.method == "gptq"
        return gptq and name.endswith(".bias") and not self._files.get(name)[:].any()

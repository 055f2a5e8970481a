"""Reads the tensors of a GGUF file under Hugging Face names, dequantised piece by piece.  Runs in the workers."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map

from minisgl.config import ModelSpec
from minisgl.model.checkpoint.files import check_shape, missing, unexpected
from minisgl.model.checkpoint.gguf_file import GGUFFile
from minisgl.model.checkpoint.gguf_quants import QUANTS
from minisgl.model.checkpoint.weights import in_pieces, own
from minisgl.model.common.gguf_blocks import BITS, GROUP
from minisgl.model.common.shard import Range
from minisgl.model.common.weights import QuantizedWeight, Quants, StoredWeight, Weight


class GGUFWeights:
    """An open GGUF file; see `Weights`."""

    _IGNORE = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")  # the first is part of the ModelSpec

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, lazy: bool = False, *, packed: bool = False) -> None:
        """`lazy`, `packed`: see `open_weights`."""
        self._file = GGUFFile(spec.path)
        architecture = self._file.fields["general.architecture"]
        kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
        self._names = get_tensor_name_map(kind, 1)  # Hugging Face's -> those of the file, of the first layer
        # Only llama.cpp's files of this architecture rotate neighbours; see `halves_from_pairs`.
        self._in_pairs = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)" if architecture == "llama" else r"(?!)")
        self._head_dim = spec.head_dim
        self._dtype, self._lazy, self._packed = dtype, lazy, packed
        self._taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        stored = self._stored_name(name)
        if stored not in self._file.tensors:
            raise missing(self._file.path, stored)
        self._taken.add(stored)
        check_shape(self._file.path, stored, self._file.tensors[stored].shape, shape)
        pairs = self._in_pairs.fullmatch(stored) is not None
        if len(shape) == 1:
            vector = torch.from_numpy(self._file.dequantize(stored).copy())
            vector = halves_from_pairs(vector[:, None], self._head_dim)[:, 0] if pairs else vector
            return own(vector[slice(*rows)] if rows else vector, self._dtype)

        def read(some: Range) -> torch.Tensor:
            values = self._file.dequantize(stored, some, cols)
            part = torch.from_numpy(values if values.flags.writeable else values.copy())  # torch needs a writable array
            return halves_from_pairs(part, self._head_dim) if pairs else part

        (first, last), (start, end) = rows or (0, shape[0]), cols or (0, shape[1])

        def dequantize() -> torch.Tensor:
            return in_pieces(read, (first, last), end - start, self._dtype, self._head_dim if pairs else 1)

        kind = self._file.tensors[stored].kind
        if self._lazy and kind in BITS and start % GROUP == end % GROUP == 0:
            return StoredWeight((last - first, end - start), kind, lambda: self._stored(stored, rows, cols, pairs), dequantize)
        if self._packed and kind in QUANTS and all(end % QUANTS[kind].group == 0 for end in (start, end)):

            def quants(device: torch.device) -> Quants:
                raw = self._stored(stored, rows, None, pairs).to(device)
                found, size = QUANTS[kind].read(raw), QUANTS[kind].group
                scales, zeros = (x[:, start // size : end // size] for x in (found.scales, found.zeros))
                return replace(found, numbers=found.numbers[:, start:end], scales=scales, zeros=zeros)

            return QuantizedWeight((last - first, end - start), quants, dequantize)
        return dequantize()

    def _stored(self, stored: str, rows: Range | None, cols: Range | None, pairs: bool) -> torch.Tensor:
        """The quantised rows of a matrix, u8, of `cols` whole blocks."""
        raw = torch.from_numpy(self._file.data(stored, rows).copy())
        if cols:
            width = raw.shape[1] * GROUP // self._file.tensors[stored].shape[1]
            raw = raw[:, cols[0] // GROUP * width : cols[1] // GROUP * width].contiguous()
        return halves_from_pairs(raw, self._head_dim) if pairs else raw

    def _stored_name(self, name: str) -> str:
        """The file's name of a tensor; a name without a counterpart is returned unchanged, and will be missing."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        first = f"model.layers.0.{name[layer.end() :]}" if layer else name
        stored = self._names.get_name(first, (".weight", ".bias")) or name
        return stored.replace("blk.0.", f"blk.{layer[1]}.") if layer else stored

    def finish(self) -> None:
        left = [n for n in self._file.tensors if n not in self._taken and not self._IGNORE.fullmatch(n)]
        if left:
            raise unexpected(self._file.path, left)


def halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection [heads * head_dim, hidden] to the rotate-half layout.

    llama.cpp's files of the llama architecture rotate dimensions (2i, 2i + 1) of a head together; Hugging Face's rotate
    (i, i + head_dim / 2).
    """
    by_pair = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return by_pair.transpose(1, 2).reshape(weight.shape)

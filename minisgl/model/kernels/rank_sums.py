"""Adds up the ranks' parts of a product within the norm that reads the sum: residual, RMSNorm and quantisation in one kernel.

Each rank stores its part of a row straight into a buffer on every peer, over NVLink, and waits in its own buffer for theirs.
There is neither barrier nor flag: what is free in a buffer holds EMPTY, -0.0, which no rank sends (it sends 0.0), so a value
that is not EMPTY has arrived.  The reader makes its place EMPTY again, and rows alternate between two places: a peer stores
into a place for the second time only after a row in between, which this rank sends when it has emptied the first.  That holds
for rows of one width, the model's: others would lie across their places.
(TensorRT-LLM and FlashInfer call this "Lamport", NCCL has it as LL.)  Parts are added in the order of the ranks, so all ranks
get the same bits.

Bytes, T rows of C in 2 bytes on `size` ranks: 2 (size - 1) T C to the peers, and as many from them, which is what takes the
time: 2.6 MB of 256 rows of 5,120 at 370 GB/s are 7 us on two GPUs.  Next to it the local bytes of add_rms_norm.

No program waits for one that may not have started: a rank launches no more of them than run at once, and a program sends a row
before it waits for the same row of its counterparts, which do the same in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from minisgl.model.common.activations import Part, Quantized
from minisgl.model.kernels.activations import operand
from minisgl.model.kernels.norm_activation import empty_quantized, product_row
from minisgl.model.kernels.pdl import begin, launch_options

EMPTY = -0x8000  # as i16: -0.0 of bfloat16 and float16
_EMPTY = tl.constexpr(EMPTY)
TURNS = 2  # places of a row
PROGRAMS = 2  # that run at once on each processor: their registers are bounded for that
FEW_ROWS = 512
MOST_ROWS = 1 << 16  # of a launch
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["rows"])
def _add_over_ranks(
    x, part, weight, out, scales, part_rows, part_columns, inbox, inboxes, turns, eps, width, rows, room,
    BLOCK: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr,
    QUANTIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes every so-manieth row: x += the sum over the ranks, out = x / rms(x) * weight; or out = the sum.

    inbox: this rank's buffer i16 [TURNS, SIZE - 1 senders, room]; inboxes i64[SIZE]: addresses of all; turns i32[T]: where each
    row arrives next.
    """
    at = tl.arange(0, BLOCK)
    inside = at < width
    columns = 1.0
    if NORM:
        w = tl.load(weight + at, mask=inside, other=0.0)
    if SCALED:
        columns = tl.load(part_columns + at, mask=inside, other=0.0)
    begin(PDL)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        turn = tl.load(turns + row)
        mine = product_row(part + row * width + at, rows * width, part_rows + row, columns, inside, PARTS, SCALED)
        mine = mine.to(x.dtype.element_ty).to(tl.int16, bitcast=True)
        mine = tl.where(mine == _EMPTY, 0, mine)
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                sender = RANK if peer > RANK else RANK - 1
                there = tl.multiple_of(tl.load(inboxes + peer).to(tl.pointer_type(tl.int16)), 16)
                there += (turn * (SIZE - 1) + sender).to(tl.int64) * room + row * width
                tl.store(there + at, mine, mask=inside)
        if NORM:
            value = tl.load(x + row * width + at, mask=inside, other=0.0)
        here = inbox + (turn * (SIZE - 1)).to(tl.int64) * room + row * width + at
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(SIZE):
            if rank == RANK:
                term = mine
            else:
                place = here + (rank if rank < RANK else rank - 1) * room
                term = tl.load(place, mask=inside, other=0, volatile=True)
                while tl.max((term == _EMPTY).to(tl.int32), 0) > 0:
                    term = tl.load(place, mask=inside, other=0, volatile=True)
                tl.store(place, tl.full([BLOCK], _EMPTY, tl.int16), mask=inside)
            total += term.to(x.dtype.element_ty, bitcast=True).to(tl.float32)
        tl.store(turns + row, 1 - turn)
        if NORM:
            total = value.to(tl.float32) + total.to(x.dtype.element_ty).to(tl.float32)  # rounded as without the norm
            rounded = total.to(x.dtype.element_ty)
            tl.store(x + row * width + at, rounded, mask=inside)
            total = rounded.to(tl.float32)
            total = total * (1.0 / tl.sqrt(tl.sum(total * total, 0) / width + eps)) * w.to(tl.float32)
        if QUANTIZE:
            scale = tl.maximum(tl.max(tl.abs(total), 0), 1e-12) / 448.0
            tl.store(scales + row, scale)
            total = total / scale
        tl.store(out + row * width + at, total.to(out.dtype.element_ty), mask=inside)


def warps_for(rows: int, block: int) -> int:
    """Warps for a row: fewer where it is a program's only one, measured by scripts/check/tp_gpu.py on two H200."""
    return min(16, max(1, block // (1024 if rows <= FEW_ROWS else 512)))


class RankSums:
    """This rank's end of the exchange, a `Sums`."""

    def __init__(
        self,
        rank: int,
        inboxes: list[torch.Tensor],
        dtype: torch.dtype,
        *,
        processors: int,
        width: int | None = None,
        largest: int | None = None,
    ) -> None:
        """inboxes: the buffer of every rank, i16[words(size, room)] full of EMPTY, as this rank addresses it.

        dtype: of the sums, one of DTYPES.  processors: of each GPU.  width: of all rows; None: whoever calls lets all ranks
        finish before rows of another width.  largest: bytes above which `takes` says no.
        """
        self._rank, self._size, self._programs = rank, len(inboxes), PROGRAMS * processors
        self.dtype, self._width, self._largest = dtype, width, largest
        self._room = len(inboxes[rank]) // (TURNS * (self._size - 1))
        device = inboxes[rank].device
        self._inbox = inboxes[rank]
        self._inboxes = torch.tensor([i.data_ptr() for i in inboxes], dtype=torch.int64, device=device)
        self._turns = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)

    @staticmethod
    def words(size: int, room: int) -> int:
        """16-bit words of a buffer for `room` values at a time, on `size` ranks."""
        return TURNS * (size - 1) * room

    def takes(self, part: Part) -> bool:
        """Whether the sum of parts of this shape and dtype goes this way; the same on all ranks."""
        values = operand(part).values
        rows, width = values.shape[-2:]
        known = (values.dtype == self.dtype or not isinstance(part, torch.Tensor)) and self._width in (None, width)
        return known and rows > 0 and width <= self._room and (self._largest is None or 2 * rows * width <= self._largest)

    def add_rms_norm(
        self, x: torch.Tensor, part: Part, weight: torch.Tensor, eps: float, *, quantize: bool = False
    ) -> torch.Tensor | Quantized:
        quantized = empty_quantized(len(x), x.shape[1], x.device) if quantize else None
        out = torch.empty_like(x) if quantized is None else quantized.values
        scales = out if quantized is None else quantized.scales
        self._launch(x, part, weight, out, scales, eps, NORM=True, QUANTIZE=quantize)
        return quantized or out

    def total(self, part: Part, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Sums`; `out` may be the part."""
        values = operand(part).values
        if out is None:
            out = torch.empty(values.shape[-2:], dtype=self.dtype, device=values.device)
        self._launch(out, part, out, out, out, 0.0, NORM=False, QUANTIZE=False)
        return out

    def _launch(
        self,
        x: torch.Tensor,
        part: Part,
        weight: torch.Tensor,
        out: torch.Tensor,
        scales: torch.Tensor,
        eps: float,
        **kind: bool,
    ) -> None:
        """Launch for as many rows at a time as there is room for."""
        rows, width = x.shape
        block = triton.next_power_of_2(width)
        warps = warps_for(rows, block)
        options: dict[str, Any] = {**launch_options(x)}
        if options["PDL"]:
            options["maxnreg"] = min(248, 65536 // (32 * warps * PROGRAMS))
        most = min(MOST_ROWS, self._room // width)
        for first in range(0, rows, most):
            some = slice(first, min(rows, first + most))
            added = operand(part if rows <= most else part[some])
            _add_over_ranks[(min(some.stop - first, self._programs),)](
                x[some], added.values.contiguous(), weight, out[some], scales[some], added.rows, added.columns, self._inbox,
                self._inboxes, self._turns, eps, width, some.stop - first, self._room,
                BLOCK=block, RANK=self._rank, SIZE=self._size, PARTS=added.parts, SCALED=added.scaled, num_warps=warps,
                **kind, **options,
            )  # fmt: skip

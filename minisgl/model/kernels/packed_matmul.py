"""Multiplies rows by weights that stay in 4 or 8 bits: `product`, and `dequantize` for steps of many rows.

A weight [N, K] is scale * (number - zero), with a scale and a zero for each output and group of inputs.  It is kept as

    units i16 [blocks, N, LANES]   one unit is four numbers of 4 bits, or two of 8; field j of unit i in block b is the number
                                   of input b * BLOCK + j * LANES + i, BLOCK = LANES * fields
    words i32 [groups, N]          the scale, in the low half, and minus the zero, in the high one

because of what the matrix unit wants.  Its 16-bit operands come in registers of two neighbouring inputs.  A register of two
units holds such a pair four times over, so masking field j of both at once, and setting the exponent of 128 (of 1024 in
float16), makes a finished pair: shift, lop3, and one fma that takes 128 and the zero away, an instruction and a half for each
weight.  A field is one product over LANES inputs of the tile of x that begins at j * LANES, so nothing is shuffled.  Numbers
less zeros are exact; the sum over a group is scaled in float32.

Loads: the units of a block and 64 outputs are 4 KB in one piece, read in 16-byte loads; words of 4 bytes are as wide as an
asynchronous copy must be.  Bytes: N * K / 2 in 4 bits, and 4 N for each group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minisgl.model.common.activations import PartialSums
from minisgl.model.kernels.norm_activation import gate, silu_mul
from minisgl.model.kernels.pdl import INTERPRETED, begin, launch_options, prefetch, release, wait


def instructions(bits: int, dtype: torch.dtype, real_zeros: bool) -> str:
    """PTX that makes pairs of `dtype` of the fields of two units, with the zeros of the two, once for each field."""
    kind, magic, one, less, sixteen, less_17 = {
        torch.bfloat16: ("bf16x2", 0x4300, 0x3F80, 0xC300, 0x4180, 0xC508),
        torch.float16: ("f16x2", 0x6400, 0x3C00, 0xE400, 0x4C00, 0xF440),
    }[dtype]
    both = 0x10001  # times a half: twice the half
    names = {"one": one, "less": less, "sixteen": sixteen, "less17": less_17}
    lines = [".reg .b32 field, one, less, sixteen, less17;", *(f"mov.b32 {k}, {v * both:#x};" for k, v in names.items())]

    def take(to: str, nibble: int) -> None:
        at = f"${4 if bits == 4 else 2}"
        if nibble:
            lines.append(f"shr.u32 field, {at}, {4 * nibble};")
            at = "field"
        lines.append(f"lop3.b32 {to}, {at}, 0x000f000f, {magic * both:#x}, 0xea;")

    for j in range(16 // bits):
        if bits == 4:
            take(f"${j}", j)
            if real_zeros:
                lines.append(f"fma.rn.{kind} ${j}, ${j}, one, less;")
        else:  # 16 * high half - 17 * 128, plus the low half, are the number
            take(f"${j}", 2 * j + 1)
            lines.append(f"fma.rn.{kind} ${j}, ${j}, sixteen, less17;")
            take("field", 2 * j)
            lines.append(f"fma.rn.{kind} ${j}, field, one, ${j};")
        lines.append(f"fma.rn.{kind} ${j}, ${j}, one, ${(5 if bits == 4 else 3) + 2 * j};")
    return "{\n" + "\n".join(lines) + "\n}"


@triton.jit
def _field(units, zero, like, SHIFT: tl.constexpr, BITS: tl.constexpr, LESS: tl.constexpr):
    """What `instructions` do for one field, in Triton's interpreter.  LESS: what a zero of this kind is too large by."""
    number = ((units.to(tl.int32) & 0xFFFF) >> SHIFT) & ((1 << BITS) - 1)
    if like.dtype.element_ty == tl.bfloat16:
        zero = (zero & -65536).to(tl.float32, bitcast=True)
    else:
        zero = (zero >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (number + LESS + zero).to(like.dtype.element_ty).to(tl.float32)  # it multiplies no bfloat16


@triton.jit
def _zeros(words):
    """Minus the zeros, twice in each word."""
    return (words & -65536) | ((words >> 16) & 0xFFFF)


@triton.jit
def _scales(words, F16: tl.constexpr):
    if F16:
        return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _unpack4(units, z0, z1, z2, z3, like, REAL: tl.constexpr, ASM: tl.constexpr):
    """i16 [N, LANES] and words [N, 1] of the fields -> numbers less zeros, four tiles [N, LANES] of x's dtype."""
    if ASM == "":
        LESS: tl.constexpr = 0 if REAL else 128 if like.dtype.element_ty == tl.bfloat16 else 1024
        return (
            _field(units, z0, like, 0, 4, LESS), _field(units, z1, like, 4, 4, LESS),
            _field(units, z2, like, 8, 4, LESS), _field(units, z3, like, 12, 4, LESS),
        )  # fmt: skip
    kind = like.dtype.element_ty
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r", [units, z0, z1, z2, z3], dtype=(kind, kind, kind, kind), is_pure=True, pack=2
    )


@triton.jit
def _unpack8(units, z0, z1, like, ASM: tl.constexpr):
    """The same in 8 bits: two tiles."""
    if ASM == "":
        return _field(units, z0, like, 0, 8, 0), _field(units, z1, like, 8, 8, 0)
    kind = like.dtype.element_ty
    return tl.inline_asm_elementwise(ASM, "=r,=r,r,r,r,r,r", [units, z0, z1], dtype=(kind, kind), is_pure=True, pack=2)


@triton.jit
def _words(at, N, block, FIELD: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    return tl.load(at + (block * BLOCK + FIELD * LANES) // GROUP * N)


@triton.jit
def _rows(at, k, inside, K, EVEN: tl.constexpr, ASM: tl.constexpr):
    """x of LANES inputs, transposed."""
    if not EVEN:
        inside = inside & (k < K)[None, :]
    xs = tl.load(at + k[None, :], mask=inside, other=0.0)
    if ASM == "":
        xs = xs.to(tl.float32)
    return tl.trans(xs)


@triton.jit(do_not_specialize=["rows", "blocks", "each"])
def _product(
    x, units, words, y, rows, N, K, blocks, each,
    BITS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, EVEN: tl.constexpr, REAL: tl.constexpr, F16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr, CHAINS: tl.constexpr,
    UNROLL: tl.constexpr, GATED: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per (block of outputs, part of K, block of rows); y [parts, rows, N], or [rows, N / 2] if GATED.

    A part is `each` of the `blocks` of K.  Sizes are no constants, so that few kernels serve all layers.
    """
    release(PDL)
    BLOCK: tl.constexpr = LANES * (16 // BITS)
    part = tl.program_id(1)
    first = part * each
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = tl.minimum(n, N - 1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, LANES)
    at_u = units + known[:, None] * LANES + lane[None, :]
    at_w = words + known
    if PDL and PREFETCH > 0:
        line = tl.arange(0, BLOCK_N * LANES // 64)  # 64 units are one line of 128 bytes
        ahead = tl.minimum(first + tl.arange(0, PREFETCH), tl.minimum(first + each, blocks) - 1)
        at = (ahead * N + tl.minimum(tl.program_id(0) * BLOCK_N, N - BLOCK_N))[:, None] * LANES + line[None, :] * 64
        prefetch((units + at).to(tl.int64))
    wait(PDL)
    at_x = x + m.to(tl.int64)[:, None] * K
    in_x = (m < rows)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, tl.minimum(first + each, blocks), num_stages=STAGES, loop_unroll_factor=UNROLL):
        u = tl.load(at_u + block * N * LANES)
        k = block * BLOCK + lane
        x0 = _rows(at_x, k, in_x, K, EVEN, ASM)
        x1 = _rows(at_x, k + LANES, in_x, K, EVEN, ASM)
        w0 = _words(at_w, N, block, 0, BLOCK, LANES, GROUP)
        if BITS == 4:
            x2 = _rows(at_x, k + 2 * LANES, in_x, K, EVEN, ASM)
            x3 = _rows(at_x, k + 3 * LANES, in_x, K, EVEN, ASM)
            w1, w2 = w0, w0
            if GROUP <= LANES:
                w1 = _words(at_w, N, block, 1, BLOCK, LANES, GROUP)
            if GROUP < BLOCK:
                w2 = _words(at_w, N, block, 2, BLOCK, LANES, GROUP)
            w3 = w2
            if GROUP <= LANES:
                w3 = _words(at_w, N, block, 3, BLOCK, LANES, GROUP)
            t0, t1, t2, t3 = _unpack4(
                u, _zeros(w0)[:, None], _zeros(w1)[:, None], _zeros(w2)[:, None], _zeros(w3)[:, None], x, REAL, ASM
            )
            sums = tl.dot(t0, x0)
            if GROUP <= LANES:
                acc += sums * _scales(w0, F16)[:, None]
                sums = tl.dot(t1, x1)
            else:
                sums = tl.dot(t1, x1, sums)
            if GROUP < BLOCK:
                acc += sums * _scales(w1, F16)[:, None]
                sums = tl.dot(t2, x2)
            elif CHAINS == 1:
                sums = tl.dot(t2, x2, sums)
            else:
                other = sums
                sums = tl.dot(t2, x2)
            if GROUP <= LANES:
                acc += sums * _scales(w2, F16)[:, None]
                sums = tl.dot(t3, x3)
            else:
                sums = tl.dot(t3, x3, sums)
            if CHAINS == 2 and GROUP >= BLOCK:
                sums += other
            acc += sums * _scales(w3, F16)[:, None]
        else:
            w1 = w0
            if GROUP <= LANES:
                w1 = _words(at_w, N, block, 1, BLOCK, LANES, GROUP)
            t0, t1 = _unpack8(u, _zeros(w0)[:, None], _zeros(w1)[:, None], x, ASM)
            sums = tl.dot(t0, x0)
            if GROUP <= LANES:
                acc += sums * _scales(w0, F16)[:, None]
                sums = tl.dot(t1, x1)
            else:
                sums = tl.dot(t1, x1, sums)
            acc += sums * _scales(w1, F16)[:, None]
    if GATED:
        both = tl.reshape(acc, [BLOCK_N // 16, 2, 8, BLOCK_M]).permute(0, 2, 3, 1)
        left, right = tl.split(tl.reshape(both, [BLOCK_N // 2, BLOCK_M, 2]))
        value = gate(left, right, y)
        n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        at_y = y + m.to(tl.int64)[None, :] * (N // 2) + n[:, None]
        tl.store(at_y, value.to(y.dtype.element_ty), mask=(m < rows)[None, :] & (n < N // 2)[:, None])
    else:
        at_y = y + ((part.to(tl.int64) * rows + m) * N)[None, :] + n[:, None]
        tl.store(at_y, acc.to(y.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


@triton.jit
def _put(at, tile, words, k, inside, K, F16: tl.constexpr):
    value = tile.to(tl.float32) * _scales(words, F16)[:, None]
    tl.store(at + k[None, :], value.to(at.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["first", "rows"])
def _dequantize(
    units, words, out, ids, first, rows, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, REAL: tl.constexpr, F16: tl.constexpr,
    BLOCK_N: tl.constexpr, GATED: tl.constexpr, IDS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per (block of rows, block of inputs): rows first, first + 1, ... of the weight, or those that `ids` names."""
    begin(PDL)
    BLOCK: tl.constexpr = LANES * (16 // BITS)
    block = tl.program_id(1)
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = r < rows
    n = tl.minimum(first + r, N - 1)
    if IDS:
        n = tl.load(ids + r, mask=inside, other=0).to(tl.int32)
    if GATED:
        up = n >= N // 2
        n = tl.where(up, n - N // 2, n)
        n = n // 8 * 16 + n % 8 + tl.where(up, 8, 0)
    lane = tl.arange(0, LANES)
    u = tl.load(units + (block * N + n)[:, None] * LANES + lane[None, :])
    at_w = words + n
    w0 = _words(at_w, N, block, 0, BLOCK, LANES, GROUP)
    w1 = _words(at_w, N, block, 1, BLOCK, LANES, GROUP)
    at = out + r.to(tl.int64)[:, None] * K
    k = block * BLOCK + lane
    if BITS == 4:
        w2 = _words(at_w, N, block, 2, BLOCK, LANES, GROUP)
        w3 = _words(at_w, N, block, 3, BLOCK, LANES, GROUP)
        t0, t1, t2, t3 = _unpack4(
            u, _zeros(w0)[:, None], _zeros(w1)[:, None], _zeros(w2)[:, None], _zeros(w3)[:, None], out, REAL, ASM
        )
        _put(at, t0, w0, k, inside, K, F16)
        _put(at, t1, w1, k + LANES, inside, K, F16)
        _put(at, t2, w2, k + 2 * LANES, inside, K, F16)
        _put(at, t3, w3, k + 3 * LANES, inside, K, F16)
    else:
        t0, t1 = _unpack8(u, _zeros(w0)[:, None], _zeros(w1)[:, None], out, ASM)
        _put(at, t0, w0, k, inside, K, F16)
        _put(at, t1, w1, k + LANES, inside, K, F16)


# ---------------- the packed form
@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [n, k]; see the module.  gated: rows of gate and up take turns by eights, so that a thread has both."""

    units: torch.Tensor
    words: torch.Tensor
    n: int
    k: int
    bits: int
    group: int
    dtype: torch.dtype  # of x
    real_zeros: bool  # zeros are not whole numbers; those of 8 bits always count as such
    f16: bool  # the scales are in float16, otherwise in bfloat16
    gated: bool = False

    @property
    def options(self) -> dict[str, object]:
        """Arguments of the kernels."""
        asm = "" if INTERPRETED else instructions(self.bits, self.dtype, self.real_zeros)
        sizes = {"BITS": self.bits, "GROUP": self.group, "LANES": self.units.shape[2]}
        return {**sizes, "REAL": self.real_zeros, "F16": self.f16, "ASM": asm}


def packs(bits: int, group: int, k: int) -> bool:
    """Whether weights of k inputs with a scale for each `group` of them can be packed."""
    return bits in (4, 8) and (group % 16 == 0 or group >= k)


def pack(
    numbers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group: int, dtype: torch.dtype,
    *, gated: bool = False,
) -> Packed:  # fmt: skip
    """u8 [N, K] and f32 [N, G], for groups of `group` inputs (see `packs`) -> their packed form, for x of `dtype`.

    gated: the upper half of the rows is gate, the lower one up; N a multiple of 16.
    """
    if gated:
        numbers, scales, zeros = (
            x.reshape(2, -1, 8, x.shape[1]).transpose(0, 1).reshape(len(x), -1) for x in (numbers, scales, zeros)
        )
    n, k = numbers.shape
    fields = 16 // bits
    whole = group >= k
    lanes = 32 if whole or group % 32 == 0 else 16
    block = lanes * fields
    blocks = -(-k // block)
    if whole:
        group = blocks * block
    elif group % block:  # a group is a number of blocks, or a block a number of groups
        smaller = math.gcd(group, block)
        scales, zeros = (x.repeat_interleave(group // smaller, 1) for x in (scales, zeros))
        group = smaller
    groups = -(-blocks * block // group)
    scales, zeros = (F.pad(x[:, :groups], (0, max(0, groups - x.shape[1]))) for x in (scales.float(), zeros.float()))
    # Beyond 2^15 the numbers are less than float16 keeps of the zero, which it could not hold.
    scales, zeros = scales * (huge := (zeros.abs() / 2**15).clamp(min=1)), zeros / huge
    tiles = F.pad(numbers, (0, blocks * block - k)).reshape(n, blocks, fields, lanes)
    units = tiles[:, :, 0].short()
    for j in range(1, fields):
        units |= tiles[:, :, j].short() << bits * j
    real = bits == 8 or not bool(((zeros == zeros.round()) & (zeros.abs() < 64)).all())
    f16 = bool(((scales.half().float() - scales).abs() <= scales.abs() * 2.0**-10).all())
    less = 0 if real else 128 if dtype == torch.bfloat16 else 1024
    halves = torch.stack((scales.to(torch.float16 if f16 else torch.bfloat16).view(torch.int16),
                          (-less - zeros).to(dtype).view(torch.int16)), -1)  # fmt: skip
    words = halves.view(torch.int32)[..., 0].t().contiguous()
    return Packed(units.transpose(0, 1).contiguous(), words, n, k, bits, group, dtype, real, f16, gated)


def dequantize(w: Packed, rows: tuple[int, int] | None = None, *, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The weight [N, K], some of its rows, or those of `ids` i64[T]; gate stands before up again."""
    first, end = rows or (0, w.n)
    count = end - first if ids is None else len(ids)
    out = torch.empty(count, w.k, dtype=w.dtype, device=w.units.device)
    block_n = 64 if ids is None else 16
    _dequantize[(triton.cdiv(count, block_n), len(w.units))](
        w.units, w.words, out, w.words if ids is None else ids, first, count, w.n, w.k, BLOCK_N=block_n, GATED=w.gated,
        IDS=ids is not None, num_warps=4, **w.options, **launch_options(out),
    )  # fmt: skip
    return out


def product(
    x: torch.Tensor, w: Packed, *, splits: int = 1, block_m: int = 16, block_n: int = 64, warps: int = 4, stages: int = 4,
    prefetch: int = 0, chains: int = 1, unroll: int = 1,
) -> torch.Tensor | PartialSums:  # fmt: skip
    """x [R, K] @ w.T -> [R, N] of x's dtype, or with splits f32 partial sums; of gated weights silu(gate) * up [R, N / 2].

    prefetch: blocks that a program asks for before it waits for its predecessor (a power of two, or 0).  chains: sums within
    a group that do not wait for each other.
    """
    rows, width = len(x), w.n // 2 if w.gated else w.n
    y = torch.empty(splits, rows, width, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    blocks, lanes = len(w.units), w.units.shape[2]
    _product[(triton.cdiv(w.n, block_n), splits, triton.cdiv(rows, block_m))](
        x, w.units, w.words, y, rows, w.n, w.k, blocks, triton.cdiv(blocks, splits), EVEN=w.k % (lanes * 16 // w.bits) == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, STAGES=stages, PREFETCH=prefetch if w.n >= block_n else 0,
        CHAINS=chains, UNROLL=unroll, GATED=w.gated, num_warps=warps, **w.options,
        **launch_options(x),
    )  # fmt: skip
    return y[0] if splits == 1 else PartialSums(y)


# ---------------- which path
PROCESSORS = 132  # of an H100 or H200
MOST_ROWS = 256  # up to here our product; above, it is faster to dequantise, and to multiply by the library
SCRATCH = 1 << 26  # weights that are dequantised at a time


def settings(rows: int, n: int, k: int, *, no_partial_sums: bool = False, gated: bool = False) -> dict[str, int]:
    """The settings of `product`, from scripts/bench/packed.py on an H200.

    Small programs, many for each processor, hide the steps from a load to the matrix unit behind each other's.
    """
    blocks = triton.cdiv(k, 128)
    if rows <= 8:
        shape = {"block_m": 8, "block_n": 32, "warps": 1, "stages": 5, "prefetch": 8 if gated else 4}
        most, programs = 2 if rows == 1 and n <= k <= 8192 else 4, 4 * PROCESSORS  # the next kernel adds them up
    else:
        block_m, few = min(64, triton.next_power_of_2(rows)), rows <= 16 and not gated
        shape = {"block_m": block_m, "block_n": 64, "warps": 2, "stages": 3}
        if not few:
            shape |= {"block_n": 128, "warps": 4}
        most, programs = (8, 4 * PROCESSORS) if few else (4, 3 * PROCESSORS // 2)
    tiles, splits = triton.cdiv(n, shape["block_n"]) * triton.cdiv(rows, shape["block_m"]), 1
    while not (no_partial_sums or gated) and splits < most and splits * tiles <= programs and blocks >= 8 * splits:
        splits *= 2
    if rows <= 8 and blocks % (2 * splits) == 0:
        shape |= {"unroll": 2, "chains": 2}
    return {"splits": splits, **shape}


def many_rows(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """x [R, K] @ w.T -> [R, N] through the library; gate stands before up."""
    step = min(w.n, max(1, SCRATCH // w.k // 128) * 128)
    if step == w.n:
        return F.linear(x, dequantize(w))
    y = torch.empty(len(x), w.n, dtype=x.dtype, device=x.device)
    for first in range(0, w.n, step):
        end = min(first + step, w.n)
        torch.mm(x, dequantize(w, (first, end)).t(), out=y[:, first:end])
    return y


def matmul(x: torch.Tensor, w: Packed, *, no_partial_sums: bool = False) -> torch.Tensor | PartialSums:
    """x @ w.T, of gated weights silu(gate) * up, by the faster path."""
    if len(x) <= MOST_ROWS:
        return product(x, w, **settings(len(x), w.n, w.k, no_partial_sums=no_partial_sums, gated=w.gated))
    y = many_rows(x, w)
    return silu_mul(y) if w.gated else y

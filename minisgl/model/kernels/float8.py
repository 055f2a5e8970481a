"""Converts float8_e4m3fn to the layout of the matrix unit, two dimensions at a time.

Hopper's small matrix instructions take 16-bit operands, and what brings operands from shared memory in their layout (ldmatrix)
moves 16-bit units.  So a row of bytes is read as units of two neighbouring dimensions; converted, a unit falls apart into an
even and an odd dimension, and a product over all dimensions is the sum of the products over either half.  Loading single bytes
in the operands' layout instead halves the bandwidth of decode attention (docs/benchmarks.md).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(units, INTERPRET: tl.constexpr):
    """i16 [N, D / 2] -> the even and the odd dimensions, f16 [N, D / 2] each."""
    if INTERPRET:
        even = (units & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = ((units >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # A register holds two units, bytes (e0, o0, e1, o1): gather (e0, e1) and (o0, o1), convert each pair.
        even, odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pairs;
            .reg .b16 low, high;
            prmt.b32 pairs, $2, 0, 0x3120;
            mov.b32 {low, high}, pairs;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [units],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd

"""Starts a kernel while the one before it still runs: programmatic dependent launch (PDL).

Every kernel here begins with `begin(PDL)` where its inputs are needed: it lets the next kernel of the stream start early, and
waits until every kernel before it has completed and its writes are visible.  As each kernel waits for the one before it,
completion is transitive, so a buffer may be reused as if launches were serial.  What no kernel writes (weights) may be read
before the wait: that is the gain, in addition to the launch latency.

CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; needs compute capability 9.0.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as _cuda


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the previous ones."""
    if PDL:
        _cuda.gdc_launch_dependents()
        _cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """The first half of `begin`: what stands between it and `wait` must read nothing that a kernel writes."""
    if PDL:
        _cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """The second half of `begin`."""
    if PDL:
        _cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines of `pointers` (i64) to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def available(device: torch.device) -> bool:
    """Whether kernels on this device are launched with PDL."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(x: torch.Tensor) -> dict[str, bool]:
    """Keyword arguments of a launch for the device of `x`: the flag of `begin`, and the launch attribute."""
    pdl = available(x.device)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}

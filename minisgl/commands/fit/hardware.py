"""The hardware that `minisgl fit` knows: memory, bandwidth and arithmetic, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.  Peak rates of the data sheet, without sparsity: a step can only take longer.  0: not known, or not there."""

    name: str
    gib: float  # as CUDA reports it, a little less than on the box
    bandwidth: float  # bytes/s of its memory
    flops: float  # of products of 16-bit numbers, added up in 32
    fp8_flops: float
    capability: int  # 90 for compute capability 9.0
    source: str


_AS_REPORTED = "memory as CUDA reports it"
GPUS = {
    "h200": Hardware("H200", 139.8, 4.8e12, 989e12, 1979e12, 90, f"NVIDIA H200 data sheet (SXM); {_AS_REPORTED}"),
    "h100": Hardware("H100", 79.1, 3.35e12, 989e12, 1979e12, 90, f"NVIDIA H100 data sheet (SXM, 80 GB); {_AS_REPORTED}"),
    "a100": Hardware("A100", 79.1, 2.039e12, 312e12, 0.0, 80, f"NVIDIA A100 data sheet (SXM, 80 GB); {_AS_REPORTED}"),
    "l4": Hardware("L4", 22.0, 0.3e12, 121e12, 242e12, 89, f"NVIDIA L4 data sheet; {_AS_REPORTED}"),
    "4090": Hardware(
        "RTX 4090", 23.5, 1.008e12, 165.2e12, 330.3e12, 89, f"NVIDIA Ada GPU architecture white paper; {_AS_REPORTED}"
    ),
}
OTHER_GIB = 0.6  # taken on an H200 before the weights by CUDA itself;
OTHER_GIB_RANKS = 1.5  # with NCCL's buffers, for each of several GPUs

"""The C kernels for aarch64, under emulation, against the same sources compiled for this machine.

    .venv/bin/python scripts/check/neon.py   # on Debian: apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

Three instruction sets: without products of bytes (armv8-a), with signed ones (dotprod), with mixed ones (i8mm).  Packed weights
must be equal, products and attention within rounding.  One JSON line for each; exit code 1 if one differs.  Speed is not
measured: an emulator has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minisgl.model.cpu.build import SOURCES

SETS = ("armv8-a", "armv8.2-a+dotprod", "armv8.6-a")
FLAGS = ("-O2", "-std=gnu11", "-pthread", "-fno-math-errno", "-Wno-psabi")
F32, F16, BF16 = 0, 1, 30  # ggml's numbers of these types
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """Sizes of a product, gated or not, and of an attention."""

    kind: int
    outputs: int
    inputs: int
    bits: int
    gated: int
    rows: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int

    def numbers(self, rng: np.random.Generator) -> bytes:
        """What kernel_driver.c reads."""

        def normal(*shape: int) -> npt.NDArray[np.float32]:
            return rng.standard_normal(shape).astype(np.float32)

        weight = normal(self.outputs, self.inputs)
        raw: npt.NDArray[Any] = weight
        if self.kind != F32:
            raw = weight.astype(np.float16) if self.kind == F16 else (weight.view(np.uint32) >> 16).astype(np.uint16)
        angles = normal(self.tokens, self.dim)
        parts: list[npt.NDArray[Any]] = [
            np.array([self.kind, self.outputs, self.inputs, self.bits, self.gated, self.rows], np.int32),
            raw,
            *(normal(self.inputs), normal(self.rows, self.inputs), normal(self.rows, self.inputs)),
            np.array([self.heads, self.kv_heads, self.dim, self.tokens], np.int32),
            normal(self.tokens, (self.heads + 2 * self.kv_heads) * self.dim),
            *(np.cos(angles), np.sin(angles)),
        ]
        return b"".join(p.tobytes() for p in parts)

    def split(self, out: bytes) -> tuple[bytes, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Blocks, product, attention."""
        packed = -(-self.outputs // 16) * -(-self.inputs // 32) * (320 if self.bits == 4 else 544)
        floats = np.frombuffer(out[packed:], np.float32)
        product = self.rows * (self.outputs // 2 if self.gated else self.outputs)
        assert len(floats) == product + self.tokens * self.heads * self.dim
        return out[:packed], floats[:product], floats[product:]


CASES = (
    Case(F32, 48, 64, 8, 0, 1, 2, 1, 16, 5),
    Case(F32, 37, 100, 8, 0, 11, 6, 2, 64, 75),
    Case(F16, 64, 96, 4, 1, 9, 3, 3, 32, 40),
    Case(BF16, 96, 128, 8, 2, 19, 22, 2, 48, 130),
    Case(BF16, 40, 64, 4, 0, 3, 4, 1, 80, 33),
)


def build(compiler: str, flags: tuple[str, ...], path: Path) -> str:
    """The driver with the kernels."""
    sources = [str(Path(__file__).parent / "kernel_driver.c"), *map(str, sorted(SOURCES.glob("*.c")))]
    subprocess.run([compiler, *FLAGS, *flags, f"-I{SOURCES}", "-o", str(path), *sources, "-lm"], check=True)
    return str(path)


def off(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def main() -> int:
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        here = build("cc", ("-march=native",), Path(folder) / "native")
        blobs = [case.numbers(np.random.default_rng(i)) for i, case in enumerate(CASES)]

        def run(command: list[str], at: int) -> tuple[bytes, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
            return CASES[at].split(subprocess.run(command, input=blobs[at], capture_output=True, check=True).stdout)

        expected = [run([here], i) for i in range(len(CASES))]
        for name in SETS:
            there = build("aarch64-linux-gnu-gcc", (f"-march={name}", "-static"), Path(folder) / name)
            got = [run(["qemu-aarch64", "-cpu", "max", there], i) for i in range(len(CASES))]
            pairs = list(zip(got, expected, strict=True))
            equal = all(a[0] == b[0] for a, b in pairs)
            product = max(off(mine, theirs) for (_, mine, _), (_, theirs, _) in pairs)
            attention = max(off(mine, theirs) for (_, _, mine), (_, _, theirs) in pairs)
            ok = equal and product <= TOLERANCE and attention <= TOLERANCE
            failed |= not ok
            result = {"blocks equal": equal, "product": product, "attention": attention, "ok": ok}
            print(json.dumps({"check": "neon", "set": name, "cases": len(CASES), **result}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

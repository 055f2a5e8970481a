"""Every algorithm that cuBLASLt proposes for the products of a model, timed, beside the one it would take; one JSON line each.

    python scripts/tune/cublaslt.py [--shapes 34816x5120 ...] [--rows 64 144 256] [--kinds bf16 fp8-rows fp8-whole]

y [rows, N] = x [rows, K] @ W [N, K].T.  fp8-rows has a scale for each row of x and of W, fp8-whole one for each of them.
"default" is the first proposal, which is what torch runs.  Microseconds inside a CUDA graph over weights larger than the cache.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from scripts.tune.kernels import CACHE_BYTES, graph_us

# cublasLt.h and library_types.h of CUDA 13
F32, BF16, E4M3, COMPUTE_F32 = 0, 14, 28, 68
TRANS_A, A_SCALE, B_SCALE, FAST_ACCUM, A_MODE, B_MODE = 3, 17, 18, 25, 31, 32
OUTER_VECTOR, MAX_WORKSPACE = 3, 1
WORKSPACE = 32 << 20


class Heuristic(ctypes.Structure):
    _fields_ = [
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def library() -> Any:
    """The one that torch has loaded."""
    torch.zeros(1, 1, device="cuda") @ torch.zeros(1, 1, device="cuda")
    with open("/proc/self/maps") as maps:
        path = next(line.split()[-1] for line in maps if "libcublasLt.so" in line)
    return ctypes.CDLL(path)


class Product:
    """cublasLtMatmul for one size and kind; `proposals` are its algorithms, the default first."""

    def __init__(self, lib: Any, rows: int, n: int, k: int, kind: str) -> None:
        self.lib, self.rows, self.n = lib, rows, n
        self.handle = self._made("cublasLtCreate")
        self.desc = self._made("cublasLtMatmulDescCreate", COMPUTE_F32, F32)
        self._set("cublasLtMatmulDescSetAttribute", self.desc, TRANS_A, ctypes.c_int32(1))
        item = BF16 if kind == "bf16" else E4M3
        if kind != "bf16":
            self._set("cublasLtMatmulDescSetAttribute", self.desc, FAST_ACCUM, ctypes.c_int8(1))
            by_rows = kind == "fp8-rows"
            self.scales = [torch.ones(size if by_rows else 1, device="cuda") for size in (n, rows)]
            for pointer, mode, scale in ((A_SCALE, A_MODE, self.scales[0]), (B_SCALE, B_MODE, self.scales[1])):
                self._set("cublasLtMatmulDescSetAttribute", self.desc, pointer, ctypes.c_void_p(scale.data_ptr()))
                if by_rows:
                    self._set("cublasLtMatmulDescSetAttribute", self.desc, mode, ctypes.c_int32(OUTER_VECTOR))
        size = [ctypes.c_uint64(k), ctypes.c_uint64(n), ctypes.c_int64(k)]
        self.a = self._made("cublasLtMatrixLayoutCreate", item, *size)
        self.b = self._made("cublasLtMatrixLayoutCreate", item, ctypes.c_uint64(k), ctypes.c_uint64(rows), ctypes.c_int64(k))
        self.d = self._made("cublasLtMatrixLayoutCreate", BF16, ctypes.c_uint64(n), ctypes.c_uint64(rows), ctypes.c_int64(n))
        preference = self._made("cublasLtMatmulPreferenceCreate")
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, MAX_WORKSPACE, ctypes.c_size_t(WORKSPACE))
        found, results = ctypes.c_int(0), (Heuristic * 64)()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self.handle, self.desc, self.a, self.b, self.d, self.d, preference, 64, results,
            ctypes.byref(found),
        )  # fmt: skip
        self.proposals = [results[i] for i in range(found.value) if results[i].state == 0]
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        self.one, self.zero = ctypes.c_float(1), ctypes.c_float(0)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, algo: Heuristic) -> torch.Tensor:
        y = torch.empty(self.rows, self.n, dtype=torch.bfloat16, device="cuda")
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight, x, y)]
        self._call(
            "cublasLtMatmul", self.handle, self.desc, ctypes.byref(self.one), pointers[0], self.a, pointers[1], self.b,
            ctypes.byref(self.zero), pointers[2], self.d, pointers[2], self.d, ctypes.byref(algo.algo),
            ctypes.c_void_p(self.workspace.data_ptr()), ctypes.c_size_t(WORKSPACE),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        return y

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self.lib, name)(*args)
        if status:
            raise RuntimeError(f"{name}: status {status}")

    def _made(self, name: str, *args: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *args)
        return made

    def _set(self, name: str, target: ctypes.c_void_p, attribute: int, value: Any) -> None:
        self._call(name, target, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


def tune(lib: Any, n: int, k: int, rows: int, kind: str) -> None:
    size = n * k * (2 if kind == "bf16" else 1)
    sets = min(12, max(2, -(-CACHE_BYTES // size)))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float8_e4m3fn
    weights = [(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.05).to(dtype) for _ in range(sets)]
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16).to(dtype)
    want = x.float() @ weights[0].float().T
    product = Product(lib, rows, n, k, kind)
    timed: list[tuple[float, int, float]] = []
    for index, algo in enumerate(product.proposals):
        try:
            got = product(x, weights[0], algo).float()
            calls: list[Callable[[], Any]] = [partial(product, x, w, algo) for w in weights]
            timed.append((graph_us(calls, 9), index, float((got - want).norm() / want.norm())))
        except RuntimeError as e:
            print(kind, n, k, rows, index, repr(e)[:120], file=sys.stderr)
    best = min(timed)
    line = {"product": f"{n}x{k}", "rows": rows, "kind": kind, "limit_us": round(size / 4.3e6, 1), "proposals": len(timed)}
    line |= {"default_us": round(timed[0][0], 1), "best_us": round(best[0], 1), "best": best[1], "error": round(best[2], 4)}
    print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["7168x5120", "5120x5120", "34816x5120", "5120x17408"], metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 96, 128, 144, 176, 208, 256])
    parser.add_argument("--kinds", nargs="+", default=["bf16", "fp8-rows", "fp8-whole"])
    args = parser.parse_args()
    lib = library()
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        for kind in args.kinds:
            for rows in args.rows:
                tune(lib, n, k, rows, kind)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every attention backend on this GPU against the reference in torch, row by row; one JSON line a case.

    python scripts/check/attention.py [--time]

Ragged chunks, some over a cached prefix, and decode rows; groups of 1 to 8 query heads, head sizes 64 to 256, pages of 1, 16
and 64 tokens in random order, bfloat16 and float8 caches.  The errors are the largest of any one head of any one token, as
ratios of norms.  --time compares the backends' prefill at sizes of real models instead.  Exit code 1 if a case fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys

import numpy as np
import torch

from minisgl.errors import UserError
from minisgl.model.cuda.attention.base import AttentionSpec, Backend, Chunks, DecodeRows
from minisgl.model.cuda.attention.choose import find
from minisgl.model.cuda.attention.flashinfer import FlashInferAttention
from minisgl.model.cuda.attention.kv_cache import FP8, KVCache
from scripts.lib.reference import provenance

BF16 = torch.bfloat16
CHUNKS = [
    (1, 1),
    (2, 2),
    (15, 15),
    (16, 40),
    (17, 17),
    (64, 64),
    (100, 300),
    (333, 333),
    (129, 1000),
    (300, 600),
]  # new, in all
GROUPS = [(8, 8), (8, 4), (6, 2), (8, 2), (10, 2), (6, 1), (7, 1), (8, 1)]  # heads, KV heads


class Case:
    """A cache with chunks, whose last tokens also serve as decode rows."""

    def __init__(self, heads: AttentionSpec, page_size: int, chunks: list[tuple[int, int]]) -> None:
        generator = torch.Generator("cuda").manual_seed(7)
        new, self.total = (np.array(x, np.int32) for x in zip(*chunks, strict=True))
        counts = -(-self.total // page_size)
        order = np.random.default_rng(3).permutation(int(counts.sum())).astype(np.int32)
        pages = np.zeros((len(chunks), int(counts.max())), np.int32)
        for row, (start, count) in enumerate(zip(np.cumsum(counts) - counts, counts, strict=True)):
            pages[row, :count] = order[start : start + count]
        self.heads = heads
        self.table = torch.from_numpy(pages).cuda()
        self.cache = KVCache(
            layers=1,
            num_pages=len(order),
            page_size=page_size,
            kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            dtype=heads.kv_dtype,
            device=torch.device("cuda"),
        )
        for part in (self.cache.keys(0), self.cache.values(0)):
            part.copy_(torch.randn(part.shape, device="cuda", generator=generator).to(heads.kv_dtype))
        slots = np.arange(len(chunks), dtype=np.int32)
        self.chunks = Chunks(new, self.total, slots, pages)
        on_device = torch.from_numpy(slots).cuda(), torch.from_numpy(self.total).cuda()
        self.rows = DecodeRows(*on_device, 4, self.total, pages)
        shape = (int(new.sum()), heads.num_heads, heads.head_dim)
        self.q = torch.randn(shape, device="cuda", generator=generator).to(heads.dtype)

    def backend(self, name: str) -> Backend:
        made = find(name.split(maxsplit=1)[0])(self.heads, self.cache, self.table)
        if name == "flashinfer fa2":
            import flashinfer

            assert isinstance(made, FlashInferAttention)
            made._prefill = {0: flashinfer.BatchPrefillWithPagedKVCacheWrapper(made._workspace, "HND", backend="fa2")}
            made._widening = {}
        return made

    def outputs(self, name: str) -> dict[str, torch.Tensor]:
        backend, out = self.backend(name), {}
        if find(name.split(maxsplit=1)[0]).refuses(self.heads, "prefill") is None:
            backend.plan_prefill(self.chunks)
            out["prefill"] = backend.prefill(self.q, 0, None)
        if name != "flashinfer fa2" and find(name).refuses(self.heads, "decode") is None:
            backend.plan_decode(self.rows)
            out["decode"] = backend.decode(self.q[: len(self.total)].contiguous(), 0, None)
        return out


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)).max())


def check() -> int:
    failed = 0
    cases = [(g, 128, 16, BF16) for g in GROUPS] + [(g, 64, 16, BF16) for g in GROUPS]
    cases += [((10, 2), 128, p, kv) for p, kv in itertools.product((1, 64), (BF16, FP8))] + [((8, 4), 128, 16, FP8)]
    cases += [((5, 1), 80, 16, BF16), ((7, 1), 96, 16, BF16), ((4, 2), 256, 16, BF16), ((10, 2), 96, 1, FP8)]
    for (num_heads, kv_heads), dim, page_size, kv_dtype in cases:
        capability = torch.cuda.get_device_capability()
        heads = AttentionSpec(num_heads, kv_heads, dim, BF16, kv_dtype, 10 * capability[0] + capability[1])
        case = Case(heads, page_size, CHUNKS)
        want = case.outputs("torch")
        names = ["triton", "flashinfer", "flashinfer fa2"] if dim in (64, 128) else ["triton"]
        if kv_dtype == FP8 and dim != 128:
            names = names[:1]
        for name in names:
            line: dict[str, object] = {
                "backend": name, "heads": f"{num_heads}/{kv_heads}", "dim": dim, "page_size": page_size, "kv": str(kv_dtype)[6:]
            }  # fmt: skip
            try:
                errors = {task: worst(out, want[task]) for task, out in case.outputs(name).items()}
                # float8: weights of the softmax are rounded to float16 or bfloat16 beside 8-bit values, no worse than bfloat16
                ok = all(e < 0.03 for e in errors.values())
                line |= {task: round(e, 4) for task, e in errors.items()}
            except (UserError, RuntimeError) as e:
                ok, line["refused"] = False, str(e)[:200]
            failed += not ok
            print(json.dumps({"ok": ok, **line}), flush=True)
    return failed


def time_prefill() -> None:
    """Milliseconds of one layer, and TFLOP/s, causal work counted once."""
    for (num_heads, kv_heads), dim in (((16, 8), 128), ((40, 8), 128), ((32, 8), 64)):
        heads = AttentionSpec(num_heads, kv_heads, dim, BF16, BF16, 90)
        for chunks in ([(128, 128)], [(558, 558)] * 29, [(2048, 2048)] * 8, [(16_384, 16_384)], [(8192, 131_072)]):
            case = Case(heads, 16, chunks)
            pairs = sum(n * (s - n) + n * (n + 1) // 2 for n, s in chunks)
            for name in ("triton", "flashinfer", "flashinfer fa2"):
                backend = case.backend(name)
                backend.plan_prefill(case.chunks)
                times = []
                for _ in range(8):
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    backend.prefill(case.q, 0, None)
                    end.record()
                    end.synchronize()
                    times.append(start.elapsed_time(end))
                ms = float(np.median(times[3:]))
                print(
                    json.dumps(
                        {
                            "prefill": name,
                            "heads": f"{num_heads}/{kv_heads}",
                            "dim": dim,
                            "chunks": f"{len(chunks)} x {chunks[0][0]} of {chunks[0][1]}",
                            "ms": round(ms, 3),
                            "tflops": round(4 * pairs * num_heads * dim / ms / 1e9),
                        }
                    ),
                    flush=True,
                )


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), **provenance()}), flush=True)
    with torch.inference_mode():
        if args.time:
            time_prefill()
            return 0
        return 1 if check() else 0


if __name__ == "__main__":
    sys.exit(main())

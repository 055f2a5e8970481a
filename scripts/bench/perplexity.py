"""What quantisation costs a model on a CPU: perplexity of English text in float32 and in each kind, on the same tokens.

    .venv/bin/python scripts/bench/perplexity.py [--model M] [--kinds auto int8] [--segments 16] [--length 512]

The text is the reference that comes with Python (pydoc_data.topics), from which segments are cut evenly.  The error is that of
the mean over segments of the difference to float32, so what is hard in the text drops out.  One JSON line for each kind.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics

import numpy as np
import numpy.typing as npt
import torch

from minisgl.config import EngineConfig, ModelSpec
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.host import usable_cores
from minisgl.model.common.interfaces import Build
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.registry import model_class
from minisgl.model.common.shard import Shard
from minisgl.model.common.slots import SlotState
from minisgl.model.cpu.backend import CpuArithmetic
from minisgl.model.text.tokenizer import load_tokenizer
from minisgl.plan import StepPlan
from scripts.lib.reference import provenance

PAGE = 16


def segments(spec: ModelSpec, number: int, length: int) -> list[npt.NDArray[np.int32]]:
    """i32[length] each, BOS in front where the model has one."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:400_000]
    ids = np.asarray(load_tokenizer(spec).encode(text, False), np.int32)
    first = [] if spec.bos_id is None else [spec.bos_id]
    starts = np.linspace(0, len(ids) - length, number).astype(int)
    return [np.array([*first, *ids[s : s + length - len(first)]], np.int32) for s in starts]


def losses(spec: ModelSpec, kind: str, texts: list[npt.NDArray[np.int32]], threads: int) -> npt.NDArray[np.float64]:
    """f64[segments, length - 1]: of each token but the first."""
    arithmetic, shard = CpuArithmetic.choose(EngineConfig(quantization=kind), spec, threads), Shard.of(spec, 0, 1)
    pages = -(-len(texts[0]) // PAGE)
    attention = arithmetic.attention(spec, shard, pages, PAGE)
    weights = open_weights(spec, torch.float32, lazy=arithmetic.lazy)
    found = []
    with torch.inference_mode():
        model = model_class(spec.architecture)(Build(spec, shard, weights, Parallel(), arithmetic.layers))
        for ids in texts:
            state = SlotState(1, pages * PAGE, PAGE)
            state.page_table[0] = np.arange(pages)
            prefill = np.zeros(1, StepPlan(1).prefill.dtype)
            prefill["n_ids"] = len(ids)
            batch = state.apply(StepPlan(1, prefill=prefill, ids=ids))
            attention.plan(batch)
            logits = model(torch.from_numpy(batch.ids), torch.from_numpy(batch.positions), None, attention)
            targets = torch.from_numpy(ids[1:].astype(np.int64))
            found.append(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none").double().numpy())
    return np.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--kinds", nargs="+", default=["auto", "int8"])
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    spec, threads = resolve(args.model), usable_cores()
    torch.set_num_threads(threads)
    texts = segments(spec, args.segments, args.length)
    exact = losses(spec, "none", texts, threads)
    print(json.dumps({"check": "perplexity", **provenance(), "tokens": exact.size, "float32": float(np.exp(exact.mean()))}))
    for kind in args.kinds:
        off = losses(spec, kind, texts, threads) - exact
        error = off.mean(1).std(ddof=1) / np.sqrt(len(off))
        result = {"perplexity": float(np.exp((exact + off).mean())), "more": float(np.expm1(off.mean())), "error": float(error)}
        print(json.dumps({"kind": kind, **result}), flush=True)


if __name__ == "__main__":
    main()

"""What kinds of arithmetic cost: perplexity of texts in windows of 512 tokens, against the first kind; one JSON line each.

    python scripts/perplexity.py [--model M] [--quantization none auto ...] [--device cpu] [--files FILE ...]

Without --files: this repository's README and docs.  The change is that of the mean log probability, with two standard errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from reference import provenance

from minisgl import LLM, SamplingParams
from minisgl.model.resolve import resolve
from minisgl.model.tokenizer import load_tokenizer

WINDOW = 512


def log_probabilities(windows: list[list[int]], model: str | None, **engine: str) -> npt.NDArray[np.float64]:
    """Of every token but the first of each window."""
    with LLM(model, **engine) as llm:
        answers = llm.generate(windows, SamplingParams(max_tokens=0, echo=True, logprobs=0))
    failed = [a.error for a in answers if a.error is not None]
    if failed:
        raise SystemExit(f"{len(failed)} windows failed: {failed[0]}")
    return np.array([t.logprob for a in answers for t in a.logprobs[1:]], np.float64)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--quantization", nargs="+", default=["none", "auto"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--files", nargs="+", type=Path)
    args = parser.parse_args()
    root = Path(__file__).parent.parent
    files = args.files or [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    tokenizer = load_tokenizer(resolve(args.model))
    ids = [t for file in files for t in tokenizer.encode(file.read_text(encoding="utf-8"), False)]
    windows = [list(ids[at : at + WINDOW]) for at in range(0, len(ids) - WINDOW, WINDOW)]
    print(
        json.dumps({"windows": len(windows), "tokens": WINDOW * len(windows), "files": len(files), **provenance()}), flush=True
    )
    exact = None
    for kind in args.quantization:
        found = log_probabilities(windows, args.model, quantization=kind, device=args.device)
        exact = found if exact is None else exact
        change = float(np.expm1(np.mean(exact - found)))
        chance = 2 * float(np.std(exact - found)) / len(found) ** 0.5
        line = {"quantization": kind, "perplexity": round(float(np.exp(-found.mean())), 4)}
        print(json.dumps({**line, "percent": round(100 * change, 3), "chance": round(100 * chance, 3)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Computes reference answers for checks and benchmarks: the checkpoint in Hugging Face transformers, float32, on this CPU.

Imported by other scripts; not a command.
"""

from __future__ import annotations

import inspect
import json
import json.decoder
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from minisgl.bench.provenance import provenance
from minisgl.config import ModelSpec
from minisgl.model.text.tokenizer import load_tokenizer
from minisgl.selfcheck.reference import load_transformers

__all__ = ["greedy", "load_transformers", "prompts", "provenance"]


def greedy(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, stop_at_eos: bool = True) -> list[list[int]]:
    """Greedy answers of transformers' generate to a batch of prompts, padded on the left; without the padding after EOS."""
    width = max(map(len, prompts))
    pad = model.generation_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    more = {} if stop_at_eos else {"min_new_tokens": max_tokens}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad, **more)
    eos = model.generation_config.eos_token_id
    answers = []
    for row in out[:, width:].tolist():
        end = row.index(eos) + 1 if stop_at_eos and eos in row else len(row)
        answers.append(row[:end])
    return answers


_QUESTIONS = (
    "Hi!",
    "What is the capital of France?",
    "Name three colours.",
    "Write a haiku about the sea.",
    "Explain in one paragraph why the sky is blue.",
    "What is 17 plus 25? Think step by step.",
    "Translate to German: The train leaves at nine.",
    "Give me a recipe for pancakes with five ingredients.",
    "Who wrote Hamlet, and when?",
    "Continue the list: 2, 4, 8, 16,",
    "Write a Python function that reverses a string.",
    "¿Cuál es la capital de España? Responde en español. 🇪🇸",
)
_LENGTHS = (5, 16, 17, 64, 200, 255, 256, 257, 500, 800, 1200, 1500)  # around page and chunk borders, and long


def prompts(spec: ModelSpec) -> list[list[int]]:
    """24 prompts of 5 to 1,500 tokens: chat questions, and source text of the standard library cut to length."""
    tokenizer = load_tokenizer(spec)
    chats = [
        tokenizer.encode_chat(json.dumps({"messages": [{"role": "user", "content": q}], "kwargs": {}}).encode())
        for q in _QUESTIONS
    ]
    text = tokenizer.encode(inspect.getsource(json.decoder), False)
    cuts = [text[17 * i : 17 * i + n] for i, n in enumerate(_LENGTHS)]
    return [np.asarray(p).tolist() for p in (*chats, *cuts)]

"""A seeded set of requests of every kind.  Imported by other scripts; not a command."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WORDS = ["river", "stone", "dragon", "seven", "light", "over", "under", "garden", "winter", "letter", "bread", "engine"]
FIRST, LAST = 50, 40_000  # token ids of plain text in any vocabulary that is large enough
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo", "Bern"]}, "size": {"enum": [1, 22, 333]}, "old": {"type": "boolean"}},
    "required": ["city", "size", "old"],
}


@dataclass(frozen=True)
class Case:
    """One request.  `path` "/v1/batches": a batch over HTTP, "socket": over the batch socket; both have `lines`.

    `greedy`: its tokens are the most likely ones, and it tells their ids and those of its prompt.
    """

    number: int
    kind: str
    path: str
    body: dict[str, Any]
    lines: tuple[tuple[str, dict[str, Any]], ...] = field(default=())
    greedy: bool = False

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


class _Maker:
    def __init__(self, seed: int, tokens: int) -> None:
        self.rng = random.Random(f"cases {seed}")
        self.tokens = tokens
        self._trunks = [self.ids(60) for _ in range(3)]  # prompts with a common beginning

    def ids(self, n: int) -> list[int]:
        return [self.rng.randrange(FIRST, LAST) for _ in range(n)]

    def prompt(self) -> list[int]:
        return (self.rng.choice(self._trunks) if self.rng.random() < 0.5 else []) + self.ids(self.rng.randrange(1, 40))

    def text(self) -> str:
        return " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randrange(3, 30)))

    def length(self) -> dict[str, Any]:
        return {"max_tokens": self.rng.randrange(self.tokens // 3, self.tokens), "ignore_eos": True}

    def drawn(self) -> dict[str, Any]:
        return {"seed": self.rng.randrange(1 << 30), "temperature": self.rng.choice((0.5, 0.9, 1.2)), "top_p": 0.95}

    def stream(self) -> dict[str, Any]:
        return {"stream": True, "stream_options": {"include_usage": True}} if self.rng.random() < 0.6 else {}

    def chat(self) -> list[dict[str, str]]:
        turns = [{"role": "user", "content": self.text()}]
        if self.rng.random() < 0.4:
            turns += [{"role": "assistant", "content": self.text()}, {"role": "user", "content": self.text()}]
        return turns


CHAT, COMPLETE, GENERATE, EMBED = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/embeddings"


def _native(m: _Maker) -> dict[str, Any]:
    length = m.length()["max_tokens"]
    return {
        "input_ids": m.prompt(),
        "sampling_params": {"max_new_tokens": length, "temperature": 0, "ignore_eos": True},
        "stream": m.rng.random() < 0.7,
        "return_logprob": m.rng.random() < 0.5,
    }


# kind -> (path, what makes a body)
KINDS: dict[str, tuple[str, Callable[[_Maker], dict[str, Any]]]] = {
    "native": (GENERATE, _native),
    "chat": (CHAT, lambda m: {"messages": m.chat(), "temperature": 0, **m.length(), **m.stream()}),
    "chat, n": (CHAT, lambda m: {"messages": m.chat(), "n": m.rng.randrange(2, 5), **m.drawn(), **m.length(), **m.stream()}),
    "chat, logprobs": (
        CHAT,
        lambda m: {"messages": m.chat(), **m.drawn(), "logprobs": True, "top_logprobs": 2, **m.length(), **m.stream()},
    ),
    "schema": (
        CHAT,
        lambda m: {
            "messages": m.chat(),
            **m.drawn(),
            **m.stream(),
            "max_tokens": 200,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        },
    ),
    "tool": (
        CHAT,
        lambda m: {
            "messages": m.chat(),
            **m.drawn(),
            "tools": [TOOL],
            "tool_choice": "required",
            "max_tokens": 200,
            **m.stream(),
        },
    ),
    "tool, auto": (CHAT, lambda m: {"messages": m.chat(), **m.drawn(), "tools": [TOOL], **m.length(), **m.stream()}),
    "regex": (
        COMPLETE,
        lambda m: {"prompt": m.text(), **m.drawn(), "guided_regex": "([a-f]{5} ){30}end", "max_tokens": 400, **m.stream()},
    ),
    "text": (COMPLETE, lambda m: {"prompt": m.text(), **m.drawn(), **m.length(), **m.stream()}),
    "echo": (
        COMPLETE,
        lambda m: {"prompt": m.prompt(), **m.drawn(), "echo": True, "logprobs": 2, **m.length(), **m.stream()},
    ),
    "ids, n": (COMPLETE, lambda m: {"prompt": [m.prompt(), m.prompt()], "n": 2, **m.drawn(), **m.length(), **m.stream()}),
    "penalties": (
        COMPLETE,
        lambda m: {
            "prompt": m.prompt(),
            **m.drawn(),
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.4,
            "presence_penalty": 0.3,
            "logit_bias": {"100": 2.0},
            **m.length(),
            **m.stream(),
        },
    ),
    "stop": (
        COMPLETE,
        lambda m: {
            "prompt": m.text(),
            **m.drawn(),
            "stop": ["qu", " th"],
            "min_tokens": m.tokens // 4,
            **m.length(),
            **m.stream(),
        },
    ),
    "vectors": (EMBED, lambda m: {"input": [m.prompt(), m.prompt()], "pooling": m.rng.choice(("last", "mean"))}),
}
LINES = ("chat", "chat, n", "schema", "text", "echo", "penalties")  # kinds that are sent in batches


def cases(seed: int, n: int, tokens: int, context: int) -> list[Case]:
    """`n` requests of all kinds in turn, with answers of up to `tokens` tokens.  `context`: of the model."""
    m = _Maker(seed, tokens)
    made = []
    for number in range(n):
        kinds = [*KINDS, "batch", "socket", "too long"]
        kind = kinds[number % len(kinds)]
        if kind == "too long":
            made.append(
                Case(number, kind, COMPLETE, {"prompt": m.ids(context + 1), "max_tokens": 5, "stream": m.rng.random() < 0.5})
            )
        elif kind in ("batch", "socket"):
            made.append(Case(number, kind, "/v1/batches" if kind == "batch" else kind, {}, tuple(_lines(m, kind == "batch"))))
        else:
            path, make = KINDS[kind]
            made.append(Case(number, kind, path, make(m), greedy=kind == "native"))
    return made


def _lines(m: _Maker, one_path: bool) -> list[tuple[str, dict[str, Any]]]:
    """(path, body) of the lines of a batch, which has only one path over HTTP."""
    names = [name for name in LINES if not one_path or KINDS[name][0] == CHAT]
    lines = [(KINDS[name][0], KINDS[name][1](m)) for name in names]
    return [(path, {k: v for k, v in body.items() if not k.startswith("stream")}) for path, body in lines]

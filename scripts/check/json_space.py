"""Which white space of JSON gives the better answers: how many of N greedy answers end, and are what the schema says.

    .venv/bin/python scripts/check/json_space.py [--model M] [--tokens 256] [--prompts 20] [--choice one-form free ...]

A grammar may prescribe one form of white space, as json.dumps writes it, or leave the model freedom.  For every choice and
each of three schemas, N chats are answered greedily.  One JSON line each: how many answers ended by themselves before --tokens
tokens, how many of those are valid, how many say nothing at all ({} or []), how many tokens all answers have, and the longest
run of white space.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from minisgl import LLM, SamplingParams

ONE_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
FREE = {"whitespace_flexible": True, "item_separator": ",", "key_separator": ":"}
CHOICES: dict[str, dict[str, Any]] = {  # options of the grammar library; a pattern may match again behind itself
    "one-form": ONE_FORM,
    "free": FREE,
    "spaces": {**FREE, "whitespace_pattern": " "},
    "lines": {**FREE, "whitespace_pattern": "[ \\n]+"},  # what is served
}
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
SCHEMAS: dict[str, tuple[str, dict[str, Any]]] = {  # what is asked of a subject, and the schema
    "any object": ("Describe {} in a few words, as a JSON object.", {"type": "object"}),
    "array": ("List three words about {} as a JSON array of strings.", {"type": "array", "items": TEXT}),
    "object": (
        "Describe {} as JSON with the fields name, kind, size (an integer) and uses (an array of strings).",
        {
            "type": "object",
            "properties": {"name": TEXT, "kind": TEXT, "size": WHOLE, "uses": {"type": "array", "items": TEXT}},
            "required": ["name", "kind", "size", "uses"],
            "additionalProperties": False,
        },
    ),
}
SUBJECTS = (
    *("apples", "bread", "the sea", "Paris", "a horse", "winter", "music", "gold", "the moon", "a bicycle", "tea", "a bridge"),
    *("rain", "chess", "a library", "the sun", "glass", "a garden", "trains", "honey", "paper", "a clock", "salt", "a river"),
)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON schema, as far as SCHEMAS go."""
    kind = schema["type"]
    if kind == "array":
        return isinstance(value, list) and all(valid(v, schema["items"]) for v in value)
    if kind == "object":
        inner = schema.get("properties")
        return isinstance(value, dict) and (
            inner is None or (list(value) == list(inner) and all(valid(v, inner[k]) for k, v in value.items()))
        )
    return isinstance(value, str) if kind == "string" else type(value) is int


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--choice", nargs="+", choices=CHOICES, default=list(CHOICES))
    args = parser.parse_args()
    with LLM(args.model, max_running=args.prompts) as llm:
        for (name, (question, schema)), choice in ((s, c) for s in SCHEMAS.items() for c in args.choice):
            grammar = json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": CHOICES[choice]}}]})
            params = SamplingParams(temperature=0, max_tokens=args.tokens, grammar=grammar)
            chats = [[{"role": "user", "content": question.format(s)}] for s in SUBJECTS[: args.prompts]]
            answers = llm.chat(chats, params)
            ended = [a for a in answers if a.finish_reason == "stop"]
            right = sum(valid(json.loads(a.text), schema) for a in ended)
            empty = sum(a.text in ("[]", "{}") for a in ended)
            blank = max(len(run) for a in answers for run in re.findall(r"\s+|$", a.text))
            counts = {
                "answers": len(answers),
                "ended": len(ended),
                "valid": right,
                "empty": empty,
                "tokens": sum(len(a.token_ids) for a in answers),
            }
            print(json.dumps({"schema": name, "white space": choice, **counts, "longest white space": blank}), flush=True)


if __name__ == "__main__":
    main()

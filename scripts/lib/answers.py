"""What a server has answered, in one form for all endpoints, and how two answers differ.  Imported by other scripts.

An answer has parts: a choice by its index, or a line of a batch by its id.  While a stream is read, whatever contradicts
itself is noted: a part that goes on after its end, an end that comes twice, a text that does not continue what was sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

CLOSE = 1e-3  # log probabilities and vectors may differ by so much


@dataclass
class Part:
    """One text.  `numbers`: log probabilities, those of alternatives included, or a vector; `calls`: of tools, as JSON."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    numbers: list[float | None] = field(default_factory=list)
    calls: dict[int, list[str]] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)


@dataclass
class Answer:
    """`torn`: contradictions inside the answer; `ends`: how often the whole was ended."""

    status: int = 200
    parts: dict[str, Part] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    ends: int = 0
    torn: list[str] = field(default_factory=list)
    error: str = ""

    def part(self, key: object) -> Part:
        return self.parts.setdefault(str(key), Part())


# ---------------- reading
def read_plain(path: str, body: Any, answer: Answer, prefix: str = "") -> Answer:
    """Add the answer to a request that was not streamed.  `prefix`: stands before the keys of its parts."""
    answer.ends += 1
    if path == "/generate":
        for i, one in enumerate(body if isinstance(body, list) else [body]):
            _native(answer.part(f"{prefix}{i}"), one, answer)
    elif path == "/v1/embeddings":
        for one in body["data"]:
            part = answer.part(f"{prefix}{one['index']}")
            part.numbers.extend(one["embedding"])
            part.ends.append("vector")
    else:
        for choice in body["choices"]:
            _choice(answer, f"{prefix}{choice['index']}", choice, choice.get("message", choice))
        _use(answer, body.get("usage"), prefix)
    return answer


def read_event(path: str, data: str, answer: Answer) -> None:
    """Add one event of a stream, what stands behind `data:`."""
    if answer.ends:
        answer.torn.append("an event came after [DONE]" if data != "[DONE]" else "[DONE] came twice")
    if data == "[DONE]":
        answer.ends += 1
        return
    event = json.loads(data)
    if "error" in event:
        answer.error = answer.error or json.dumps(event["error"])
    elif path == "/generate":
        _native(answer.part(event.get("index", 0)), event, answer)
    else:
        for choice in event["choices"]:
            _choice(answer, choice["index"], choice, choice.get("delta", choice))
        _use(answer, event.get("usage"))


def _use(answer: Answer, usage: dict[str, Any] | None, prefix: str = "") -> None:
    if usage:
        answer.usage |= {f"{prefix}{name}": usage[name] for name in ("prompt_tokens", "completion_tokens") if name in usage}


def _choice(answer: Answer, key: object, choice: dict[str, Any], content: dict[str, Any]) -> None:
    part = answer.part(key)
    if part.ends and (content.get("content") or content.get("text") or content.get("tool_calls") or choice["finish_reason"]):
        answer.torn.append(f"choice {key} went on after its end")
    part.text += content.get("content") or content.get("text") or ""
    for i, call in enumerate(content.get("tool_calls") or ()):
        function = call.get("function", {})
        name, arguments = part.calls.setdefault(call.get("index", i), ["", ""])
        part.calls[call.get("index", i)] = [name + (function.get("name") or ""), arguments + (function.get("arguments") or "")]
    if logprobs := choice.get("logprobs"):
        if "content" in logprobs:
            entries = logprobs["content"] or ()
            part.tokens.extend(e["token"] for e in entries)
            part.numbers.extend(x for e in entries for x in (e["logprob"], *(t["logprob"] for t in e["top_logprobs"])))
        else:
            part.tokens.extend(logprobs["tokens"])
            for lp, tops in zip(logprobs["token_logprobs"], logprobs["top_logprobs"] or (), strict=False):
                part.numbers.extend((lp, *(tops or {}).values()))
    if choice["finish_reason"]:
        part.ends.append(choice["finish_reason"])


def _native(part: Part, one: dict[str, Any], answer: Answer) -> None:
    """An object of /generate, which has all of the answer so far: what was sent before must be its beginning."""
    meta = one["meta_info"]
    if part.ends:
        answer.torn.append("an answer went on after its end")
    if one["output_ids"][: len(part.ids)] != part.ids or not one["text"].startswith(part.text):
        answer.torn.append(f"{len(one['output_ids'])} tokens do not continue the {len(part.ids)} sent before")
    if meta["completion_tokens"] != len(one["output_ids"]):
        answer.torn.append(f"{len(one['output_ids'])} tokens are counted as {meta['completion_tokens']}")
    part.text, part.ids = one["text"], one["output_ids"]
    part.numbers = [lp for lp, *_ in meta.get("output_token_logprobs", ())]
    if part.numbers and [i for _, i, _ in meta["output_token_logprobs"]] != part.ids:
        answer.torn.append("log probabilities belong to other tokens")
    if meta["finish_reason"]:
        part.ends.append(meta["finish_reason"]["type"])


# ---------------- comparing
def faults(want: Answer, got: Answer | None) -> list[str]:
    """What is wrong with `got`, an answer to the same request as `want`; empty: nothing."""
    if got is None:
        return ["missing: no answer came"]
    found = complete(got)
    if want.status != got.status:
        return [*found, f"changed: status {got.status} instead of {want.status}: {got.error[:300]}"]
    for key in want.parts.keys() - got.parts.keys():
        found.append(f"missing: part {key} has no answer")
    for key in got.parts.keys() - want.parts.keys():
        found.append(f"changed: part {key} was not asked for")
    for key in sorted(want.parts.keys() & got.parts.keys()):
        found += [f"part {key} {line}" for line in _differences(want.parts[key], got.parts[key])]
    if want.usage != got.usage:
        found.append(f"changed: usage {got.usage} instead of {want.usage}")
    return found


def complete(got: Answer) -> list[str]:
    """What can be seen to be wrong with an answer without another: errors, contradictions, ends that are missing or twice."""
    found = [f"torn: {line}" for line in got.torn]
    if got.error and got.status == 200:
        found.append(f"missing: an error instead of the end: {got.error[:300]}")
    if got.ends != 1:
        found.append(f"{'twice' if got.ends else 'missing'}: the answer has {got.ends} ends")
    for key, part in got.parts.items():
        if len(part.ends) != 1:
            found.append(f"{'twice' if part.ends else 'missing'}: part {key} has {len(part.ends)} ends")
    return found


def _differences(want: Part, got: Part) -> Iterator[str]:
    for name in ("ids", "tokens", "text"):
        if line := difference(getattr(want, name), getattr(got, name)):
            yield f"{line} of {name}"
            break
    if len(want.numbers) != len(got.numbers):
        yield f"has {len(got.numbers)} numbers instead of {len(want.numbers)}"
    elif far := [(i, a, b) for i, (a, b) in enumerate(zip(want.numbers, got.numbers, strict=True)) if not _close(a, b)]:
        yield f"changed: number {far[0][0]} is {far[0][2]} instead of {far[0][1]} (and {len(far) - 1} more)"
    if want.calls != got.calls:
        yield f"changed: calls {got.calls} instead of {want.calls}"
    if want.ends[:1] != got.ends[:1] and got.ends:
        yield f"changed: ends by {got.ends[0]} instead of {want.ends[0]}"


def _close(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and abs(a - b) <= CLOSE)


def difference(want: Sequence[Any], got: Sequence[Any]) -> str:
    """How a sequence differs from the right one, in words: what was lost, repeated or changed, and where; "" if it does not."""
    if want == got:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
    n, where = abs(len(want) - len(got)), f"at {at} of {len(want)}"
    if len(got) < len(want) and got[at:] == want[at + n :]:
        return f"lost: {n} {where}"
    if len(got) > len(want) and got[at + n :] == want[at:]:
        again = any(got[at : at + n] == got[k : k + n] for k in range(max(0, at - 2 * n), at))
        return f"{'repeated' if again else 'changed: added'}: {n} {where}"
    return f"changed: {got[at : at + 8]!r} instead of {want[at : at + 8]!r} {where}"


# ---------------- the rest of a run
def pool_faults(stats: dict[str, int], open_requests: int) -> list[str]:
    """What a server still holds that is idle and has an empty cache.  `stats`: of /server_info."""
    found = []
    if stats.get("free_pages") != stats.get("total_pages"):
        found.append(f"leaked: {stats.get('total_pages', 0) - stats.get('free_pages', 0)} pages of {stats.get('total_pages')}")
    for name, n in {"open": open_requests, **{k: stats.get(f"{k}_requests", 0) for k in ("running", "waiting")}}.items():
        if n:
            found.append(f"leaked: {n} requests are {name}")
    return found


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the straight line through the points (least squares); 0 where there is none."""
    n = len(times)
    if n < 2 or all(a == b for a, b in pairwise(times)):
        return 0.0
    t, v = sum(times) / n, sum(values) / n
    return sum((a - t) * (b - v) for a, b in zip(times, values, strict=True)) / sum((a - t) ** 2 for a in times)

"""Finds out in which form a chat template wants the calls, thoughts and roles of a conversation, and brings messages into it.

Every family of models has a form of its own: arguments of calls as objects or as JSON text, `content` as "" or null beside a
call, a thought as `reasoning_content`, `thinking` or inside the content.  A template that meets another form fails, or leaves
the call out without a word.  So each template is asked: it renders small histories full of marks, and the first form whose
marks are all in the text is its own.  Runs in the tokenizer process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]  # (messages, whether an answer shall follow) -> text; may raise anything

MAX_DEPTH = 32  # of arguments as objects
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # the names that templates have for the thought of a message
_USER: Message = {"role": "user", "content": "Mquestion"}
_RESULT: Message = {"role": "tool", "content": "Mresult", "name": "Mtool", "tool_call_id": "Mcall0001"}
_SCENE = (("system", "first"), ("system", "later"), ("assistant", "said"))
_ARGUMENTS = '{"Mkey": "Mvalue"}'


@dataclass(frozen=True, slots=True)
class Forms:
    """What one template wants.

    `calls`: it shows calls; if not, they are written into the content.  `objects`: arguments are objects, not JSON text.
    `text`: arguments may be any text.  `empty`: the content of a message that only calls.  `apart`: text and calls of a message
    need a message each.  `thought`: the name of a message's thought, "" if it stands in the content in <think> tags, None if
    there is no place for it.  `one_system`: there can be one system message, and only at the beginning.  `silent`: roles whose
    messages are left out; `refused`: roles that raise an error.
    """

    calls: bool = True
    objects: bool = True
    text: bool = True
    empty: str | None = ""
    apart: bool = False
    thought: str | None = "reasoning_content"
    one_system: bool = False
    silent: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def forms_of(render: Render, source: str) -> Forms:
    """Ask a template.  `source`: its text."""

    def length(messages: Sequence[Message], *marks: str, generate: bool = True) -> int:
        """The length of the text; -1 if the template raises an error, 0 if a mark is missing."""
        try:
            text = render(messages, generate)
        except Exception:
            return -1
        right = all(mark in text for mark in marks) and "'Mkey'" not in text  # Python's notation is nobody's
        return len(text) if right else 0

    def shows(messages: Sequence[Message], *marks: str, generate: bool = True) -> bool:
        return length(messages, *marks, generate=generate) > 0

    def history(forms: Forms, arguments: str = _ARGUMENTS, **more: Any) -> list[Message]:
        call = {"id": "Mcall0001", "type": "function", "function": {"name": "Mtool", "arguments": arguments}}
        return arranged([_USER, {"role": "assistant", "content": None, "tool_calls": [call], **more}, _RESULT], forms)

    found = Forms(thought=None)
    ways: list[tuple[int, Forms]] = []
    for objects, marks in ((True, ("Mkey", "Mvalue")), (False, (_ARGUMENTS,))):
        if not ways:
            both = [replace(found, objects=objects, empty=empty) for empty in ("", None)]
            ways = [(n, f) for f in both if (n := length(history(f), *marks)) > 0]
    # The shorter text has neither an empty turn for "" nor the word None.
    found = min(ways, key=lambda way: way[0])[1] if ways else replace(found, calls=False)
    if found.calls:
        found = replace(found, text=not found.objects or shows(history(found, "Mtext {"), "Mtext {"))
        together, apart = (shows(history(replace(found, apart=a), content="Msaid"), "Msaid", "Mkey") for a in (False, True))
        found = replace(found, apart=apart and not together)
    thoughts = {name: f"M{name}" for name in THOUGHTS}
    known = [
        name
        for name, mark in thoughts.items()
        if (found.calls and shows(with_thoughts(history(found), thoughts), mark))
        or shows(with_thoughts([_USER, {"role": "assistant", "content": "Msaid"}], thoughts), mark, generate=False)
    ]
    found = replace(found, thought=known[0] if known else "" if "</think>" in source else None)
    first, later, said = ({"role": role, "content": f"M{text}"} for role, text in _SCENE)
    scenes = ([first, later, _USER], [first, _USER, said, later, _USER])
    found = replace(found, one_system=not all(shows(scene, "Mfirst", "Mlater") for scene in scenes))
    roles = {"system": [{"role": "system", "content": "Msystem"}, _USER], "tool": history(found)}
    seen = {role: length(messages, messages[0 if role == "system" else -1]["content"]) for role, messages in roles.items()}
    silent, refused = (tuple(role for role, n in seen.items() if n == fault) for fault in (0, -1))
    return replace(found, silent=silent, refused=refused)


def with_thoughts(messages: Sequence[Message], thoughts: Mapping[str, str]) -> list[Message]:
    return [{**m, **thoughts} if m["role"] == "assistant" else m for m in messages]


def arranged(messages: Sequence[Message], forms: Forms) -> list[Message]:
    """The messages in a template's form.  In: arguments as text, content as text or null, thoughts under any of their names."""
    systems = [m for m in messages if m["role"] == "system"]
    if forms.one_system and systems and (len(systems) > 1 or messages[0] is not systems[0]):
        whole = {"role": "system", "content": "\n\n".join(m.get("content") or "" for m in systems)}
        messages = [whole, *(m for m in messages if m["role"] != "system")]
    out: list[Message] = []
    names: dict[Any, str] = {}  # of the tools that were called, by the id of the call
    for message in messages:
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message = {**message, "name": names[message["tool_call_id"]]}  # noqa: PLW2901  some templates show it
        if message["role"] != "assistant":
            out.append({**message, "content": message.get("content") or ""})
            continue
        calls = message.get("tool_calls") or []
        names |= {call.get("id"): call["function"]["name"] for call in calls}
        out += _answer(message, calls, forms)
    return out


def _answer(message: Message, calls: Sequence[Message], forms: Forms) -> list[Message]:
    """An assistant's message, or the two that it becomes."""
    thought = next((message[name] for name in THOUGHTS if message.get(name)), "")
    rest = {k: v for k, v in message.items() if k not in (*THOUGHTS, "tool_calls")}
    text = message.get("content") or ""
    if calls and not forms.calls:
        text, calls = "\n".join([*filter(None, [text]), *map(_written, calls)]), []
    said = [{**rest, "content": text}] if text or not calls else []
    if calls:
        called = {"tool_calls": [_call(call, forms) for call in calls]}
        if said and not forms.apart:
            said[0] |= called
        else:
            said.append({**rest, "content": forms.empty, **called})
    if thought and forms.thought:
        said[-1][forms.thought] = thought  # what is said after the thought and needs it most
    elif thought and forms.thought == "" and (said[0]["content"] or not forms.apart):  # otherwise it would hide the call
        said[0]["content"] = f"<think>\n{thought}\n</think>\n\n{said[0]['content'] or ''}"
    return said


def _call(call: Message, forms: Forms) -> Message:
    text = call["function"]["arguments"]
    arguments: Any = text or "{}"
    if forms.objects:
        arguments = _object(text)
        if arguments is None:  # cut off, or never JSON
            arguments = text if forms.text else {"arguments": text}
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _written(call: Message) -> str:
    """A call as text, for a template without calls."""
    function = call["function"]
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {function["arguments"] or "{}"}}}\n</tool_call>'


def _object(text: str) -> dict[str, Any] | None:
    """The object that a JSON text means, None if it means none that a template can write."""
    try:
        value = json.loads(text or "{}")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # neither NaN nor half a surrogate pair
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _shallow(value, MAX_DEPTH) else None


def _shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_shallow(v, depth - 1) for v in inner)


# ---------------- the shape of a conversation
PLACED = 8  # messages whose places are looked for: a place takes a walk over the tokens
NOWHERE = (1 << 32) - 1


def shape_of(messages: Sequence[Message], text: str, place: Callable[[int], int | None]) -> list[tuple[int, int, int]]:
    """What tells the messages of one conversation from those of another, and where the first ones are in the rendered text.

    For each: a checksum of its role, one of all else in it, and the token where its content begins, NOWHERE if that is not
    known.  `place`: the token of a character.  The contents are looked for from the end of the text, because the tools and what
    a template says by itself stand at its beginning.
    """
    starts, end = [NOWHERE] * len(messages), len(text)
    for i in range(len(messages) - 1, -1, -1):
        content = messages[i].get("content")
        if not isinstance(content, str) or not content:
            continue
        at = text.rfind(content, 0, end)
        if at < 0:
            content = content.strip()
            at = text.rfind(content, 0, end) if content else -1
        if at < 0:
            continue
        end = at
        if i < PLACED and (token := place(at)) is not None:
            starts[i] = token
    out = []
    for message, start in zip(messages, starts, strict=True):
        content, rest = message.get("content"), [item for item in message.items() if item[0] not in ("role", "content")]
        said = crc32(content.encode()) if isinstance(content, str) else crc32(json.dumps(content).encode(), 1)
        out.append((crc32(message["role"].encode()), crc32(json.dumps(rest).encode(), said) if rest else said, start))
    return out

"""Reads the chat templates of a checkpoint and guesses its formats of tool calls and thoughts.  No torch, no tokenizer.

Runs in the root process, and in the tokenizer processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.files import read_json, read_text
from minisgl.model.checkpoint.metadata import Metadata
from minisgl.reasoning import HARMONY

_PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "  # without the embedded model
# A mark in a template -> the row of minisgl.api.parsers.call_formats for its format; the first mark that is found decides.
_TOOL_CALLS = (
    ("<|message|>", HARMONY),
    ("<seed:tool_call>", "seed"),
    ("<minimax:tool_call>", "minimax"),
    ("<parameter=", "qwen3_coder"),  # it stands inside <tool_call>
    ("<function=", ""),  # with JSON in it
    ("<arg_key>", "glm"),
    ("<|tool_call_start|>", "lfm2"),
    ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "deepseek"),
    ("<|tool_calls_section_begin|>", "kimi"),
    ("<|START_ACTION|>", "command"),
    ("<|action_start|>", "internlm"),
    ("<longcat_tool_call>", "longcat"),
    ("<TOOLCALL>", "nemotron"),
    ("<tool_calls>", "jamba"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3"),
)
_PYTHONIC = re.compile(r"\[\w+\(\w+=[^()\[\]{}]+\), ?\w+\(")  # Llama 3.2 and 4 may be taught [f(a=1, b=2), g(...)]
_BARE = re.compile('"name":.{,100}"parameters":', re.DOTALL)  # Llama 3.2 teaches the object of a call without a mark
# SmolLM2 of 135M parameters, by (layers, hidden size).  With the whole system message that its template adds by itself it
# answers many questions about a country in that country's language, and wrongly ("Il Coriobella, Italy.").
_SMALLEST_SMOLLM2 = (30, 576)
_DISTRACTING = ("named SmolLM, trained by Hugging Face<|im_end|>", "named SmolLM<|im_end|>")
# The same for reasoning.STYLES.
_THOUGHTS = (
    ("<|message|>", HARMONY),
    ("<|START_THINKING|>", "command"),
    ("\u25c1think\u25b7", "kimi_vl"),
    ("<seed:think>", "seed"),
    ("</think>", "qwen3"),
    ("<think>", "qwen3"),
    ("[THINK]", "mistral"),
)


def styles_of(spec: ModelSpec, chat_template: str = "") -> tuple[str, str]:
    """The formats (of tool calls, of thoughts) of a checkpoint, "" where its template shows none that can be read.

    `chat_template`: a file to use instead of the checkpoint's own.  Raises UserError for files that cannot be read.
    """
    return guess(chat_templates(spec, chat_template))


def guess(templates: Mapping[str, str]) -> tuple[str, str]:
    """The same for templates by name."""
    every = "\n".join(templates.values())
    calls = next((style for mark, style in _TOOL_CALLS if mark in every), None) if "tools" in every else ""
    if calls in (None, "llama3") and "tools" in every and _PYTHONIC.search(every):
        calls = "pythonic"
    if calls is None:
        calls = "llama3" if _BARE.search(every.replace("\\", "")) else ""
    return calls, next((style for mark, style in _THOUGHTS if mark in every), "")


def chat_templates(spec: ModelSpec, chat_template: str = "", fields: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The sources of the chat templates by name: those of a checkpoint, or the one in the file `chat_template`.

    `fields`: the metadata of the GGUF file, from callers that have read it.  The smallest SmolLM2 gets a shorter default system
    message (docs/adr/0025).  Raises UserError for files that cannot be read.
    """
    if chat_template:
        return {"default": _read_template(chat_template)}
    if in_gguf(spec):
        from minisgl.model.checkpoint.gguf_file import GGUFFile

        templates = _gguf_templates(Metadata(spec.path, GGUFFile(spec.path).fields if fields is None else fields))
    elif spec.path:
        templates = _directory_templates(spec.path)
    else:
        templates = {"default": _PLAIN} if spec.format == "fake" else {}
    if (spec.num_layers, spec.hidden_size) != _SMALLEST_SMOLLM2:
        return templates
    return {name: text.replace(*_DISTRACTING) for name, text in templates.items()}


def in_gguf(spec: ModelSpec) -> bool:
    """Whether the tokenizer and the chat template come from a GGUF file."""
    return spec.format == "gguf" or (spec.format == "fake" and spec.path != "")


def _read_template(path: str) -> str:
    try:
        return read_text(path)
    except UserError as e:
        raise UserError(f"--chat-template {e}") from e


def _gguf_templates(fields: Metadata) -> dict[str, str]:
    """The sources of the chat templates in the metadata of a GGUF file, by name.  Raises UserError if damaged."""
    key = "tokenizer.chat_template"
    keys = {"default": key} | {name: f"{key}.{name}" for name in fields.strings("tokenizer.chat_templates")}
    return {name: source for name, key in keys.items() if isinstance(source := fields.get(key), str)}


def _directory_templates(path: str) -> dict[str, str]:
    """A file holds one template, or a list of several with names."""
    sources: dict[str, str] = {}
    for file in ("tokenizer_config.json", "chat_template.json"):
        value = read_json(path, file, optional=True).get("chat_template")
        named = [{"name": "default", "template": value}] if isinstance(value, str) else value
        for t in named if isinstance(named, list) else ():
            if isinstance(t, dict) and isinstance(t.get("template"), str):
                sources[str(t.get("name", "default"))] = t["template"]
    jinja = os.path.join(path, "chat_template.jinja")
    if os.path.isfile(jinja):
        sources["default"] = read_text(jinja)
    return sources

"""How a model writes calls of tools and thoughts, guessed from its chat template.  No torch; runs where a server starts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from minisgl.config import ModelSpec
from minisgl.model.text.tokenizer import chat_templates

_CALLS = (  # what a template shows, and the reader of minisgl.api.parsers.tool_calls for it; the first that fits
    ("<function=", ""),  # the XML of Qwen3-Coder, which stands inside <tool_call>, too
    ("<arg_key>", ""),  # that of GLM-4.5
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3"),
)


def styles_of(spec: ModelSpec, chat_template: str = "") -> tuple[str, str]:
    """(calls of tools, thoughts) of a checkpoint, "" where its template shows nothing that can be read.

    `chat_template`: a file to look at instead of the checkpoint's own.  Raises UserError for files that cannot be read.
    """
    return guess(chat_templates(spec, chat_template))


def guess(templates: Mapping[str, str]) -> tuple[str, str]:
    """The same, of templates by name."""
    every = "\n".join(templates.values())
    calls = next((style for mark, style in _CALLS if mark in every), "") if "tools" in every else ""
    if "</think>" not in every and "<think>" not in every:
        return calls, ""
    default = templates.get("default", every)
    # What stands behind the last mention of add_generation_prompt is where an answer begins.
    prompt = default.rpartition("add_generation_prompt")[2] if "add_generation_prompt" in default else ""
    opened = re.search(r"<think>(?!.*</think>)", prompt, re.DOTALL)
    return calls, "deepseek_r1" if opened else "qwen3"

"""Renders chat templates: Jinja programs of a checkpoint that turn a conversation into the text the model was trained on.

A template comes from the checkpoint, or, where the operator trusts them, from a request.  The sandbox keeps it away from
Python, not from the CPU: one line can loop for hours or allocate gigabytes, and the messages come from strangers.  Hence the
limits on time, memory and output.
Runs in the tokenizer process.
"""

from __future__ import annotations

import json
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from minisgl.errors import InvalidParam, RequestError
from minisgl.model.text.conversation import Forms, Message, arranged, forms_of

MAX_SECONDS = 2.0
MAX_CHARS = 16 << 20
MAX_MEMORY = 512 << 20  # bytes beyond what the process has mapped already
_UNLIMITED = resource.RLIM_INFINITY


class _LimitExceeded(BaseException):
    """The template exceeds the limits.  A BaseException: Jinja's constant folding swallows an Exception and goes on."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it renders its content."""

    tags = {"generation"}  # noqa: RUF012  declared without ClassVar by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    """The names and settings of Hugging Face's `apply_chat_template`, for which templates are written."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
    return env


class ChatTemplate:
    """The templates of one checkpoint by name ("default", "tool_use"), and its special tokens ("bos_token", ...) as text."""

    def __init__(self, sources: Mapping[str, str], specials: Mapping[str, str]) -> None:
        self._specials = dict(specials)
        self._sources = dict(sources)
        self._forms: dict[str, Forms] = {}  # of the templates that have been asked
        self.source = sources.get("default")
        self._templates: dict[str, jinja2.Template | str] = {}  # compiled, or the reason of the failure
        env = _environment()
        for name, source in sources.items():
            try:
                with _bounded():  # Jinja evaluates constant expressions while it compiles
                    self._templates[name] = env.from_string(source)
            except (Exception, _LimitExceeded) as e:
                self._templates[name] = _reason(e)

    def fault(self) -> str | None:
        """The reason why the default template cannot be used; None: it can."""
        template = self._templates.get("default")
        return template if isinstance(template, str) else None

    def render(self, messages: Any, kwargs: Mapping[str, Any]) -> str:
        """The text of a conversation.  `kwargs` are further variables of the template (tools, enable_thinking, ...).

        With `continue_final_message` the text ends inside the last message; otherwise a generation prompt follows unless
        `add_generation_prompt` is false.  Raises RequestError 400 (param "messages") when the template refuses the messages.
        """
        messages = check_messages(messages)
        proceed = bool(kwargs.get("continue_final_message"))
        generate = kwargs.get("add_generation_prompt", not proceed)
        if proceed and generate:
            raise InvalidParam("messages", "continue_final_message and add_generation_prompt exclude each other.")
        with_tools = bool(kwargs.get("tools")) or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name, f"it has none named {name}")
        if isinstance(template, str):
            raise _refused(f"cannot be used: {template}")
        forms, roles = self._ask(name, template), {m["role"] for m in messages}
        for role in forms.silent:
            if role in roles:
                raise _refused(f"leaves out messages with the role {role}: say it in a message with the role user")
        # Templates expect tools and documents to be defined.
        variables = {"tools": None, "documents": None, **self._specials, **kwargs, "add_generation_prompt": generate}
        try:
            with _bounded():
                text = self._try(template, variables, messages, forms)
        except (Exception, _LimitExceeded) as e:  # any error is caused by these messages
            raise _refused(f"cannot render these messages: {_reason(e)}{_hint(messages, forms)}") from e
        return _cut_after(text, messages[-1]) if proceed else text

    def _ask(self, name: str, template: jinja2.Template) -> Forms:
        """The forms that a template wants its messages in; found out once."""
        if name not in self._forms:
            tools = [{"type": "function", "function": {"name": "Mtool", "parameters": {"type": "object", "properties": {}}}}]
            variables = {"tools": tools if name == "tool_use" else None, "documents": None, **self._specials}

            def render(messages: Sequence[Message], generate: bool) -> str:
                return _render(template, {**variables, "add_generation_prompt": generate, "messages": messages})

            try:
                with _bounded():
                    self._forms[name] = forms_of(render, self._sources[name])
            except _LimitExceeded:
                self._forms[name] = Forms()
        return self._forms[name]

    def _try(self, template: jinja2.Template, variables: Mapping[str, Any], messages: list[Message], forms: Forms) -> str:
        """The text; where a message with text, a thought and calls is too much for the template, it becomes two."""
        try:
            return _render(template, {**variables, "messages": arranged(messages, forms)})
        except Exception:
            divided = arranged(messages, replace(forms, apart=True))
            if forms.apart or len(divided) == len(messages):
                raise
            return _render(template, {**variables, "messages": divided})


def _render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    parts, size = [], 0
    for part in template.generate(variables):
        size += len(part)
        if size > MAX_CHARS:
            raise _LimitExceeded(f"the result has more than {MAX_CHARS} characters")
        parts.append(part)
    return "".join(parts)


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return f"{error}"[:500] or type(error).__name__


def _refused(why: str) -> RequestError:
    return RequestError(f"The chat template of this model {why}.", param="messages", code="chat_template_error")


def _hint(messages: Sequence[Message], forms: Forms) -> str:
    """What may help a client whose messages a template refuses: the roles that it never takes, or the order of the roles."""
    never = [role for role in forms.refused if any(m["role"] == role for m in messages)]
    if never:
        return f" (it takes no messages with the role {' or '.join(never)}: say it in a message with the role user)"
    order = [m["role"] for m in messages]
    return f" (the roles here: {', '.join(order[:12])}{', ...' if len(order) > 12 else ''})"


def _cut_after(text: str, message: Mapping[str, Any]) -> str:
    """The text up to the end of the last message's content, which the template may have trimmed."""
    content = message.get("content")
    core = content.strip() if isinstance(content, str) else ""
    at = text.rfind(core) if core else -1
    if at < 0:
        raise InvalidParam("messages", "continue_final_message needs a last message whose content the chat template shows.")
    tail = str(content).lstrip()
    return text[: at + len(tail)] if text.startswith(tail, at) else text[: at + len(core)]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages, with list contents joined into one string.  Raises InvalidParam for anything else."""
    if not isinstance(messages, list) or not messages:
        raise InvalidParam("messages", "messages must be a list with at least one message.")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidParam("messages", f'messages[{i}] must be an object with a "role".')
        content = message.get("content")
        if isinstance(content, list):
            out.append({**message, "content": "\n".join(_part_text(i, part) for part in content)})
        elif content is None or isinstance(content, str):
            out.append(message)
        else:
            raise InvalidParam("messages", f"messages[{i}].content must be a string or a list of text parts.")
    return out


def _part_text(i: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InvalidParam("messages", f"messages[{i}].content has a part of type {kind!r:.80}; only text can be served.")
    return str(part["text"])


@contextmanager
def _bounded() -> Iterator[None]:
    """Limit the CPU time (main thread only: it takes a signal) and the memory of what runs inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [n for n in (_mapped_bytes() + MAX_MEMORY, soft, hard) if n != _UNLIMITED]
    timed = threading.current_thread() is threading.main_thread()
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        if timed:
            before = signal.signal(signal.SIGPROF, _on_alarm)
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _on_alarm(*_: object) -> None:
    raise _LimitExceeded(f"it takes more than {MAX_SECONDS:g} seconds")


def _mapped_bytes() -> int:
    """The size of this process's address space."""
    with open("/proc/self/statm", "rb") as f:
        return int(f.read().split()[0]) * resource.getpagesize()

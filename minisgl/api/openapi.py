"""GET /openapi.json and /docs: the routes and fields of the API, from the tables that requests are checked with.

A field that the checks know is here, under its name; SCHEMAS says what its values are.  Runs in the api process.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minisgl import __version__
from minisgl.api.embeddings import EMBEDDING_FIELDS, EMBEDDING_UNSUPPORTED
from minisgl.api.files import BATCH_FIELDS
from minisgl.api.messages import COUNT_FIELDS, MESSAGE_FIELDS, MESSAGE_UNSUPPORTED
from minisgl.api.native import DETOKENIZE_FIELDS, GENERATE_FIELDS, TOKENIZE_FIELDS
from minisgl.api.openai import CHAT_UNSUPPORTED, CHAT_USED, COMPLETION_UNSUPPORTED, COMPLETION_USED
from minisgl.api.responses import RESPONSE_FIELDS, RESPONSE_UNSUPPORTED
from minisgl.config import Config
from minisgl.types import (
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TIMEOUT,
)

Schema = dict[str, Any]


def _integer(text: str, low: int | None = None, high: int | None = None) -> Schema:
    return _bounded({"type": "integer", "description": text}, low, high)


def _number(text: str, low: float, high: float) -> Schema:
    return _bounded({"type": "number", "description": text}, low, high)


def _bounded(schema: Schema, low: float | None, high: float | None) -> Schema:
    return schema | ({} if low is None else {"minimum": low}) | ({} if high is None else {"maximum": high})


def _boolean(text: str) -> Schema:
    return {"type": "boolean", "description": text}


def _string(text: str, *values: str) -> Schema:
    return {"type": "string", "description": text} | ({"enum": list(values)} if values else {})


def _array(text: str, items: Schema, most: int | None = None) -> Schema:
    return {"type": "array", "description": text, "items": items} | ({} if most is None else {"maxItems": most})


def _object(text: str) -> Schema:
    return {"type": "object", "description": text}


_TEXTS: Schema = {
    "description": "A text, token ids, or an array of either.",
    "oneOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
}
_STOP: Schema = {
    "description": "The answer ends before the first of these texts.",
    "oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOP_STRINGS}],
}
SCHEMAS: Mapping[str, Schema] = {
    "model": _string("One of the names in /v1/models; may be left out."),
    "messages": _array("The conversation, oldest first.", {"type": "object"}),
    "prompt": _TEXTS,
    "input": _TEXTS,
    "text": _TEXTS,
    "input_ids": _array("Token ids, or several lists of them.", {}),
    "max_tokens": _integer("Tokens of the answer, at most.", 0),
    "max_completion_tokens": _integer("The same as max_tokens, before which it counts.", 0),
    "max_output_tokens": _integer("Tokens of the answer, at most.", 1),
    "temperature": _number("0 always takes the likeliest token.", 0, 2),
    "top_p": _number("Only the likeliest tokens that have this share together.", 0, 1),
    "top_k": _integer("Only so many of the likeliest tokens; 0 or -1: all.", -1),
    "min_p": _number("Only tokens at least this likely, relative to the likeliest.", 0, 1),
    "seed": _integer("The same seed and prompt give the same answer.", -MAX_SEED, MAX_SEED),
    "stop": _STOP,
    "stop_sequences": _array("The answer ends before the first of these.", {"type": "string"}, MAX_STOP_STRINGS),
    "stop_token_ids": _array("The answer ends with the first of these tokens.", {"type": "integer"}, MAX_STOP_TOKEN_IDS),
    "ignore_eos": _boolean("Do not end at an end token."),
    "skip_special_tokens": _boolean("Special tokens have no text."),
    "presence_penalty": _number("Taken once from the logit of a token that the answer has.", -2, 2),
    "frequency_penalty": _number("Taken from a token's logit as often as the answer has it.", -2, 2),
    "repetition_penalty": _number("Divides the logits of tokens of prompt and answer; 1: off.", 0, MAX_REPETITION_PENALTY),
    "response_format": _object("The form of the answer: text, json_object, or json_schema with a schema."),
    "structured_outputs": _object("The form of the answer, as vLLM names it: json, regex, choice or grammar."),
    "guided_json": {"description": "A JSON schema that the answer follows."},
    "json_schema": {"description": "A JSON schema that the answer follows."},
    "guided_regex": _string("A regular expression that the whole answer matches."),
    "regex": _string("A regular expression that the whole answer matches."),
    "guided_choice": _array("Texts of which the answer is one.", {"type": "string"}),
    "choice": _array("Texts of which the answer is one.", {"type": "string"}),
    "guided_grammar": _string("A grammar (GBNF or Lark) that the answer follows."),
    "ebnf": _string("A grammar (GBNF or Lark) that the answer follows."),
    "tools": _array("Functions that the answer may call.", {"type": "object"}),
    "tool_choice": {"description": "auto, none, required, or the function that must be called."},
    "parallel_tool_calls": {"type": "boolean", "description": "Whether an answer may call several functions."},
    "logit_bias": _object("Token id -> what is added to its logit, from -100 to 100."),
    "min_tokens": _integer("No end before so many tokens.", 0),
    "n": _integer("Answers to each prompt.", 1, 128),
    "best_of": _integer("1, or the same as n.", 1, 128),
    "stream": _boolean("Answer with server-sent events."),
    "stream_options": _object(
        "include_usage: a last event has the counts of tokens; continuous_usage_stats: every event has those so far."
    ),
    "priority": _integer("Higher is served first.", -MAX_PRIORITY, MAX_PRIORITY),
    "timeout": _number("Seconds until the request is given up; 0: never.", 0, MAX_TIMEOUT),
    "cache_salt": _string("Cached prefixes are shared with the same salt only."),
    "chat_template_kwargs": _object("Switches of the model's chat template."),
    "logprobs": {"description": "Log probabilities: in a chat true, of a completion the number of alternatives."},
    "top_logprobs": _integer("Alternatives to each token.", 0, MAX_LOGPROBS),
    "add_special_tokens": _boolean("The tokenizer adds its own, such as BOS."),
    "echo": _boolean("The prompt stands before the answer."),
    "encoding_format": _string("How vectors are written.", "float", "base64"),
    "dimensions": _integer("Only so many of the vector's numbers.", 1),
    "pooling": _string("The last token's state, or the mean over all tokens.", "last", "mean"),
    "normalize": _boolean("Vectors have length one (default)."),
    "instructions": _string("The system message."),
    "include": _array("message.output_text.logprobs asks for log probabilities.", {"type": "string"}),
    "system": {"description": "The system message: a text, or an array of text blocks."},
    "thinking": _object("Whether the model thinks first: type is enabled or disabled; for models that do."),
    "output_config": _object("format: {type: json_schema, schema: ...}, the form of the answer."),
    "output_format": _object("An older name of output_config.format."),
    "sampling_params": _object("max_new_tokens, temperature, top_p, top_k, stop, ..."),
    "incremental": _boolean("Events hold what is new, not all of the text so far."),
    "return_logprob": _boolean("With log probabilities."),
    "logprob_start_len": _integer("0: of the prompt, too; -1: of the answer alone.", -1),
    "top_logprobs_num": _integer("Alternatives to each token.", 0, MAX_LOGPROBS),
    "rid": _string("Comes back as meta_info.id."),
    "tokens": _array("Token ids.", {"type": "integer"}),
    "input_file_id": _string("An uploaded file of requests, one a line."),
    "endpoint": _string("The path that all requests of the file are for."),
    "completion_window": _string("24h; a batch never expires here.", "24h"),
    "metadata": _object("Comes back with the batch."),
}


@dataclass(frozen=True, slots=True)
class Route:
    """One operation.  `fields`: of its JSON body, None where it has none; `required`: those that cannot be left out."""

    method: str
    path: str
    summary: str
    fields: Iterable[str] | None = None
    unsupported: Iterable[str] = ()
    required: tuple[str, ...] = ()


ROUTES = (
    Route("post", "/v1/chat/completions", "Answer a conversation.", CHAT_USED, CHAT_UNSUPPORTED, ("messages",)),
    Route("post", "/v1/completions", "Continue texts.", COMPLETION_USED, COMPLETION_UNSUPPORTED, ("prompt",)),
    Route(
        "post",
        "/v1/responses",
        "Answer, in the shape of the Responses API; stateless.",
        RESPONSE_FIELDS,
        RESPONSE_UNSUPPORTED,
        ("input",),
    ),
    Route(
        "post", "/v1/messages", "Answer, in Anthropic's shape.", MESSAGE_FIELDS, MESSAGE_UNSUPPORTED, ("messages", "max_tokens")
    ),
    Route("post", "/v1/messages/count_tokens", "How long a prompt would be.", COUNT_FIELDS, MESSAGE_UNSUPPORTED, ("messages",)),
    Route("post", "/v1/embeddings", "Vectors of texts.", EMBEDDING_FIELDS, EMBEDDING_UNSUPPORTED, ("input",)),
    Route("post", "/generate", "Continue texts or token ids; the answer has the ids, too.", GENERATE_FIELDS),
    Route("post", "/tokenize", "Text or messages to token ids.", TOKENIZE_FIELDS),
    Route("post", "/detokenize", "Token ids to text.", DETOKENIZE_FIELDS, (), ("tokens",)),
    Route("get", "/tokenizer_info", "Special tokens and chat template."),
    Route("get", "/v1/models", "The names that model may have."),
    Route("get", "/v1/models/{name}", "One of them."),
    Route("post", "/v1/files", "Upload a file (multipart: file, purpose); needs --data-dir."),
    Route("get", "/v1/files", "All files, newest first; purpose, after, limit."),
    Route("get", "/v1/files/{file_id}", "About a file."),
    Route("delete", "/v1/files/{file_id}", "Delete a file."),
    Route("get", "/v1/files/{file_id}/content", "What is in a file."),
    Route(
        "post",
        "/v1/batches",
        "Answer a file of requests in the background.",
        BATCH_FIELDS,
        (),
        ("input_file_id", "endpoint", "completion_window"),
    ),
    Route("get", "/v1/batches", "All batches, newest first; after, limit."),
    Route("get", "/v1/batches/{batch_id}", "How far a batch is."),
    Route("post", "/v1/batches/{batch_id}/cancel", "Stop a batch; what is answered stays."),
    Route("get", "/health", "200 while the process can become or be useful, 503 when the engine is dead."),
    Route("get", "/ready", "200 when requests are served, 503 otherwise."),
    Route("get", "/metrics", "Prometheus text."),
    Route("get", "/server_info", "What runs here, and the scheduler's statistics."),
    Route("post", "/flush_cache", "Empty the prefix cache."),
    Route("get", "/openapi.json", "This description, for programs."),
    Route("get", "/docs", "This description, for people."),
)


def document(config: Config) -> dict[str, Any]:
    """The OpenAPI 3.1 description."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    out: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "minisgl", "version": __version__, "description": _about(config)},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if config.server.api_keys:
        out["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        out["security"] = [{"bearer": []}]
    return out


_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _operation(route: Route) -> dict[str, Any]:
    error = {"description": "An error.", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    out: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method}_{route.path.strip('/').replace('/', '_')}".translate({ord(c): None for c in "{}."}),
        "responses": {"200": {"description": "The answer."}, "default": error},
    }
    names = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    if names:
        out["parameters"] = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    if route.fields is not None:
        schema = {"type": "object", "properties": {n: SCHEMAS.get(n, {}) for n in sorted(route.fields)}}
        if route.required:
            schema["required"] = list(route.required)
        out["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return out


def _about(config: Config) -> str:
    names = ", ".join(config.server.served_names or (config.model.name,))
    return f"Serves {names}; up to {config.max_context} tokens for prompt and answer."


# ---------------- for people
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
code { font: 14px ui-monospace, monospace; background: #8881; padding: .1em .3em; border-radius: 3px }
summary { cursor: pointer; padding: .4rem 0 } details { border-top: 1px solid #8884 }
summary b { display: inline-block; width: 4.5rem; text-transform: uppercase; font-size: 13px; color: #06c }
table { border-collapse: collapse; margin: .3rem 0 1rem } td { padding: .15rem .8rem .15rem 0; vertical-align: top }
.less { color: #777 }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd } summary b { color: #6af } }
"""


def page(config: Config) -> str:
    """One self-contained page of HTML."""
    return "".join(_page(config))


def _page(config: Config) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>minisgl API</title><style>{_STYLE}</style>'
    yield f"<h1>minisgl {html.escape(__version__)}</h1><p>{html.escape(_about(config))}</p>"
    yield "<p>Unknown fields are "
    yield "refused" if config.server.strict else "ignored, and named in the header <code>X-Ignored-Params</code>"
    yield ". <code>null</code> is the same as leaving a field out. For programs: <a href=openapi.json>openapi.json</a>.</p>"
    for route in ROUTES:
        yield f"<details><summary><b>{route.method}</b> <code>{html.escape(route.path)}</code> "
        yield f"{html.escape(route.summary)}</summary>"
        yield from _fields(route)
        yield "</details>"
    yield "</html>"


def _fields(route: Route) -> Iterator[str]:
    if route.fields is None:
        yield "<p class=less>No fields.</p>"
        return
    yield "<table>"
    for name in sorted(route.fields, key=lambda n: (n not in route.required, n)):
        schema = SCHEMAS.get(name, {})
        kind = schema.get("type", "")
        if "minimum" in schema or "maximum" in schema:
            kind += f" {schema.get('minimum', '')}..{schema.get('maximum', '')}"
        need = " (required)" if name in route.required else ""
        text = html.escape(schema.get("description", ""))
        yield f"<tr><td><code>{name}</code><td class=less>{html.escape(kind)}<td>{text}{need}"
    yield "</table>"
    if refused := ", ".join(sorted(route.unsupported)):
        yield f"<p class=less>Refused, unless they ask for nothing: {refused}.</p>"

"""What the fields of requests hold and what answers look like, for openapi.py: JSON schemas.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisgl.api.requests.openai import EFFORTS
from minisgl.sampling_params import (
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TIMEOUT,
)

Schema = dict[str, Any]


def integer(text: str, low: int | None = None, high: int | None = None) -> Schema:
    return bounded({"type": "integer", "description": text}, low, high)


def number(text: str, low: float, high: float) -> Schema:
    return bounded({"type": "number", "description": text}, low, high)


def bounded(schema: Schema, low: float | None, high: float | None) -> Schema:
    return schema | ({} if low is None else {"minimum": low}) | ({} if high is None else {"maximum": high})


def boolean(text: str) -> Schema:
    return {"type": "boolean", "description": text}


def string(text: str, *values: str) -> Schema:
    return {"type": "string", "description": text} | ({"enum": list(values)} if values else {})


def array(text: str, items: Schema, most: int | None = None) -> Schema:
    return {"type": "array", "description": text, "items": items} | ({} if most is None else {"maxItems": most})


def object(text: str) -> Schema:
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
    "model": string("One of the names in /v1/models; may be left out."),
    "messages": array("The conversation, oldest first.", {"type": "object"}),
    "prompt": _TEXTS,
    "input": _TEXTS,
    "text": _TEXTS,
    "input_ids": array("Token ids, or several lists of them.", {}),
    "max_tokens": integer("Tokens of the answer, at most.", 0),
    "max_completion_tokens": integer("The same as max_tokens, before which it counts.", 0),
    "max_output_tokens": integer("Tokens of the answer, at most.", 1),
    "temperature": number("0 always takes the likeliest token.", 0, 2),
    "top_p": number("Only the likeliest tokens that have this share together.", 0, 1),
    "top_k": integer("Only so many of the likeliest tokens; 0 or -1: all.", -1),
    "min_p": number("Only tokens at least this likely, relative to the likeliest.", 0, 1),
    "seed": integer("The same seed and prompt give the same answer.", -MAX_SEED, MAX_SEED),
    "stop": _STOP,
    "stop_sequences": array("The answer ends before the first of these.", {"type": "string"}, MAX_STOP_STRINGS),
    "stop_token_ids": array("The answer ends with the first of these tokens.", {"type": "integer"}, MAX_STOP_TOKEN_IDS),
    "ignore_eos": boolean("Do not end at an end token."),
    "skip_special_tokens": boolean("Special tokens have no text."),
    "presence_penalty": number("Taken once from the logit of a token that the answer has.", -2, 2),
    "frequency_penalty": number("Taken from a token's logit as often as the answer has it.", -2, 2),
    "repetition_penalty": number("Divides the logits of tokens of prompt and answer; 1: off.", 0, MAX_REPETITION_PENALTY),
    "response_format": object("The form of the answer: text, json_object, or json_schema with a schema."),
    "structured_outputs": object("The form of the answer, as vLLM names it: json, regex, choice or grammar."),
    "guided_json": {"description": "A JSON schema that the answer follows."},
    "json_schema": {"description": "A JSON schema that the answer follows."},
    "guided_regex": string("A regular expression that the whole answer matches."),
    "regex": string("A regular expression that the whole answer matches."),
    "guided_choice": array("Texts of which the answer is one.", {"type": "string"}),
    "choice": array("Texts of which the answer is one.", {"type": "string"}),
    "guided_grammar": string("A grammar (GBNF or Lark) that the answer follows."),
    "ebnf": string("A grammar (GBNF or Lark) that the answer follows."),
    "tools": array("Functions that the answer may call.", {"type": "object"}),
    "tool_choice": {"description": "auto, none, required, or the function that must be called."},
    "parallel_tool_calls": {"type": "boolean", "description": "Whether an answer may call several functions."},
    "logit_bias": object("Token id -> what is added to its logit, from -100 to 100."),
    "min_tokens": integer("No end before so many tokens.", 0),
    "n": integer("Answers to each prompt.", 1, 128),
    "best_of": integer("1, or the same as n.", 1, 128),
    "stream": boolean("Answer with server-sent events."),
    "stream_options": object(
        "include_usage: a last event has the counts of tokens; continuous_usage_stats: every event has those so far."
    ),
    "priority": integer("Higher is served first.", -MAX_PRIORITY, MAX_PRIORITY),
    "timeout": number("Seconds until the request is given up; 0: never.", 0, MAX_TIMEOUT),
    "cache_salt": string("Cached prefixes are shared with the same salt only."),
    "chat_template_kwargs": object("Switches of the model's chat template."),
    "logprobs": {"description": "Log probabilities: in a chat true, of a completion the number of alternatives."},
    "top_logprobs": integer("Alternatives to each token.", 0, MAX_LOGPROBS),
    "add_special_tokens": boolean("The tokenizer adds its own, such as BOS."),
    "echo": boolean("The prompt stands before the answer."),
    "encoding_format": string("How vectors are written.", "float", "base64"),
    "dimensions": integer("Only so many of the vector's numbers.", 1),
    "pooling": string("The last token's state, or the mean over all tokens.", "last", "mean"),
    "normalize": boolean("Vectors have length one (default)."),
    "instructions": string("The system message."),
    "include": array("message.output_text.logprobs asks for log probabilities.", {"type": "string"}),
    "system": {"description": "The system message: a text, or an array of text blocks."},
    "reasoning_effort": string("Whether a model that thinks does so; its template may know degrees.", *EFFORTS),
    "reasoning": object("effort: as reasoning_effort of a chat."),
    "thinking": object("Whether the model thinks first: type is enabled or disabled; for models that do."),
    "output_config": object("format: {type: json_schema, schema: ...}, the form of the answer."),
    "output_format": object("An older name of output_config.format."),
    "sampling_params": object("max_new_tokens, temperature, top_p, top_k, stop, ..."),
    "incremental": boolean("Events hold what is new, not all of the text so far."),
    "return_logprob": boolean("With log probabilities."),
    "logprob_start_len": integer("0: of the prompt, too; -1: of the answer alone.", -1),
    "top_logprobs_num": integer("Alternatives to each token.", 0, MAX_LOGPROBS),
    "rid": string("Comes back as meta_info.id."),
    "tokens": array("Token ids.", {"type": "integer"}),
    "input_file_id": string("An uploaded file of requests, one a line."),
    "endpoint": string("The path that all requests of the file are for."),
    "completion_window": string("24h; a batch never expires here.", "24h"),
    "metadata": object("Comes back with the batch."),
}


def nullable(schema: Schema) -> Schema:
    """The same, or null, which means the same as leaving the field out."""
    out = dict(schema)
    if isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    if "enum" in out:
        out["enum"] = [*out["enum"], None]
    if "oneOf" in out:
        out["oneOf"] = [*out["oneOf"], {"type": "null"}]
    return out


# ---------------- fields that are something else on some path
_TEXT_OR_PARTS: Schema = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}


def _conversation(content: Schema, *roles: str) -> Schema:
    item = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": list(roles)}, "content": content},
    }
    return {"type": "array", "description": "The conversation, oldest first.", "minItems": 1, "items": item}


_MESSAGES = _conversation(nullable(_TEXT_OR_PARTS), "system", "developer", "user", "assistant", "tool")
_ANTHROPIC = _conversation(_TEXT_OR_PARTS, "system", "user", "assistant")
_TEXT_OR_TEXTS: Schema = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
SPECIAL: Mapping[tuple[str, str], Schema] = {
    ("/v1/chat/completions", "messages"): _MESSAGES,
    ("/v1/chat/completions", "logprobs"): boolean("With log probabilities."),
    ("/v1/completions", "logprobs"): integer("Alternatives to each token.", 0, MAX_LOGPROBS),
    ("/v1/responses", "input"): {"description": "A text, or messages, calls and their outputs.", **_TEXT_OR_PARTS},
    ("/v1/responses", "text"): object("format: {type: json_schema, name: ..., schema: ...}, the form of the answer."),
    ("/v1/messages", "messages"): _ANTHROPIC,
    ("/v1/messages/count_tokens", "messages"): _ANTHROPIC,
    ("/v1/messages", "tool_choice"): object("type: auto, any, none, or tool with its name."),
    ("/v1/messages/count_tokens", "tool_choice"): object("As in a message."),
    ("/generate", "text"): {"description": "A text, or several.", **_TEXT_OR_TEXTS},
    ("/tokenize", "prompt"): {"description": "A text, or several.", **_TEXT_OR_TEXTS},
}


# ---------------- answers
def _has(*required: str, **properties: Schema) -> Schema:
    """An object with these keys."""
    return {"type": "object", "required": [*required, *properties], "properties": properties}


def _list(items: Schema) -> Schema:
    return _has(object={"const": "list"}, data={"type": "array", "items": items})


_COUNT: Schema = {"type": "integer", "minimum": 0}
_STRING: Schema = {"type": "string"}
_USAGE = _has(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_CHOICES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": _has(index=_COUNT, finish_reason={"enum": ["stop", "length", "tool_calls"]}),
}
_HEAD = {"id": _STRING, "created": _COUNT, "model": _STRING}
_MODEL = _has(id=_STRING, object={"const": "model"}, created=_COUNT, owned_by=_STRING)
_FILE = _has(id=_STRING, object={"const": "file"}, bytes=_COUNT, filename=_STRING, purpose=_STRING)
_BATCH = _has("request_counts", id=_STRING, object={"const": "batch"}, endpoint=_STRING, status=_STRING)
_GENERATED = _has("meta_info", text=_STRING, output_ids={"type": "array", "items": {"type": "integer"}})
_STATE = _has(status={"enum": ["starting", "ready", "draining", "stopped", "dead"]})
ANSWERS: Mapping[str, Schema] = {  # "method path" -> what a 200 holds; where nothing is said, any object
    "post /v1/chat/completions": _has(object={"const": "chat.completion"}, choices=_CHOICES, usage=_USAGE, **_HEAD),
    "post /v1/completions": _has(object={"const": "text_completion"}, choices=_CHOICES, usage=_USAGE, **_HEAD),
    "post /v1/responses": _has(
        "usage",
        id=_STRING,
        object={"const": "response"},
        status={"enum": ["completed", "incomplete"]},
        output={"type": "array", "minItems": 1, "items": _has(id=_STRING, type=_STRING, status=_STRING)},
    ),
    "post /v1/messages": _has(
        "usage",
        id=_STRING,
        type={"const": "message"},
        role={"const": "assistant"},
        content={"type": "array", "minItems": 1, "items": _has(type=_STRING)},
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
    ),
    "post /v1/messages/count_tokens": _has(input_tokens=_COUNT),
    "post /v1/embeddings": _list(_has("embedding", object={"const": "embedding"}, index=_COUNT)),
    "post /generate": {"oneOf": [_GENERATED, {"type": "array", "items": _GENERATED}]},
    "post /tokenize": _has(tokens={"type": "array"}, count=_COUNT, max_model_len=_COUNT),
    "post /detokenize": _has(prompt=_STRING),
    "get /v1/models": _list(_MODEL),
    "get /v1/models/{name}": _MODEL,
    "post /v1/files": _FILE,
    "get /v1/files": _list(_FILE),
    "get /v1/files/{file_id}": _FILE,
    "delete /v1/files/{file_id}": _has(id=_STRING, deleted={"const": True}),
    "post /v1/batches": _BATCH,
    "get /v1/batches": _list(_BATCH),
    "get /v1/batches/{batch_id}": _BATCH,
    "post /v1/batches/{batch_id}/cancel": _BATCH,
    "get /health": _STATE,
    "get /ready": _STATE,
    "post /flush_cache": _has(flushed={"const": True}),
}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
ERROR = _has(error=_has(message=_STRING, type=_STRING, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL))
MESSAGE_ERROR = _has(type={"const": "error"}, error=_has(type=_STRING, message=_STRING))

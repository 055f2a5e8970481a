"""Describes the answers of the API as JSON schemas, for openapi.py.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Mapping

from minisgl.api.requests.fields import Schema


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
_STATES: Schema = {"enum": ["starting", "ready", "recovering", "draining", "stopped", "dead"]}
_STATE = _has(status=_STATES)
_NAMES: Schema = {"type": "array", "items": _STRING}
_HEALTH = _has(status=_STATES, down=_NAMES, still=_NAMES)
_RENDERED = _has("sampling_params", request_id=_STRING, token_ids={"type": "array"}, model=_STRING)
_LOAD = _has(dp_rank=_COUNT, num_running_reqs=_COUNT, num_waiting_reqs=_COUNT, num_used_tokens=_COUNT)
ANSWERS: Mapping[str, Schema] = {  # "method path" -> the body of a 200; any object where there is none here
    "post /v1/chat/completions": _has(object={"const": "chat.completion"}, choices=_CHOICES, usage=_USAGE, **_HEAD),
    "post /v1/completions": _has(object={"const": "text_completion"}, choices=_CHOICES, usage=_USAGE, **_HEAD),
    "post /v1/chat/completions/render": _RENDERED,
    "post /v1/completions/render": {"type": "array", "items": _RENDERED},
    "post /v1/responses": _has(
        "usage",
        id=_STRING,
        object={"const": "response"},
        status={"enum": ["completed", "incomplete"]},
        output={"type": "array", "minItems": 1, "items": _has(id=_STRING, type=_STRING, status=_STRING)},
    ),
    "post /v1/responses/input_tokens": _has(object={"const": "response.input_tokens"}, input_tokens=_COUNT),
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
    "get /health": _HEALTH,
    "get /ready": _STATE,
    "get /ping": _HEALTH,
    "post /ping": _HEALTH,
    **dict.fromkeys(("get /", "get /v1"), _has("routes", model=_STRING, state=_STRING)),
    "get /v1/loads": _has(timestamp=_STRING, version=_STRING, loads={"type": "array", "items": _LOAD}),
    **dict.fromkeys(("get /model_info", "get /get_model_info"), _has("model_path", is_generation={"const": True})),
    "get /version": _has(version=_STRING),
    "post /flush_cache": _has(flushed={"const": True}),
    "post /debug/journal/start": _has(journal=_STRING),
    "post /debug/journal/stop": _has(journal=_STRING),
    "post /debug/live": _has(watcher=_STRING),
    "post /debug/live/journal": _has(steps={"type": "integer"}),
    "get /debug/journals": _has("journals"),
    "get /debug/journal": _has("journal", failures={"type": "integer"}),
    "get /debug/trace": _has(running={"type": "boolean"}),
}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
ERROR = _has(error=_has(message=_STRING, type=_STRING, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL))
MESSAGE_ERROR = _has(type={"const": "error"}, error=_has(type=_STRING, message=_STRING))

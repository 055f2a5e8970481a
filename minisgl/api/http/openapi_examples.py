"""Gives the example of each route's body, for openapi.py and the page at /docs, where it can be sent as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Germany?"}]}
_FORMED = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
BODIES: Mapping[str, Mapping[str, Any]] = {  # path -> a body, without the model
    "/v1/chat/completions": {**_QUESTION, "temperature": 0.2, "max_tokens": 64, "stream": False},
    "/v1/completions": {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8},
    "/v1/chat/completions/render": _QUESTION,
    "/v1/completions/render": {"prompt": "The capital of France is"},
    "/v1/responses": {"input": "What is the capital of Italy?", "max_output_tokens": 64},
    "/v1/responses/input_tokens": {"input": "What is the capital of Italy?"},
    "/v1/messages": {**_QUESTION, "max_tokens": 64},
    "/v1/messages/count_tokens": _QUESTION,
    "/v1/embeddings": {"input": ["red", "green"], "dimensions": 8},
    "/generate": {"text": "The capital of Japan is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}},
    "/tokenize": {"prompt": "Hello, world"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/debug/journal/start": {"name": "morning"},
    "/debug/live": {"watcher": "0123456789abcdef01234567", "opened": [1], "closed": []},
    "/v1/batches": {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
}
_LINE = {"custom_id": "q-0", "method": "POST", "url": "/v1/chat/completions", "body": _FORMED}
UPLOAD: Mapping[str, str] = {"file": json.dumps(_LINE) + "\n", "purpose": "batch"}
PATH_VALUES: Mapping[str, str] = {"file_id": "file-1", "batch_id": "batch_1", "file": "main.js"}  # others are the model's name

"""Encodes server-sent events.  Pure; runs in the api process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

COMMENT = b": keep-alive\n\n"  # no event: it only shows proxies and clients that the stream is alive


def sse(data: Mapping[str, Any], event: str = "") -> bytes:
    """The bytes of one event.  Its payload is ASCII, so no text can end a line."""
    head = b"event: %s\n" % event.encode() if event else b""
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"

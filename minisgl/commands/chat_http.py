"""Streams the answers of a server to the terminal chat, over http.client.  Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 600.0  # of silence after which the server counts as gone


class ChatError(Exception):
    """The server cannot be reached, or refuses to answer; the text is for the user."""


@dataclass(slots=True)
class Usage:
    """Counts of tokens; `cached`: tokens of the prompt whose keys and values were reused."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


class Server:
    """The HTTP API at `url` (with or without /v1).  Raises ChatError if that is no address."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
        except ValueError as e:
            raise ChatError(f"--url {url} is no address: {e}") from e
        self._https = parts.scheme == "https"
        self._host = parts.netloc.rpartition("@")[2]
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")

    def model(self) -> str:
        """The name of the model that is served.  Raises ChatError."""
        with self._request("GET", "/v1/models") as response:
            try:
                return str(json.loads(response.read())["data"][0]["id"])
            except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException) as e:
                raise ChatError(f"what answers at {self.url} is no minisgl server; name another with --url") from e

    def stream(self, body: dict[str, Any]) -> Generator[str | Usage, None, None]:
        """The pieces of an answer, then its Usage.  Raises ChatError.

        Closing the generator closes the connection, and with that ends the generation of the answer.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._request("POST", "/v1/chat/completions", body) as response:
            try:
                yield from _events(response)
            except (OSError, http.client.HTTPException) as e:
                raise ChatError(f"the connection to {self.url} was lost during the answer ({_why(e)})") from e
            except (ValueError, TypeError, AttributeError) as e:
                raise ChatError(f"the server at {self.url} sent something that is no part of an answer") from e

    @contextlib.contextmanager
    def _request(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """An answer with status 200.  Leaving the context closes the connection, which cancels the request."""
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        try:
            connection = kind(self._host, timeout=_CONNECT_SECONDS)
        except http.client.InvalidURL as e:
            raise ChatError(f"--url {self.url} is no address: {e}") from e
        with contextlib.closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(_ANSWER_SECONDS)
                data = None if body is None else json.dumps(body)
                connection.request(method, self._prefix + path, data, {"Content-Type": "application/json"})
                response = connection.getresponse()
            except (OSError, http.client.HTTPException, UnicodeError) as e:
                raise ChatError(
                    f"no server answers at {self.url} ({_why(e)}). "
                    "Start one with scripts/launch.sh, or name another with --url."
                ) from e
            with response:
                if response.status != 200:
                    raise ChatError(_error_text(response))
                yield response


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _error_text(response: http.client.HTTPResponse) -> str:
    try:
        return str(json.loads(response.read())["error"]["message"])
    except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
        return f"the server answered {response.status} {response.reason}"


def _events(response: http.client.HTTPResponse) -> Iterator[str | Usage]:
    """The server-sent events of one answer.  Raises ChatError if they end before the answer does."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(str(event["error"].get("message", "the server failed")))
        for choice in event.get("choices") or ():
            if text := choice.get("delta", {}).get("content"):
                yield text
        if usage := event.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            yield Usage(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), details.get("cached_tokens", 0))
    raise ChatError("the connection was closed in the middle of the answer")

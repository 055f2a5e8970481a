"""Streams the answers of a server to the terminal chat, over http.client.  Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 600.0  # of silence after which the server counts as gone


class ChatError(Exception):
    """The server cannot be reached, or refuses to answer; the text is for the user, `code` the server's word for it."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Served:
    """The model of a server; `context`: tokens of a prompt with its answer, None where the server does not say."""

    name: str
    context: int | None


@dataclass(slots=True)
class Usage:
    """Counts of tokens; `cached`: tokens of the prompt whose keys and values were reused."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a stream adds: to the answer, to the thought before it, or to what is known about it.

    `finish`: why the answer has ended, as OpenAI's API calls it.
    """

    text: str = ""
    thought: str = ""
    finish: str = ""
    usage: Usage | None = None


class Server:
    """The HTTP API at `url` (with or without /v1 and what follows it), asked with `key` unless that is empty.

    Raises ChatError for what is no address.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url
        self._key = key
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
        except ValueError as e:
            raise ChatError(f"--url {url} is no address: {e}") from e
        if parts.scheme not in ("http", "https"):
            raise ChatError(f"--url {url} is no address of a server: it must begin with http:// or https://")
        self._https = parts.scheme == "https"
        self._host = parts.netloc.rpartition("@")[2]
        self._prefix = re.sub(r"/v1(/.*)?$", "", parts.path).rstrip("/")

    def served(self) -> Served:
        """The model that is served.  Raises ChatError."""
        with self._request("GET", "/v1/models") as response:
            try:
                model = json.loads(response.read())["data"][0]
                context = model.get("max_model_len")
                return Served(str(model["id"]), context if isinstance(context, int) and context > 0 else None)
            except (ValueError, LookupError, TypeError, AttributeError, OSError, http.client.HTTPException) as e:
                raise ChatError(f"what answers at {self.url} is no minisgl server; name another with --url") from e

    def get(self, path: str, seconds: float, good: Container[int] = (200,)) -> bytes:
        """The body of an answer with one of the `good` statuses, which may take so long.  Raises ChatError."""
        with self._request("GET", path, seconds=seconds, good=good) as response:
            try:
                return response.read()
            except (OSError, http.client.HTTPException) as e:
                raise ChatError(f"the connection to {self.url} was lost ({_why(e)})") from e

    def lines(self, path: str, seconds: float) -> Generator[bytes, None, None]:
        """The lines of an answer as they come, none of them after so long a silence.  Raises ChatError."""
        with self._request("GET", path, seconds=seconds) as response:
            try:
                yield from response
            except (OSError, http.client.HTTPException) as e:
                raise ChatError(f"the connection to {self.url} was lost ({_why(e)})") from e

    def stream(self, body: dict[str, Any]) -> Generator[Piece, None, None]:
        """The pieces of an answer.  Raises ChatError.

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
    def _request(
        self, method: str, path: str, body: Any = None, seconds: float = _ANSWER_SECONDS, good: Container[int] = (200,)
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer with one of the `good` statuses.  Leaving the context closes the connection, which cancels the request."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        try:
            connection = kind(self._host, timeout=_CONNECT_SECONDS)
        except http.client.InvalidURL as e:
            raise ChatError(f"--url {self.url} is no address: {e}") from e
        with contextlib.closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(seconds)
                data = None if body is None else json.dumps(body)
                connection.request(method, self._prefix + path, data, headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException, UnicodeError) as e:
                raise ChatError(
                    f"no server answers at {self.url} ({_why(e)}). "
                    "Start one with scripts/launch.sh, or name another with --url."
                ) from e
            with response:
                if response.status not in good:
                    raise self._refusal(response)
                yield response

    def _refusal(self, response: http.client.HTTPResponse) -> ChatError:
        """What to tell the user of an answer that is not 200."""
        if response.status == 401:
            found = "does not accept this API key" if self._key else "wants an API key"
            return ChatError(
                f"the server at {self.url} {found}: set MINISGL_API_KEY, or name a file that holds the key with --api-key-file"
            )
        try:
            return _error(json.loads(response.read())["error"])
        except (ValueError, LookupError, TypeError, AttributeError, OSError, http.client.HTTPException):
            return ChatError(f"the server answered {response.status} {response.reason}")


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _error(error: dict[str, Any]) -> ChatError:
    return ChatError(str(error.get("message", "the server failed")), str(error.get("code") or ""))


def _events(response: http.client.HTTPResponse) -> Iterator[Piece]:
    """The server-sent events of one answer.  Raises ChatError if they end before the answer does."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise _error(event["error"])
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            yield Piece(str(delta.get("content") or ""), str(thought), str(choice.get("finish_reason") or ""))
        if usage := event.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            counts = usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens")
            yield Piece(usage=Usage(*(int(n or 0) for n in counts)))
    raise ChatError("the connection was closed in the middle of the answer")

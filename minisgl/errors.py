"""Defines the two kinds of errors with a text for people.

`UserError` ends a command with one sentence; `RequestError` ends one request with an OpenAI error body.
Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import Any

NOT_HTTP = "invalid_http"  # code of the answer to bytes that are not HTTP; the connection ends with it


class UserError(Exception):
    """A command cannot go on because of something its user can change.

    The text names the flag, file or variable and the way out; it is printed without a traceback.
    """


class RequestError(Exception):
    """One request cannot be served; everything else goes on.

    Rendered as `{"error": {"message", "type", "param", "code"}}` with HTTP status `status`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after  # seconds, sent as the Retry-After header

    @property
    def kind(self) -> str:
        """The `type` of OpenAI's error body, which follows from the status."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The OpenAI error body (`code` is always a string or null)."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class InvalidParam(RequestError):
    """A field of a request has a value that cannot be used: 400, `param` names the field."""

    def __init__(self, param: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message, param=param, code=code)


def context_overflow(field: str, context: int, total: int | str, parts: str) -> InvalidParam:
    """The prompt in `field`, with the completion, does not fit in `context` tokens: 400 with both numbers.

    The wording is the one that litellm and LangChain recognise as a context overflow.
    """
    return InvalidParam(
        field,
        f"This model's maximum context length is {context} tokens. However, you requested {total} tokens ({parts}). "
        f"Please reduce the length of the {field} or completion. (context_length_exceeded)",
        "context_length_exceeded",
    )


def internal_error() -> RequestError:
    """500: the answer after a bug, which reveals nothing but that it happened."""
    text = "The server failed while it handled this request; its log says why."
    return RequestError(text, status=500, code="internal_error")


def model_loading() -> RequestError:
    """503: the engine is not ready yet."""
    text = "The model is still being loaded; try again in a moment."
    return RequestError(text, status=503, code="model_loading", retry_after=2)

"""Says what a request is in a trace: the attributes and phases of its span, by OpenTelemetry's names for generative models.

From the account of a request that has ended, without any package of OpenTelemetry; telemetry.py makes spans of it.  No text of
a prompt or an answer is in them.  Runs in the api process.  Names: open-telemetry/semantic-conventions-genai.
"""

from __future__ import annotations

from typing import NamedTuple

from minisgl.api.request_log import LEFT, Account

TRACE_HEADERS = ("traceparent", "tracestate")  # of W3C: which trace a request belongs to
PROVIDER = "minisgl"
# Routes that the engine works for -> gen_ai.operation.name.  The other ones have no span.
OPERATIONS = {
    "POST /v1/chat/completions": "chat",
    "POST /v1/responses": "chat",
    "POST /v1/messages": "chat",
    "POST /v1/completions": "text_completion",
    "POST /generate": "text_completion",
    "POST /v1/embeddings": "embeddings",
}
Value = str | int | float | bool | list[str]


class Phase(NamedTuple):
    """A part of a request's life, in seconds on the clock of its account."""

    name: str
    begin: float
    end: float


def attributes_of(account: Account, model: str) -> dict[str, Value]:
    """The attributes of the span of a request whose route is in OPERATIONS."""
    failure, params = account.failure, account.params
    out: dict[str, Value] = {
        "gen_ai.operation.name": OPERATIONS[account.route],
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": account.request_id,
        "gen_ai.request.stream": account.kind == "stream",
        "http.request.method": "POST",
        "http.route": account.route.partition(" ")[2],
        "http.response.status_code": account.status,
    }
    if params is not None and OPERATIONS[account.route] != "embeddings":
        out |= {f"gen_ai.request.{name}": getattr(params, name) for name in ("temperature", "top_p")}
        given: dict[str, float | None] = {"top_k": params.top_k or None, "seed": params.seed, "max_tokens": params.max_tokens}
        given |= {"frequency_penalty": params.frequency_penalty or None, "presence_penalty": params.presence_penalty or None}
        out |= {f"gen_ai.request.{name}": value for name, value in given.items() if value is not None}
    if account.first:
        out |= {
            "gen_ai.usage.input_tokens": account.prompt_tokens,
            "gen_ai.usage.output_tokens": account.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": account.cached_tokens,
            "gen_ai.usage.reasoning.output_tokens": account.thought_tokens,
            "gen_ai.response.time_to_first_chunk": account.first - account.began,
            "gen_ai.latency.time_in_queue": account.started_at - account.queued_at,  # as vLLM's spans have it
        }
    finish = ["abort"] if account.status == LEFT else ["error"] if failure is not None else account.finish
    if finish:
        out["gen_ai.response.finish_reasons"] = list(finish)
    if failure is not None:
        out["error.type"] = failure.code
    return out


def failed(account: Account) -> bool:
    """Whether the server is at fault, as the status of a server's span has it."""
    return account.status >= 500 or (account.failure is not None and account.failure.status >= 500)


def phases_of(account: Account, now: float) -> list[Phase]:
    """What a request was doing until it ended at `now`, in order: only what has begun, each from the end of the one before."""
    if not account.first:
        return []
    last = account.last or now
    times = (account.began, account.queued_at, account.started_at, account.first, last)
    begins = [max(account.began, min(t, last)) for t in times]
    names = ("prepare", "queue", "prefill", "decode")
    return [Phase(name, a, b) for name, a, b in zip(names, begins[:-1], begins[1:], strict=True)]

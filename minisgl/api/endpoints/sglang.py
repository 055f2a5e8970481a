"""POST /generate: text or token ids in, text and token ids out, as SGLang has it.  Runs in the api process."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minisgl.api.endpoints.openai_answers import DONE, error_event
from minisgl.api.engine import Chunk, Engine, TokenLogprob
from minisgl.api.generation import StreamedAnswer, Timings
from minisgl.api.requests import generate as serving
from minisgl.api.requests.fields import Fields, wrong_type
from minisgl.api.requests.generate import served_names
from minisgl.api.requests.openai import GenerationRequest, Usage, served_model, text_prompts, unknown_fields
from minisgl.api.requests.sampling import options, sampling
from minisgl.api.requests.structured_output import constraint
from minisgl.api.sse import sse
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import MAX_LOGPROBS

GENERATE_TOKENS = 128  # max_new_tokens where a request does not say
GENERATE_FIELDS = frozenset(
    {
        "model",
        "text",
        "input_ids",
        "sampling_params",
        "stream",
        "incremental",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "priority",
        "timeout",
        "cache_salt",
        "rid",
    }
)
_FORMS = ("json_schema", "regex", "ebnf")
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
SAMPLING_FIELDS = frozenset(
    {
        *_RENAMED,
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "n",
        *_FORMS,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRequest(GenerationRequest):
    """`several`: the answer is an array.  `incremental`: events have what is new instead of all there is.
    `top`: alternatives of which log probabilities are told, None without; `scored`: those of the prompt, too."""

    several: bool
    incremental: bool
    top: int | None
    scored: bool
    rid: str


def parse_generate(engine: Engine, body: Mapping[str, Any]) -> NativeRequest:
    """Check the body of POST /generate, for the model that is served.  Raises RequestError."""
    fields, defaults = Fields(body), engine.config.sampling_defaults
    model = served_model(fields, served_names(engine.config))
    if (body.get("text") is None) == (body.get("input_ids") is None):
        raise InvalidParam("text", "give either text or input_ids.", "missing_required_parameter")
    name = "text" if body.get("text") is not None else "input_ids"
    given, kind = body[name], str if name == "text" else int
    several = isinstance(given, list) and not (name == "input_ids" and given and isinstance(given[0], int))
    first = given[0] if isinstance(given, list) and given else given
    if isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, str | int) and not isinstance(first, kind):
        raise wrong_type(name, "a string or an array of them" if kind is str else "an array of token ids", first)
    prompts = text_prompts(name, given, add_special=True)
    inner = fields.get("sampling_params", dict, "an object") or {}
    if inner.get("n") not in (None, 1):
        raise InvalidParam("sampling_params.n", "sampling_params.n must be 1 here.", "unsupported_value")
    stream, wanted = fields.boolean("stream"), fields.boolean("return_logprob")
    start = fields.integer("logprob_start_len", -1, 1 << 31)
    scored = wanted and start is not None and start >= 0
    if scored and stream:
        raise InvalidParam("logprob_start_len", "the prompt is not scored in a stream; leave one of the two out.")
    top = (fields.integer("top_logprobs_num", 0, MAX_LOGPROBS) or 0) if wanted else None
    names = {_RENAMED.get(k, k): v for k, v in inner.items()}
    bound = constraint(Fields({name: inner.get(name) for name in _FORMS}))
    params = sampling(Fields(names), GENERATE_TOKENS, defaults, logprobs=top, echo=scored or None, grammar=bound.grammar)
    ignored = tuple(f"sampling_params.{k}" for k, v in inner.items() if k not in SAMPLING_FIELDS and v is not None)
    return NativeRequest(
        model=model,
        prompts=prompts,
        n=1,
        params=params,
        options=options(fields),
        stream=stream,
        usage=Usage(),
        bound_by=bound.field,
        ignored=unknown_fields(body, GENERATE_FIELDS) + ignored,
        several=several,
        incremental=fields.boolean("incremental"),
        top=top,
        scored=scored,
        rid=fields.get("rid", str, "a string") or uuid.uuid4().hex,
    )


@dataclass(slots=True)
class _Answer:
    """What has been said to one prompt."""

    request: NativeRequest
    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Chunk | None = None
    began: float = field(default_factory=time.monotonic)

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.last = chunk

    def body(self, chunk: Chunk | None = None) -> dict[str, Any]:
        """All of it; with `chunk` only that, for incremental streams."""
        last = self.last
        assert last is not None
        meta: dict[str, Any] = {
            "id": self.request.rid,
            "finish_reason": self._reason(),
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": len(self.ids),
            "cached_tokens": last.cached_tokens,
            "e2e_latency": round(time.monotonic() - self.began, 6),
        }
        text, ids, told = (
            (self.text, self.ids, self.logprobs) if chunk is None else (chunk.text, chunk.token_ids, chunk.logprobs)
        )
        if self.request.top is not None:
            text = self._add_logprobs(meta, text, list(told), last.prompt_tokens if self.request.scored else 0)
        out = {"text": text, "output_ids": list(ids), "meta_info": meta}
        return {"index": self.index, **out} if self.request.several and self.request.stream else out

    def _reason(self) -> dict[str, Any] | None:
        last = self.last
        if last is None or not last.finish:
            return None
        return {"type": "length", "length": len(self.ids)} if last.finish.reason == "length" else {"type": "stop"}

    def _add_logprobs(self, meta: dict[str, Any], text: str, told: list[TokenLogprob], n_prompt: int) -> str:
        """SGLang's triples (log probability, id, text); returns the text without that of a scored prompt."""
        prompt, output = told[:n_prompt], told[n_prompt:]
        parts = [("output", output)] + ([("input", prompt)] if self.request.scored else [])
        for name, tokens in parts:
            meta[f"{name}_token_logprobs"] = [(t.logprob, t.token_id, t.text.decode("utf-8", "replace")) for t in tokens]
            tops = [[(lp, i, b.decode("utf-8", "replace")) for i, b, lp in t.top] if t.top else None for t in tokens]
            meta[f"{name}_top_logprobs"] = tops if self.request.top else []
        return text[output[0].offset :] if self.request.scored and output else text


async def generate(engine: Engine, request: NativeRequest) -> Any:
    """POST /generate without a stream: an object, or an array of them where several prompts were given."""
    answers = [_Answer(request, i) for i in range(len(request.prompts))]
    chunks, _ = await serving.generate_chunks(engine, request)
    for answer, chunk in zip(answers, chunks, strict=True):
        answer.add(chunk)
    bodies = [a.body() for a in answers]
    return bodies if request.several else bodies[0]


async def stream(engine: Engine, request: NativeRequest) -> StreamedAnswer:
    """POST /generate as events; each has all of the text so far, or what is new with `incremental`.  Raises RequestError."""
    return await serving.begin(engine, request, _Events(request))


class _Events:
    """The Events of a request."""

    def __init__(self, request: NativeRequest) -> None:
        self._incremental = request.incremental
        self._answers = [_Answer(request, i) for i in range(len(request.prompts))]

    def start(self) -> bytes:
        return b""

    def add(self, index: int, chunk: Chunk) -> bytes:
        self._answers[index].add(chunk)
        return sse(self._answers[index].body(chunk if self._incremental else None))

    def end(self, timings: Timings) -> bytes:
        return DONE

    def failed(self, error: RequestError) -> bytes:
        return error_event(error) + DONE

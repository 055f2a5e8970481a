"""Declares what the gateway keeps of each open request, and the errors with which one can end.  Runs in the api process."""

from __future__ import annotations

from dataclasses import dataclass, field

from minisgl.api.cache_reasons import Recollection
from minisgl.api.engine import OnChunk, TokenLogprob
from minisgl.arrays import I32
from minisgl.errors import RequestError
from minisgl.grammar import too_complex
from minisgl.sampling_params import Finish, RequestOptions, SamplingParams


@dataclass(slots=True, eq=False)
class Entry:
    """One open request."""

    uid: int
    params: SamplingParams
    options: RequestOptions
    on_chunk: OnChunk
    source: str  # the request field that holds the prompt, for error messages
    ids: I32 | None = None  # prompt ids, known once tokenized
    max_tokens: int = 0
    seed: int = 0
    name: int = 0  # its uid on the way through the engine, another one for each replay; 0: it is not there
    fresh: bool = True  # it never was
    started: bool = False  # under this name
    cached: int = 0  # tokens of the prompt that the cache had
    shape: bytes = b""  # of a conversation, see Tokenized
    known: Recollection | None = None  # of its prompt
    heard: bool = False  # that its prompt is computed
    deaths: int = 0  # see trials.py
    said_at_death: int = 0
    began: float = 0.0  # when it was opened
    queued: float = 0.0  # seconds of waiting for the first step, in the scheduler
    waited: float = 0.0  # and from its opening
    thought_tokens: int = 0  # tokens of the thought, once it has ended
    delivered: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the tokens in the next Text message


def failure_of(entry: Entry, end: Finish) -> RequestError | None:
    """The error of a request that ended without an answer, None if it ended with one."""
    if end is Finish.ABORT:  # but the client is still here
        return RequestError("The request was aborted.", status=500, code="aborted")
    if end is Finish.GRAMMAR:
        return too_complex(len(entry.delivered))
    if end is Finish.NAN:
        text = f"The model computed logits that are not finite numbers, after {len(entry.delivered)} tokens of the answer."
        return RequestError(text, status=500, code="nan_logits")
    return None


def timed_out(seconds: float, generated: int) -> RequestError:
    """504: the deadline of a request has passed."""
    text = f"The request was not finished within its timeout of {seconds:g} s ({generated} tokens were generated)."
    return RequestError(text, status=504, param="timeout", code="timeout")


def poison() -> RequestError:
    """500: it would kill the engine again."""
    text = (
        "This request has ended the engine three times: it is not tried again.  Please report it; another prompt, or other "
        "parameters, may work."
    )
    return RequestError(text, status=500, code="poison_request")

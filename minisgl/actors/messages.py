"""Declares every message of the system, who sends it to whom, and what its fields mean.

A message is a frozen value.  Its fields are ints, floats, strings, bytes, bools, None,
tuples of these, numpy arrays of one dimension, or a registered value type; minisgl.actors.wire turns it into bytes.  Ids of
requests (`uid`) are given by the api process and are never reused.

`agrees`, where a message has it, says whether its values can belong together: wire asks it of what comes from a socket.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass

from minisgl.actors.wire import message, register
from minisgl.arrays import F32, I32, I64, U8
from minisgl.reasoning import STYLES
from minisgl.sampling_params import Finish, RequestOptions, SamplingParams

register(SamplingParams)
register(RequestOptions)
_LONGEST, _LARGEST = 1 << 31, 1 << 63  # what is no number of tokens, and no uid: they become i32 and i64


def _same(*columns: Sized) -> bool:
    """Whether the columns of a table have one length."""
    return len(set(map(len, columns))) == 1


def _ids(numbers: I32) -> bool:
    """Whether none is negative."""
    return not len(numbers) or int(numbers.min()) >= 0


def _ends(finish: U8) -> bool:
    """Whether these are values of Finish."""
    return not len(finish) or int(finish.max()) <= max(Finish)


# ---------------- lifecycle (every actor)
@message
class Hello:
    """actor -> api: what it needs is loaded, and it takes messages.

    Seconds on the machine's monotonic clock: `began` when its process ran our first line, `made` when the actor was made, `up`
    when it was sent.
    """

    name: str
    pid: int
    began: float = 0.0
    made: float = 0.0
    up: float = 0.0


@message
class Stop:
    """api -> actor: finish the current work, then leave."""

    reason: str


@message
class Stopped:
    """actor -> api: the last message of an actor that leaves on purpose."""

    name: str


@message
class Failed:
    """actor -> api: the actor cannot start, for a reason that its user can remove; `text` is the sentence to print."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class ActorDied:
    """supervisor -> recovery, in one process: another has ended.  Not registered, so none comes from a socket."""

    name: str
    exitcode: int


@message
class Wake:
    """scheduler <-> worker, api -> tokenizer: a doorbell for an actor that sleeps.  The work itself is in a ring."""


# ---------------- start-up
@message
class WorkerLoaded:
    """worker -> scheduler: the weights are loaded, and `max_pages` KV pages would fit next to them."""

    rank: int
    max_pages: int

    def agrees(self) -> bool:
        return self.rank >= 0 < self.max_pages


@message
class Capacity:
    """scheduler -> every worker: allocate this many KV pages (the minimum over the ranks)."""

    num_pages: int

    def agrees(self) -> bool:
        return self.num_pages > 0


@message
class WorkerArmed:
    """worker -> scheduler: KV cache allocated, reading the plan ring."""

    rank: int


@message
class MayCapture:
    """worker 0 of several -> scheduler: no plan has come for a while, so all ranks could capture a graph."""


@message
class EngineReady:
    """scheduler (process `pid`) -> api: requests can be served."""

    num_pages: int
    pid: int

    def agrees(self) -> bool:
        return self.num_pages > 0


# ---------------- requests
@message
class Tokenize:
    """api -> tokenizer: encode a prompt.  Exactly one of `text` and `chat` is set.

    `chat` is the JSON of {"messages": [...], "kwargs": {...}}: user data stays opaque bytes on the wire.  The ids, or the first
    `keep` of them (0: all), come back through the prompt ring, in the order of the `Tokenized` messages.  `reasoning`: the
    style of thoughts to look for.
    """

    uid: int
    text: str | None
    chat: bytes | None
    add_special: bool
    keep: int = 0
    reasoning: str = ""

    def agrees(self) -> bool:
        return (self.text is None) != (self.chat is None) and 0 <= self.keep < _LONGEST and self.reasoning in ("", *STYLES)


@message
class Tokenized:
    """tokenizer -> api: a record of the prompt ring holds the uid of this request (8 bytes) and its `n` ids.

    It is the next one, but for records whose messages were lost when the tokenizer died.

    `thinking`: whether the conversation ends inside a thought of the model; None: that was not asked.  `shape`: of a
    conversation, three u32 for each message, as minisgl.model.text.conversation.shape_of has them.
    """

    uid: int
    n: int
    thinking: bool | None = None
    shape: bytes = b""

    def agrees(self) -> bool:
        return self.n >= 0 and len(self.shape) % 12 == 0


@message
class Detokenize:
    """api -> tokenizer: decode these token ids."""

    uid: int
    ids: I32
    skip_special: bool

    def agrees(self) -> bool:
        return _ids(self.ids)


@message
class Detokenized:
    """tokenizer -> api: the answer to Detokenize."""

    uid: int
    text: str


@message
class TokenizerInfo:
    """tokenizer -> api, once it is loaded: the JSON object for GET /tokenizer_info."""

    info: str


@message
class CheckGrammar:
    """api -> checker: try a grammar out.  `field`: the request field that prescribes it, for the error message."""

    uid: int
    grammar: str
    field: str


@message
class GrammarChecked:
    """checker -> api: the grammar fits the limits; its text, converted where it came in another form."""

    uid: int
    grammar: str


@message
class PrepareGrammar:
    """scheduler -> every worker: compile a grammar beside the steps, for request `uid` that waits for it."""

    uid: int
    grammar: str


@message
class GrammarPrepared:
    """worker -> scheduler: the grammar of request `uid` is compiled on this rank."""

    uid: int
    rank: int


@message
class Rejected:
    """tokenizer, checker or scheduler -> api: the request cannot be served; the fault is its own, not the engine's."""

    uid: int
    status: int
    text: str
    param: str | None
    code: str | None
    retry_after: int | None

    def agrees(self) -> bool:
        return 400 <= self.status <= 599


@message
class Generate:
    """api -> scheduler: continue the `n_ids` tokens in the next record of the request ring.

    The first `n_prompt` are the prompt; the rest were delivered before a restart (replay), with their log probabilities and
    those of the prompt.  `max_tokens` counts from the end of the prompt.  `max_tokens` and `seed` are set here even where
    `params` leaves them open.
    """

    uid: int
    n_ids: int
    n_prompt: int
    max_tokens: int
    seed: int
    params: SamplingParams
    options: RequestOptions

    def agrees(self) -> bool:
        numbers = 0 <= self.uid < _LARGEST and 0 <= self.max_tokens < _LONGEST and self.seed >= 0
        return numbers and 0 < self.n_prompt <= self.n_ids <= self.n_prompt + max(1, self.max_tokens)


@message
class Cancel:
    """api -> scheduler (the client is gone) or detokenizer -> scheduler (a stop string came): end a request.  Idempotent."""

    uid: int


@message
class FlushCache:
    """api -> scheduler: empty the prefix cache, except for pages that running requests use."""


@message
class Journal:
    """api -> scheduler: begin a journal of the steps, or end it.

    `path`: its first file; "" is the stream that comes to api as JournalBytes.  `tokens`: it has token ids, not hashes of them.
    `megabytes`: of all its files.
    """

    path: str
    on: bool
    tokens: bool
    megabytes: float

    def agrees(self) -> bool:
        return self.megabytes > 0


@message
class Journaled:
    """scheduler -> api: the journal at `path` has begun (`on`) or ended; `error`: why, where it was not told to."""

    path: str
    on: bool
    error: str


@message
class JournalBytes:
    """scheduler -> api: how the stream of the journal goes on, at most ten times a second.  `begins`: with a part, anew."""

    data: bytes
    begins: bool


@message
class Trace:
    """api -> every actor: begin a trace of what the actor does, or end it.

    `steps`: the scheduler says when the results of so many have come; 0: never.  `kernels`: workers profile theirs.
    """

    on: bool
    steps: int = 0
    kernels: bool = False


@message
class Traced:
    """actor -> api: events of its trace (see minisgl.tracing.probe).

    `last`: no more of them come from process `pid`.  `enough`: the steps asked for have come.
    """

    name: str
    pid: int
    data: bytes
    last: bool
    enough: bool


@message
class Stats:
    """scheduler -> api: statistics, at most once a second while it works and once when it becomes idle.

    `values[i]` belongs to `names[i]`.  Counters count from the start of the run: tokens, unless the name says otherwise.
    """

    names: tuple[str, ...]
    values: I64

    def agrees(self) -> bool:
        return _same(self.names, self.values)


@message
class Embedded:
    """scheduler -> api: the vector of request `uid`, which has ended."""

    uid: int
    vector: F32


@message
class Evicted:
    """scheduler -> api, as request `uid` is admitted: the pages that it would read next were evicted so many `seconds` ago."""

    uid: int
    seconds: float

    def agrees(self) -> bool:
        return self.seconds >= 0


@message
class Track:
    """scheduler -> detokenizer, before the first Tokens of a request: how to turn its tokens into text.

    `prompt`: the prompt's tokens under `echo`, else none.  `queued`: as in Started.  `said`: tokens of the answer that were
    delivered before a restart, text and all.
    """

    uid: int
    n_cached: int
    prompt: I32
    params: SamplingParams
    queued: float
    said: I32

    def agrees(self) -> bool:
        fits = 0 <= self.n_cached < _LONGEST and _ids(self.prompt) and _ids(self.said)
        return fits and (not self.params.echo or len(self.prompt) > 0)


@message
class Reconnect:
    """api -> scheduler: another process has the name of this actor now; what was sent to the one before is lost."""

    name: str


@message
class Forget:
    """api -> detokenizer: requests with uids below this one have been sent again, or have ended: nothing of them matters."""

    below: int


@message
class Started:
    """detokenizer -> api, before the first Text of a request; scheduler -> api, before Embedded.

    `queued`: seconds from its arrival at the scheduler to the first step that computes a part of its prompt.
    """

    uid: int
    queued: float


@message
class ThoughtEnded:
    """detokenizer -> api, before the Text that ends the thought of a model, closed or not: its number of tokens."""

    uid: int
    tokens: int


@message
class Tokens:
    """scheduler -> detokenizer: one message per step.  Row i appends `counts[i]` (0 or 1) of `tokens` to request `uids[i]`."""

    uids: I64
    counts: U8
    tokens: I32
    finish: U8

    def agrees(self) -> bool:
        columns = _same(self.uids, self.counts, self.finish) and int(self.counts.sum()) == len(self.tokens)
        return columns and _ids(self.tokens) and _ends(self.finish)


@message
class TokenLogprobs:
    """scheduler -> detokenizer, before the Tokens of the same step: log probabilities, for the requests that have any.

    Entry i is about the next token of the prompt of request uids[i], or (`drawn`) about its token in the Tokens that follows.
    It has widths[i] alternatives; those of all entries are concatenated in `top_ids` and `top_logprobs`.
    """

    uids: I64
    drawn: U8
    tokens: I32
    logprobs: F32
    widths: U8
    top_ids: I32
    top_logprobs: F32

    def agrees(self) -> bool:
        columns = _same(self.uids, self.drawn, self.tokens, self.logprobs, self.widths)
        widths = len(self.top_ids) == len(self.top_logprobs) == int(self.widths.sum())
        return columns and widths and _ids(self.tokens) and _ids(self.top_ids)


@message
class Logprobs:
    """detokenizer -> api, before the Text with the same tokens: log probabilities, with the bytes of all tokens.

    Entry i is about token tokens[i] of request uids[i], whose text begins at character offsets[i] of the request's text; the
    first token of a prompt has NaN.  `pieces` concatenates the bytes of each token and of its widths[i] alternatives, with
    their lengths in `sizes`.
    """

    uids: I64
    tokens: I32
    offsets: I32
    logprobs: F32
    widths: U8
    top_ids: I32
    top_logprobs: F32
    sizes: I32
    pieces: bytes

    def agrees(self) -> bool:
        columns = _same(self.uids, self.tokens, self.offsets, self.logprobs, self.widths)
        n = int(self.widths.sum())
        lengths = columns and len(self.top_ids) == len(self.top_logprobs) == n and len(self.sizes) == len(self.uids) + n
        return lengths and _ids(self.sizes) and int(self.sizes.sum(dtype=int)) == len(self.pieces)


@message
class Text:
    """detokenizer -> api: one message per step.  Row i brings `counts[i]` tokens and their text, which may lag behind."""

    uids: I64
    counts: U8
    tokens: I32
    finish: U8
    cached: I32
    texts: tuple[str, ...]

    def agrees(self) -> bool:
        columns = _same(self.uids, self.counts, self.finish, self.cached, self.texts)
        return columns and int(self.counts.sum()) == len(self.tokens) and _ends(self.finish)


# ---------------- batch socket (clients outside)
@message
class BatchSubmit:
    """client -> api: one request of a batch.  `body` is the JSON body that HTTP would carry to `url`."""

    custom_id: str
    url: str
    body: bytes


@message
class BatchResult:
    """api -> client: the answer to one request, with its HTTP status."""

    custom_id: str
    status: int
    request_id: str
    body: bytes


@message
class BatchPing:
    """client -> api, once a second.  The requests of a client that is silent for ten seconds are cancelled."""


@message
class BatchPong:
    """api -> client, in answer to a ping: the server is alive; `open_requests` of this client are being served."""

    open_requests: int


@message
class BatchRefused:
    """api -> client: a frame was not a message of this protocol."""

    text: str

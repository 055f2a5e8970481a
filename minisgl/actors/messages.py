"""Every message of the system, in one file.  A message is a frozen value; on the wire it is a msgpack array.

Wire:    one version byte, then msgpack [class name, field 0, field 1, ...]
Fields:  int, float, str, bytes, bool, None, a tuple of these or of such tuples, a numpy array of one dimension (copied, never
         aliased), or one of the plain value types registered below (SamplingParams).  No dict, no callable, no pickle.

The registry is closed: decoding looks a name up among the classes declared here and checks every field against its
annotation, so bytes from a stranger become `BadMessage` and nothing else.  All processes of a run come from one source
tree, hence one version byte and no optional fields; it exists to refuse an old client of the batch socket with a sentence.
"""

from __future__ import annotations

import dataclasses as dc
import types as pytypes
import typing
from typing import Any, TypeVar

import msgpack
import numpy as np
from typing_extensions import dataclass_transform

from minisgl.sampling_params import RequestOptions, SamplingParams

PROTOCOL = 1
MAX_BYTES = 64 << 20  # larger frames are refused before they are parsed
T = TypeVar("T")

_REGISTRY: dict[str, type] = {}
_FIELDS: dict[type, tuple[str, ...]] = {}
_CHECKS: dict[type, tuple[Any, ...]] = {}
_DTYPES = {"<i4", "<i8", "<u8", "|u1", "<f4"}
_VALUE, _ARRAY = 1, 2  # msgpack ext codes


class BadMessage(ValueError):
    """The bytes are not a message of this protocol."""


def _checker(hint: Any) -> Any:
    """The set of admissible runtime types for an annotation: a tuple of classes, or ("tuple", classes) for tuple[x, ...]."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, pytypes.UnionType):
        return tuple(c for arm in typing.get_args(hint) for c in _checker(arm))
    if origin is tuple:
        return ("tuple", tuple(c for arm in typing.get_args(hint) if arm is not ... for c in _checker(arm)))
    if origin is np.ndarray:
        return (np.ndarray,)
    if hint is float:
        return (float, int)
    return (type(None) if hint is None else hint,)


def _admits(check: Any, value: Any) -> bool:
    if check[0] == "tuple":
        inner = check[1]
        if type(value) is not tuple:
            return False
        return all(_admits(inner, v) for v in value) if inner[:1] == ("tuple",) else all(type(v) in inner for v in value)
    return type(value) in check


def register(cls: type[T]) -> type[T]:
    """Enter a frozen dataclass in the registry under its class name."""
    if cls.__name__ in _REGISTRY:
        raise TypeError(f"message {cls.__name__} is declared twice")
    fields = dc.fields(cls)  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    _REGISTRY[cls.__name__] = cls
    _FIELDS[cls] = tuple(f.name for f in fields)
    _CHECKS[cls] = tuple(_checker(hints[f.name]) for f in fields)
    return cls


@dataclass_transform(frozen_default=True)
def message(cls: type[T]) -> type[T]:
    """Declare a message type: frozen, slotted, registered."""
    return register(dc.dataclass(frozen=True, slots=True, eq=False)(cls))


def registry() -> dict[str, type]:
    """A copy of the registry: class name -> class."""
    return dict(_REGISTRY)


def _row(msg: Any) -> list[Any]:
    cls = type(msg)
    row = [cls.__name__]
    for name, check in zip(_FIELDS[cls], _CHECKS[cls], strict=True):
        value = getattr(msg, name)
        if not _admits(check, value):
            raise TypeError(f"{cls.__name__}.{name} may not be {type(value).__name__}")
        row.append(value)
    return row


def _pack(obj: Any) -> msgpack.ExtType:
    if isinstance(obj, np.ndarray):
        code = obj.dtype.str
        if obj.ndim != 1 or code not in _DTYPES:
            raise TypeError(f"an array of {obj.ndim} dimensions and dtype {code} may not travel in a message")
        return msgpack.ExtType(_ARRAY, code.encode() + obj.tobytes())
    if type(obj) in _FIELDS:
        return msgpack.ExtType(_VALUE, msgpack.packb(_row(obj), default=_pack))
    raise TypeError(f"{type(obj).__name__} may not travel in a message")


def _unpack(code: int, data: bytes) -> Any:
    if code == _VALUE:
        return _build(_parse(data))
    if code == _ARRAY:
        dtype = data[:3].decode("ascii", "replace")
        if dtype not in _DTYPES or (len(data) - 3) % np.dtype(dtype).itemsize:
            raise BadMessage(f"array of dtype {dtype!r} and {len(data) - 3} bytes")
        return np.frombuffer(data, dtype, offset=3).copy()
    raise BadMessage(f"unknown ext code {code}")


def _parse(data: bytes) -> Any:
    return msgpack.unpackb(data, ext_hook=_unpack, use_list=False, max_array_len=1 << 16, max_map_len=0)


def _build(row: Any) -> Any:
    if type(row) is not tuple or not row or type(row[0]) is not str:
        raise BadMessage("a message is an array that begins with its name")
    cls = _REGISTRY.get(row[0])
    if cls is None:
        raise BadMessage(f"unknown message {row[0]!r:.80}")
    names, checks = _FIELDS[cls], _CHECKS[cls]
    if len(row) != len(names) + 1:
        raise BadMessage(f"{row[0]} has {len(names)} fields, got {len(row) - 1}")
    for name, check, value in zip(names, checks, row[1:], strict=True):
        if not _admits(check, value):
            raise BadMessage(f"{row[0]}.{name} may not be {type(value).__name__}")
    return cls(*row[1:])


def encode(msg: Any) -> bytes:
    """Message -> bytes.  Raises TypeError for anything that is not a declared message."""
    if type(msg) not in _FIELDS:
        raise TypeError(f"{type(msg).__name__} is not a message")
    body: bytes = msgpack.packb(_row(msg), default=_pack)
    return bytes([PROTOCOL]) + body


def decode(raw: bytes) -> Any:
    """Bytes -> message.  Raises BadMessage, and only BadMessage, on anything else."""
    if not raw or raw[0] != PROTOCOL:
        raise BadMessage(f"protocol version {raw[0] if raw else None}, expected {PROTOCOL}")
    if len(raw) > MAX_BYTES:
        raise BadMessage(f"{len(raw)} bytes are more than a message may have")
    try:
        return _build(_parse(raw[1:]))
    except BadMessage:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as e:
        raise BadMessage(f"not a message: {type(e).__name__}") from e
    except Exception as e:  # a value type refused its fields (InvalidParam)
        raise BadMessage(f"not a message: {e}") from e


# Spelled out: numpy's NDArray is an alias whose form at run time differs between versions.
I32 = np.ndarray[Any, np.dtype[np.int32]]
I64 = np.ndarray[Any, np.dtype[np.int64]]
U8 = np.ndarray[Any, np.dtype[np.uint8]]
F32 = np.ndarray[Any, np.dtype[np.float32]]

register(SamplingParams)
register(RequestOptions)


# ---------------- lifecycle (every actor)
@message
class Hello:
    """actor -> api: my mailbox is bound and my constructor has run."""

    name: str
    pid: int


@message
class Stop:
    """api -> actor: finish what is in hand, then leave."""

    reason: str


@message
class Stopped:
    """actor -> api: the last message of an actor that leaves on purpose."""

    name: str


@message
class Failed:
    """actor -> api: I cannot start, for a reason that a person can mend; `text` is the sentence to print."""

    name: str
    text: str


@message
class ActorDied:
    """supervisor -> api actor (never on a socket): a process ended without Stopped."""

    name: str
    exitcode: int


@message
class Wake:
    """scheduler <-> worker, a doorbell: look at your ring.  It carries nothing on purpose."""


# ---------------- start-up
@message
class WorkerLoaded:
    """worker -> scheduler: weights are in place; `max_pages` KV pages would fit beside them."""

    rank: int
    max_pages: int


@message
class Capacity:
    """scheduler -> every worker: allocate this many KV pages (the minimum over the ranks)."""

    num_pages: int


@message
class WorkerArmed:
    """worker -> scheduler: KV cache allocated, reading the plan ring."""

    rank: int


@message
class MayPrepare:
    """worker 0 of several -> scheduler: nothing was planned for a while, and later steps could be made faster meanwhile."""


@message
class EngineReady:
    """scheduler -> api: requests can be served."""

    num_pages: int


# ---------------- requests
@message
class Tokenize:
    """api -> tokenizer: exactly one of `text` and `chat` is set.

    `chat` is the JSON of {"messages": [...], "kwargs": {...}}: user data stays opaque bytes on the wire.  The ids come
    back through the prompt ring, in the order of the `Tokenized` messages.
    """

    uid: int
    text: str | None
    chat: bytes | None
    add_special: bool


@message
class Tokenized:
    """tokenizer -> api: the next record of the prompt ring holds the `n` ids of this request."""

    uid: int
    n: int


@message
class Detokenize:
    """api -> tokenizer: what text are these token ids?"""

    uid: int
    ids: I32
    skip_special: bool


@message
class Detokenized:
    """tokenizer -> api: the answer to Detokenize."""

    uid: int
    text: str


@message
class TokenizerInfo:
    """tokenizer -> api, once it is loaded: the JSON object that GET /tokenizer_info answers with."""

    info: str


@message
class Rejected:
    """tokenizer or scheduler -> api: this request cannot be served (an error of the request, not of the engine)."""

    uid: int
    status: int
    text: str
    param: str | None
    code: str | None
    retry_after: int | None


@message
class Generate:
    """api -> scheduler: continue the `n_ids` tokens in the next record of the request ring.

    The first `n_prompt` are the prompt; the rest were delivered before a restart (replay).  `max_tokens` counts from the
    end of the prompt and is always set; `seed` likewise.
    """

    uid: int
    n_ids: int
    n_prompt: int
    max_tokens: int
    seed: int
    params: SamplingParams
    options: RequestOptions


@message
class Cancel:
    """api -> scheduler (the client is gone) or detokenizer -> scheduler (a stop string was found).  Idempotent."""

    uid: int


@message
class FlushCache:
    """api -> scheduler: empty the prefix cache, but for what running requests use."""


@message
class Stats:
    """scheduler -> api, at most once a second while it works and once when it becomes idle.

    `values[i]` belongs to `names[i]`; counters count from the start, tokens unless the name says otherwise.
    """

    names: tuple[str, ...]
    values: I64


@message
class Embedded:
    """scheduler -> api: the vector that request `uid` wanted; it has ended."""

    uid: int
    vector: F32


@message
class Track:
    """scheduler -> detokenizer, before the first Tokens of a request: how to turn its tokens into text.

    `prompt`: the prompt's tokens if they are to stand before the text (echo), else none.  `queued`: as in Started.
    """

    uid: int
    n_cached: int
    prompt: I32
    params: SamplingParams
    queued: float


@message
class Started:
    """detokenizer -> api, before the first Text of a request: it was `queued` for so many seconds, from its arrival at the
    scheduler to the first step that computes something of its prompt."""

    uid: int
    queued: float


@message
class ThoughtEnded:
    """detokenizer -> api, before the Text that ends the thought of a model, closed or not: it has so many tokens."""

    uid: int
    tokens: int


@message
class Tokens:
    """scheduler -> detokenizer: one message per step.  Row i appends `counts[i]` (0 or 1) of `tokens` to request `uids[i]`."""

    uids: I64
    counts: U8
    tokens: I32
    finish: U8


@message
class Scores:
    """scheduler -> detokenizer, before the Tokens of the same step, and only when a request wants log probabilities.

    Entry i is about the next token of the prompt of request uids[i], or about its next token in that Tokens (`drawn`), and has
    widths[i] alternatives, one behind the other in `top_ids` and `top_logprobs`.
    """

    uids: I64
    drawn: U8
    tokens: I32
    logprobs: F32
    widths: U8
    top_ids: I32
    top_logprobs: F32


@message
class Logprobs:
    """detokenizer -> api, before the Text that brings the tokens meant: log probabilities with the bytes of all tokens.

    Entry i is about token tokens[i] of request uids[i], whose text begins offsets[i] characters behind the beginning; the first
    token of a prompt has NaN.  The bytes of the token and of its widths[i] alternatives stand one behind the other in `pieces`,
    `sizes` of them each.
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


@message
class Text:
    """detokenizer -> api: one message per step.  Row i brings `counts[i]` tokens and their text, which may lag behind."""

    uids: I64
    counts: U8
    tokens: I32
    finish: U8
    cached: I32
    texts: tuple[str, ...]


# ---------------- batch socket (clients outside)
@message
class BatchSubmit:
    """client -> api: one request of a batch.  `body` is the JSON body that HTTP would carry to `url`."""

    custom_id: str
    url: str
    body: bytes


@message
class BatchResult:
    """api -> client: the answer of one request, with its HTTP status."""

    custom_id: str
    status: int
    request_id: str
    body: bytes


@message
class BatchPing:
    """client -> api, once a second: I am here.  A client silent for ten seconds has its requests cancelled."""


@message
class BatchPong:
    """api -> client, in answer to a ping: the server is alive; `open_requests` of this client are being served."""

    open_requests: int


@message
class BatchRefused:
    """api -> client: what you sent was not a message of this protocol."""

    text: str

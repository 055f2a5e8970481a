"""Sends many requests over one ZMQ connection to a server on the same machine, or with keys on another.  No torch.

with BatchClient() as client:  # finds the socket through http://127.0.0.1:8000/server_info
    texts = client.generate(["Once upon", "a time"], SamplingParams(max_tokens=32))
    for result in client.run(BatchRequest(str(i), "/v1/completions", {"prompt": p}) for i, p in enumerate(prompts)):
        ...
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minisgl.actors.messages import BatchResult, BatchSubmit
from minisgl.client.connection import Link, check_address
from minisgl.client.curve import ServerGone, read_curve
from minisgl.errors import RequestError, UserError
from minisgl.sampling_params import SamplingParams

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_BODY_BYTES = 15 << 20  # the server cuts a connection that sends frames of 16 MiB
MAX_ATTEMPTS = 12
MAX_BACKOFF_SECONDS = 30.0
RECONNECT_SECONDS = 1.0  # between two trials to reach a server
_RETRY = (429, 503)
_ENGINE_ERROR = "engine_error"  # code of the answer to requests that an engine took along when it failed
_NOT_READY = ("model_loading", "server_draining")  # says nothing about the request: not counted as an attempt
_TICKETS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request: `body` is the JSON object that HTTP would carry to `url`, e.g. "/v1/chat/completions"."""

    custom_id: str
    url: str
    body: Mapping[str, Any]


class BatchClient:
    """Raises UserError when no server can be reached at `url` (or `socket`, an ipc:// or tcp:// address), then and later.

    `wait`: seconds, in the middle of a run, for another server to come up there when this one has ended.  It is sent what has
    no answer; each request still has one result.  `say` is told of it.
    `api_key`: an administrator's, where the server at `url` asks for one; default: MINISGL_ADMIN_API_KEY or MINISGL_API_KEY.
    `server_key`, `client_key`: for tcp://, the files of the server's public key and of this client's pair.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        socket: str | None = None,
        window: int = 256,
        *,
        wait: float = 0.0,
        say: Callable[[str], object] = lambda text: None,
        api_key: str = "",
        server_key: str = "",
        client_key: str = "",
    ) -> None:
        if window < 1:
            raise UserError(f"window must be at least 1, got {window}")
        self.window = window  # most requests without an answer at a time
        self.wait, self.say = wait, say
        self._url, self._socket, self._key = url, socket, api_key
        self._curve = read_curve(server_key, client_key)
        self.address, self.link = self._connect()
        self._running = self._left = False

    def reconnect(self) -> None:
        """Connect to the server that is there now.  Raises UserError if there is none."""
        self.link.close()
        self.address, self.link = self._connect()
        self._left = False

    def _connect(self) -> tuple[str, Link]:
        if self._curve is not None and self._socket is None:
            raise UserError("--server-key and --client-key need the address of the batch socket: --socket tcp://HOST:PORT")
        address = self._socket or find_socket(self._url, self._key)
        check_address(address, self._curve)
        return address, Link(address, self._curve)

    def __enter__(self) -> BatchClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; the server cancels the open requests of this client.  Idempotent."""
        self.link.close()

    def run(self, requests: Iterable[BatchRequest]) -> Iterator[BatchResult]:
        """Send the requests and yield their results as they finish, in any order; `requests` is read as room becomes free.

        Answers 429 and 503 are retried with growing pauses (the server's `retry_after` is the least).  Leaving the iteration
        early cancels the rest.  Raises UserError when the server is gone and none comes within `wait`.  One run at a time.
        """
        if self._running:
            raise RuntimeError("a BatchClient does one run at a time")
        if self._left:
            self.reconnect()
        self._running = True
        run = _Run(self, requests)
        try:
            yield from run.results()
        finally:
            self._running = False
            if run.open:  # to end the connection is the way to cancel
                self._left = True
                self.link.close()

    def chat(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]], **params: Any
    ) -> list[str]:
        """The answers to a conversation (a list of messages) or several, in order.  `params`: fields of the request body.

        Raises RequestError if one of them cannot be served.
        """
        one = bool(conversations) and isinstance(conversations[0], Mapping)
        several: Sequence[Any] = [conversations] if one else conversations
        bodies = [{"messages": list(messages), **params} for messages in several]
        return [c["message"]["content"] for c in self._choices("/v1/chat/completions", bodies)]

    def generate(self, prompts: Sequence[str] | str, params: SamplingParams | None = None) -> list[str]:
        """The continuations of a prompt or several, in order.

        Without `params` the server's defaults hold; without `max_tokens`, 16.
        Raises RequestError if one of them cannot be served.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        fields = {k: v for k, v in asdict(params).items() if v is not None} if params else {}
        if "logit_bias" in fields:
            fields["logit_bias"] = {str(token): value for token, value in fields["logit_bias"]}
        return [c["text"] for c in self._choices("/v1/completions", [{"prompt": p, **fields} for p in prompts])]

    def _choices(self, url: str, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        choices: list[Any] = [None] * len(bodies)
        for result in self.run(BatchRequest(str(i), url, body) for i, body in enumerate(bodies)):
            body = json.loads(result.body)
            if result.status != 200:
                error = body.get("error", {})
                text = error.get("message", "the server gave no reason")
                raise RequestError(text, status=result.status, param=error.get("param"), code=error.get("code"))
            choices[int(result.custom_id)] = body["choices"][0]
        return choices


def find_socket(url: str, api_key: str = "") -> str:
    """The address of the batch socket of the server at `url`; `api_key`: see BatchClient.  Raises UserError with the remedy."""
    key = (api_key or os.environ.get("MINISGL_ADMIN_API_KEY") or os.environ.get("MINISGL_API_KEY") or "").strip()
    remedy = "set MINISGL_ADMIN_API_KEY (minisgl batch: or --api-key-file FILE)"
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/server_info")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            info = json.load(answer)
            address = info.get("batch_socket")
    except urllib.error.HTTPError as e:
        if e.code != 401:
            raise UserError(f"the server at {url} answered {e.code} {e.reason}") from e
        raise UserError(f"the server at {url} {'does not accept this' if key else 'wants an'} API key: {remedy}") from e
    except (OSError, ValueError, AttributeError) as e:  # URLError is an OSError
        reason = e.reason if isinstance(e, urllib.error.URLError) else e
        raise UserError(
            f"no minisgl server answers at {url} ({reason}): start one with scripts/launch.sh, or name another with --url"
        ) from e
    if "batch_socket" not in info:
        raise UserError(f"the server at {url} tells its batch socket to administrators and to its own machine: {remedy}")
    if not isinstance(address, str):
        raise UserError(f"the server at {url} has no batch socket")
    return address


# ---------------- one run
@dataclass(slots=True)
class _Open:
    request: BatchRequest
    message: BatchSubmit
    attempts: int = 0


class _Run:
    """The requests of one run without a final answer.  On the wire they carry tickets: callers may repeat ids."""

    def __init__(self, client: BatchClient, requests: Iterable[BatchRequest]) -> None:
        self.open: dict[str, _Open] = {}
        self._client = client
        self._source = iter(requests)
        self._until = 0.0  # when to give up a server that has ended; 0: it answers
        self._later: list[tuple[float, str]] = []  # (when to send again, ticket)

    def results(self) -> Iterator[BatchResult]:
        more = True
        while True:
            while more and len(self.open) < self._client.window:
                request = next(self._source, None)
                if request is None:
                    more = False
                elif (refusal := self._submit(request)) is not None:
                    yield refusal
            if not self.open:
                return
            self._send_due()
            result = self._next_answer()
            if result is not None:
                yield result

    def _submit(self, request: BatchRequest) -> BatchResult | None:
        """Send a request; returns its answer if it cannot be sent at all."""
        body = json.dumps(request.body).encode()
        if len(body) > MAX_BODY_BYTES:
            text = f"The body has {len(body)} bytes; {MAX_BODY_BYTES} are allowed."
            error = RequestError(text, status=413, code="request_too_large")
            return BatchResult(request.custom_id, error.status, "", json.dumps(error.body()).encode())
        ticket = str(next(_TICKETS))
        opened = _Open(request, BatchSubmit(ticket, request.url, body))
        self.open[ticket] = opened
        self._client.link.send(opened.message)
        return None

    def _send_due(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            self._client.link.send(self.open[heapq.heappop(self._later)[1]].message)

    def _next_answer(self) -> BatchResult | None:
        """Wait for the next final answer; None: no answer, or one that will be retried, or a retry is due."""
        due = max(0.0, self._later[0][0] - time.monotonic()) if self._later else None
        try:
            answer = self._client.link.receive(due)
        except ServerGone as e:
            self._reconnect(e)
            return None
        if answer is None or answer.custom_id not in self.open:
            return None
        opened = self.open[answer.custom_id]
        code = _error(answer.body).get("code") if answer.status != 200 else None
        if code not in _NOT_READY:
            self._until = 0.0
            opened.attempts += 1
        if not answered(answer) and opened.attempts < MAX_ATTEMPTS:
            pause = _pause(answer.body, opened.attempts)
            heapq.heappush(self._later, (time.monotonic() + pause, answer.custom_id))
            return None
        del self.open[answer.custom_id]
        return BatchResult(opened.request.custom_id, answer.status, answer.request_id, answer.body)

    def _reconnect(self, gone: ServerGone) -> None:
        """Send all that has no answer to the next server.  Raises `gone` if none comes in time."""
        if not self._until:
            self._until = time.monotonic() + self._client.wait
            if self._client.wait:
                self._client.say(f"{gone}; waiting up to {self._client.wait:g} s for the next")
        while True:
            if time.monotonic() >= self._until:
                raise gone
            time.sleep(RECONNECT_SECONDS)
            try:
                self._client.reconnect()
                break
            except UserError:
                continue
        self._later.clear()
        for opened in self.open.values():
            self._client.link.send(opened.message)


def answered(result: BatchResult) -> bool:
    """Whether a result is about the request: not where the server was too full, not ready, or failed as a whole."""
    return result.status not in _RETRY and not (result.status == 500 and _error(result.body).get("code") == _ENGINE_ERROR)


def _error(body: bytes) -> dict[str, Any]:
    """The error in a body, {} if there is none."""
    try:
        error = json.loads(body)["error"]
        return error if isinstance(error, dict) else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _pause(body: bytes, attempts: int) -> float:
    """Seconds before the next attempt: at least `retry_after`, doubling each time, with jitter."""
    try:
        retry_after = float(_error(body).get("retry_after", 0.0))
    except (ValueError, TypeError):
        retry_after = 0.0
    backoff = min(MAX_BACKOFF_SECONDS, 0.25 * 2**attempts)
    pause: float = max(min(retry_after, MAX_BACKOFF_SECONDS), backoff)
    return pause * random.uniform(1.0, 1.25)

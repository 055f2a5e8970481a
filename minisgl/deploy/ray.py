"""minisgl on Ray Serve: `serve run minisgl.deploy.ray:app model=M replicas=3`.

Thin: each replica starts the ordinary server as a process of its own and passes requests and streams through.  Ray places
replicas, counts what is open to scale them, and replaces those that fail their health check.  An ingress reads the body of each
request and sends it where a prompt that begins alike has gone before, unless that replica has much more to do than another.

Needs the extra [ray].
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from minisgl.deploy.program import Program, free_port, server_command
from minisgl.deploy.ray_settings import flags_of, settings

CHUNK_CHARS = 256  # of the text of a prompt, in which its beginning is compared
MAX_CHUNKS = 64  # that are looked at: the first 16 KiB
KEPT_CHUNKS = 1 << 16  # for all prompts; the oldest go first
IMBALANCE = 8  # requests that a replica may have more than the least busy one before a prefix gives way
TRIES = 3  # for a request whose answer has not begun
START_SECONDS = 1800.0  # for a model to load
# Headers that belong to one connection, and not to what is passed on.
_HOP = {"host", "content-length", "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


# ---------------- which replica
class PrefixTable:
    """Which replica has lately got prompts that begin alike: hashes of the first 1, 2, ... chunks of a text -> replica."""

    def __init__(self, kept: int = KEPT_CHUNKS) -> None:
        self._kept = kept
        self._last: OrderedDict[int, Any] = OrderedDict()

    @staticmethod
    def hashes(text: str) -> list[int]:
        """One for each chunk, of everything up to its end.  A rest shorter than a chunk is one, too."""
        out, so_far = [], 0
        for start in range(0, min(len(text), CHUNK_CHARS * MAX_CHUNKS), CHUNK_CHARS):
            so_far = hash((so_far, text[start : start + CHUNK_CHARS]))
            out.append(so_far)
        return out

    def longest(self, hashes: Sequence[int], present: Any) -> Any:
        """The replica of `present` that has the longest beginning of it; None where no one has any."""
        for key in reversed(hashes):
            if (found := self._last.get(key)) is not None and found in present:
                return found
        return None

    def note(self, hashes: Sequence[int], replica: Any) -> None:
        for key in hashes:
            self._last[key] = replica
            self._last.move_to_end(key)
        while len(self._last) > self._kept:
            self._last.popitem(last=False)


def ranked(favourite: Any, loads: dict[Any, int]) -> list[list[Any]]:
    """Replicas in the order to be tried: the favourite, unless it has IMBALANCE requests more than another; then the idlest."""
    idlest = min(loads.values(), default=0)
    order = sorted(loads, key=lambda replica: loads[replica])
    if favourite in loads and loads[favourite] <= idlest + IMBALANCE:
        order.remove(favourite)
        order.insert(0, favourite)
    return [[replica] for replica in order]


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # ray is untyped here
    """Ray Serve's hook for the choice of a replica.  Runs in the process of the ingress."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = PrefixTable()
        self._open: dict[ReplicaID, int] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {name: self._open.get(name, 0) for name in by_id}
        hashes = PrefixTable.hashes(str(pending_request.args[0])) if pending_request and pending_request.args else []
        return [[by_id[name] for name in rank] for rank in ranked(self._table.longest(hashes, by_id), loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._open[replica_id] = self._open.get(replica_id, 0) + 1
        if pending_request.args:
            self._table.note(PrefixTable.hashes(str(pending_request.args[0])), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._open[replica_id] = max(0, self._open.get(replica_id, 0) - 1)


def prompt_text(body: bytes) -> str:
    """What a request's prompt begins with, as text: the same for requests that share a prefix.  "" for bodies without one."""
    try:
        request = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(request, dict):
        return ""
    parts = [
        request.get(name) for name in ("cache_salt", "system", "instructions", "tools", "messages", "prompt", "input", "text")
    ]
    return json.dumps([part for part in parts if part is not None], sort_keys=True) if any(parts) else ""


# ---------------- a replica
class Server:
    """One replica: an ordinary server in a process of its own, on the node where Ray has placed this actor."""

    def __init__(self, flags: Sequence[str], drain_seconds: float) -> None:
        """Raises RuntimeError with the server's last lines where it does not start."""
        self._drain_seconds = drain_seconds
        port = free_port()
        self._program = Program("server", server_command(*flags, "--port", str(port)), port)
        self._started = threading.Event()
        self._leave = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()  # the server dies with the thread that starts it
        self._started.wait()
        if not self._program.pid:
            raise RuntimeError("the server's process could not be started; Ray's log of this actor says why")
        end = time.monotonic() + START_SECONDS
        while not self._program.is_ready():
            if (how := self._program.ended()) or time.monotonic() > end:
                self._program.kill()
                raise RuntimeError(f"the server {how or 'is not ready in time'}:\n" + "\n".join(self._program.lines))
            time.sleep(0.2)
        self._url = f"http://127.0.0.1:{port}"
        self._session: aiohttp.ClientSession | None = None

    def _keep(self) -> None:
        try:
            self._program.start()
        finally:
            self._started.set()
        self._leave.wait()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:  # on the loop that runs requests
            self._session = aiohttp.ClientSession(
                self._url,
                connector=aiohttp.TCPConnector(limit=0),  # by default the 101st request would wait, and so the health check
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
                auto_decompress=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),  # the client's own, or none
            )
        return self._session

    async def answer(
        self, _: str, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncIterator[tuple[int, list[tuple[str, str]]] | bytes]:
        """Pass a request on: first status and headers, then the body as it comes.  Its first argument is for the router."""
        async with self._client().request(method, path, headers=headers, data=body or None, allow_redirects=False) as response:
            yield response.status, [(k, v) for k, v in response.headers.items() if k.lower() not in _HOP]
            async for part in response.content.iter_any():
                yield part

    async def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if how := self._program.ended():
            raise RuntimeError(f"the server {how}: " + " | ".join(list(self._program.lines)[-3:]))
        async with self._client().get("/health?deep=1", timeout=aiohttp.ClientTimeout(total=10)) as response:
            if response.status != 200:
                raise RuntimeError(f"/health?deep=1 answers {response.status}: {(await response.text())[:300]}")

    def __del__(self) -> None:
        """Ray has waited for what was open; what is still there gets the server's own --drain-seconds."""
        self._program.signal(signal.SIGTERM)
        if not self._program.wait(self._drain_seconds + 5):
            self._program.kill()
        self._leave.set()


# ---------------- the ingress
def error_event(text: str) -> bytes:
    """The last event of a stream whose replica is lost, as the server's own errors look."""
    error = {"message": text, "type": "server_error", "param": None, "code": "replica_lost"}
    return f"data: {json.dumps({'error': error})}\n\n".encode()


class Ingress:
    """Reads requests, and passes answers on as they come.  Runs on Ray's head node."""

    def __init__(self, servers: Any) -> None:
        self._servers = servers.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Try again with another replica as long as nothing of an answer has come; end a stream that is lost with one error."""
        body = await request.body()
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(k, v) for k, v in request.headers.items() if k not in _HOP]
        if not any(k == "x-forwarded-for" for k, _ in headers):  # who comes through here is no administrator
            headers.append(("x-forwarded-for", request.client.host if request.client else "unknown"))
        last: Exception | None = None
        for _ in range(TRIES):
            parts = self._servers.answer.remote(prompt_text(body), request.method, path, headers, body)
            try:
                status, theirs = await parts.__anext__()
            except (RayError, aiohttp.ClientError, StopAsyncIteration) as e:
                last = e
                await asyncio.sleep(0.2)
                continue
            response = StreamingResponse(self._rest(parts, dict(theirs)), status)
            response.raw_headers = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in theirs]
            return response
        text = f"No replica could answer: {type(last).__name__}."
        error = {"message": text, "type": "server_error", "param": None, "code": "replica_lost"}
        return Response(json.dumps({"error": error}), 503, {"Retry-After": "2"}, "application/json")

    async def _rest(self, parts: Any, headers: dict[str, str]) -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                yield part
        except (RayError, aiohttp.ClientError):
            if not headers.get("Content-Type", "").startswith("text/event-stream"):
                raise  # the client sees an answer that is not complete
            yield error_event("The replica that was answering is lost; ask again.")
        finally:
            parts.cancel()  # a client that has left


def app(args: dict[str, Any]) -> Any:
    """The application, for `serve run minisgl.deploy.ray:app NAME=VALUE ...`; ray_settings.py has them.  Raises UserError."""
    found = settings(args)
    most = max(found["max_replicas"], found["replicas"])
    scaling: dict[str, Any] = {"num_replicas": found["replicas"]}
    if most > found["replicas"]:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=found["replicas"], max_replicas=most, target_ongoing_requests=found["target_requests"]
            )
        }
    server = serve.deployment(
        Server,
        name="minisgl",
        ray_actor_options={"num_cpus": found["cpus"], "num_gpus": found["gpus"]},
        max_ongoing_requests=found["max_requests"],
        health_check_period_s=5,
        health_check_timeout_s=15,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=found["drain_seconds"] + 10,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        **scaling,
    )
    # One, which knows what has gone where, on the node that the cluster cannot lose anyway.
    where = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    ingress = serve.deployment(Ingress, name="ingress", ray_actor_options=where, max_ongoing_requests=100_000, num_replicas=1)
    return ingress.bind(server.bind(flags_of(found), found["drain_seconds"]))

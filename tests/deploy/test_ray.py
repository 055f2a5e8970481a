"""minisgl.deploy.ray, as far as it goes without a Ray cluster; scripts/check/ray_cluster.py runs one."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="not run: ray is not installed (pip install 'minisgl[ray]')")

from minisgl.deploy import ray as on_ray


def test_the_table_finds_the_replica_with_the_longest_common_beginning() -> None:
    table, text = on_ray.PrefixTable(), "".join(chr(97 + i % 26) * 7 for i in range(400))
    hashes = table.hashes(text)
    assert len(hashes) == -(-len(text) // on_ray.CHUNK_CHARS)
    table.note(hashes, "a")
    table.note(table.hashes(text[:512]), "b")
    assert table.longest(table.hashes(text), {"a", "b"}) == "a"
    assert table.longest(table.hashes(text[:512] + "other" * 100), {"a", "b"}) == "b"
    assert table.longest(table.hashes(text[:512] + "other" * 100), {"a"}) is None
    assert table.longest(table.hashes("x" + text), {"a", "b"}) is None


def test_the_table_forgets_the_oldest_and_stays_bounded() -> None:
    table = on_ray.PrefixTable(kept=4)
    for i in range(10):
        table.note(table.hashes(f"{i}" * 300), i)
    assert table.longest(table.hashes("9" * 300), range(10)) == 9
    assert table.longest(table.hashes("1" * 300), range(10)) is None


def test_a_replica_that_has_much_more_to_do_loses_its_prefixes() -> None:
    assert on_ray.ranked("a", {"a": 8, "b": 0, "c": 3}) == [["a"], ["b"], ["c"]]
    assert on_ray.ranked("a", {"a": 9, "b": 0, "c": 3}) == [["b"], ["c"], ["a"]]
    assert on_ray.ranked(None, {"a": 2, "b": 1}) == [["b"], ["a"]]
    assert on_ray.ranked("gone", {}) == []


def test_requests_that_share_a_prefix_have_texts_that_begin_alike() -> None:
    def text(**fields: Any) -> str:
        return on_ray.prompt_text(json.dumps(fields).encode())

    one, two = ([{"role": "system", "content": "s" * 99}, {"role": "user", "content": word}] for word in ("x", "y"))
    assert text(model="m", messages=one)[:120] == text(temperature=1, messages=two)[:120]
    assert text(messages=one) != text(messages=one, cache_salt="tenant")
    assert text(model="m") == ""
    for body in (b"", b"[1]", b"{", b"\xff"):
        assert on_ray.prompt_text(body) == ""


def test_as_many_requests_as_ray_sends_are_open_at_a_server_at_once() -> None:
    async def limits() -> tuple[int, int]:
        server = SimpleNamespace(_url="http://127.0.0.1:1", _session=None)
        async with on_ray.Server._client(server) as session:
            return session.connector.limit, session.connector.limit_per_host

    assert asyncio.run(limits()) == (0, 0)  # no bound: the health check must not wait behind streams


class Handle:
    """Stands in for Ray's handle of the replicas: each call plays one script of parts, of which an exception is raised."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.calls, self.answer = list(scripts), 0, self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, *_: Any) -> Any:
        self.calls += 1
        script = self.scripts.pop(0)

        class Parts:
            def __aiter__(self) -> Any:
                return self

            async def __anext__(self) -> Any:
                if not script:
                    raise StopAsyncIteration
                if isinstance(part := script.pop(0), Exception):
                    raise part
                return part

            def cancel(self) -> None:
                pass

        return Parts()


def ask(handle: Handle) -> tuple[int, bytes]:
    """Status and body of one request through the ingress."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [],
        "client": ("c", 1),
    }
    scope |= {"scheme": "http", "server": ("s", 80), "root_path": ""}
    sent: list[Any] = []

    async def main() -> None:
        from starlette.requests import Request

        waits = asyncio.Event()
        bodies = [{"type": "http.request", "body": b'{"prompt": "p"}', "more_body": False}]

        async def receive() -> Any:
            if bodies:
                return bodies.pop()
            await waits.wait()

        async def send(message: Any) -> None:
            sent.append(message)

        response = await on_ray.Ingress(handle)(Request(scope, receive))
        await response(scope, receive, send)

    asyncio.run(main())
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


STREAM = (200, [("Content-Type", "text/event-stream; charset=utf-8")])


def lost() -> Exception:
    return on_ray.RayError("the actor died")


def test_a_request_whose_answer_has_not_begun_goes_to_another_replica() -> None:
    handle = Handle([lost()], [STREAM, b"data: [DONE]\n\n"])
    assert ask(handle) == (200, b"data: [DONE]\n\n")
    assert handle.calls == 2


def test_a_stream_whose_replica_is_lost_ends_with_one_error_event() -> None:
    status, body = ask(Handle([STREAM, b"data: {}\n\n", lost()]))
    assert status == 200
    assert body.startswith(b"data: {}\n\ndata: ")
    assert body.count(b'"error"') == 1
    assert json.loads(body.split(b"data: ")[2])["error"]["code"] == "replica_lost"


def test_a_request_that_no_replica_can_answer_gets_503() -> None:
    handle = Handle(*([lost()] for _ in range(on_ray.TRIES)))
    status, body = ask(handle)
    assert (status, handle.calls) == (503, on_ray.TRIES)
    assert json.loads(body)["error"]["type"] == "server_error"

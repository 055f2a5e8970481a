"""Clients that ask mixed requests of a server and keep what it answers.  Imported by other scripts; not a command."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import zmq
import zmq.asyncio

from minisgl.actors.messages import BatchPing, BatchResult, BatchSubmit
from minisgl.actors.wire import decode, encode
from scripts.lib.answers import Answer, read_event, read_plain
from scripts.lib.mixed import Case

REFUSED = (429, 503, 507)  # come again: the server takes no requests now, or has no room
PAUSE = 0.25  # seconds until then
SOON = 5.0  # seconds: what is refused later was not refused but lost
_ENDED = ("completed", "failed", "expired", "cancelled")


class Asker:
    """One program that asks.

    `counts`: of what happened; `gaps`: the longest pause in each stream, `pauses`: all, if they are kept; seconds.
    """

    def __init__(self, session: aiohttp.ClientSession, batch_socket: str, wait: float = 120.0) -> None:
        self.session, self.wait = session, wait
        self.counts: Counter[str] = Counter()
        self.gaps: list[float] = []
        self.pauses: list[float] | None = None
        self._socket, self._zmq = batch_socket, zmq.asyncio.Context()
        self._salt = 0

    def close(self) -> None:
        self._zmq.destroy(linger=0)

    async def ask(self, case: Case, slow: float = 0.0) -> Answer | None:
        """The answer; None if it did not come in time.  `slow`: seconds to wait before each piece of a stream is read."""
        try:
            return await asyncio.wait_for(self._ask(case, slow), self.wait)
        except asyncio.TimeoutError:
            return None
        except (aiohttp.ClientError, OSError) as e:
            return Answer(status=0, error=f"{type(e).__name__}: {e}", ends=1)

    async def _ask(self, case: Case, slow: float) -> Answer:
        if case.path == "socket":
            return await self._over_socket(case)
        if case.path == "/v1/batches":
            return await self._batch(case)
        answer = Answer()
        async with await self._request("POST", case.path, json=case.body) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error, answer.ends = await response.text(), 1
            elif case.stream:
                async for data in self._events(response, slow):
                    read_event(case.path, data, answer)
            else:
                read_plain(case.path, await response.json(), answer)
        return answer

    async def _request(self, method: str, path: str, **kw: Any) -> aiohttp.ClientResponse:
        """An answer that is no refusal of the moment; the caller closes it."""
        while True:
            began = time.monotonic()
            if callable(kw.get("data")):
                response = await self.session.request(method, path, data=kw["data"]())
            else:
                response = await self.session.request(method, path, **kw)
            took = time.monotonic() - began
            if response.status not in REFUSED or (took > SOON and response.status != 507):
                return response
            text = await response.text()
            self.counts[f"refused {response.status} {_code(text)}"] += 1
            response.close()
            await asyncio.sleep(PAUSE * random.uniform(1, 2))

    async def _events(self, response: aiohttp.ClientResponse, slow: float) -> AsyncIterator[str]:
        gap, last = 0.0, time.monotonic()
        async for line in response.content:
            if line.startswith(b"data:"):
                pause, last = time.monotonic() - last, time.monotonic()
                gap = max(gap, pause)
                if self.pauses is not None:
                    self.pauses.append(pause)
                yield line[5:].strip().decode()
                if slow:
                    await asyncio.sleep(slow)
        self.gaps.append(gap)

    # ---------------- batches
    async def _batch(self, case: Case) -> Answer:
        lines = [
            json.dumps({"custom_id": f"l{i}", "method": "POST", "url": path, "body": body})
            for i, (path, body) in enumerate(case.lines)
        ]

        def form() -> aiohttp.FormData:
            data = aiohttp.FormData()
            data.add_field("purpose", "batch")
            data.add_field("file", "\n".join(lines).encode(), filename="in.jsonl")
            return data

        file = await self._json("POST", "/v1/files", data=form)
        want = {"input_file_id": file["id"], "endpoint": case.lines[0][0], "completion_window": "24h"}
        batch = await self._json("POST", "/v1/batches", json=want)
        while batch["status"] not in _ENDED:
            await asyncio.sleep(0.1)
            batch = await self._json("GET", f"/v1/batches/{batch['id']}")
        answer = Answer()
        for name in filter(None, (batch.get("output_file_id"), batch.get("error_file_id"))):
            async with await self._request("GET", f"/v1/files/{name}/content") as response:
                for line in (await response.text()).splitlines():
                    one = json.loads(line)
                    self._line(answer, one["custom_id"], one["response"]["status_code"], one["response"]["body"], case)
            (await self._request("DELETE", f"/v1/files/{name}")).close()
        (await self._request("DELETE", f"/v1/files/{file['id']}")).close()
        answer.ends = 1
        if batch["status"] != "completed":
            answer.error = json.dumps(batch)
        return answer

    async def _json(self, method: str, path: str, **kw: Any) -> Any:
        async with await self._request(method, path, **kw) as response:
            text = await response.text()
            if response.status >= 400:
                raise aiohttp.ClientError(f"{method} {path}: {response.status} {text[:300]}")
            return json.loads(text)

    @staticmethod
    def _line(answer: Answer, custom_id: str, status: int, body: Any, case: Case) -> None:
        if status == 200:
            read_plain(case.lines[int(custom_id[1:])][0], body, answer, f"{custom_id}:")
        else:
            part = answer.part(f"{custom_id}:0")
            part.text += json.dumps(body)
            part.ends.append(str(status))

    async def _over_socket(self, case: Case) -> Answer:
        """A client of the batch socket that sees every message, also one that comes twice."""
        sock, answer, done = self._zmq.socket(zmq.DEALER), Answer(), set[str]()
        sock.connect(self._socket)

        async def submit(i: int, pause: float = 0.0) -> None:
            await asyncio.sleep(pause)
            path, body = case.lines[i]
            await sock.send(encode(BatchSubmit(f"l{i}", path, json.dumps(body).encode())))

        async def ping() -> None:
            while True:
                await asyncio.sleep(1)
                await sock.send(encode(BatchPing()))

        tasks = {asyncio.create_task(submit(i)) for i in range(len(case.lines))} | {asyncio.create_task(ping())}
        try:
            while len(done) < len(case.lines) or await sock.poll(50):  # what comes twice comes at once
                message = decode(await sock.recv())
                if not isinstance(message, BatchResult):
                    continue
                if message.status in REFUSED:
                    self.counts[f"refused {message.status} {_code(message.body)}"] += 1
                    tasks.add(asyncio.create_task(submit(int(message.custom_id[1:]), PAUSE)))
                    continue
                done.add(message.custom_id)
                self._line(answer, message.custom_id, message.status, json.loads(message.body), case)
        finally:
            for task in tasks:
                task.cancel()
            sock.close(0)
        answer.ends = 1
        return answer


def _code(text: str | bytes) -> str:
    try:
        return str(json.loads(text)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "?"

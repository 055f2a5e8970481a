"""Connections whose clients have said nothing: what they cost, how long they wait, who makes room, and how they end."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable

import pytest
from test_door import Served, answer, knock, per_turn, play, request
from test_server import ScriptedEngine

from minisgl.api.http import acceptor, lobby
from minisgl.api.http.lobby import Waiting

GET = b"GET /version HTTP/1.1\r\nHost: t\r\n\r\n"


async def until(fact: Callable[[], object]) -> None:
    async def poll() -> None:
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), 5)


async def ended(client: socket.socket) -> bytes:
    """What a client is told before its connection ends."""
    client.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=client)
    said = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return said


def test_a_silent_connection_counts_and_has_no_transport() -> None:
    async def scene(served: Served) -> None:
        clients = knock(served, 30)
        await until(lambda: len(served.all) == 30)
        assert not served.made
        assert len(served.all._silent) == 30
        assert served.all.busy == 0
        clients[0].sendall(GET)
        await until(lambda: served.made)
        reader, writer = await asyncio.open_connection(sock=clients[0])
        assert (await answer(reader))[0] == 200
        assert len(served.all) == 30, "it counts once"
        writer.close()
        for client in clients[1:]:
            client.close()
        await until(lambda: not len(served.all))
        assert len(served.made) == 1, "a transport was made for a client that has left"

    play(scene, ScriptedEngine)


def test_many_silent_connections_are_few_objects_for_the_collector() -> None:
    async def scene(served: Served) -> None:
        gc.collect()
        before = len(gc.get_objects())
        clients = knock(served, 200)
        await until(lambda: len(served.all) == 200)
        gc.collect()
        assert len(gc.get_objects()) - before < 200 * 4  # the client's socket is one of them
        for client in clients:
            client.close()

    play(scene)


@pytest.mark.parametrize("first", [b"", b"GET / HT"])
def test_the_time_for_headers_runs_from_the_connection_wherever_it_waits(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "HEADER_SECONDS", 0.05)
    monkeypatch.setattr(Served, "seconds", 0.05)

    async def scene(served: Served) -> None:
        came: list[float] = []
        let_in = served.acceptor._lobby._let_in

        def keep(one: Waiting) -> None:
            came.append(one.since)
            let_in(one)

        served.acceptor._lobby._let_in = keep
        [client] = knock(served, 1, first)
        assert (await ended(client)).startswith(b"HTTP/1.1 408 ")
        assert [c.since for c in served.made] == came
        assert served.all.closed["headers"] == 1

    play(scene)


def test_those_whose_time_is_over_are_let_in_a_few_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "HEADER_SECONDS", 0.0)
    monkeypatch.setattr(lobby, "_LET_IN", 3)

    async def scene(served: Served) -> None:
        clients = knock(served, 30)
        assert max(await per_turn(served, lambda: len(served.made), 30)) == 3
        for client in clients:
            client.close()

    play(scene)


def test_who_has_been_silent_for_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Served, "limit", 3)

    async def scene(served: Served) -> None:
        silent = []
        for n in (1, 2, 3):
            silent += knock(served, 1)
            await until(lambda n=n: len(served.all) == n)
        reader, writer = await served.connect(GET)
        assert (await answer(reader))[0] == 200
        assert await ended(silent[0]) == b""
        assert (len(served.all), served.all.closed) == (3, {"room": 1})
        for client in (*silent[1:], writer):
            client.close()

    play(scene, ScriptedEngine)


def test_where_all_are_served_a_new_client_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Served, "limit", 0)
    monkeypatch.setattr(acceptor, "_TURNED_AWAY", 2)

    async def scene(served: Served) -> None:
        clients = knock(served, 10, GET)
        assert max(await per_turn(served, lambda: len(served.made), 10)) == 2
        for client in clients:
            assert (await ended(client)).startswith(b"HTTP/1.1 503 ")
        assert served.all.closed["refused"] == 10

    play(scene)


def test_a_crowd_of_those_who_may_come_in_is_let_in_one_by_one() -> None:
    async def scene(served: Served) -> None:
        served.door._refused = float("inf")
        clients = knock(served, 12, GET)
        assert max(await per_turn(served, lambda: len(served.made), 12)) == 1
        for client in clients:
            client.close()

    play(scene)


def test_the_refused_leave_with_their_answer_and_nothing_is_left_of_them() -> None:
    async def scene(served: Served) -> None:
        served.door._refused = float("inf")
        clients = knock(served, 50, request())
        for client in clients:
            said = await ended(client)
            assert said.startswith(b"HTTP/1.1 429 ")
            assert b"Connection: close\r\n" in said
        assert not len(served.all)
        assert not len(served.acceptor._lobby)
        assert not served.made

    play(scene)


def test_the_end_of_the_acceptor_is_the_end_of_those_who_wait() -> None:
    async def scene(served: Served) -> None:
        clients = knock(served, 20)
        await until(lambda: len(served.all) == 20)
        served.acceptor.close()
        served.acceptor.close()
        assert not len(served.all)
        for client in clients:
            assert await ended(client) == b""

    play(scene)


def test_a_descriptor_that_is_used_again_is_another_client() -> None:
    async def scene(served: Served) -> None:
        for _ in range(3):
            [client] = knock(served, 1)
            await until(lambda: len(served.all) == 1)
            client.close()
            await until(lambda: not len(served.all))
        reader, writer = await served.connect(GET)
        assert (await answer(reader))[0] == 200
        writer.close()

    play(scene, ScriptedEngine)

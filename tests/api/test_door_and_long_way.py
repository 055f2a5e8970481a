"""Random requests: what is answered from the bytes of a new connection is what the long way would have answered."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
from conftest import cases

from minisgl.api.http import door
from scripts.lib import fuzz_http
from scripts.lib.fuzz_http import House, NotServed, answers, change_http, try_http

POSTS = [raw for raw in fuzz_http.requests() if raw.startswith(b"POST") and raw.count(b"POST") == 1]


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    yield fuzz_http.house()
    fuzz_http.close_house()


def tried(rng: random.Random, n: int) -> None:
    """Raises RuntimeError where the ways disagree."""
    for _ in range(n):
        with contextlib.suppress(NotServed):
            try_http(change_http(rng.choice(POSTS), rng))


def test_the_door_answers_random_requests_as_the_long_way_or_leaves_them_to_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, of_bytes = [0], house.door.refusal_of_bytes

    def count(raw: bytes, address: str) -> bytes | None:
        answer = of_bytes(raw, address)
        answered[0] += answer is not None
        return answer

    monkeypatch.setattr(house.door, "refusal_of_bytes", count)
    n = cases(150)
    tried(random.Random(7), n)
    assert answered[0] > n // 20, "too few of them were for the door"


ODD = {
    "Origin": b"Origin: http://a.page",
    "Expect": b"Expect: something",
    "Upgrade": b"Upgrade: websocket",
    "Transfer-Encoding": b"Transfer-Encoding: gzip",
    "Sec-WebSocket-Key1": b"Sec-WebSocket-Key1: 1",
    "twice": b"host: u",
    "a byte beyond ASCII": b"X-A: \xc3\xa9",
    "a control character": b"X-A: a\x01",
    "too long": b"X-A: " + b"a" * 8000,
}


@pytest.mark.parametrize("what", [*door._UNUSUAL, *(name for name in ODD if name not in door._UNUSUAL), "no host"])
def test_what_is_odd_is_left_to_the_long_way(house: House, what: str) -> None:
    raw = fuzz_http._post("/v1/completions", {"prompt": "abc"}, f"Authorization: Bearer {fuzz_http.KEY}")
    house.full = True
    assert house.door.refusal_of_bytes(raw, "1.2.3.4") is not None
    odd = raw.replace(b"Host: t\r\n", b"Host: t\r\n" + ODD[what] + b"\r\n" if what in ODD else b"")
    assert house.door.refusal_of_bytes(odd, "1.2.3.4") is None


# ---------------- the comparison itself
@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: a\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc",
        b"{}",
    ],
)
def test_what_is_not_well_formed_is_a_finding(said: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        answers(said)


def test_a_door_that_answers_otherwise_is_a_finding(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_UNUSUAL", ())
    with pytest.raises(RuntimeError, match="the long way"):
        tried(random.Random(0), 400)

"""Pages of other origins: who may use the API, what a preflight says, and which headers an answer has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_server import CHAT, DIED, GOOD, OVERLOADED, ScriptedEngine, Server, ask, check_error, events, play

import minisgl
from minisgl.api.http.cors import EXPOSED
from minisgl.commands.flags import config_from, read_origins
from minisgl.commands.serve import parser
from minisgl.config import ServerConfig
from minisgl.errors import UserError
from minisgl.model.checkpoint.resolve import resolve

HERE, THERE = "https://app.example", "https://elsewhere.example"
KEY = "a key of twenty characters"
ASKED = "authorization,content-type,x-api-key,anthropic-version,openai-organization,x-stainless-os,x-stainless-new,x-title"


async def preflight(http: Server, path: str = CHAT, origin: str = HERE, **headers: str) -> tuple[int, Any, bytes]:
    given = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": ASKED, **headers}
    return await ask(http, path, method="OPTIONS", headers=given)


def cors_headers(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith("access-control-")}


@pytest.mark.parametrize("keys", [(), (KEY,)])
def test_a_preflight_is_answered_before_the_key_is_asked_for(keys: tuple[str, ...]) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path in (CHAT, "/v1/models", "/v1/files/file-1", "/", CHAT + "/", "/nowhere"):
            status, headers, raw = await preflight(http, path)
            assert (status, raw) == (204, b"")
            assert headers["Access-Control-Allow-Origin"] == HERE
            assert set(ASKED.split(",")) <= set(headers["Access-Control-Allow-Headers"].split(", "))
            assert {"GET", "POST", "DELETE"} <= set(headers["Access-Control-Allow-Methods"].split(", "))
            assert "Origin" in headers.getall("Vary")
            assert headers["x-request-id"]
            assert "Access-Control-Allow-Credentials" not in headers

    play(scene, api_keys=keys, allow_origins=(HERE,))


def test_every_answer_can_be_read_by_a_page_that_is_allowed_errors_and_streams_too() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        mine = {"Origin": HERE, "Authorization": f"Bearer {KEY}"}

        async def check(status: int, path: str, body: Any = None, method: str = "POST", **more: str) -> bytes:
            got, headers, raw = await ask(http, path, body, method, headers={**mine, **more})
            assert got == status, raw
            assert headers["Access-Control-Allow-Origin"] == HERE
            assert headers.getall("Access-Control-Expose-Headers") == [", ".join(EXPOSED)]
            assert "Origin" in headers.getall("Vary")
            return raw

        await check(200, CHAT, GOOD)
        assert events(await check(200, CHAT, {**GOOD, "stream": True}))
        await check(200, "/health", method="GET")
        await check(200, "/", method="GET", Accept="text/html")
        await check(400, CHAT, {})
        await check(401, CHAT, GOOD, Authorization="Bearer wrong")
        await check(404, "/nowhere", method="GET")
        await check(405, "/v1/models", {})
        await check(413, CHAT, {**GOOD, "user": "x" * 5000})
        engine.refuse = OVERLOADED
        await check(429, CHAT, GOOD)
        engine.refuse, engine.error = None, DIED
        await check(500, CHAT, GOOD)
        engine.error, engine.refuse = None, ValueError("a bug")
        await check(500, CHAT, GOOD)

    play(scene, api_keys=(KEY,), allow_origins=(HERE,))


def test_by_default_no_answer_has_a_cors_header_and_a_refused_preflight_names_the_flag() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path, body in ((CHAT, GOOD), (CHAT, {**GOOD, "stream": True}), (CHAT, {})):
            _, headers, _ = await ask(http, path, body, headers={"Origin": HERE})
            assert not cors_headers(headers)
        status, headers, raw = await preflight(http)
        error = check_error(status, headers, raw)
        assert (status, error["code"]) == (403, "origin_not_allowed")
        assert "--allow-origin" in error["message"]
        assert HERE in error["message"]
        assert not cors_headers(headers)

    play(scene)


def test_pages_of_origins_that_are_not_named_are_refused_and_cannot_read_answers() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        near = (
            THERE,
            "http://app.example",
            "https://app.example:8443",
            "https://app.example.evil",
            "https://a.app.example",
            "null",
        )
        for origin in near:
            status, headers, raw = await preflight(http, origin=origin)
            assert (status, check_error(status, headers, raw)["code"]) == (403, "origin_not_allowed")
            assert not cors_headers(headers)
            status, headers, _ = await ask(http, CHAT, GOOD, headers={"Origin": origin})
            assert status == 200
            assert not cors_headers(headers)
            assert "Origin" in headers.getall("Vary")
        _, headers, _ = await ask(http, CHAT, GOOD)
        assert not cors_headers(headers)
        assert "Origin" in headers.getall("Vary"), "a cache must not give this answer to a page"

    play(scene, allow_origins=(HERE, "http://localhost:3000"))


def test_several_origins_may_be_named_and_a_star_is_all_of_them() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        allowed = engine.config.server.allow_origins
        for origin in (HERE, "http://localhost:3000", "null"):
            status, headers, _ = await preflight(http, origin=origin)
            assert (status, headers["Access-Control-Allow-Origin"]) == (204, "*" if "*" in allowed else origin)

    play(scene, allow_origins=(HERE, "http://localhost:3000", "null"))
    play(scene, allow_origins=("*",))


def test_a_public_page_may_use_a_server_at_home_if_it_is_allowed() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        asked = {"Access-Control-Request-Private-Network": "true"}
        assert (await preflight(http, **asked))[1]["Access-Control-Allow-Private-Network"] == "true"
        assert "Access-Control-Allow-Private-Network" not in (await preflight(http))[1]
        assert "Access-Control-Allow-Private-Network" not in (await preflight(http, origin=THERE, **asked))[1]

    play(scene, allow_origins=(HERE,))


def test_names_of_headers_that_are_none_are_not_repeated() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        asked = ", ".join(["x-good", "x bad", "x\u00e9", "a:b", "", "*", "y" * 65, *(f"x-{i}" for i in range(200))])
        _, headers, _ = await preflight(http, **{"Access-Control-Request-Headers": asked})
        names = headers["Access-Control-Allow-Headers"].split(", ")
        assert "x-good" in names
        assert not {"x bad", "x\u00e9", "a:b", "", "y" * 65} & set(names)
        assert len(names) < 100

    play(scene, allow_origins=(HERE,))


def test_an_options_request_that_is_no_preflight_is_an_ordinary_request() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for headers in ({}, {"Origin": HERE}, {"Access-Control-Request-Method": "POST"}):
            status, got, raw = await ask(http, CHAT, method="OPTIONS", headers=headers)
            assert (status, check_error(status, got, raw)["code"]) == (405, "method_not_allowed")

    play(scene, allow_origins=(HERE,))


def test_every_header_that_answers_have_of_their_own_is_exposed() -> None:
    text = "".join(path.read_text() for path in (Path(minisgl.__file__).parent / "api").rglob("*.py") if path.name != "cors.py")
    ours = set(re.findall(r'"((?:[Xx]-[\w-]+|Server-Timing|Retry-After|WWW-Authenticate))"', text))
    asked_only = {"x-api-key", "X-Accel-Buffering", "X-Content-Type-Options"}  # of requests, for proxies, for browsers
    assert {name.lower() for name in ours - asked_only} <= {name.lower() for name in EXPOSED}
    assert len(ours) > 5


# ---------------- the flag
@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost:3000", "https://app.example", "http://127.0.0.1", "http://[::1]:8080", "null", "*"),
        *("chrome-extension://abcdefghij", "capacitor://localhost", "app://obsidian.md", "https://xn--bcher-kva.example"),
    ],
)
def test_an_origin_is_taken_as_browsers_send_it(origin: str) -> None:
    args = parser().parse_args(["--allow-origin", origin.upper(), "--allow-origin", THERE, "--device", "cpu"])
    assert config_from(args, resolve(None)).server.allow_origins == (origin, THERE)
    assert ServerConfig().allow_origins == ()


@pytest.mark.parametrize(
    ("origin", "way_out"),
    [
        ("localhost:3000", "http://localhost:3000"),
        ("app.example", "http://app.example"),
        ("https://app.example/", "write https://app.example"),
        ("https://app.example/chat?x=1", "write https://app.example"),
        ("http://app.example:8080/", "write http://app.example:8080"),
        ("https://app.example:443", "write https://app.example"),
        ("http://app.example:80/x", "write http://app.example"),
        ("https://*.example", "only alone"),
        ("https://a.example,https://b.example", "repeated"),
        ("https://a.example https://b.example", "repeated"),
        *((text, "scheme://host") for text in ("", "http://", "://x", "http:///x", "http://user@host", "http://host:0")),
        *(
            (text, "scheme://host")
            for text in ("http://host:99999", "http://host:x", "https://b\u00fccher.example", "file:///x")
        ),
        ("https://a.example\r\nX-Evil: 1", "repeated"),
        ("https://a.example\nX-Evil:1", "scheme://host"),
    ],
)
def test_what_is_no_origin_is_refused_at_the_start_with_the_way_out(origin: str, way_out: str) -> None:
    with pytest.raises(UserError, match=r"^--allow-origin ") as caught:
        read_origins([HERE, origin])
    assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)
    json.dumps(str(caught.value))

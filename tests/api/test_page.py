"""The pages for people, GET / and GET /docs: who gets which, what they tell, and what a browser makes of them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from browser import Tab, browse, needs_chromium
from hypothesis import given
from hypothesis import strategies as st
from test_server import CHAT, ScriptedEngine, Server, ask, check_error, play

from minisgl import __version__
from minisgl.api.batches.store import Store
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.engine import Chunk, Prompt
from minisgl.api.http import openapi, pages
from minisgl.api.http.docs_page import written
from minisgl.api.http.pages import wants_page
from minisgl.api.requests.fields import Support
from minisgl.commands.access import page_url
from minisgl.errors import context_overflow
from minisgl.sampling_params import Finish, SamplingParams

KEY = "a key of twenty characters"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
SECRETS = {"max_context", "context", "runs", "tp", "version", "batch_socket", "pid", "stats", "KV cache"}


async def get(http: Server, path: str, accept: str = BROWSER, method: str = "GET", **headers: str) -> tuple[int, Any, str]:
    status, got, raw = await ask(http, path, method=method, headers={"Accept": accept, **headers})
    return status, got, raw.decode()


# ---------------- who gets which
@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("TEXT/HTML", True),
        ("text/*", True),
        ("text/html, */*", True),
        ("text/html;level=1, application/json", True),
        ("text/html, application/json", True),
        ("application/json;q=0.9, text/html", True),
        ("text/html; q=0.5, application/json; q=0.4", True),
        ("*/*;q=0.1, text/html;q=0.2", True),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/json, text/html", False),
        ("application/json, text/html;q=0.9", False),
        ("text/html;q=0.5, application/json", False),
        ("text/html;q=0.5, */*", False),
        ("text/html;q=0", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=zero", False),
        ("text/plain", False),
        ("text/htmlx", False),
        ("application/json, text/plain, */*", False),
        ("text/event-stream", False),
    ],
)
def test_browsers_get_a_page_and_programs_get_json(accept: str, page: bool) -> None:
    assert wants_page(accept) is page


@given(st.text(alphabet="abtexhml/json*;q=.01, \t", max_size=40))
def test_any_accept_header_has_an_answer(accept: str) -> None:
    assert wants_page(accept) in (True, False)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
def test_the_printed_addresses_open_in_a_browser_and_answer_programs(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stats = {"total_pages": 100}
        status, headers, text = await get(http, path)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "Accept" in headers.getall("Vary")
        for fact in ('<h1 id="model">tiny</h1>', "context 64", "KV cache 1,600", "tp 1", __version__):
            assert fact in text
        assert (await get(http, path, method="HEAD"))[0] == 200
        for accept in ("*/*", "application/json"):
            status, headers, text = await get(http, path, accept)
            told = json.loads(text)
            assert (status, told["model"], told["models"], told["state"]) == (200, "tiny", ["tiny", "org/alias"], "ready")
            assert told["runs"] == {"context": 64, "KV cache": 1600, "tp": 1, "version": __version__}
            assert told["api_key"] == "none"
            assert "Accept" in headers.getall("Vary")
            assert {f"POST {CHAT}", "GET /docs", "GET /metrics", "GET /v1/models"} <= set(told["routes"])
        status, headers, raw = await ask(http, path, {})
        assert (status, check_error(status, headers, raw)["code"]) == (405, "method_not_allowed")

    play(scene)


def test_the_page_opens_while_the_model_is_loaded_and_says_so() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.state, engine.stats = "starting", {}
        assert (await get(http, "/"))[0] == 200
        told = json.loads((await get(http, "/", "*/*"))[2])
        assert (told["state"], "KV cache" in told["runs"]) == ("starting", False)

    play(scene)


def test_without_the_key_the_pages_open_and_tell_the_models_name_alone() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path in ("/", "/v1", "/v1/", "/docs"):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                status, _, text = await get(http, path, **headers)
                assert status == 200
                assert __version__ not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
                assert "64 tokens" not in text
                assert "context 64" not in text
        told = json.loads((await get(http, "/", "*/*"))[2])
        assert (told["model"], told["api_key"]) == ("tiny", "required")
        assert not SECRETS & set(told)
        told = json.loads((await get(http, "/", "*/*", Authorization=f"Bearer {KEY}"))[2])
        assert told["runs"]["context"] == 64
        for path in ("/docs/", "//", "/v1//", "/openapi.json", "/server_info"):
            assert (await get(http, path))[0] == 401, path

    play(scene, api_keys=(KEY,))


def test_a_models_name_cannot_become_html() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path in ("/", "/docs"):
            text = (await get(http, path))[2]
            assert "<i>evil" not in text
            assert "&lt;i&gt;evil" in text

    play(scene, served_names=("<i>evil{{model}}\"'</i>",))


class Inline(HTMLParser):
    """What a page has of its own: texts of its scripts and styles, addresses that it loads, handlers in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.parts, self.loads, self.handlers = "", dict[str, list[str]](script=[], style=[]), [], []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = tag
        for name, value in attrs:
            if name in ("src", "srcset", "action", "style") or (name == "href" and tag == "link"):
                self.loads.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        if self.inside in self.parts:
            self.parts[self.inside].append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


FORBIDDEN = r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b"


def policy_of(headers: Any) -> dict[str, str]:
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    return policy


def test_the_documentation_loads_nothing_and_its_policy_admits_its_own_script_and_style_alone() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        _, headers, text = await get(http, "/docs")
        page = Inline()
        page.feed(text)
        assert (page.loads, page.handlers) == (["data:,"], [])
        assert not re.search(FORBIDDEN, text)
        policy = policy_of(headers)
        for kind, texts in page.parts.items():
            assert len(texts) == 1
            digest = base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()
            assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
        assert len(text.splitlines()) < 250

    play(scene)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
def test_the_page_loads_its_own_modules_as_they_are_written_and_is_small(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        _, headers, text = await get(http, path)
        page = Inline()
        page.feed(text)
        up = "../" if path == "/v1/" else ""
        assert (page.loads, page.handlers) == (["data:,", f"{up}page/style.css", f"{up}page/main.js"], [])
        assert not any(part.strip() for texts in page.parts.values() for part in texts)
        policy = policy_of(headers)
        assert policy["script-src"] == policy["style-src"] == "'self'"
        folder = Path(pages.__file__).parent / "page"
        total = len(text)
        for file in sorted(folder.iterdir()):
            written = file.read_text()
            assert not re.search(FORBIDDEN, written), file.name
            if file.suffix == ".html":
                continue
            status, headers, served = await get(http, f"/page/{file.name}", "*/*")
            assert (status, served) == (200, written)
            assert headers["Content-Type"].split(";")[0] == {".js": "text/javascript", ".css": "text/css"}[file.suffix]
            imported = re.findall(r'from "\./([^"]+)"', written)
            assert all((folder / name).is_file() for name in imported)
            total += len(written)
        assert total < 150_000
        for name in ("nothing.js", "index.html", "..%2fpages.py", "%2e%2e/app.py"):
            status, headers, text = await get(http, f"/page/{name}", "*/*")
            assert status == 404

    play(scene)


def test_without_the_page_a_browser_is_told_so_and_programs_have_all_they_had() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path in ("/", "/v1", "/page/main.js", "/debug/live", "/debug/journals"):
            status, headers, text = await get(http, path)
            assert (status, check_error(status, headers, text.encode())["code"]) == (404, "page_off")
            assert "--no-page" in text
        status, headers, raw = await ask(http, "/debug/live", {"watcher": "x"})
        assert (status, check_error(status, headers, raw)["code"]) == (404, "page_off")
        assert (await get(http, "/", "application/json"))[0] == 200
        assert (await get(http, "/docs"))[0] == 200

    play(scene, no_page=True)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/"),
        ("0.0.0.0", "http://127.0.0.1:8000/"),
        ("::", "http://[::1]:8000/"),
        ("192.168.7.9", "http://192.168.7.9:8000/"),
        ("fe80::1", "http://[fe80::1]:8000/"),
    ],
)
def test_the_start_prints_an_address_that_a_browser_can_open(host: str, url: str) -> None:
    assert page_url(host, 8000) == url


# ---------------- the documentation
def test_every_route_has_an_example_that_it_answers(tmp_path: Path) -> None:
    async def scene() -> None:
        engine = ScriptedEngine(data_dir=str(tmp_path))
        http = Server(engine, store=Store(str(tmp_path), 1 << 20))
        await http.start()
        document = openapi.document(engine.config)
        ids = {"name": "org/alias", "file": "main.js"}
        served = [route for route in openapi.ROUTES if "/debug/" not in route.path]  # these need a scheduler
        for route in sorted(served, key=lambda r: (r.method == "delete", r.path.endswith("cancel"), r.path.count("/"))):
            described = document["paths"][route.path][route.method]
            assert all(p["example"] for p in described.get("parameters", ()) if p["in"] == "path")
            content = described.get("requestBody", {}).get("content", {})
            path = route.path.format(**ids)
            if form := content.get("multipart/form-data"):
                data = aiohttp.FormData()
                data.add_field("purpose", form["example"]["purpose"])
                data.add_field("file", form["example"]["file"], filename="requests.jsonl")
                status, _, raw = await ask(http, path, method="POST", data=data)
                ids["file_id"] = json.loads(raw)["id"]
            elif content:
                body = {**content["application/json"]["example"]}
                assert body.get("model", "tiny") == "tiny"
                if route.path == "/v1/embeddings":  # the scripted engine has no vectors
                    assert ENDPOINTS[route.path].parse(engine.config, {**body, "dimensions": 1}).prompts
                    continue
                if "input_file_id" in body:
                    body["input_file_id"] = ids["file_id"]
                status, headers, raw = await ask(http, path, body)
                assert "X-Ignored-Params" not in headers
                if route.path == "/v1/batches":
                    ids["batch_id"] = json.loads(raw)["id"]
            else:
                status, _, raw = await ask(http, path, method=route.method.upper())
            assert status in ((200,) if route.path != "/tokenizer_info" else (200, 503)) or b"batch_" in raw, (path, raw)
        await http.close()

    asyncio.run(scene())


def test_the_types_of_all_fields_are_written_out() -> None:
    for route in openapi.ROUTES:
        for field in route.fields.having(Support.SUPPORTED) if route.fields is not None else ():
            assert "any JSON" not in written(field.schema), (route.path, field.name)
            assert written(field.schema).strip("[]") not in ("object", "array", ""), (route.path, field.name)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, "string | string[]"),
        ({"type": "array", "items": {"oneOf": [{"type": "string"}, {"type": "integer"}]}}, "(string | integer)[]"),
        ({"type": "array", "items": {"type": ["string", "null"]}}, "(string | null)[]"),
        ({"type": "integer", "minimum": 0, "maximum": 9}, "integer 0..9"),
        ({"type": "string", "enum": ["a", "b"]}, '"a" | "b"'),
        (
            {"type": "object", "required": ["a"], "properties": {"a": {"const": 1}, "b": {"type": ["string", "null"]}}},
            "{a: 1, b?: string}",
        ),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "{[name]: number}"),
        ({}, "any JSON"),
    ],
)
def test_a_schema_is_written_as_people_write_types(schema: dict[str, Any], text: str) -> None:
    assert written(schema) == text


def test_the_documentation_has_a_form_for_each_route_and_the_description_names_both_ways_to_bring_a_key() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        text = (await get(http, "/docs"))[2]
        for route in openapi.ROUTES:
            assert f'<form data-method="{route.method.upper()}" data-path="{route.path}">' in text
        assert ('id="keybox" hidden' in text) is not bool(engine.config.server.api_keys)
        document = openapi.document(engine.config)
        schemes = document["components"].get("securitySchemes", {})
        assert set(schemes) == ({"bearer", "x-api-key"} if engine.config.server.api_keys else set())
        if schemes:
            assert document["security"] == [{"bearer": []}, {"x-api-key": []}]
            assert document["paths"]["/health"]["get"]["security"] == []
            assert "security" not in document["paths"][CHAT]["post"]

    play(scene)
    play(scene, api_keys=(KEY,))


# ---------------- in a browser
class Saying(ScriptedEngine):
    """Answers each request with the next of `answers`: pieces of text, the last of which ends it.  None: silence from there."""

    answers: list[tuple[str | None, ...]] = []
    narrow = False  # whether a conversation of more than three turns is too long

    def open(self, prompt: Prompt, params: SamplingParams, *more: Any) -> int:
        if self.narrow and len(json.loads(prompt.payload)["messages"]) > 4:  # type: ignore[union-attr]
            raise context_overflow("messages", 64, 65, "65 in the messages")
        return super().open(prompt, params, *more)

    def _piece(self, uid: int, at: int) -> None:
        if uid not in self.live:
            return
        pieces = self.answers[min(uid, len(self.answers) - 1)]
        piece, last = pieces[at], at == len(pieces) - 1
        if piece is None:
            return
        self.live[uid](Chunk(piece, (at,), Finish.STOP if last else Finish.NONE, 3, 2))
        if last:
            del self.live[uid]
        else:
            asyncio.get_running_loop().call_soon(self._piece, uid, at + 1)


Visit = Callable[[Saying, Tab], Awaitable[None]]


def visit(tmp_path: Path, path: str, scene: Visit, **server: Any) -> Saying:
    async def with_browser(engine: ScriptedEngine, http: Server) -> None:
        assert isinstance(engine, Saying)
        async with browse(http.make_url(path), tmp_path / "profile") as tab:
            await scene(engine, tab)
            assert tab.complaints == []

    engine = play(with_browser, Saying, max_body_bytes=1 << 20, **server)
    assert isinstance(engine, Saying)
    return engine


def messages_of(engine: ScriptedEngine, number: int) -> list[tuple[str, str]]:
    prompt = engine.opened[number][0]
    return [(m["role"], m["content"]) for m in json.loads(prompt.payload)["messages"]]  # type: ignore[union-attr]


IDLE = "!document.querySelector('#send').hidden && document.querySelector('#stop').hidden"


@needs_chromium
def test_someone_chats_in_a_browser_reads_the_answer_as_it_comes_and_stops_the_next_one(tmp_path: Path) -> None:
    evil = "<img src=x onerror='document.title=1'><b>bold</b>"

    async def scene(engine: Saying, tab: Tab) -> None:
        engine.answers = [("<think>", "Hm, a", " city.", "</think>", "\n\nBer", "lin.", evil), ("On and", " on", None)]
        await tab.until("document.querySelector('#curl').textContent")
        assert await tab.text("#model") == ["tiny"]
        base = await tab.value("location.origin")
        (curl,), (sdk,) = await tab.text("#curl"), await tab.text("#sdk")
        assert f"curl {base}/v1/chat/completions" in curl
        assert '"model":"tiny"' in curl
        assert f'base_url="{base}/v1"' in sdk
        assert 'model="tiny"' in sdk
        assert [await tab.value(f"document.querySelector('#{name}').href") for name in ("docs", "metrics")] == [
            f"{base}/docs",
            f"{base}/metrics",
        ]
        await tab.type("#system", "Be brief.")
        await tab.type("#temperature", "0.5")
        await tab.type("#input", "What is the capital of Germany?\n")
        await tab.until(f"document.querySelector('.note') && {IDLE}")
        assert await tab.text(".user") == ["What is the capital of Germany?"]
        assert await tab.text(".said") == [f"Berlin.{evil}"]
        assert await tab.text(".thought") == ["Hm, a city."]
        assert "3 + 7 tokens, 2 cached" in (await tab.text(".note"))[0]
        assert await tab.value("document.querySelectorAll('#log img, #log b').length") == 0
        assert await tab.value("document.title") != "1"
        assert engine.opened[0][1].temperature == 0.5
        assert messages_of(engine, 0) == [("system", "Be brief."), ("user", "What is the capital of Germany?")]

        await tab.type("#input", "Go on.\n")
        await tab.until("document.querySelectorAll('.said')[1]?.textContent === 'On and on'")
        assert list(engine.live) == [1]
        assert not await tab.value(IDLE)
        await tab.click("#stop")
        await engine.wait_for(lambda: not engine.live)
        await tab.until(IDLE)
        assert (await tab.text(".note"))[1] == "[stopped]"
        assert messages_of(engine, 1)[2:] == [("assistant", f"Berlin.{evil}"), ("user", "Go on.")]

        engine.answers.append(("Fine.",))
        engine.narrow = True
        await tab.type("#input", "And then?")
        await tab.click("#send")
        await tab.until("document.querySelectorAll('.said')[2]?.textContent === 'Fine.'")
        assert messages_of(engine, 2)[1:] == [("user", "Go on."), ("assistant", "On and on"), ("user", "And then?")]
        assert "the oldest turns were left out" in (await tab.text(".note"))[2]
        await tab.click("#clear")
        assert await tab.text(".said") == []

    assert len(visit(tmp_path, "/v1", scene, reasoning_parser="qwen3").opened) == 3


@needs_chromium
def test_refusals_are_shown_with_their_message_and_a_key_is_kept_for_the_documentation(tmp_path: Path) -> None:
    async def scene(engine: Saying, tab: Tab) -> None:
        engine.answers = [("Hello.",)]
        await tab.until("!document.querySelector('#keybox').hidden")
        assert await tab.text("#runs") == [""]
        await tab.type("#input", "Hi\n")
        await tab.until("document.querySelector('.error')")
        assert "The server wants an API key" in (await tab.text(".error"))[0]
        assert await tab.value("document.querySelector('#input').value") == "Hi"
        await tab.type("#key", KEY + "\n")
        await tab.until("document.querySelector('#runs').textContent.includes('context 64')")
        assert KEY not in "".join(await tab.text("pre"))
        await tab.type("#temperature", "7")
        await tab.click("#send")
        await tab.until("document.querySelectorAll('.error').length == 2")
        assert (await tab.text(".error"))[1] == "temperature must be between 0 and 2."
        await tab.value("document.querySelector('#temperature').value = ''")
        await tab.click("#send")
        await tab.until("[...document.querySelectorAll('.said')].pop().textContent === 'Hello.'")
        assert messages_of(engine, 0) == [("user", "Hi")]

        await tab.go(await tab.value("document.querySelector('#docs').href"))
        assert await tab.value("document.querySelector('#key').value") == KEY
        for path, said in ((CHAT, '"content": "Hello."'), ("/v1/models/{name}", '"id": "tiny"'), ("/tokenize", '"count": 12')):
            form = f"form[data-path='{path}']"
            await tab.value(f"document.querySelector(\"{form}\").closest('details').open = true")
            await tab.click(f"{form} button")
            await tab.until(f'document.querySelector("{form} .answer").textContent.includes({json.dumps(said)})')
            assert (await tab.text(f"{form} .answer"))[0].startswith("200 OK\nx-request-id: ")

    visit(tmp_path, "/", scene, api_keys=(KEY,))

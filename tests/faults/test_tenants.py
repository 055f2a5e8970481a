"""What belongs to an API key: its files and batches, its cached prefixes; and what only an administrator may do."""

from __future__ import annotations

import asyncio
import dataclasses as dc
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from conftest import World, fake_config
from test_batches import ENDED, Stored, request_line
from test_callers import Listening
from test_server import CHAT, COMPLETION, USER, ScriptedEngine, Server, ask, check_error, play

from minisgl.api.batches.store import Store
from minisgl.api.caller import Callers
from minisgl.api.engine import Chunk, Engine, TokenPrompt
from minisgl.api.http import openapi
from minisgl.api.http.app import keys_of
from minisgl.api.http.auth import Keys, is_loopback
from minisgl.api.http.docs_page import docs_values
from minisgl.config import ServerConfig
from minisgl.errors import RequestError, UserError
from minisgl.sampling_params import MAX_SALT_CHARS, RequestOptions, SamplingParams

ALICE, BOB, ADMIN = "alice-has-a-long-key", "bob-has-a-longer-key", "the-administrator-has-one"
Scene = Callable[["Asking"], Awaitable[None]]


class Asking:
    """A server with a data directory, asked with keys."""

    def __init__(self, server: Stored) -> None:
        self.server = server

    async def __call__(self, key: str, method: str, path: str, **more: Any) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = self.server.make_url(path)
        async with aiohttp.ClientSession(headers=headers) as session, session.request(method, url, **more) as answer:
            raw = await answer.read()
            return answer.status, json.loads(raw) if answer.content_type == "application/json" else raw

    async def upload(self, key: str) -> str:
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", request_line("a"), filename="in.jsonl")
        status, file = await self(key, "POST", "/v1/files", data=form)
        assert (status, "owner" in file) == (200, False)
        return str(file["id"])

    async def batch(self, key: str, file: str) -> dict[str, Any]:
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        status, batch = await self(key, "POST", "/v1/batches", json=body)
        assert (status, "owner" in batch) == (200, False)
        return dict(await self.server.until(batch["id"], *ENDED))

    async def listed(self, key: str, what: str) -> set[str]:
        status, page = await self(key, "GET", f"/v1/{what}")
        assert status == 200
        assert not any("owner" in value for value in page["data"])
        return {value["id"] for value in page["data"]}


def serve(directory: Path, scene: Scene, make: type[ScriptedEngine] = ScriptedEngine, **server: Any) -> Any:
    async def main() -> Any:
        engine = make(**server)
        async with Stored(engine, directory) as stored:
            await scene(Asking(stored))
        return engine

    return asyncio.run(main())


# ---------------- files and batches
def test_files_and_batches_of_another_key_do_not_exist(tmp_path: Path) -> None:
    async def scene(ask_as: Asking) -> None:
        file = await ask_as.upload(ALICE)
        batch = await ask_as.batch(ALICE, file)
        other = await ask_as.upload(BOB)
        mine = {file, batch["output_file_id"]}
        assert await ask_as.listed(ALICE, "files") == mine
        assert await ask_as.listed(BOB, "files") == {other}
        assert await ask_as.listed(ALICE, "batches") == {batch["id"]}
        assert await ask_as.listed(BOB, "batches") == set()
        create = {"json": {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}}
        asked = [("POST", "/v1/batches", create), ("POST", f"/v1/batches/{batch['id']}/cancel", {})]
        asked += [("GET", f"/v1/batches/{batch['id']}", {})]
        for name in mine:
            asked += [
                (method, f"/v1/files/{name}{rest}", {}) for method, rest in (("GET", ""), ("GET", "/content"), ("DELETE", ""))
            ]
        for method, path, more in asked:
            status, answer = await ask_as(BOB, method, path, **more)
            assert (status, answer["error"]["code"]) == (404, "not_found"), path
            other_id = answer["error"]["message"].split("'")[1]
            unknown = json.dumps([path, more]).replace(other_id, other_id[:-32] + "0" * 32)
            path, more = json.loads(unknown)
            _, as_unknown = await ask_as(BOB, method, path, **more)
            assert as_unknown == json.loads(json.dumps(answer).replace(other_id, other_id[:-32] + "0" * 32))
        status, answer = await ask_as(BOB, "GET", f"/v1/files?after={file}")
        assert (status, answer["error"]["param"]) == (400, "after"), "the id of another's object is as good as any text"
        for name in mine:
            assert (await ask_as(ALICE, "GET", f"/v1/files/{name}/content"))[0] == 200
            assert (await ask_as(ALICE, "DELETE", f"/v1/files/{name}"))[0] == 200
        assert (await ask_as(ALICE, "GET", f"/v1/batches/{batch['id']}"))[0] == 200

    serve(tmp_path, scene, api_keys=(ALICE, BOB))


def test_what_a_key_has_made_is_its_own_after_a_restart_and_the_disk_knows_no_key(tmp_path: Path) -> None:
    files: dict[str, str] = {}

    async def first(ask_as: Asking) -> None:
        for key in (ALICE, BOB):
            files[key] = await ask_as.upload(key)
            await ask_as.batch(key, files[key])

    async def second(ask_as: Asking) -> None:
        assert files[ALICE] in await ask_as.listed(ALICE, "files")
        assert files[BOB] not in await ask_as.listed(ALICE, "files")
        assert await ask_as.listed("a-key-that-came-since", "files") == set()

    serve(tmp_path, first, api_keys=(ALICE, BOB))
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"owner" in kept
    assert not any(key.encode() in kept for key in (ALICE, BOB))
    assert (tmp_path / "salt").stat().st_mode & 0o777 == 0o600
    serve(tmp_path, second, api_keys=(ALICE, "a-key-that-came-since"))


def test_what_was_made_without_keys_belongs_to_the_only_key_or_else_to_the_administrator(tmp_path: Path) -> None:
    made: list[str] = []

    async def without(ask_as: Asking) -> None:
        made.append(await ask_as.upload(""))

    def seen(*keys: str, admins: tuple[str, ...] = ()) -> list[bool]:
        found: list[bool] = []

        async def scene(ask_as: Asking) -> None:
            found.extend([made[0] in await ask_as.listed(key, "files") for key in (*keys, *admins)])

        serve(tmp_path, scene, api_keys=keys, admin_api_keys=admins)
        return found

    serve(tmp_path, without)
    assert seen(ALICE) == [True]
    assert seen(ALICE, BOB) == [False, False]
    assert seen(ALICE, BOB, admins=(ADMIN,)) == [False, False, True]
    assert seen(ALICE, admins=(ADMIN,)) == [True, True]


def test_an_admin_key_sees_and_removes_what_a_lost_key_has_left(tmp_path: Path) -> None:
    async def scene(ask_as: Asking) -> None:
        file = await ask_as.upload(ALICE)
        mine = await ask_as.upload(ADMIN)
        assert await ask_as.listed(ADMIN, "files") == {file, mine}
        assert await ask_as.listed(ALICE, "files") == {file}
        assert (await ask_as(ADMIN, "DELETE", f"/v1/files/{file}"))[0] == 200
        assert (await ask_as(ALICE, "DELETE", f"/v1/files/{mine}"))[0] == 404

    serve(tmp_path, scene, api_keys=(ALICE, BOB), admin_api_keys=(ADMIN,))


def test_without_keys_everybody_has_everything(tmp_path: Path) -> None:
    async def with_key(ask_as: Asking) -> None:
        await ask_as.upload(ALICE)

    async def without(ask_as: Asking) -> None:
        assert len(await ask_as.listed("", "files")) == 1
        assert len(await ask_as.listed(BOB, "files")) == 1, "a key that nobody asks for changes nothing"

    serve(tmp_path, with_key, api_keys=(ALICE, BOB))
    serve(tmp_path, without)


def test_a_key_that_is_exchanged_while_the_server_runs_keeps_its_files_for_when_it_comes_back(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    keys = keys_of(dc.replace(ScriptedEngine().config, server=ServerConfig(api_keys=(ALICE, BOB))), store)

    def find(key: str) -> Any:
        return keys.find(SimpleNamespace(headers={"x-api-key": key}))  # type: ignore[arg-type]

    alice = find(ALICE)
    keys.replace((BOB, "a-key-that-came-since"), (ADMIN,))
    assert find(ALICE) is None
    assert not find("a-key-that-came-since").owns(alice.name)
    assert not find(BOB).owns(alice.name)
    assert find(ADMIN).owns(alice.name)
    keys.replace((ALICE, BOB))
    assert find(ALICE) == alice
    assert find(ADMIN) is None
    store.close()


@pytest.mark.parametrize("content", [b"", b"fifteen bytes..", b"seventeen bytes.."])
def test_a_salt_that_is_damaged_is_not_replaced_in_silence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "salt").write_bytes(content)
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match=r"--data-dir .* the file salt is damaged"):
        store.salt()
    assert (tmp_path / "salt").read_bytes() == content
    store.close()


def test_the_name_of_a_tenant_needs_key_and_salt() -> None:
    names = {Keys((key,), salt=salt).name(key) for key in (ALICE, BOB) for salt in (b"a" * 16, b"b" * 16, b"")}
    assert len(names) == 6
    assert all(len(name) == 32 and ALICE not in name for name in names)


def test_all_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    keys = Keys((ALICE, BOB), (ADMIN,))
    monkeypatch.setattr("minisgl.api.http.auth.hmac.compare_digest", compare)
    for key, known in ((ADMIN, True), (ALICE, True), (BOB, True), (ALICE[:-1], False), ("", False), ("\u00e9\udcff", False)):
        compared.clear()
        headers = {"Authorization": f"Bearer {key}"}
        assert (keys.find(SimpleNamespace(headers=headers)) is not None) is known  # type: ignore[arg-type]
        assert len(compared) == 3, "whichever it is, all are compared"
        assert {len(given) for given, _ in compared} == {32}, "by digests of one length"


# ---------------- cached prefixes
def cached_by(world: World, engine: Engine, salt: str = "") -> int:
    told: list[Chunk | RequestError] = []
    prompt = TokenPrompt(tuple(range(2, 22)))
    engine.open(prompt, SamplingParams(max_tokens=1), told.append, RequestOptions(cache_salt=salt))
    world.system.run()
    assert isinstance(told[-1], Chunk)
    return told[-1].cached_tokens


def tenants(world: World, **server: Any) -> dict[str, Engine]:
    world.gateway.config = dc.replace(world.config, server=ServerConfig(**server))
    keys, callers = Keys((ALICE, BOB)), Callers(world.gateway)
    return {key: callers.call("", tenant=keys.name(key)) for key in (ALICE, BOB)} | {"": callers.call("127.0.0.1")}


def test_cached_tokens_tell_a_key_nothing_of_what_another_has_asked() -> None:
    world = World(None, fake_config(kv_tokens=640))
    by = tenants(world)
    for key in (ALICE, BOB, ""):
        assert cached_by(world, by[key]) == 0, "nobody's prompt is found by the next"
        assert cached_by(world, by[key]) > 15, "everybody's own is"
    assert cached_by(world, by[ALICE], "a salt of its own") == 0
    assert cached_by(world, by[ALICE], "a salt of its own") > 15
    assert cached_by(world, by[BOB], "a salt of its own") == 0, "a salt is added to the key's, not taken instead"
    for salt in list(world.scheduler.machine.cache._salted):
        assert cached_by(world, by[BOB], salt) == 0, "not even who knows the salt of another may use it"
    world.close()


def test_keys_share_prefixes_where_the_operator_says_so() -> None:
    world = World(None, fake_config(kv_tokens=640))
    by = tenants(world, salt_by_key="off")
    assert cached_by(world, by[ALICE]) == 0
    assert cached_by(world, by[BOB]) > 15
    assert cached_by(world, by[BOB], "salt") == 0
    assert cached_by(world, by[ALICE], "salt") > 15
    world.close()


def told_to_bob(seed: int, alice: bool) -> list[Any]:
    """What Bob learns from a random series of his requests, with and without those of Alice in between.

    It is the explanations, and by how much each has made the counts in /metrics grow.
    """
    config = dc.replace(fake_config(tp=1, kv_tokens=8192), server=ServerConfig(api_keys=(ALICE, BOB)))
    rng, world = random.Random(seed), World(seed, config)
    keys, callers, reasons = Keys((ALICE, BOB)), Callers(world.gateway), world.gateway.cache_reasons
    callers._engine = world.gateway  # type: ignore[assignment]  # there is no tokenizer to give explanations their texts
    prompts = [tuple(rng.randrange(1, 4) for _ in range(rng.randrange(1, 40))) for _ in range(8)]
    learnt: list[Any] = []
    for _ in range(40):
        key, batch, salt = rng.choice((ALICE, BOB)), rng.random() < 0.3, rng.choice(("", "", "salt", "pepper"))
        ids = rng.choice(prompts)[: rng.randrange(1, 40)] + rng.choice(prompts)[: rng.randrange(9)]
        length = rng.randrange(1, 6)
        if key == ALICE and not alice:
            continue
        told: list[Any] = []
        before = reasons.requests.copy(), reasons.tokens.copy()
        engine = callers.call("batches" if batch else keys.name(key), batch, tenant=keys.name(key))
        options = RequestOptions(cache_salt=salt, explain_cache=True)
        engine.open(TokenPrompt(ids), SamplingParams(max_tokens=length, temperature=0), told.append, options)
        world.system.run()
        if key == BOB:
            found = told[-1].explanation
            learnt.append((found.render(), found.windows, reasons.requests - before[0], reasons.tokens - before[1]))
    world.close()
    return learnt


@pytest.mark.parametrize("seed", range(8))
def test_what_other_tenants_send_changes_nothing_that_a_tenant_is_told(seed: int) -> None:
    alone = told_to_bob(seed, alice=False)
    assert told_to_bob(seed, alice=True) == alone
    assert {"new", "short", "salt"} <= {why["reason"] for why, *_ in alone}, "his own salts he may know of"


def test_where_keys_share_the_cache_their_batches_show_each_other_no_text() -> None:
    world = World(None, dc.replace(fake_config(tp=1, kv_tokens=640), server=ServerConfig(salt_by_key="off")))
    keys, callers, told = Keys((ALICE, BOB)), Callers(world.gateway), list[Any]()
    callers._engine = world.gateway  # type: ignore[assignment]
    for key, last in ((ALICE, 9), (BOB, 10)):
        engine = callers.call("batches", batch=True, tenant=keys.name(key))
        ids, options = (*range(1, 19), last, *range(1, 9)), RequestOptions(explain_cache=True)
        engine.open(TokenPrompt(ids), SamplingParams(max_tokens=1), told.append, options)
        world.system.run()
    assert told[-1].explanation.windows.theirs is None
    world.close()


def test_every_way_to_ask_has_the_salt_of_its_key(tmp_path: Path) -> None:
    async def scene(ask_as: Asking) -> None:
        for key in (ALICE, BOB):
            assert (await ask_as(key, "POST", CHAT, json={"messages": USER}))[0] == 200
            assert (await ask_as(key, "POST", COMPLETION, json={"prompt": ["a", "b"], "n": 2, "stream": True}))[0] == 200
            assert (await ask_as(key, "POST", "/v1/messages", json={"messages": USER, "max_tokens": 1, "model": "tiny"}))[
                0
            ] == 200
            assert (await ask_as(key, "POST", "/generate", json={"text": "a"}))[0] == 200
            await ask_as.batch(key, await ask_as.upload(key))

    options = serve(tmp_path, scene, Listening, api_keys=(ALICE, BOB)).options
    salts = [o.cache_salt for o in options]
    assert len(salts) == 16
    assert "" not in salts
    assert len(set(salts[:8])) == len(set(salts[8:])) == 1, "batches find what their key has asked otherwise"
    assert salts[0] != salts[8]


def test_a_salt_of_a_request_is_added_to_the_keys_whatever_it_is(tmp_path: Path) -> None:
    async def scene(engine: Any, http: Server) -> None:
        salts = ("", "a", "\u00e9\U0001f600", "x" * MAX_SALT_CHARS)
        for key in (ALICE, BOB):
            for salt in salts:
                body = {"messages": USER, "cache_salt": salt}
                assert (await ask(http, CHAT, body, headers={"Authorization": f"Bearer {key}"}))[0] == 200
        assert len({o.cache_salt for o in engine.options}) == 2 * len(salts)
        assert all(len(o.cache_salt) <= MAX_SALT_CHARS for o in engine.options)
        body = {"messages": USER, "cache_salt": "x" * (MAX_SALT_CHARS + 1)}
        status, headers, raw = await ask(http, CHAT, body, headers={"Authorization": f"Bearer {ALICE}"})
        assert (status, check_error(status, headers, raw)["param"]) == (400, "cache_salt")

    play(scene, Listening, api_keys=(ALICE, BOB))


# ---------------- administration
PRIVATE = {"pid", "batch_socket"}


async def administer(http: Server, **headers: str) -> tuple[int, set[str]]:
    """(status of /flush_cache, private fields of /server_info); both say the same."""
    status, got, raw = await ask(http, "/flush_cache", headers=headers)
    if status != 200:
        assert check_error(status, got, raw)["code"] in ("admin_key_required", "invalid_api_key")
    info, _, raw = await ask(http, "/server_info", method="GET", headers=headers)
    told = json.loads(raw) if info == 200 else {}
    assert info == 401 or "max_context" in told, "what harms nobody is told to every key"
    return status, PRIVATE & told.keys()


@pytest.mark.parametrize(
    ("users", "admins", "key", "status"),
    [
        ((), (), "", 200),
        ((), (), ALICE, 200),
        ((), (ADMIN,), "", 401),
        ((), (ADMIN,), ALICE, 401),
        ((), (ADMIN,), ADMIN, 200),
        ((ALICE,), (), ALICE, 403),
        ((ALICE,), (), "", 401),
        ((ALICE, BOB), (), BOB, 403),
        ((ALICE, BOB), (ADMIN,), BOB, 403),
        ((ALICE, BOB), (ADMIN,), "", 401),
        ((ALICE, BOB), (ADMIN,), ADMIN, 200),
    ],
)
def test_what_is_the_administrators_needs_an_admin_key_or_a_caller_of_this_machine_where_there_are_none(
    users: tuple[str, ...], admins: tuple[str, ...], key: str, status: int
) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        got, private = await administer(http, **({"x-api-key": key} if key else {}))
        assert (got, private) == (status, PRIVATE if status == 200 else set())
        assert engine.flushed is (status == 200)

    play(scene, api_keys=users, admin_api_keys=admins)


def test_an_admin_key_may_do_what_every_key_may() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        assert (await ask(http, CHAT, {"messages": USER}, headers={"x-api-key": ADMIN}))[0] == 200

    play(scene, api_keys=(ALICE,), admin_api_keys=(ADMIN,))


@pytest.mark.parametrize(
    "header",
    [
        *({"Host": host} for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example")),
        *({"Host": host} for host in ("192.168.0.1", "0.0.0.0.evil.example", "127.0.0.1@evil.example", "[::2]:80", "[")),
        *({name: "127.0.0.1"} for name in ("X-Forwarded-For", "x-forwarded-proto", "Forwarded", "X-Real-IP", "Via")),
    ],
)
def test_a_proxy_or_a_page_whose_name_points_here_is_not_this_machine(header: dict[str, str]) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        assert await administer(http, **header) == (403, set())

    play(scene)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:80", "LOCALHOST", "127.0.0.1", "127.9.9.9:1", "[::1]", "[::1]:8000"),
        *("0.0.0.0:8000", "[::]:8000"),  # as a server that listens everywhere announces itself
    ],
)
def test_this_machine_has_several_names(host: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        assert await administer(http, Host=host) == (200, PRIVATE)

    play(scene)


def test_loopback_addresses_are_told_from_others() -> None:
    for host in ("127.0.0.1", "127.255.0.3", "::1", "::ffff:127.0.0.1", "localhost", "LocalHost.", "[::1]"):
        assert is_loopback(host), host
    for host in ("", "0.0.0.0", "::", "128.0.0.1", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%lo", "example.com", "localhost.x"):
        assert not is_loopback(host), host


# ---------------- pages of other origins that do not ask first
TEXT = {"Content-Type": "text/plain"}
FOREIGN: tuple[dict[str, str], ...] = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},
)


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize(
    "kind", ["", "text/plain", "text/plain; charset=utf-8", "multipart/form-data; boundary=x", "Multipart/Form-Data"]
)
def test_a_page_cannot_change_what_it_may_not_read(foreign: dict[str, str], kind: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        headers = foreign | ({"Content-Type": kind} if kind else {})
        skip = {"skip_auto_headers": ["Content-Type"]} if not kind else {}
        for path in ("/flush_cache", "/v1/files", CHAT):
            status, got, raw = await ask(http, path, b"{}", headers=headers, **skip)
            assert (status, check_error(status, got, raw)["code"]) == (403, "origin_not_allowed")
        assert not engine.flushed
        assert (await ask(http, "/v1/models", method="GET", headers=foreign))[0] == 200

    play(scene)


def test_own_pages_programs_and_pages_that_are_allowed_may() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        own = f"http://127.0.0.1:{http.port}"
        for headers in (
            {},
            {"Origin": own},
            {"Sec-Fetch-Site": "same-origin", "Origin": "https://a.proxy"},
            {"Sec-Fetch-Site": "none"},
        ):
            assert (await ask(http, "/flush_cache", headers=headers))[0] == 200, headers
        status, _, _ = await ask(
            http, "/flush_cache", b"x", headers={**TEXT, "Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
        )
        assert status == (200 if engine.config.server.allow_origins else 403)

    play(scene)
    play(scene, allow_origins=("https://app.example",))
    play(scene, allow_origins=("*",))


# ---------------- what is documented
@pytest.mark.parametrize(("users", "admins"), [((), ()), ((ALICE,), ()), ((), (ADMIN,)), ((ALICE,), (ADMIN,))])
def test_the_description_says_which_keys_there_are(users: tuple[str, ...], admins: tuple[str, ...]) -> None:
    config = ScriptedEngine(api_keys=users, admin_api_keys=admins).config
    document = openapi.document(config)
    assert ("securitySchemes" in document["components"]) is bool(users or admins)
    assert ({} in document.get("security", [{}])) is not bool(users), "only with API keys each route needs one"
    assert {"401", "403"} <= set(document["paths"]["/flush_cache"]["post"]["responses"])
    assert (docs_values(config, True)["keys"] == "hidden") is not bool(users or admins)

"""The live page in a browser, before a whole engine whose every step the test makes: what is shown is the engine's state."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from browser import Tab, browse, needs_chromium
from conftest import World, fake_spec
from journal.loads import Recorded, random_load
from test_server import Server

from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.actors.wire import decode
from minisgl.api.http.app import WATCHERS
from minisgl.api.http.watchers import MOST
from minisgl.api.rings import Rings
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.journal.desk import Desk
from minisgl.model.text.tokenizer import load_tokenizer
from minisgl.view.scenes import Scene

A, B, ADMIN = "the key of a user, twenty", "the key of another user", "the key of an administrator"
PAGE = 4


class Engine(World):
    """A world behind the real HTTP application.  `run` makes steps; `show` sends what has been noted to those who look on."""

    def __init__(self, **server: Any) -> None:
        engine = EngineConfig(tp=1, page_size=PAGE, max_running=4, step_tokens=32, lag=2, kv_tokens=240)
        config = Config(replace(fake_spec(200), vocab_size=200), engine, ServerConfig(**server))
        super().__init__(None, config, lambda ctx, config, arenas: SchedulerActor(ctx, config, arenas, 0, Desk(ctx, config)))
        self.later = 1e9  # on the clock of the stream, which sends ten times a second
        self.http = Server(self.gateway)  # type: ignore[arg-type]

    def deliver(self) -> None:
        """What waits between api and scheduler arrives; nobody makes a step."""
        for lane, actor in ((("api", "scheduler"), self.scheduler), (("scheduler", "api"), self.gateway)):
            messages = self.system._lanes.get(lane, ())
            while messages:
                actor.receive(decode(messages.popleft()))
                self.system._asleep.discard(lane[1])

    def run(self, steps: int) -> None:
        """Until the machine has made so many steps more, or rests."""
        end = self.machine.counters.steps + steps
        while self.machine.counters.steps < end and self.system.step():
            pass
        self.show()

    def show(self) -> None:
        self.deliver()
        if (desk := self.scheduler.watcher) is not None:
            desk._recorder._write(1e9)
            self.later += 1.0
            desk._flush(self.later)
        self.deliver()

    async def looked_on(self) -> None:
        """Wait until the stream has begun."""
        for _ in range(2000):
            self.deliver()
            if self.scheduler.watcher is not None:
                return
            await asyncio.sleep(0.005)
        raise AssertionError("nobody looks on")


def prompt(n: int, first: int) -> list[int]:
    return [(first * 37 + i * 11) % 190 + 5 for i in range(n)]


@asynccontextmanager
async def served(**server: Any) -> Any:
    engine = Engine(**server)
    await engine.http.start()
    try:
        yield engine
    finally:
        await engine.http.close()
        engine.memory.close()


Visit = Callable[[Engine, Tab], Awaitable[None]]


def visit(tmp_path: Path, scene: Visit, path: str = "/#batch", width: int = 1300, **server: Any) -> None:
    async def main() -> None:
        async with served(**server) as engine, browse(engine.http.make_url("/docs"), tmp_path / "profile") as tab:
            await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
            await tab.go(engine.http.make_url(path))
            await scene(engine, tab)
            assert tab.complaints == []

    asyncio.run(main())


async def tile(tab: Tab, name: str) -> str:
    return (await tab.text(f"#tile-{name} b"))[0]


async def shows(tab: Tab, steps: int) -> None:
    """Wait until the page has come to this step."""
    await tab.until(f"document.querySelector('#tile-steps b')?.textContent === '{steps}'")


def busy(engine: Engine) -> None:
    """Five requests on four slots, with a common beginning, one of them long."""
    common = prompt(24, 1)
    for i, (own, most) in enumerate(((9, 40), (5, 40), (60, 30), (3, 40), (7, 20))):
        engine.submit(common + prompt(own, 10 + i), most, ignore_eos=True)
        engine.run(1)
    engine.run(9)


# ---------------- the numbers
@needs_chromium
def test_what_the_page_shows_is_the_state_of_the_engine(tmp_path: Path) -> None:
    async def scene(engine: Engine, tab: Tab) -> None:
        await engine.looked_on()
        engine.show()
        await shows(tab, 0)
        assert await tab.text("#slots .nothing") == ["No request is running."]
        busy(engine)
        machine = engine.machine
        table, counters = machine.table, machine.counters
        await shows(tab, counters.steps)
        assert await tile(tab, "running") == str(len(machine.running)) == "4"
        assert await tile(tab, "waiting") == str(len(machine.waiting)) == "1"
        hits = 100 * counters.cached_tokens / counters.prompt_tokens
        assert hits > 20
        assert await tile(tab, "hits") == f"{hits:.0f} %"
        owned = machine.limits.num_pages - machine.pool.free - machine.cache.num_pages
        legend = [
            f"{owned} of running requests alone",
            f"{machine.cache.num_pages - machine.cache.evictable} cached, in use",
            f"{machine.cache.evictable} cached, can be evicted",
            f"{machine.pool.free} free",
        ]
        assert await tab.text("#pool .legend span") == legend
        rows = await tab.value(
            "[...document.querySelectorAll('#slots tbody tr')].map((r) => [...r.children].map((c) => c.textContent))"
        )
        want = []
        for slot in sorted(slot for slot, _ in machine.running.values()):
            request = machine._request(slot)
            n, length = len(request.ids), int(table.length[slot])
            first = slot in machine._prefilling
            done = f"prompt {table.planned[slot]} of {n}" if first else f"{length - n} said"
            left = request.limit - (n if first else length)
            want.append(
                [str(slot), f"#{request.uid}", "", done, str(left), str(table.n_pages[slot]), str(table.n_shared[slot])]
            )
        assert rows == want
        # the newest steps
        steps = await tab.value(
            "[...document.querySelectorAll('#steps tbody tr')].map((r) => [...r.children].map((c) => c.textContent))"
        )
        assert [int(row[0]) for row in steps] == list(range(counters.steps - 1, counters.steps - 1 - len(steps), -1))
        assert sum(int(row[1]) for row in steps) == counters.prefill_tokens
        assert sum(int(row[2]) for row in steps) == counters.decode_tokens
        said = await tab.text("#step-said")
        assert said[0].startswith(f"Step {counters.steps - 1}: ")

        # the queue, and why
        await tab.value("document.querySelector('#tab-requests').click()")
        waiting = machine.waiting.front(1)[0]
        assert await tab.text("#waiting tbody td:nth-child(2)") == [f"#{waiting.uid}"]
        assert "all 4 slots are taken" in (await tab.text("#waiting tbody td:last-child"))[0]
        states = dict(
            await tab.value(
                "[...document.querySelectorAll('#list tbody tr')].map((r) => [r.dataset.uid, r.children[1].textContent])"
            )
        )
        for uid, (slot, _) in machine.running.items():
            assert states[str(uid)] == ("prefill" if slot in machine._prefilling else "decode")
        assert states[str(waiting.uid)] == "waits"

        # the life of one
        uid = next(u for u, (s, r) in machine.running.items() if engine.answers[u] and table.n_shared[s] and u > 1)
        slot, request = machine.running[uid]
        await tab.value(f"document.querySelector('#list tr[data-uid=\"{uid}\"] button').click()")
        await tab.until("document.querySelector('#life .pieces')")
        facts = dict(
            await tab.value("[...document.querySelectorAll('#life dt')].map((t) => [t.textContent, t.nextSibling.textContent])")
        )
        cached = engine.cached.get(uid, 0)
        assert cached > 0
        assert facts["cached"].startswith(f"{cached} of {len(request.ids)} prompt tokens")
        assert facts["said"].startswith(
            f"{table.length[slot] - len(request.ids)} tokens, {request.limit - table.length[slot]} more"
        )
        hit = "document.querySelector('#life .pieces').querySelectorAll('.hit').length"
        assert await tab.value(hit) == cached
        assert await tab.value("document.querySelector('#life .pieces').querySelectorAll('span').length") == len(request.ids)

        # the end of all
        engine.run(10_000)
        await shows(tab, machine.counters.steps)
        assert machine.idle
        assert await tab.text("#waiting .nothing") == ["Nobody waits."]
        tokens = sum(map(len, engine.answers.values()))
        said_ = [int(t) for t in await tab.text("#list tbody td:nth-child(5)")]
        assert sum(said_) == tokens == 170

    visit(tmp_path, scene)


@needs_chromium
def test_the_tree_on_the_page_is_the_engines_and_the_keyboard_goes_through_it(tmp_path: Path) -> None:
    async def scene(engine: Engine, tab: Tab) -> None:
        await engine.looked_on()
        busy(engine)
        machine = engine.machine
        await shows(tab, machine.counters.steps)
        nodes = list(machine.cache.nodes())
        assert (await tab.text("#crumbs"))[0] == f"{len(nodes)} nodes, {machine.cache.num_pages * PAGE} tokens"
        items = "[...document.querySelectorAll('#tree [role=treeitem]')]"
        await tab.until(f"{items}.length === {1 + len(nodes)}")
        users = {r.uid for _, r in machine.running.values()}
        shown = await tab.value(
            f"{items}.flatMap((i) => [...i.querySelectorAll('.users')].flatMap((u) => u.textContent.split(' ')))"
        )
        assert sorted(shown) == sorted(f"#{uid}" for uid in users)
        texts = await tab.value(f"{items}.slice(1).map((i) => i.children[2].textContent)")
        assert sorted(texts) == sorted(f"{len(node.pages) * PAGE} tokens" for node in nodes)
        await tab.until(f"{items}[1].querySelector('.opening')")
        tokens = load_tokenizer(engine.config.model)
        begins = {tokens.decode(np.frombuffer(n.key, np.int32).tolist()[:10], False)[:40] for n in nodes}
        openings = await tab.value("[...document.querySelectorAll('#tree .opening')].map((o) => o.textContent.slice(0, -1))")
        assert {" ".join(text.split()) for text in openings} <= {" ".join(text.split()) for text in begins}
        # only with keys
        await tab.value(f"{items}[0].focus()")
        for _ in range(2):
            await press(tab, "ArrowDown")
        await tab.until(f"{items}[2].getAttribute('aria-selected') === 'true'")
        await tab.until("document.querySelector('#node .pieces')")
        name = int(await tab.value(f"{items}[2].dataset.name"))
        assert await tab.value("document.activeElement.dataset.name") == str(name)
        await press(tab, "Home")
        await press(tab, "ArrowLeft")
        await tab.until(f"{items}.length === 1")
        await press(tab, "ArrowRight")
        await tab.until(f"{items}.length === {1 + len(nodes)}")
        await press(tab, "ArrowDown")
        await press(tab, "Enter")
        await tab.until("document.querySelector('#crumbs button')")
        await press(tab, "Escape")
        await tab.until("!document.querySelector('#crumbs button')")
        # and the tabs
        await tab.value("document.querySelector('#tab-cache').focus()")
        for key, name_ in (
            ("ArrowRight", "requests"),
            ("End", "processes"),
            ("ArrowRight", "batch"),
            ("ArrowLeft", "processes"),
        ):
            await press(tab, key)
            assert await tab.value("document.activeElement.id") == f"tab-{name_}"
            assert await tab.value(f"document.querySelector('#{name_}').hidden") is False

    visit(tmp_path, scene, "/#cache")


async def press(tab: Tab, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        await tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)


@needs_chromium
@pytest.mark.parametrize("width", [400, 900, 1600])
def test_nothing_is_wider_than_the_window_and_every_control_has_a_name(tmp_path: Path, width: int) -> None:
    async def scene(engine: Engine, tab: Tab) -> None:
        await engine.looked_on()
        busy(engine)
        await shows(tab, engine.machine.counters.steps)
        for name in ("chat", "batch", "cache", "requests", "curves", "processes"):
            await tab.value(f"document.querySelector('#tab-{name}').click()")
            await tab.value("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            assert await tab.value("document.documentElement.scrollWidth") <= width
        unnamed = """[...document.querySelectorAll('button, input, select, textarea, [role=img], [tabindex="0"]')].filter((e) =>
            !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length || e.title)).map((e) => e.outerHTML)"""
        assert await tab.value(unnamed) == []

    visit(tmp_path, scene, width=width)


@needs_chromium
def test_what_waits_in_the_rings_is_on_the_edges_between_the_processes(tmp_path: Path) -> None:
    """The workers stand still, then the scheduler: plans, then requests pile up in shared memory."""

    async def scene(engine: Engine, tab: Tab) -> None:
        await engine.looked_on()
        watchers = engine.http._runner.app[WATCHERS]
        names = ("api", "scheduler", "worker0", "tokenizer", "detokenizer")
        watchers.processes = lambda: dict.fromkeys(names, (os.getpid(), 0.0))
        watchers.rings = Rings(lambda: engine.arenas).depths
        worker = engine.system.actors.pop("worker0")
        for i in range(3):
            engine.submit(prompt(9, i), 20, ignore_eos=True)
        engine.run(10)
        for i in range(2):  # the scheduler does not take them
            engine.submit(prompt(9, 9 + i), 20, ignore_eos=True)
        plans = len(engine.machine.inflight)
        assert plans == 2

        async def edge(name: str, said: str) -> None:
            found = f"document.querySelector('[data-edge={name}]')?.textContent"
            await tab.until(f"{found}?.endsWith('ring: {said} waiting')")

        await edge("plans", str(plans))
        await edge("results", "0")
        await edge("requests", "2")
        cells = "[...r.children].map((c) => c.textContent)"
        rows = await tab.value(f"[...document.querySelectorAll('#rings tbody tr')].map((r) => [r.dataset.ring, {cells}])")
        found = dict(rows)
        assert set(found) == {"requests", "plans", "results", "tokenizer"}
        assert found["plans"][:4] == ["scheduler", "workers", "step plans", str(plans)]
        assert found["requests"][3] == "2"
        assert int(found["requests"][4].replace(",", "")) >= 2 * 4 * 9
        engine.system.actors["worker0"] = worker
        engine.system._asleep.discard("worker0")
        engine.run(10_000)
        await edge("plans", "0")
        await edge("requests", "0")

    visit(tmp_path, scene, "/#processes")


# ---------------- the connection
@needs_chromium
def test_a_lost_connection_is_shown_and_made_again(tmp_path: Path) -> None:
    async def scene(engine: Engine, tab: Tab) -> None:
        await engine.looked_on()
        busy(engine)
        await shows(tab, engine.machine.counters.steps)
        watchers = engine.http._runner.app[WATCHERS]
        assert watchers.viewer_pid is not None
        os.kill(watchers.viewer_pid, signal.SIGKILL)
        await tab.until("document.querySelector('#status').textContent.startsWith('connection lost')")
        assert "bad" in await tab.value("document.querySelector('#banner').className")
        engine.deliver()
        await engine.looked_on()
        engine.run(3)
        engine.show()
        await shows(tab, engine.machine.counters.steps)
        assert await tile(tab, "running") == str(len(engine.machine.running))
        await tab.until("document.querySelector('#status').textContent === 'live'")
        # a page that nobody sees takes nothing
        await tab.go(engine.http.make_url("/docs"))
        for _ in range(1000):
            engine.deliver()
            if watchers.viewer_pid is None and engine.scheduler.watcher is None:
                break
            await asyncio.sleep(0.01)
        assert watchers.viewer_pid is None
        assert engine.scheduler.watcher is None

    visit(tmp_path, scene)


# ---------------- rights
class Reader:
    """A stream of GET /debug/live."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.watcher = ""
        self.view: dict[str, dict[str, Any]] = {}
        self.actors: Any = None

    async def until(self, fact: Callable[[Reader], bool]) -> None:
        async def read() -> None:
            while not fact(self):
                line = await self.response.content.readline()
                assert line, "the stream has ended"
                if line.startswith(b"data:"):
                    self.take(json.loads(line[5:]))

        await asyncio.wait_for(read(), 30)

    def take(self, message: dict[str, Any]) -> None:
        self.watcher = message.get("watcher", self.watcher)
        self.actors = message.get("actors", self.actors)
        if "view" in message:
            self.view = {}
        for name, rows in (message.get("view") or message.get("change") or {}).items():
            mine = self.view.setdefault(name, {})
            for key, row in rows.items():
                mine.pop(key, None) if row is None else mine.__setitem__(key, row)


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def test_a_key_sees_its_own_requests_an_admin_key_all_and_nobody_nothing() -> None:
    async def main() -> None:
        async with served(api_keys=(A, B), admin_api_keys=(ADMIN,)) as engine, aiohttp.ClientSession() as session:
            url = engine.http.make_url("/debug/live")
            for key in ("", "a key that nobody has"):
                async with session.get(url, headers=as_(key)) as answer:
                    assert answer.status == 401
            asked = []
            for key, n in ((A, 20), (B, 30)):
                body = {"prompt": prompt(n, n), "max_tokens": 50, "ignore_eos": True}
                ask = session.post(engine.http.make_url("/v1/completions"), json=body, headers=as_(key))
                asked.append(asyncio.ensure_future(_finish(ask)))
            readers = {}
            for key in (A, B, ADMIN):
                answer = await session.get(url, headers=as_(key))
                assert answer.status == 200
                readers[key] = Reader(answer)
            await engine.looked_on()
            while len(engine.machine.running) + len(engine.machine.waiting) < 2:
                engine.run(1)
                await asyncio.sleep(0.005)
            engine.run(6)
            n = engine.machine.counters.steps
            for reader in readers.values():
                await reader.until(lambda r: r.view.get("totals", {}).get("steps") == n)
            uids = {len(r.ids): r.uid for _, r in engine.machine.running.values()}
            mine = {A: {uids[20]}, B: {uids[30]}, ADMIN: set(uids.values())}
            for key, reader in readers.items():
                view = reader.view
                assert {int(u) for u in view["requests"]} == mine[key]
                assert {row[0] for row in view["slots"].values()} == mine[key]
                assert {c[1] for s in view["steps"].values() for c in s["chunks"]} == mine[key]
                assert {u for k, row in view["tree"].items() if "+" not in k for u in row[7]} == mine[key]
                assert view["journal"]["everything"] is (key == ADMIN)
                for uid, tokens in ((uids[20], 20), (uids[30], 30)):
                    async with session.post(url, json={"watcher": reader.watcher, "life": uid}, headers=as_(key)) as answer:
                        life = await answer.json()
                        assert answer.status == (200 if uid in mine[key] else 404)
                        assert len(life.get("prompt_pieces", [])) == (tokens if uid in mine[key] else 0)
                foreign = set(readers[ADMIN].view["tree"]) - set(view["tree"])
                for name in foreign:
                    if "+" not in name:
                        async with session.post(
                            url, json={"watcher": reader.watcher, "node": int(name)}, headers=as_(key)
                        ) as answer:
                            assert answer.status == 404
            # whoever knows the name of another's stream has nothing of it
            async with session.post(url, json={"watcher": readers[ADMIN].watcher, "life": uids[30]}, headers=as_(A)) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (404, "no_watcher")
            async with session.post(url, json={"watcher": readers[A].watcher, "journal": "j"}, headers=as_(A)) as answer:
                assert answer.status in (401, 403)
            async with session.get(engine.http.make_url("/debug/journals"), headers=as_(A)) as answer:
                assert answer.status == 403
            await readers[ADMIN].until(lambda r: r.actors is not None)
            assert readers[A].actors is None
            for task in asked:
                task.cancel()
            for reader in readers.values():
                reader.response.close()

    async def _finish(ask: Any) -> None:
        async with ask as answer:
            await answer.read()

    asyncio.run(main())


def test_without_keys_only_the_machine_itself_looks_on_and_the_seventeenth_page_is_refused() -> None:
    async def main() -> None:
        async with served(allow_origins=("*",)) as engine, aiohttp.ClientSession() as session:
            url = engine.http.make_url("/debug/live")
            async with session.get(url, headers={"X-Forwarded-For": "10.1.2.3"}) as answer:
                assert answer.status == 403
                assert "administrator" in (await answer.json())["error"]["message"]
            for origin, status in (("https://elsewhere.example", 403), ("null", 403), (engine.http.make_url(""), 404)):
                async with session.post(url, json={"watcher": "nobody"}, headers={"Origin": origin}) as answer:
                    assert answer.status == status, origin
            async with session.get(url, headers={"Origin": "https://elsewhere.example"}) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (403, "foreign_origin")
            opened = [await session.get(url) for _ in range(MOST)]
            async with session.get(url) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (429, "too_many_watchers")
            for answer in opened:
                answer.close()

    asyncio.run(main())


# ---------------- journals
def written(folder: Path, name: str, tokens: bool, seed: int = 3) -> Recorded:
    """A journal in files, and the load that it is of."""
    loop = random_load(seed)
    (folder / "journals").mkdir(exist_ok=True)
    for i, data in enumerate(loop.parts[tokens]):
        (folder / "journals" / (f"{name}.part{i}" if i else name)).write_bytes(bytes(data))
    return loop


def states(loop: Recorded, tokens: bool) -> list[tuple[int, int, int, int, int]]:
    """(step, running, waiting, free pages, nodes) after each call with a plan."""
    out, scene = [], Scene()
    for data in loop.parts[tokens]:
        scene.next_part(bytes(data))
        while scene.advance():
            if scene.output.plan is not None:
                m = scene.machine
                assert m is not None
                out.append((scene.output.plan.step, len(m.running), len(m.waiting), m.pool.free, m.cache.num_nodes))
    return out


@needs_chromium
def test_a_journal_is_walked_through_with_a_slider(tmp_path: Path) -> None:
    loop = written(tmp_path, "morning", tokens=False)
    want = states(loop, False)

    async def scene(engine: Engine, tab: Tab) -> None:
        await tab.until("document.querySelectorAll('#journal option').length === 2")
        await tab.value(
            "(s => { s.value = 'morning'; s.dispatchEvent(new Event('change')); })(document.querySelector('#journal'))"
        )
        await tab.until("!document.querySelector('#player').hidden")
        assert await tab.value("document.querySelector('#slider').max") == str(len(want) - 1)
        assert "hashes instead of tokens" in (await tab.text("#banner"))[0]
        for place in (len(want) - 1, 0, len(want) // 2, len(want) // 3):
            await tab.value(
                f"(s => {{ s.value = {place}; s.dispatchEvent(new Event('input')); }})(document.querySelector('#slider'))"
            )
            step, running, waiting, free, nodes = want[place]
            await tab.until(f"document.querySelector('#where').textContent === 'step {step:,} ({place + 1} of {len(want)})'")
            assert (await tile(tab, "running"), await tile(tab, "waiting")) == (str(running), str(waiting))
            assert (await tab.text("#cache .legend span"))[3] == f"{free} free"
            assert (await tab.text("#crumbs"))[0].startswith(f"{nodes} nodes" if nodes else "")
        await tab.value("document.querySelector('#on').focus()")
        await tab.click("#on")
        step = want[len(want) // 3 + 1][0]
        await tab.until(f"document.querySelector('#where').textContent.startsWith('step {step:,} ')")
        await tab.value("(s => { s.value = ''; s.dispatchEvent(new Event('change')); })(document.querySelector('#journal'))")
        await engine.looked_on()
        engine.show()
        await tab.until("document.querySelector('#player').hidden && document.querySelector('#status').textContent === 'live'")

    visit(tmp_path, scene, "/#cache", data_dir=str(tmp_path))


def test_journals_that_cannot_be_shown_are_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "journals").mkdir()
    (tmp_path / "journals" / "poem").write_bytes(b"The sea is calm to-night.\nThe tide is full")

    async def main() -> None:
        async with served(data_dir=str(tmp_path)) as engine, aiohttp.ClientSession() as session:
            url = engine.http.make_url("/debug/live")
            answer = await session.get(url)
            reader, troubles = Reader(answer), []
            plain = reader.take
            reader.take = lambda m: (troubles.append(m["trouble"]) if "trouble" in m else None, plain(m))[1]  # type: ignore[method-assign]
            await reader.until(lambda r: bool(r.watcher))
            for name in ("../poem", "a/b", "..", "x" * 200):
                async with session.post(url, json={"watcher": reader.watcher, "journal": name}) as refused:
                    assert refused.status == 404
            for name, said in (("poem", "no journal of minisgl"), ("nothing", "there is no journal nothing")):
                troubles.clear()
                async with session.post(url, json={"watcher": reader.watcher, "journal": name}) as taken:
                    assert taken.status == 200
                await reader.until(lambda r: bool(troubles))
                assert said in troubles[0]
            answer.close()

    asyncio.run(main())


def test_the_engine_is_shown_by_a_server_with_more_than_a_thousand_descriptors() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]

    async def main() -> None:
        async with served() as engine, aiohttp.ClientSession() as session:
            answer = await session.get(engine.http.make_url("/debug/live"))
            reader = Reader(answer)
            await engine.looked_on()
            engine.show()
            await reader.until(lambda r: "totals" in r.view)
            answer.close()

    try:
        assert max(taken) > 1024
        asyncio.run(main())
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

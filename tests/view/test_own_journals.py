"""Journals of a reader's own computer on the page: what is shown is the replay's state; no bytes do any harm."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from browser import Tab, needs_chromium
from journal.loads import Recorded, random_load
from test_live_page import ADMIN, A, Engine, Reader, as_, press, served, states, tile, visit

from minisgl.api.http import watchers as watchers_
from minisgl.errors import RequestError
from minisgl.journal.format import MAGIC, Kind, frame
from minisgl.journal.replay import records
from minisgl.view.scenes import Scene
from minisgl.view.viewer import Viewer
from minisgl.view.views import Sight, sections


def joined(loop: Recorded, tokens: bool = True) -> bytes:
    return b"".join(map(bytes, loop.parts[tokens]))


async def patiently(tab: Tab, condition: str) -> None:
    """`until` with a minute: a process starts, which is nicer than all others."""
    for _ in range(5):
        with contextlib.suppress(AssertionError):
            return await tab.until(condition)
    await tab.until(condition)


async def send(session: aiohttp.ClientSession, engine: Engine, watcher: str, data: Any, key: str = "") -> tuple[int, Any]:
    """Status and body of an upload."""
    url = engine.http.make_url(f"/debug/live/journal?watcher={watcher}")
    headers = {"Content-Type": "application/octet-stream", **as_(key)}
    async with session.post(url, data=data, headers=headers) as answer:
        return answer.status, await answer.json()


@needs_chromium
def test_a_journal_of_the_readers_own_computer_is_walked_through(tmp_path: Path) -> None:
    """Its parts are chosen as files in any order; each step shows what the replay has there, in every view."""
    for seed in range(3, 40):  # one with several parts, whose end is not empty
        loop = random_load(seed, rotations=0.1)
        if len(loop.parts[True]) > 1 and sum(row[1] for row in states(loop, True)) > 50:
            break
    mine = tmp_path / "mine"
    mine.mkdir()
    files = [mine / (f"case.part{i}" if i else "case") for i in range(len(loop.parts[True]))]
    for path, data in zip(files, loop.parts[True], strict=True):
        path.write_bytes(bytes(data))
    want = states(loop, True)
    views: list[Any] = []
    scene_ = Scene()
    for data in loop.parts[True]:
        scene_.next_part(bytes(data))
        while scene_.advance():
            if scene_.output.plan is not None and scene_.machine is not None:
                views.append(sections(scene_.machine, scene_.history, Sight(None, True)))

    async def scene(engine: Engine, tab: Tab) -> None:
        await engine.looked_on()
        await patiently(tab, "!document.querySelector('#openfile').hidden")
        found = await tab.call("Runtime.evaluate", expression="document.querySelector('#file')")
        chosen = [str(path) for path in reversed(files)]
        await tab.call("DOM.setFileInputFiles", files=chosen, objectId=found["result"]["objectId"])
        last = f"document.querySelector('#where').textContent === 'step {want[-1][0]:,} ({len(want)} of {len(want)})'"
        await patiently(tab, f"!document.querySelector('#player').hidden && {last}")
        await patiently(tab, "document.activeElement.id === 'slider'")  # once the upload is answered, perhaps after its view
        text = f"file case ({len(files)} parts)"
        assert await tab.value("document.querySelector('#journal').selectedOptions[0].textContent") == text
        await press(tab, "Home")
        await patiently(tab, f"document.querySelector('#where').textContent === 'step {want[0][0]:,} (1 of {len(want)})'")
        for _ in range(3):
            await press(tab, "ArrowRight")
        await patiently(tab, f"document.querySelector('#where').textContent === 'step {want[3][0]:,} (4 of {len(want)})'")
        for place in (len(want) // 2, len(want) - 3, len(want) // 5):
            await tab.value(
                f"(s => {{ s.value = {place}; s.dispatchEvent(new Event('input')); }})(document.querySelector('#slider'))"
            )
            step, running, waiting, free, nodes = want[place]
            await patiently(
                tab, f"document.querySelector('#where').textContent === 'step {step:,} ({place + 1} of {len(want)})'"
            )
            assert (await tile(tab, "running"), await tile(tab, "waiting")) == (str(running), str(waiting))
            shown = await tab.value("import('/page/live.js').then((m) => JSON.stringify(m.state))")
            got = json.loads(shown)
            for name in ("slots", "waiting", "steps", "requests", "totals", "limits"):
                assert got[name] == json.loads(json.dumps(views[place][name])), (place, name)
            await tab.click("#tab-batch")
            assert (await tab.text("#pool .legend span"))[3] == f"{free} free"
            assert len(await tab.text("#slots tbody tr")) == running
            assert (await tab.text("#step-said"))[0].startswith(f"Step {step:,}: ")
            await tab.click("#tab-cache")
            assert (await tab.text("#crumbs"))[0].startswith(f"{nodes} nodes" if nodes else "")
            await tab.click("#tab-requests")
            assert len(await tab.text("#waiting tbody tr")) == waiting
            uid = next(iter(views[place]["requests"]))
            await tab.value(f"document.querySelector('#list tr[data-uid=\"{uid}\"] button').click()")
            await patiently(tab, "document.querySelector('#life .pieces, #life .error')")
            assert await tab.text("#life .error") == []
            await tab.click("#tab-processes")
            assert "knows no other process" in (await tab.text("#actors .nothing"))[0]
        # what is no journal is refused, and the engine is shown again
        (mine / "poem").write_text("The sea is calm to-night.")
        await tab.call("DOM.setFileInputFiles", files=[str(mine / "poem")], objectId=found["result"]["objectId"])
        await patiently(tab, "document.querySelector('#banner').textContent.includes('no journal of minisgl')")
        engine.show()
        await patiently(
            tab, "document.querySelector('#player').hidden && document.querySelector('#status').textContent === 'live'"
        )
        assert "no journal of minisgl" in (await tab.text("#banner"))[0]
        # dropped on the page
        text = base64.b64encode(files[0].read_bytes()).decode()
        drop = f"""(() => {{ const bytes = Uint8Array.from(atob('{text}'), (c) => c.charCodeAt(0));
            const dataTransfer = new DataTransfer(); dataTransfer.items.add(new File([bytes], 'dropped'));
            document.body.dispatchEvent(new DragEvent('drop', {{ dataTransfer, bubbles: true, cancelable: true }})); }})()"""
        await tab.value(drop)
        await patiently(tab, "document.querySelector('#journal').selectedOptions[0].textContent === 'file dropped'")
        await patiently(tab, "!document.querySelector('#player').hidden")
        assert await tab.value("document.querySelector('#banner').hidden")

    visit(tmp_path, scene, "/#batch")


def altered(loop: Recorded, change: Callable[[Any], Any]) -> bytes:
    """A journal whose first record is another one; its checksum is right."""
    first, *rest = records(io.BytesIO(bytes(loop.parts[True][0])))
    return MAGIC + frame(first.kind, change(first.values)) + b"".join(frame(r.kind, r.values) for r in rest)


_ODD: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    255,
    4096,
    -(1 << 31),
    2.5,
    float("nan"),
    "",
    "x",
    b"",
    b"\x01" * 8,
    [],
    {},
    [[]],
    True,
)


def spoiled(value: Any, rng: random.Random) -> Any:
    """A value with one of its leaves or branches replaced, lengthened or lost."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.15:
        if isinstance(value, bytes) and value and rng.random() < 0.7:
            at = rng.randrange(len(value))
            return value[:at] + bytes([rng.randrange(256)]) * rng.randrange(3) + value[at + rng.randrange(3) :]
        return rng.choice(_ODD)
    key = rng.choice(keys)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if rng.random() < 0.1:
        del copy[key]
    else:
        copy[key] = spoiled(value[key], rng)
    return copy


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_in_a_journal_it_is_shown_or_what_is_wrong_is_said(seed: int, tmp_path: Path) -> None:
    """Records with right checksums and wrong values; and bytes that were changed on the way."""
    rng, loop = random.Random(seed), random_load(3 + seed)
    whole = [list(records(io.BytesIO(bytes(part)))) for part in loop.parts[True]]
    said = set()
    for i in range(10):
        data = bytearray()
        spoil = rng.randrange(min(12, len(whole[0])))
        for part in whole:
            data += MAGIC
            for k, record in enumerate(part):
                bad = part is whole[0] and k == spoil
                kind = rng.choice(list(Kind)) if bad and rng.random() < 0.1 else record.kind
                data += frame(kind, spoiled(record.values, rng) if bad else record.values)
        if i % 4 == 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "journal").write_bytes(data)
        viewer = Viewer(lambda ids: [str(t) for t in ids])
        viewer.take("watch", 1, None, True)
        viewer.take("open", 1, str(tmp_path / "journal"), 7)
        (_, number, raw), *_ = [m for m in viewer.out if m[0] == "answer"]
        answer = json.loads(raw)
        assert (number, bool(answer["steps"])) == (7, not answer["trouble"]), answer
        assert not answer["trouble"] or answer["trouble"].startswith("The journal cannot be shown: "), answer
        said.add(answer["trouble"][:60])
        for place in (0, rng.randrange(100), 1 << 40):
            viewer.take("seek", 1, place)
            viewer.take("ready", 1)
            viewer.due()
            viewer.take("ask", 8, 1, "life", rng.randrange(1, 9))
            viewer.take("ask", 9, 1, "node", rng.randrange(1, 9))
        for kind, _, raw in viewer.out:
            assert kind in ("view", "answer")
            json.loads(raw, parse_constant=no_number)
    assert len(said) > 1


def no_number(name: str) -> None:
    """NaN and infinity: Python reads them, a page does not."""
    raise AssertionError(name)


@pytest.mark.parametrize("time", [float("nan"), float("inf")])
def test_times_that_are_no_numbers_are_damage_and_no_page_gets_them(time: float, tmp_path: Path) -> None:
    first, snapshot, *steps = records(io.BytesIO(bytes(random_load(4, rotations=0.0).parts[True][0])))
    at = [r for r in steps if any(event[0] == "result" for event in r.values[1])]
    for event in at[len(at) // 2].values[1]:
        if event[0] == "result":
            event[3] = time  # its busy microseconds
    data = MAGIC + b"".join(frame(r.kind, r.values) for r in (first, snapshot, *steps))
    (tmp_path / "journal").write_bytes(data)
    viewer = Viewer(lambda ids: [])
    viewer.take("watch", 1, None, True)
    viewer.take("open", 1, str(tmp_path / "journal"), 7)
    viewer.take("ready", 1)
    viewer.due()
    for _, _, raw in viewer.out:
        json.loads(raw, parse_constant=no_number)
    assert any("damaged" in json.loads(raw).get("trouble", "") for kind, _, raw in viewer.out if kind == "view")


class Deaf:
    """A viewer process that never says a word."""

    pid = behind = 0

    def __init__(self, _: Any, __: Any, ended: Callable[[], None], ___: int = 0) -> None:
        self.ended, self.closed = ended, False

    def send(self, *_: Any) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("how", ["dies", "leaves", "opens another"])
def test_who_uploads_is_answered_at_once_if_the_viewer_dies_or_its_reader_turns_away(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers_, "ViewerProcess", Deaf)
    journals = SimpleNamespace(watch=lambda *_, **__: None, unwatch=lambda: None)

    async def main() -> None:
        watchers = watchers_.Watchers(SimpleNamespace(config=SimpleNamespace(model=None), journals=journals))  # type: ignore[arg-type]
        watcher, file = watchers.enter(None), io.BytesIO()
        file.fileno = lambda: 0  # type: ignore[method-assign]
        upload = asyncio.create_task(watchers.open_file(watcher, file))
        await asyncio.sleep(0)
        own: Any = watcher.own
        assert own is not None
        if how == "dies":
            own.ended()
        elif how == "leaves":
            watchers.leave(watcher)
        else:
            watchers.open(watcher, "/another")
        with pytest.raises(RequestError, match="has ended" if how == "dies" else "has left, or has opened another"):
            await asyncio.wait_for(upload, 5)
        assert own.closed
        assert file.closed
        assert (watcher.own is not None) == (how == "opens another")
        watchers.close()

    asyncio.run(main())


def test_a_step_that_cannot_be_made_again_leaves_the_state_before_it(tmp_path: Path) -> None:
    loop = random_load(4, rotations=0.0)
    want = states(loop, True)
    first, *rest = records(io.BytesIO(bytes(loop.parts[True][0])))
    plans = [i for i, r in enumerate(rest) if r.kind == Kind.STEP and r.values[3][1] is not None]
    bad = len(plans) // 2
    rest[plans[bad]].values[3][1][3] = b"\x07\0\0\0"  # other slots decode
    data = MAGIC + frame(first.kind, first.values) + b"".join(frame(r.kind, r.values) for r in rest)
    (tmp_path / "journal").write_bytes(data)
    viewer = Viewer(lambda ids: [])
    viewer.take("watch", 1, None, True)
    viewer.take("open", 1, str(tmp_path / "journal"), 7)
    for place in (None, len(want) - 1, 0, bad - 1, bad + 1):
        if place is not None:
            viewer.take("seek", 1, place)
        viewer.take("ready", 1)
        viewer.due()
        opened = viewer._watchers[1].opened
        assert opened is not None
        assert opened.at == min(bad - 1, len(want) if place is None else place)
        m = opened.scene.machine
        assert m is not None
        at = want[opened.at]
        assert (len(m.running), len(m.waiting), m.pool.free, m.cache.num_nodes) == at[1:]
    troubles = [json.loads(raw).get("trouble", "") for kind, _, raw in viewer.out if kind == "view"]
    assert sum("followed no further" in text for text in troubles) == 3


def test_an_upload_leaves_nothing_and_needs_an_administrator(tmp_path: Path) -> None:
    loop = random_load(3)

    def held() -> list[str]:
        """Files in the data directory that this process has open, deleted ones too."""
        found = []
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(fd))
        return [path for path in found if path.startswith(str(tmp_path)) and path.endswith("(deleted)")]

    def names() -> list[Path]:
        return sorted(tmp_path.rglob("*"))

    async def main() -> None:
        keys: dict[str, Any] = {"api_keys": (A,), "admin_api_keys": (ADMIN,), "data_dir": str(tmp_path)}
        async with served(**keys) as engine, aiohttp.ClientSession() as session:
            url = engine.http.make_url("/debug/live")
            readers = {}
            for key in (A, ADMIN):
                readers[key] = Reader(await session.get(url, headers=as_(key)))
                await readers[key].until(lambda r: bool(r.watcher))
            before = names()
            assert (await send(session, engine, readers[A].watcher, joined(loop), A))[0] == 403
            assert (await send(session, engine, readers[A].watcher, joined(loop)))[0] == 401
            assert (await send(session, engine, "nobody", joined(loop), ADMIN))[0] == 404
            huge = altered(loop, lambda head: {**head, "limits": {**head["limits"], "slots": 1 << 40}})
            for data, said in (
                (huge, "memory"),
                (b"", "no step"),
                (b"no journal", "no journal of minisgl"),
                (bytes(loop.parts[True][0][:400]), "no step"),
            ):
                status, body = await send(session, engine, readers[ADMIN].watcher, data, ADMIN)
                assert status == 400, (data, body)
                assert said in body["error"]["message"], body
                assert held() == []
            status, body = await send(session, engine, readers[ADMIN].watcher, joined(loop), ADMIN)
            assert (status, body) == (200, {"steps": len(states(loop, True))})
            await readers[ADMIN].until(lambda r: "steps" in r.view.get("journal", {}))
            assert names() == before, "it has a name"
            assert len(held()) == 1
            readers[ADMIN].response.close()
            for _ in range(500):
                if not held():
                    break
                await asyncio.sleep(0.01)
            assert held() == [], "it is still there"
            readers[A].response.close()

    asyncio.run(main())


def test_the_explanation_of_a_live_server_is_for_administrators_and_says_what_it_takes() -> None:
    async def main() -> None:
        async with served(api_keys=(A,), admin_api_keys=(ADMIN,)) as engine, aiohttp.ClientSession() as session:
            url = str(engine.http.make_url("/debug/explain"))
            for key, query, status, said in (
                ("", "", 401, "API key"),
                (A, "", 403, "administrator"),
                (ADMIN, "?steps=0", 400, "steps"),
                (ADMIN, "?steps=x", 400, "steps"),
                (ADMIN, "?steps=" + "9" * 5000, 400, "steps"),
                (ADMIN, "?step=5", 400, "?steps=N"),
            ):
                async with session.get(url + query, headers=as_(key)) as answer:
                    assert answer.status == status, (key, query)
                    assert said in (await answer.json())["error"]["message"]

    asyncio.run(main())


def test_an_upload_that_is_too_large_names_the_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("minisgl.api.http.journal_upload.MAX_BYTES", 5000)

    async def pieces(n: int) -> Any:
        for _ in range(n):
            yield b"x" * 1000

    async def main() -> None:
        async with served(data_dir=str(tmp_path)) as engine, aiohttp.ClientSession() as session:
            reader = Reader(await session.get(engine.http.make_url("/debug/live")))
            await reader.until(lambda r: bool(r.watcher))
            for data in (b"x" * 5001, pieces(6)):  # with its length, and in chunks
                status, body = await send(session, engine, reader.watcher, data)
                assert (status, body["error"]["code"]) == (413, "body_too_large")
                assert "5000" in body["error"]["message"]
            assert (await send(session, engine, reader.watcher, b"x" * 5000))[0] == 400
            reader.response.close()

    asyncio.run(main())

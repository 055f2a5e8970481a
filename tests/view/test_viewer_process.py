"""The viewer among real processes: it is there while somebody looks on, and follows a scheduler that was killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
from browser import browse, needs_chromium
from processes import alive, eventually
from test_live_page import Reader
from test_system import ServerProcess


def test_whoever_looks_on_sees_the_next_scheduler_after_a_kill_and_nothing_is_left_when_nobody_does(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--max-running", "8")
    assert "minisgl::viewer" not in server.children()

    async def ask(session: aiohttp.ClientSession, n: int) -> None:
        body = {"prompt": "a ship, " * 40, "max_tokens": n, "ignore_eos": True}
        async with session.post(f"{server.url}/v1/completions", json=body) as answer:
            assert answer.status == 200
            assert (await answer.json())["usage"]["completion_tokens"] == n

    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            reader = Reader(await session.get(f"{server.url}/debug/live"))
            await ask(session, 10)
            await reader.until(lambda r: "length" in {row[0] for row in r.view.get("requests", {}).values()})
            assert [row[4] for row in reader.view["requests"].values()] == [10]
            await reader.until(lambda r: r.actors is not None and "scheduler" in r.actors["processes"])
            pid = reader.actors["processes"]["scheduler"][0]
            assert {"api", "tokenizer", "checker", "detokenizer", "scheduler", "worker0"} <= set(reader.actors["processes"])
            os.kill(pid, signal.SIGKILL)
            await reader.until(lambda r: r.actors["processes"].get("scheduler", [pid])[0] != pid)
            await ask(session, 7)
            await reader.until(lambda r: {row[4] for row in r.view.get("requests", {}).values()} == {7})
            assert reader.view["totals"]["admitted"] == 1
            assert reader.actors["restarts"]["scheduler"] == 1
            reader.response.close()

    asyncio.run(main())
    eventually(lambda: "minisgl::viewer" not in server.children())
    os.kill(server.proc.pid, signal.SIGTERM)
    assert server.proc.wait(timeout=60) == 0


@needs_chromium
def test_the_chat_shows_which_tokens_of_its_prompt_came_from_the_cache(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)

    async def main() -> None:
        async with browse(f"{server.url}/docs", tmp_path / "profile") as tab:
            await tab.call("Emulation.setDeviceMetricsOverride", width=1300, height=900, deviceScaleFactor=1, mobile=False)
            await tab.go(f"{server.url}/")
            await tab.until("document.querySelector('#tile-steps')")
            await tab.value("document.querySelector('#settings').open = true")
            await tab.type("#max_tokens", "8")
            for i in range(2):
                await tab.type("#input", "Which of the ships in this harbour is the oldest, and who owns it today?\n")
                await tab.until(f"document.querySelectorAll('.note button').length === {i + 1}")
                cached = int((await tab.text(".note"))[i].split(" cached")[0].split()[-1])
                assert bool(cached) is bool(i)
                await tab.value(f"document.querySelectorAll('.note button')[{i}].click()")
                await tab.until(f"document.querySelectorAll('#log .pieces, #log .note + .error').length === {i + 1}")
                assert await tab.text("#log .error") == []
                assert (
                    await tab.value(f"document.querySelectorAll('#log .pieces')[{i}].querySelectorAll('.hit').length") == cached
                )
                shown = (await tab.text("#log .pieces"))[i]
                assert "Which of the ships in this harbour is the oldest" in shown
            await tab.click("#clear")
            assert tab.complaints == []

    asyncio.run(main())
    os.kill(server.proc.pid, signal.SIGTERM)
    assert server.proc.wait(timeout=60) == 0


def test_the_viewer_dies_with_the_server(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)

    async def main() -> int:
        async with aiohttp.ClientSession() as session:
            reader = Reader(await session.get(f"{server.url}/debug/live"))
            await reader.until(lambda r: bool(r.view))
            pid = server.children()["minisgl::viewer"]
            server.proc.kill()
            return pid

    pid = asyncio.run(main())
    eventually(lambda: not alive(pid))
    server.proc.wait()

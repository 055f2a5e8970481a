"""Makes the pictures of docs/walkthroughs.md: plays each walk-through on a server of its own, and takes the page in Chromium.

    .venv/bin/python scripts/pictures.py [cached] [waited] [queued] [page]

The same requests as the commands of the document send, to the embedded model.  Needs Chromium (Debian's package `chromium`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
RULES = "You answer for the harbour office. Be brief, be kind, and never guess. " * 5
Page = Any  # a Tab of tests/browser.py
Ask = Callable[..., Awaitable[Any]]


async def _pick(tab: Page, tab_name: str) -> None:
    await tab.value(f"document.querySelector('#tab-{tab_name}').click()")


async def _life(tab: Page, uid: int) -> None:
    await _pick(tab, "requests")
    await tab.until(f"document.querySelector('#list tr[data-uid=\"{uid}\"]')")
    await tab.value(f"document.querySelector('#list tr[data-uid=\"{uid}\"] button').click()")
    await tab.until("document.querySelector('#life .pieces')")


async def cached(tab: Page, ask: Ask) -> None:
    """A prompt that begins with the time shares nothing; with the time at its end it shares all but the end."""
    for minute in range(3):
        await ask(f"The time is 12:0{minute}. {RULES}", "When is high tide?", 8)
    for minute in range(3):
        await ask(f"{RULES} The time is 12:0{minute}.", "When is high tide?", 8)
    await _life(tab, 6)
    await shoot(tab, "cached-request", "#life")
    await _pick(tab, "cache")
    await tab.until("document.querySelectorAll('#tree [role=treeitem]').length > 6")
    await tab.value("document.querySelectorAll('#icicle button')[1].dispatchEvent(new PointerEvent('pointerenter'))")
    await tab.until("document.querySelector('#node .pieces')")
    await asyncio.sleep(3.0)
    await shoot(tab, "cached-tree", "#cache")


async def waited(tab: Page, ask: Ask) -> None:
    """Without overlap the device rests between two steps, until the next plan has come."""
    running = [asyncio.ensure_future(ask("", f"Tell me a long story about ship {i}.", 120)) for i in range(4)]
    await tab.until("document.querySelectorAll('#steps tbody tr').length > 12")
    await asyncio.sleep(1.5)
    await shoot(tab, "waited", "#batch .card")
    await asyncio.gather(*running)


async def queued(tab: Page, ask: Ask) -> None:
    """Three requests, two slots."""
    running = []
    for i in range(4):
        running.append(asyncio.ensure_future(ask("", f"Tell me a long story about ship {i}.", 90)))
        await asyncio.sleep(0.2)
    await _pick(tab, "requests")
    await tab.until("document.querySelectorAll('#waiting tbody tr').length === 2")
    await shoot(tab, "queued", "#requests .card")
    await asyncio.gather(*running)
    await _life(tab, 3)
    await shoot(tab, "queued-life", "#life")


async def page(tab: Page, ask: Ask) -> None:
    """The whole page at work."""
    await tab.call("Emulation.setDeviceMetricsOverride", width=1500, height=860, deviceScaleFactor=1, mobile=False)
    await tab.value("document.querySelector('#settings').open = false")
    await tab.value("document.querySelector('#max_tokens').value = 40")
    await tab.type("#input", "What is a lighthouse for?\n")
    await tab.until("document.querySelector('.note')")
    running = [
        asyncio.ensure_future(
            ask(RULES if i % 3 else "", f"What do you know of pier {i % 4}? " * (1 + i % 3), 30 + 8 * (i % 4))
        )
        for i in range(24)
    ]
    await tab.until("document.querySelectorAll('#slots tbody tr').length > 5")
    await asyncio.sleep(2.5)
    await shoot(tab, "page")
    await asyncio.gather(*running)


async def shoot(tab: Page, name: str, selector: str = "") -> None:
    """Take a picture of an element, or of the window."""
    await asyncio.sleep(0.6)
    clip: dict[str, Any] = {}
    if selector:
        await tab.value(f"document.querySelector('{selector}').scrollIntoView()")
        box = await tab.value(
            f"(b => [b.x, b.y, b.width, b.height])(document.querySelector('{selector}').getBoundingClientRect())"
        )
        x, y, width, height = box
        clip = {"clip": {"x": x - 8, "y": y - 8, "width": width + 16, "height": min(height + 16, 760), "scale": 1}}
    shot = await tab.call("Page.captureScreenshot", format="png", **clip)
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
    print(PICTURES / f"{name}.png")


SCENES: dict[str, tuple[Callable[[Page, Ask], Awaitable[None]], list[str]]] = {
    "cached": (cached, ["--page-size", "16", "--kv-tokens", "8192"]),
    "waited": (waited, ["--lag", "1"]),
    "queued": (queued, ["--max-running", "2", "--step-tokens", "64"]),
    "page": (page, ["--page-size", "16", "--kv-tokens", "8192", "--max-running", "12"]),
}


async def play(name: str) -> None:
    """Play a scene on a server of its own."""
    scene, flags = SCENES[name]
    command = [sys.executable, "-m", "minisgl", "--port", "0", *flags]
    server = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, cwd=ROOT)
    assert server.stderr is not None
    try:
        url = ""
        while not url:
            line = (await server.stderr.readline()).decode()
            if not line:
                raise SystemExit("the server has ended")
            url = next(iter(re.findall(r"^ready.*?(http://[\d.:]+)/v1", line)), "")
        drain = asyncio.ensure_future(server.stderr.read())
        browse = importlib.import_module("tests.browser").browse
        with tempfile.TemporaryDirectory() as profile:
            async with aiohttp.ClientSession() as session, browse(f"{url}/docs", Path(profile)) as tab:

                async def ask(system: str, question: str, tokens: int) -> Any:
                    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]
                    body = {"messages": turns, "max_tokens": tokens, "temperature": 0}
                    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                        return await answer.json()

                await tab.call("Emulation.setDeviceMetricsOverride", width=1000, height=1300, deviceScaleFactor=1, mobile=False)
                await tab.go(f"{url}/#batch")
                await tab.until("document.querySelector('#status').textContent === 'live'")
                await scene(tab, ask)
        drain.cancel()
    finally:
        server.terminate()
        await server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=f"of {', '.join(SCENES)}; default: all")
    for name in parser.parse_args().scenes or SCENES:
        asyncio.run(play(name))


if __name__ == "__main__":
    main()

"""A headless Chromium that a test drives over the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed: apt-get install chromium")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
)


class Tab:
    """One page.  `complaints`: what its console says of the page's own script and of its Content-Security-Policy."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.complaints: list[str] = []

    async def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            told = await self._socket.receive_json(timeout=20)
            if told.get("id") == self._number:
                assert "error" not in told, told
                return told["result"]
            if told["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["source"] in ("security", "javascript"):
                self.complaints.append(told["params"]["entry"]["text"])

    async def go(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; promises are awaited."""
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; it fails after ten seconds."""
        look = (
            f"const end = Date.now() + 1e4; const look = () => (({condition}) ? done(true) : Date.now() > end ? done(false) : "
        )
        assert await self.value(f"new Promise((done) => {{ {look} setTimeout(look, 5)); look(); }})"), condition

    async def type(self, selector: str, text: str) -> None:
        """Type as a keyboard does; a line break is the Enter key."""
        await self.value(f"document.querySelector({selector!r}).focus()")
        for i, line in enumerate(text.split("\n")):
            if i:
                for kind in ("keyDown", "keyUp"):
                    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
                    await self.call("Input.dispatchKeyEvent", type=kind, **key)
            await self.call("Input.insertText", text=line)

    async def click(self, selector: str) -> None:
        """Click in the middle of an element, where the mouse would."""
        at = f"document.querySelector({selector!r})"
        await self.value(f"{at}.scrollIntoView({{ block: 'center' }})")
        box = json.loads(await self.value(f"JSON.stringify({at}.getBoundingClientRect())"))
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, **place)

    async def text(self, selector: str) -> list[str]:
        """The text of every element."""
        found: list[str] = await self.value(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")
        return found


@asynccontextmanager
async def browse(url: str, profile: Path) -> AsyncIterator[Tab]:
    """A tab with this page.  `profile`: a folder for what the browser keeps."""
    assert PROGRAM is not None
    arguments = (*_FLAGS, f"--user-data-dir={profile}", "about:blank")
    process = await asyncio.create_subprocess_exec(PROGRAM, *arguments, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        line = b""
        while not line.startswith(b"DevTools listening on"):
            line = await asyncio.wait_for(process.stderr.readline(), 30)
            assert line, "chromium ended"
        port = line.decode().split(":")[2].split("/")[0]
        drain = asyncio.ensure_future(process.stderr.read())
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                address = json.loads(await answer.read())["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.go(url)
                yield tab
        drain.cancel()
    finally:
        process.terminate()
        await process.wait()

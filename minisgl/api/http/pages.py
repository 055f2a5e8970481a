"""Serves the pages for people: GET / (a chat, and what the engine does) and GET /docs.  Runs in the api process.

/docs is one file that loads nothing: its Content-Security-Policy admits its own script and style alone, by their hashes.  That
of / admits the modules and the style of the folder page/, which are served as they are written, at /page/NAME.  Values take the
place of {{name}}.  Pages need no API key, as a browser's address bar has none to send, and say no more than the names of the
model to whoever has none.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path
from typing import Any

from aiohttp import web

from minisgl.api.engine import Engine
from minisgl.api.http.openapi import ROUTES
from minisgl.api.requests.openai import served_names
from minisgl.errors import RequestError
from minisgl.version import __version__

_POLICY = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SELF = "'self'"
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
_KINDS = {".js": "text/javascript", ".css": "text/css"}


class Page:
    """A page, read once from the file `name`."""

    def __init__(self, name: str) -> None:
        self._text = (Path(__file__).parent / name).read_text(encoding="utf-8")
        sources = (f"; {kind}-src {_hashes(self._text, kind) or SELF}" for kind in ("script", "style"))
        self._headers = {"Content-Security-Policy": _POLICY + "".join(sources), "Referrer-Policy": "no-referrer", **_HEADERS}

    def response(self, values: dict[str, str]) -> web.Response:
        """The page with these values, which are HTML."""
        text = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], self._text)
        return web.Response(text=text, content_type="text/html", charset="utf-8", headers=self._headers)


def _hashes(text: str, kind: str) -> str:
    inline = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in inline)


def page_files() -> dict[str, tuple[str, str]]:
    """The files that the page loads, by name: content type and text."""
    found = (Path(__file__).parent / "page").iterdir()
    return {p.name: (_KINDS[p.suffix], p.read_text(encoding="utf-8")) for p in found if p.suffix in _KINDS}


def page_file(files: dict[str, tuple[str, str]], name: str) -> web.Response:
    """One of them.  Raises RequestError (404)."""
    if name not in files:
        raise RequestError(f"The page has no file {name[:100]!r}.", status=404, code="not_found")
    kind, text = files[name]
    return web.Response(text=text, content_type=kind, charset="utf-8", headers=_HEADERS)


def about(engine: Engine, known: bool) -> dict[str, Any]:
    """What runs, and the routes.  `known`: the caller may have all of it; others get the names of the model and the routes."""
    config, names = engine.config, served_names(engine.config)
    out: dict[str, Any] = {"server": "minisgl", "model": names[0], "models": list(names), "state": engine.state}
    out["api_key"] = "required" if config.server.api_keys else "none"
    if known:
        runs: dict[str, Any] = {"context": config.max_context, "KV cache": _kv_tokens(engine), "tp": config.engine.tp}
        out["runs"] = {**{name: value for name, value in runs.items() if value}, "version": __version__}
    return {**out, "routes": {f"{route.method.upper()} {route.path}": route.summary for route in ROUTES}}


def _kv_tokens(engine: Engine) -> int:
    """Size of the KV cache in tokens; 0 until the engine is ready."""
    return engine.stats.get("total_pages", 0) * engine.config.engine.page_size


def chat_values(facts: dict[str, Any]) -> dict[str, str]:
    """The values of the chat page, from `about`."""
    runs = " \u00b7 ".join(
        f"{name} {value:,}" if type(value) is int else f"{name} {value}" for name, value in facts.get("runs", {}).items()
    )
    return {"model": html.escape(facts["model"]), "runs": html.escape(runs)}


def wants_page(accept: str) -> bool:
    """Whether an Accept header asks for HTML before JSON: browsers do, programs do not.

    The higher q-value wins, then the name over a wildcard, then what stands first (RFC 9110, 12.5.1).
    """
    page, data = _preference(accept, "text/html"), _preference(accept, "application/json")
    return page[0] > 0 and page > data


def _preference(accept: str, kind: str) -> tuple[float, int, int]:
    """(q-value, how exactly it is named, how early) of a media type in an Accept header, by the most exact range that fits."""
    family = kind.partition("/")[0] + "/*"
    exactness = {kind: 2, family: 1, "*/*": 0}
    found = (-1, 0.0, 0)
    for at, part in enumerate(accept.lower().split(",")):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        if name in exactness and exactness[name] > found[0]:
            q = next((p.partition("=")[2] for p in parameters if p.startswith("q=")), "1")
            found = (exactness[name], float(q) if re.fullmatch(r"[01](\.\d{0,3})?", q) else 0.0, -at)
    return found[1], found[0], found[2]

"""Runs `minisgl top [URL]`: shows in the terminal what a running server does, from its /metrics, /health and /server_info."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentTypeError
from typing import Any

from rich.console import Console
from rich.live import Live

from minisgl.commands.chat import add_client_flags, server_of
from minisgl.commands.chat_http import ChatError, Server
from minisgl.commands.parser import Parser
from minisgl.commands.top_frame import frame
from minisgl.commands.top_readings import Reading, Readings
from minisgl.errors import UserError

_PATIENCE = 5.0  # seconds for an answer


def run(argv: list[str]) -> int:
    """Show frame after frame until ^C.  Exit code: 0, 1 if there is no server.  Raises UserError where there is no terminal."""
    parser = Parser(
        prog="minisgl top", description="Watch a running server: requests, latencies, KV cache, processes.  ^C ends."
    )
    add_client_flags(parser)
    parser.add_argument("address", nargs="?", metavar="URL", help="the same as --url")
    parser.add_argument("--once", action="store_true", help="print one frame, and end")
    parser.add_argument("--seconds", type=_seconds, default=1.0, metavar="S", help="between two frames (%(default)g)")
    args = parser.parse_args(argv)
    if args.address and (args.url or args.port):
        parser.error("the server is named twice: leave out the URL, or --url and --port")
    args.url = args.url or args.address
    console = Console(markup=False, highlight=False, emoji=False)
    if not args.once and not console.is_terminal:
        raise UserError("top draws on a terminal, and the output is none: --once prints one frame")
    try:
        watched = _Watched(server_of(args))
        if args.once:
            time.sleep(args.seconds)
            watched.read()
            console.print(watched.frame(console.width))
            return 0
    except ChatError as e:
        print(f"minisgl top: {e}", file=sys.stderr)
        return 1
    try:
        with Live(watched.frame(console.width), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(args.seconds)
                watched.try_to_read()
                live.update(watched.frame(console.width), refresh=True)
    except KeyboardInterrupt:
        return 0


class _Watched:
    """A server, and what it has told.  Raises ChatError if it cannot be read at first."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.readings = Readings()
        self.lost, self._info = "", dict[str, Any]()
        self.read()

    def read(self) -> None:
        """Take a reading.  Raises ChatError."""
        try:
            self._info = self._info or _object(self._server.get("/server_info", _PATIENCE))
            health = _object(self._server.get("/health", _PATIENCE, good=(200, 503)))
            metrics = self._server.get("/metrics", _PATIENCE).decode()
            self.readings.add(Reading(time.monotonic(), metrics, health))
        except ValueError as e:
            raise ChatError(f"what answers at {self._server.url} is no minisgl server that can be watched ({e})") from e

    def try_to_read(self) -> None:
        """Take a reading, or note why there is none; who answers next may be another server."""
        info = self._info
        try:
            if self.lost:
                self._info = {}
            self.read()
            self.lost = ""
        except ChatError as e:
            self.lost, self._info = str(e), self._info or info

    def frame(self, width: int) -> Any:
        return frame(self.readings, self._info, self.lost, width, time.time() - time.monotonic())


def _object(raw: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise ValueError("its answer is no JSON object")
    return found


def _seconds(text: str) -> float:
    try:
        if 0.1 <= (seconds := float(text)) <= 3600:
            return seconds
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 3600")

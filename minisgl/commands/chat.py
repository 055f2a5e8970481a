"""Runs `python -m minisgl chat`: talks to a running server from a terminal, over its HTTP API.  Standard library only."""

from __future__ import annotations

import argparse
import io
import os
import sys

from minisgl.commands.chat_conversation import Conversation, default_bound
from minisgl.commands.chat_http import ChatError, Server
from minisgl.commands.chat_terminal import Terminal, strip_control
from minisgl.commands.flags import KEY_VARIABLE, key_lines
from minisgl.commands.parser import Parser
from minisgl.errors import UserError

__all__ = ["run", "strip_control"]

DEFAULT_URL = "http://127.0.0.1:8000"


def run(argv: list[str]) -> int:
    """Chat until the end of the input.  Exit code: 0, 1 if there is no server or (without a terminal) an answer failed."""
    args = _parse_args(argv)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        server = server_of(args)
        served = server.served()
    except ChatError as e:
        print(f"minisgl chat: {e}", file=sys.stderr)
        return 1
    terminal = Terminal(interactive)
    options = {"temperature": args.temperature, "seed": args.seed, "model": args.model}
    chat = Conversation(server, served, {k: v for k, v in options.items() if v is not None}, args.system, terminal)
    chat.bound = default_bound(served.context) if args.max_tokens is None else args.max_tokens
    chat.allow_repeats = args.allow_repeats
    if interactive:
        terminal.edit_lines()
        terminal.note(f"{args.model or served.name} at {server.url}; /help shows the commands")
    try:
        chat.loop()
    except KeyboardInterrupt:
        return 130
    return 1 if chat.failed and not interactive else 0


def _parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="minisgl chat",
        description="Chat with a running server.",
        epilog=f"Type /help inside.  {KEY_VARIABLE} in the environment is the key of a server that wants one.",
    )
    add_client_flags(parser)
    parser.add_argument("--model", help="name of the model; default: the server's")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max-tokens",
        type=_count,
        metavar="N",
        help="longest answer; 0: what the context has left; default: an eighth of the context, and at least 1024",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--seed", type=int, metavar="SEED", help="makes answers repeatable")
    parser.add_argument("--allow-repeats", action="store_true", help="do not stop an answer that only repeats itself")
    return parser.parse_args(argv)


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a running server, and its key."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help=f"the server, with or without /v1 ({DEFAULT_URL})")
    where.add_argument("--port", type=_port, metavar="PORT", help="the server on this machine that listens there")
    add_key_flags(parser)


def add_key_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that bring the key of a server."""
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--api-key-file", metavar="FILE", help="its first line is the key of a server that wants one")
    key.add_argument("--api-key", metavar="KEY", help="the key itself; other users of this machine can see it (ps)")


def server_of(args: argparse.Namespace) -> Server:
    """The server that these flags name.  Raises ChatError."""
    return Server(args.url or (f"http://127.0.0.1:{args.port}" if args.port else DEFAULT_URL), _api_key(args))


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: 1 or more, or 0 for no bound")
    return int(text)


def _api_key(args: argparse.Namespace) -> str:
    """The key from a flag or the environment, "" without one.  Raises ChatError for one that cannot be used."""
    key: str = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE, "")
    source = KEY_VARIABLE if args.api_key is None else "--api-key"
    if args.api_key_file is not None:
        source = f"--api-key-file {args.api_key_file}"
        try:
            key = next(iter(key_lines(args.api_key_file)), "")
        except UserError as e:
            raise ChatError(str(e)) from e
    key = key.strip()
    if not key and source != KEY_VARIABLE:
        raise ChatError(f"{source}: there is no key in it")
    if not (key.isascii() and key.isprintable()):
        raise ChatError(f"{source}: a key has printable ASCII characters only")
    return key

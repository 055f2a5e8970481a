"""Adds the flags of the engine and the server to a command, and builds the Config that they describe.

minisgl.config declares the fields.  Standard library only, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from minisgl.commands.embedded import offer
from minisgl.config import AUTO_ITL, Config, EngineConfig, ModelSpec, ServerConfig, engine_config, flag, settings_of
from minisgl.errors import UserError

MIN_KEY_CHARS = 16
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9_-][a-z0-9._-]*|\[[0-9a-f:.]+\])(?::(\d{1,5}))?")
_PORTS = {"http": "80", "https": "443"}  # which browsers leave out of an origin
KEY_VARIABLE, ADMIN_KEY_VARIABLE = "MINISGL_API_KEY", "MINISGL_ADMIN_API_KEY"
_MAX_KEY_FILE = 1 << 20  # characters
_HIDDEN = f"--api-key-file FILE and the environment variable {KEY_VARIABLE} hide keys"


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add --model, --revision and a flag for every field of EngineConfig; a flag that is not given is None."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="a .gguf file, a directory, org/name, random:SHAPE, or fake (no model); default: SmolLM2-135M-Instruct",
    )
    model.add_argument("model_word", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    model.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    _add_flags(parser.add_argument_group("engine"), EngineConfig, {"default": None})


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of ServerConfig that a user may set."""
    group = parser.add_argument_group("server")
    _add_flags(group, ServerConfig, {})
    group.add_argument(
        "--api-key",
        dest="given_keys",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key, for tests; may be repeated.  Other users can see it while the server starts: {_HIDDEN}",
    )
    group.add_argument(
        "--admin-api-key",
        dest="given_admin_keys",
        action="append",
        default=[],
        metavar="KEY",
        help=f"an administrator's key, likewise; {ADMIN_KEY_VARIABLE} hides it",
    )


def _add_flags(group: argparse._ArgumentGroup, config: type, overrides: dict[str, Any]) -> None:
    """A flag for each Setting of a dataclass; `overrides` are arguments of add_argument for all of them."""
    for name, default, s in settings_of(config):
        kind = {"action": "store_true"} if default is False else {"type": type(default), "metavar": s.metavar}
        options = {"dest": name, "default": default, **kind, **s.options}
        text, shown = s.help, options["default"]
        if shown not in (None, "") and shown is not False:
            text += f" ({shown})" if s.on_gpu is None else f" ({shown}, on a GPU {s.on_gpu})"
        group.add_argument(s.flag or flag(name), help=text, **options | overrides)


def model_of(args: argparse.Namespace) -> str | None:
    """The model that is named, with or without --model.  Where none is, the embedded one may have to be installed: see `offer`.

    Raises UserError.
    """
    if args.model is not None and args.model_word not in (None, args.model):
        raise UserError(f"two models are named, {args.model_word} and --model {args.model}: leave one out")
    model: str | None = args.model if args.model is not None else args.model_word
    if model is None:
        offer()
    return model


def key_lines(path: str, flag: str = "--api-key-file") -> list[str]:
    """The keys of a file, one a line, without blank lines and comments (#).  Raises UserError.

    Files as editors leave them: with a byte order mark, with line ends of any kind, with blanks around a key.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read(_MAX_KEY_FILE + 1)
    except UnicodeDecodeError as e:
        raise UserError(f"{flag} {path}: cannot read it: it is not UTF-8 text") from e
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot read it: {e.strerror}") from e
    if len(text) > _MAX_KEY_FILE:
        raise UserError(f"{flag} {path}: it is longer than {_MAX_KEY_FILE} characters, and no file of keys")
    return [key for line in text.split("\n") if (key := _key(line)) and not key.startswith("#")]


def _key(text: str) -> str:
    return text.strip().strip("\ufeff").strip()


def read_keys(path: str | None, given: Sequence[str] = (), admin: bool = False) -> tuple[str, ...]:
    """The API keys: those of a file, one a line, those `given` by --api-key, and MINISGL_API_KEY.  Raises UserError.

    `admin`: those of administrators, from flags and a variable of their own.
    """
    flag, variable = ("--admin-api-key", ADMIN_KEY_VARIABLE) if admin else ("--api-key", KEY_VARIABLE)
    sources: dict[str, list[str]] = {}
    if path is not None:
        sources[f"{flag}-file {path}"] = key_lines(path, f"{flag}-file")
    if given:
        sources[flag] = [_key(key) for key in given]
    if key := _key(os.environ.get(variable, "")):
        sources[variable] = [key]
    for source, keys in sources.items():
        if not keys or min(map(len, keys)) < MIN_KEY_CHARS:
            lines = ", one a line" if source.startswith(f"{flag}-file") else "; `openssl rand -hex 16` makes one"
            raise UserError(f"{source}: it must hold keys of at least {MIN_KEY_CHARS} characters{lines}")
        if not all(key.isascii() and key.isprintable() for key in keys):
            raise UserError(f"{source}: a key has printable ASCII characters only, as it travels in an HTTP header")
    return tuple(dict.fromkeys(key for keys in sources.values() for key in keys))


def keys_from(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(API keys, those of administrators).  Raises UserError."""
    users = read_keys(args.api_keys, args.given_keys)
    admins = read_keys(args.admin_api_keys, args.given_admin_keys, admin=True)
    if set(users) & set(admins):
        text = "an administrator's key must not be one of the other API keys (--api-key-file, --api-key)"
        raise UserError(f"{'--admin-api-key-file' if args.admin_api_keys else '--admin-api-key'}: {text}")
    return users, admins


def hide_keys(given: Sequence[str]) -> None:
    """Take the command line, with its keys, out of the process list."""
    if not given:
        return
    import setproctitle

    setproctitle.setproctitle("minisgl::api")
    print(f"minisgl: --api-key: until now other users of this machine could see it; {_HIDDEN}", file=sys.stderr, flush=True)


def read_origins(given: Sequence[str]) -> tuple[str, ...]:
    """The origins of --allow-origin as browsers write them; "*" stands for all.  Raises UserError for what is no origin."""
    return tuple(dict.fromkeys(map(_origin, given)))


def _origin(given: str) -> str:
    origin = given.strip().lower()
    if origin in ("*", "null"):
        return origin
    if found := _ORIGIN.fullmatch(origin):
        scheme, host, port = found.groups()
        if not port or (int(port) in range(1, 65536) and port != _PORTS.get(scheme)):
            return origin
    fault = "it is no origin as browsers send it: scheme://host or scheme://host:port"
    if "," in origin or " " in origin:
        fault = "one origin only; the flag may be repeated"
    elif "*" in origin:
        fault = "a * stands for all origins, and only alone"
    elif re.fullmatch(r"[\w.-]+(:\d+)?", origin):
        fault = f"an origin begins with its scheme, as in http://{origin}"
    elif (
        (found := _ORIGIN.match(origin)) and int(found[3] or 1) in range(1, 65536) and origin[found.end() :][:1] in ("", *"/?#")
    ):
        scheme, host, port = found.groups()
        end = f":{port}" if port and port != _PORTS.get(scheme) else ""
        fault = f"an origin has no path, and not its scheme's usual port: write {scheme}://{host}{end}"
    raise UserError(f"--allow-origin {given[:200]!r}: {fault}")


def given_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the user has set, by field of EngineConfig and ServerConfig.  A flag of the server with its default is not set."""
    given = vars(args)
    found = {name: given[name] for name, _, _ in settings_of(EngineConfig) if given[name] is not None}
    return found | {n: given[n] for n, default, s in settings_of(ServerConfig) if given[n] != s.options.get("default", default)}


def config_from(args: argparse.Namespace, model: ModelSpec, styles: tuple[str, str] = ("", "")) -> Config:
    """The whole Config of a server.  `styles`: the formats of tool calls and thoughts that replace the flags' "auto".

    Raises UserError naming the flag.
    """
    given = vars(args)
    server = {name: given[name] for name, _, _ in settings_of(ServerConfig)}
    for name, guessed in zip(("tool_call_parser", "reasoning_parser"), styles, strict=True):
        server[name] = {"auto": guessed, "none": ""}.get(given[name], given[name])
    server["api_keys"], server["admin_api_keys"] = keys_from(args)
    server["served_names"] = tuple(args.served_names or (model.name,))
    server["allow_origins"] = read_origins(args.allow_origins or ())
    if given["itl_target_ms"] is None:
        given = given | {"itl_target_ms": AUTO_ITL}
    return Config(model, engine_config(given, model.format), ServerConfig(**server))

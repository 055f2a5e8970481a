"""Runs `python -m minisgl batch-keys DIR [NAME ...]`: makes the keys of a batch socket over TCP.

    DIR/server.key_secret   the server's pair; stays with the server
    DIR/clients/NAME.key    a client's public key: whose is here may use the server
    DIR/server.key          for clients: by it they know the server
    DIR/NAME.key_secret     for the client NAME: its pair

The files are those of zmq.auth, mode 0600.  What exists stays as it is.  A client that keeps its secret to itself makes its
pair on its own machine and sends NAME.key alone.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from minisgl.commands.parser import Parser
from minisgl.errors import UserError

FLAG = "--batch-keys"
_SERVER, _CLIENTS = "server", "clients"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_MAX_CLIENTS = 100_000
_ADDRESS = re.compile(r"tcp://(\*|\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]*]+):(\d{1,5})")


def run(argv: list[str]) -> int:
    """Raises UserError."""
    args = _parser().parse_args(argv)
    folder, clients = Path(args.directory), Path(args.directory) / _CLIENTS
    for name in args.names:
        if not _NAME.fullmatch(name) or name == _SERVER:
            raise UserError(f"{name[:80]!r} is no name for a client: letters, digits, dots, - and _, and not {_SERVER!r}")
    before = os.umask(0o077)
    try:
        clients.mkdir(parents=True, exist_ok=True)
        _make(folder, _SERVER, folder)
        for name in args.names:
            _make(folder, name, clients)
    except OSError as e:
        raise UserError(f"{e.filename or folder}: cannot write the keys: {e.strerror}") from e
    finally:
        os.umask(before)
    say = [f"minisgl serve --batch-socket tcp://HOST:PORT {FLAG} {folder}"]
    pair = f"--server-key {folder / 'server.key'} --client-key"
    say += [f"minisgl batch IN OUT --socket tcp://HOST:PORT {pair} {folder / name}.key_secret" for name in args.names]
    print("\n".join(say))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minisgl batch-keys", description="Make the keys of a batch socket over TCP; what exists stays.")
    parser.add_argument("directory", metavar="DIR", help=f"of the keys, for {FLAG} of the server")
    parser.add_argument("names", nargs="*", default=["client"], metavar="NAME", help="of clients; default: client")
    return parser


def _make(folder: Path, name: str, public: Path) -> None:
    """Make a pair: NAME.key in the folder `public`, and NAME.key_secret in `folder`, which is the last to be written."""
    from zmq.auth import create_certificates

    secret = folder / f"{name}.key_secret"
    if secret.exists() or (public / f"{name}.key").exists():
        what = "exists already" if secret.exists() else f"is known by its public key alone, {public / name}.key"
        print(f"minisgl batch-keys: {secret} {what}, and stays as it is", file=sys.stderr)
        return
    _, made = create_certificates(public, name)
    os.replace(made, secret)


# ---------------- for the server
def address_of(given: str) -> tuple[str, int]:
    """(host, port) of --batch-socket.  Raises UserError."""
    found = _ADDRESS.fullmatch(given)
    if found is None:
        raise UserError(f"--batch-socket {given[:200]!r}: write tcp://HOST:PORT, an IPv6 address in brackets")
    host = found[1].strip("[]")
    return ("0.0.0.0" if host == "*" else host), int(found[2])


def check_flags(batch_socket: str, batch_keys: str) -> None:
    """Raises UserError where one of the flags of the batch socket over TCP is there without the other."""
    if batch_socket and not batch_keys:
        text = f"it is served to clients with a key alone: {FLAG} DIR, which `minisgl batch-keys DIR` makes"
        raise UserError(f"--batch-socket {batch_socket}: {text}")
    if batch_keys and not batch_socket:
        raise UserError(f"{FLAG} {batch_keys}: it needs the address to listen on, too: --batch-socket tcp://HOST:PORT")


def server_secret(folder: str) -> bytes:
    """The secret key of the server.  Raises UserError."""
    import zmq

    from minisgl.client.curve import read_key

    if not zmq.has("curve"):
        raise UserError(f"{FLAG}: this libzmq {zmq.zmq_version()} has no CURVE: `pip install pyzmq` has one that has")
    return read_key(str(Path(folder) / "server.key_secret"), FLAG, secret=True)[1]


def client_keys(folder: str) -> list[str]:
    """The public keys of the clients that are allowed.  Raises UserError."""
    from minisgl.client.curve import read_key

    clients = Path(folder) / _CLIENTS
    try:
        paths = sorted(path for path in clients.iterdir() if path.suffix == ".key")
    except OSError as e:
        raise UserError(f"{FLAG} {clients}: cannot read it: {e.strerror}") from e
    if not paths or len(paths) > _MAX_CLIENTS:
        found = f"there are {len(paths):,} public keys" if paths else "there is no public key of a client"
        raise UserError(f"{FLAG} {clients}: {found} in it; `minisgl batch-keys {folder} NAME` makes one")
    return sorted({read_key(str(path), FLAG)[0].decode() for path in paths})

"""Enters a batch socket that is served over TCP: reads the keys, and says why a server lets nobody in.

Runs in the client's process.  Key files are those of zmq.auth, as `minisgl batch-keys` makes them.
"""

from __future__ import annotations

import secrets
import struct
import time
from typing import Any, NamedTuple

import zmq
from zmq.auth import load_certificate
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from minisgl.errors import UserError

CONNECT_SECONDS = 8.0  # for a server to be there and to have let this client in; also when the connection has broken
_KEY_CHARS = 40
_FAULTS = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it ends the handshake: is --server-key its public key?",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it is no batch socket with CURVE",
    zmq.EVENT_DISCONNECTED: "it has closed the connection",
    zmq.EVENT_CLOSED: "nothing listens there, or a firewall is between",
}


class ServerGone(UserError):
    """The server has ended, or has forgotten this client: what has no answer may be asked of the next one."""


class Curve(NamedTuple):
    """The keys of a client, Z85: the server's public one, and its own pair."""

    server: bytes
    public: bytes
    secret: bytes


def read_key(path: str, flag: str, secret: bool = False) -> tuple[bytes, bytes]:
    """(public key, secret key) of a file, the latter b"" where it is not asked for.  Raises UserError naming the flag."""
    try:
        public, own = load_certificate(path)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "there is no key in it, as `minisgl batch-keys` makes them"
        if isinstance(e, OSError) and e.strerror is None:
            reason = "no such file"
        raise UserError(f"{flag} {path}: cannot read it: {reason}") from e
    if not _is_key(public) or (own is not None and not _is_key(own)):
        raise UserError(f"{flag} {path}: a key has {_KEY_CHARS} characters of Z85; make another with `minisgl batch-keys`")
    if not secret:
        return public, b""
    if own is None:
        raise UserError(f"{flag} {path}: there is no secret key in it: its name ends with .key_secret")
    if zmq.curve_public(own) != public:
        raise UserError(f"{flag} {path}: its public key is not that of its secret key")
    return public, own


def _is_key(key: bytes) -> bool:
    try:
        return len(key) == _KEY_CHARS and len(z85.decode(key)) == _KEY_CHARS * 4 // 5
    except (KeyError, ValueError, struct.error):  # characters, or groups above 32 bits, that are not of Z85
        return False


def read_curve(server_key: str, client_key: str) -> Curve | None:
    """The keys of the files, None where no file is named.  Raises UserError."""
    if not server_key and not client_key:
        return None
    for flag, path in (("--server-key", server_key), ("--client-key", client_key)):
        if not path:
            raise UserError(f"{flag} FILE is missing: a batch socket over TCP needs --server-key and --client-key")
    return Curve(read_key(server_key, "--server-key")[0], *read_key(client_key, "--client-key", secret=True))


class Entrance:
    """Follows the connection of a socket: whether the server has let it in, and if not, why."""

    def __init__(self, sock: zmq.Socket[bytes], address: str, curve: Curve) -> None:
        """Connects."""
        self.inside = False
        self._address, self._curve, self._fault = address, curve, _FAULTS[zmq.EVENT_CLOSED]
        self._until = time.monotonic() + CONNECT_SECONDS
        sock.curve_serverkey, sock.curve_publickey, sock.curve_secretkey = curve.server, curve.public, curve.secret
        sock.routing_id = b"m" + secrets.token_bytes(16)  # nobody else can have it when this client is gone
        sock.ipv6 = "[" in address
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        for event in _FAULTS:
            events |= event
        self.monitor: zmq.Socket[bytes] = sock.get_monitor_socket(events)
        try:
            sock.connect(address)
        except zmq.ZMQError:
            self.monitor.close()
            raise

    def look(self) -> None:
        """Handle what has happened.  Raises UserError when the server refuses this client, ServerGone when it is not there."""
        while self.monitor.poll(0):
            event: Any = parse_monitor_message(self.monitor.recv_multipart())
            kind = event["event"]
            if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise UserError(
                    f"the server at {self._address} does not know the key of this client, {self._curve.public.decode()}: its "
                    "operator adds the client's .key file to the folder clients of --batch-keys, and sends SIGHUP"
                )
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.inside = True
                continue
            if self.inside:
                self.inside, self._until = False, time.monotonic() + CONNECT_SECONDS
            if kind != zmq.EVENT_DISCONNECTED or self._fault == _FAULTS[zmq.EVENT_CLOSED]:  # which follows a failure
                self._fault = _FAULTS[kind]
        if not self.inside and time.monotonic() > self._until:
            raise ServerGone(f"the server at {self._address} cannot be reached: {self._fault}")

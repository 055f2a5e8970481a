"""Decides who may use a server, and where it is: API keys and certificate, read at the start and again after `kill -HUP`.

Runs in the api process, before the engine starts and on its event loop.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import ssl
import stat
from typing import TYPE_CHECKING

from minisgl import logs
from minisgl.commands.batch_keys import check_flags, client_keys, server_secret
from minisgl.commands.flags import keys_from
from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.events.addresses import check_events, exposed

if TYPE_CHECKING:
    from minisgl.api.batches.curve import ClientKeys
    from minisgl.api.http.auth import Keys

PASSWORD_VARIABLE = "MINISGL_SSL_KEYFILE_PASSWORD"
_STDERR = 2  # its descriptor


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """The URL of a host, which may be an IPv6 address."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def page_url(host: str, port: int, scheme: str = "http") -> str:
    """The address that a browser on this machine opens, where the server listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # "any address" is none to go to
    return f"{url_of(host, port, scheme)}/"


def tls(certfile: str, keyfile: str = "") -> ssl.SSLContext | None:
    """The TLS context of the server, None without a certificate.  TLS 1.2 is the least.  Raises UserError naming the flag."""
    if not certfile:
        if keyfile:
            raise UserError(f"--ssl-keyfile {keyfile}: it needs the certificate, too: --ssl-certfile FILE")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load(context, certfile, keyfile)
    return context


def _load(context: ssl.SSLContext, certfile: str, keyfile: str) -> None:
    """Raises UserError."""
    flags = (("--ssl-certfile", certfile, "CERTIFICATE-----"), ("--ssl-keyfile", keyfile or certfile, "PRIVATE KEY-----"))
    for flag, path, mark in flags:
        try:
            with open(path, "rb") as f:
                found = mark.encode() in f.read(1 << 20)
        except OSError as e:
            raise UserError(f"{flag} {path}: cannot read it: {e.strerror}") from e
        if not found:
            what = "certificate" if flag == "--ssl-certfile" else "private key"
            way = ": name its file with --ssl-keyfile" if flag == "--ssl-keyfile" and not keyfile else ""
            raise UserError(f"{flag} {path}: there is no {what} in PEM format in it{way}")

    def password() -> str:
        if (given := os.environ.get(PASSWORD_VARIABLE)) is None:
            raise UserError(f"--ssl-keyfile {keyfile or certfile}: the key is encrypted: set {PASSWORD_VARIABLE}")
        return given

    try:
        context.load_cert_chain(certfile, keyfile or None, password)
    except (ssl.SSLError, ValueError) as e:
        reason = getattr(e, "reason", None) or ""
        files = f"--ssl-certfile {certfile}" + (f" --ssl-keyfile {keyfile}" if keyfile else "")
        if reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise UserError(f"{files}: the key is not that of the certificate (the server's own must be the first)") from e
        if PASSWORD_VARIABLE in os.environ:
            raise UserError(f"{files}: cannot be used; is {PASSWORD_VARIABLE} the password of the key?") from e
        raise UserError(f"{files}: cannot be used: {reason.replace('_', ' ').lower() or 'it is damaged'}") from e


def counted(n: int, what: str) -> str:
    """So many of something, and the verb."""
    return f"{n} {what}{' is' if n == 1 else 's are'}"


class Access:
    """What a server has been given to tell its users from others, and what of that changes while it runs.

    `args`: the flags, whose files are read again.
    """

    def __init__(self, config: Config, args: argparse.Namespace | None = None) -> None:
        """Raises UserError."""
        server = config.server
        self.config = config
        self.tls = tls(server.ssl_certfile, server.ssl_keyfile)
        check_flags(server.batch_socket, server.batch_keys)
        check_events(config)
        self.batch_listener: socket.socket | None = None  # on --batch-socket
        self.batch_secret = server_secret(server.batch_keys) if server.batch_keys else b""
        self.batch_clients = client_keys(server.batch_keys) if server.batch_keys else []
        self._args = args
        self._on_terminal = os.isatty(_STDERR)

    def terminal_closed(self) -> bool:
        """Whether the server was started on a terminal that is no more."""
        return self._on_terminal and not os.isatty(_STDERR)

    def warn(self, host: str) -> None:
        """Say so where everybody who reaches the address may use the server."""
        from minisgl.api.http.auth import is_loopback

        if not self.config.server.api_keys and not is_loopback(host):
            text = f"minisgl: whoever reaches {host} may use this server: --api-key-file FILE (or --api-key) asks for a key"
            logs.say("unprotected", text, logging.WARNING, host=host)
        self._warn_of_events()

    def _warn_of_events(self) -> None:
        """Say what KV events show to whom, and where they show nothing."""
        server = self.config.server
        for name, address in (("--kv-events", server.kv_events), ("--kv-events-replay", server.kv_events_replay)):
            if address and exposed(address):
                which = "all prompts" if server.kv_events_salted else "all prompts without a salt"
                text = f"minisgl: {name} {address}: whoever reaches it reads the token ids of {which}"
                logs.say("unprotected", text, logging.WARNING, host=address)
        keys = server.api_keys or server.admin_api_keys
        if server.kv_events and keys and server.salt_by_key == "on" and not server.kv_events_salted:
            text = "minisgl: --kv-events: the prompts of keys have salts, and are not published"
            text += ": --kv-events-salted publishes them, and --salt-by-key off has keys share prefixes"
            logs.say("kv_events", text, logging.WARNING)

    def reload(self, keys: Keys, clients: ClientKeys | None = None) -> None:
        """Read the files of keys and certificate again.  What cannot be used changes nothing, and is said.

        `clients`: those of the batch socket over TCP.
        """
        args, server = self._args, self.config.server
        files = [("--api-key-file", args.api_keys), ("--admin-api-key-file", args.admin_api_keys)] if args is not None else []
        given = [(flag, path) for flag, path in files if path]
        if not given and self.tls is None and clients is None:
            logs.say("keys", "SIGHUP: there is no --api-key-file to read again; nothing has changed", logging.WARNING)
        try:
            for flag, path in given:
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise UserError(f"{flag} {path}: it is no regular file, and cannot be read again")
            if args is not None and given:
                users, admins = keys_from(args)
                keys.replace(users, admins)
                text = f"SIGHUP: {counted(len(users), 'API key')} in force"
                text += f", and {len(admins)} of administrators" if admins else ""
                logs.say("keys", text, keys=len(users), admin_keys=len(admins))
        except (UserError, OSError) as e:
            logs.say("keys", f"SIGHUP: the API keys stay as they were: {e}", logging.ERROR)
        if self.tls is not None:
            try:
                tls(server.ssl_certfile, server.ssl_keyfile)  # a trial: half a change would be none
                _load(self.tls, server.ssl_certfile, server.ssl_keyfile)
                logs.say("certificate", f"SIGHUP: new connections get the certificate of {server.ssl_certfile}")
            except UserError as e:
                logs.say("certificate", f"SIGHUP: the certificate stays as it was: {e}", logging.ERROR)
        if clients is not None:
            try:
                clients.replace(client_keys(server.batch_keys))
                text = f"SIGHUP: {counted(len(clients), 'client key')} in force on the batch socket"
                logs.say("batch_keys", text, keys=len(clients))
            except UserError as e:
                logs.say("batch_keys", f"SIGHUP: the keys of the batch socket stay as they were: {e}", logging.ERROR)

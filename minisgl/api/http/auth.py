"""Checks API keys, and says whose request it is.  Runs in the api process.

The key is the tenant: files, batches and cached prefixes belong to the key that made them.  A tenant is known by a salted
digest of its key, the same at every start on a data directory, which keeps the salt.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from minisgl.errors import RequestError

OPEN = frozenset({"/", "/v1", "/docs", "/health", "/ready", "/ping", "/metrics"})  # routes that need no key
_OPEN_PATHS = OPEN | {"/v1/"}
_PAGE = "/page/{file}"  # what the page at / loads
_FORWARDED = re.compile(r"(x-)?forwarded.*|via|x-real-ip", re.IGNORECASE)  # headers that proxies add
_PORT = re.compile(r":\d*$")  # at the end of a Host header, where an IPv6 address is in brackets


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose request it is.  `name`: the digest of its key, "" without one.

    `admin`: it has brought an admin key.  `heir`: what belongs to nobody is its own, as it is the only one.
    """

    name: str = ""
    admin: bool = False
    heir: bool = False

    def owns(self, owner: str) -> bool:
        """Whether it may have what belongs to `owner`, the name of a tenant, or "" for nobody."""
        return self.admin or (owner == self.name if owner and self.name else self.heir)


EVERYBODY = Tenant(heir=True)  # where no key is asked for
NOBODY = Tenant()
TENANT: Any = getattr(web, "RequestKey", lambda name, _: name)("tenant", Tenant)  # before aiohttp 3.14 keys are strings


class Keys:
    """The keys in force.  `salt`: of the names of tenants, by default one that nobody else has."""

    def __init__(self, users: Iterable[str], admins: Iterable[str] = (), salt: bytes = b"") -> None:
        self._salt = salt or secrets.token_bytes(16)
        self.replace(users, admins)

    def replace(self, users: Iterable[str], admins: Iterable[str] = ()) -> None:
        """Have these keys instead, from the next request on."""
        known = [(_digest(key), Tenant(self.name(key), admin=True)) for key in admins]
        self.has_admins = bool(known)
        keys = list(users)
        self.required = bool(keys)
        self._known = known + [(_digest(key), Tenant(self.name(key), heir=len(keys) == 1)) for key in keys]

    def find(self, request: web.Request) -> Tenant | None:
        """Whose request it is; None if it needs one of the keys, and brings none."""
        if not self._known:
            return EVERYBODY
        given = _digest(key_of(request))
        matches = [tenant for digest, tenant in self._known if hmac.compare_digest(given, digest)]  # all are compared
        return matches[0] if matches else None if self.required else EVERYBODY

    def check_admin(self, request: web.Request) -> None:
        """Raises RequestError (401, 403) unless the request may administer the server: see `may_administer`."""
        if not self.may_administer(request):
            way = "send one of its admin keys" if self.has_admins else "start the server with --admin-api-key-file FILE"
            text = f"This is for the server's administrator: {way}"
            if not self.has_admins and not self.required:
                text += ", or ask it on its own machine, as localhost"
            status = 401 if self.has_admins and request[TENANT] is EVERYBODY else 403
            raise RequestError(f"{text}.", status=status, code="admin_key_required")

    def may_administer(self, request: web.Request) -> bool:
        """Whether the request brings an admin key; or, where there are no keys at all, comes from this machine."""
        tenant: Tenant = request[TENANT]
        return tenant.admin or (not self.has_admins and not self.required and _local(request))

    def name(self, key: str) -> str:
        """The name of the tenant with a key."""
        return hmac.new(self._salt, b"tenant " + key.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:32]


def authenticate(keys: Keys) -> Middleware:
    """Middleware that admits requests with one of the `keys`, as a Bearer token or as x-api-key, and requests to open routes.

    All others get 401, unknown paths included.  What is admitted has its TENANT.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource, tenant = request.match_info.route.resource, keys.find(request)
        route = resource.canonical if resource is not None else ""
        if tenant is None and route != _PAGE and (route not in OPEN or request.path not in _OPEN_PATHS):
            text = "A valid API key is needed: send it as Authorization: Bearer KEY."
            raise RequestError(text, status=401, code="invalid_api_key")
        request[TENANT] = tenant or NOBODY
        return await handler(request)

    return check


def key_of(request: web.Request) -> str:
    """The API key that a request brings, valid or not; "" if there is none."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is this machine's own.  Other names are not looked up."""
    host = host.strip("[]").partition("%")[0].lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.rstrip(".") == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _local(request: web.Request) -> bool:
    """Whether a program of this machine asks: no proxy, and no page whose name was made to point to this machine."""
    named = _PORT.sub("", request.headers.get("Host", "localhost"))
    direct = is_loopback(request.remote or "") and not any(map(_FORWARDED.fullmatch, request.headers))
    return direct and (is_loopback(named) or named in ("0.0.0.0", "[::]"))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

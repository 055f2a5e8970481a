"""The flags of KV events: checked in the api process, and told to routers in /server_info."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from minisgl.config import Config
from minisgl.errors import UserError

_TCP = re.compile(r"tcp://(\*|[^\s:/;]+|\[[0-9a-fA-F:.%\w]+\]):(\d{1,5})")


def check_events(config: Config) -> None:
    """Raises UserError, naming the flag, for flags that do not go together and for addresses that are none."""
    server = config.server
    if not server.kv_events:
        more = {"replay": server.kv_events_replay, "topic": server.kv_events_topic, "salted": server.kv_events_salted}
        more["format"] = server.kv_events_format != "map"
        for name, given in more.items():
            if given:
                raise UserError(f"--kv-events-{name} needs --kv-events tcp://HOST:PORT: nothing is published without it")
        return
    if config.engine.cache == "none":
        raise UserError("--kv-events tells what the prefix cache holds: leave out --cache none")
    ends = [address_of("--kv-events", server.kv_events)]
    if server.kv_events_replay:
        ends.append(address_of("--kv-events-replay", server.kv_events_replay))
        if ends[0][1] == ends[1][1] and (ends[0][0] == ends[1][0] or "*" in (ends[0][0], ends[1][0])):
            raise UserError(f"--kv-events-replay {server.kv_events_replay}: it is where --kv-events is: choose another port")


def address_of(flag: str, given: str) -> tuple[str, int]:
    """Host (* for all of this machine) and port of an address to listen on.  Raises UserError."""
    found = _TCP.fullmatch(given)
    if found is None:
        raise UserError(
            f"{flag} {given!r:.200}: write tcp://HOST:PORT, as tcp://127.0.0.1:5557, or tcp://*:5557 for all networks"
        )
    if not 0 < (port := int(found[2])) < 65536:
        raise UserError(f"{flag} {given}: routers must know the port: it is between 1 and 65535")
    return found[1].strip("[]"), port


def exposed(given: str) -> bool:
    """Whether other machines may reach an address of these flags."""
    host, _ = address_of("--kv-events", given)
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def described(config: Config) -> dict[str, Any] | None:
    """`kv_events` of /server_info, by SGLang's names; None where nothing is published."""
    server = config.server
    if not server.kv_events:
        return None
    host, port = address_of("--kv-events", server.kv_events)
    facts: dict[str, Any] = {"publisher": "zmq", "endpoint_host": host, "endpoint_port_base": port}
    facts |= {"topic": server.kv_events_topic, "block_size": config.engine.page_size, "dp_size": 1}
    if server.kv_events_replay:
        facts["replay_endpoint_port_base"] = address_of("--kv-events-replay", server.kv_events_replay)[1]
    return facts

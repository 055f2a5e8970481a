"""Reports the unknown fields of a request in the X-Ignored-Params header, or refuses them with --strict."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.config import Config
from minisgl.errors import InvalidParam

_MAX_IGNORED = 32  # names in X-Ignored-Params


def check_unknown(config: Config, names: Sequence[str]) -> None:
    """Raises InvalidParam for the first unknown field with --strict."""
    if names and config.server.strict:
        raise InvalidParam(names[0][:64], f"Unrecognized request argument: {names[0][:64]}.", "unknown_parameter")


def ignored_header(config: Config, names: Sequence[str]) -> dict[str, str]:
    """The X-Ignored-Params header.  Raises InvalidParam with --strict.

    Field names come from the client, so only identifiers may enter a header.
    """
    check_unknown(config, names)
    plain = [n for n in names if len(n) <= 64 and n.isascii() and n.replace(".", "_").isidentifier()]
    return {"X-Ignored-Params": ",".join(plain[:_MAX_IGNORED])} if plain else {}


def approximated_header(relaxed: Sequence[str]) -> dict[str, str]:
    """The X-Approximated-Schema header: the keywords of JSON schemas that the answer may not keep to."""
    return {"X-Approximated-Schema": ", ".join(relaxed)} if relaxed else {}

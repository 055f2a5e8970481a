"""Reports the fields of a request that are ignored in the X-Ignored-Params header, or refuses unknown ones with --strict."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.api.requests.fields import Fields
from minisgl.config import Config
from minisgl.errors import InvalidParam

_MAX_IGNORED = 32  # names in X-Ignored-Params


def check_unknown(config: Config, declared: Fields, ignored: Sequence[str]) -> None:
    """Raises InvalidParam for the first ignored field that is not `declared`, with --strict."""
    unknown = next((name for name in ignored if name not in declared), None)
    if unknown is not None and config.server.strict:
        raise InvalidParam(unknown[:64], f"Unrecognized request argument: {unknown[:64]}.", "unknown_parameter")


def ignored_header(config: Config, declared: Fields, ignored: Sequence[str]) -> dict[str, str]:
    """The X-Ignored-Params header.  Raises InvalidParam with --strict.

    Field names come from the client, so only identifiers may enter a header.
    """
    check_unknown(config, declared, ignored)
    plain = [n for n in ignored if len(n) <= 64 and n.isascii() and n.replace(".", "_").isidentifier()]
    return {"X-Ignored-Params": ",".join(plain[:_MAX_IGNORED])} if plain else {}


def approximated_header(relaxed: Sequence[str]) -> dict[str, str]:
    """The X-Approximated-Schema header: the keywords of JSON schemas that the answer may not keep to."""
    return {"X-Approximated-Schema": ", ".join(relaxed)} if relaxed else {}

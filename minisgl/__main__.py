"""Dispatches `python -m minisgl [COMMAND]`, and turns a UserError into one sentence and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys

from minisgl.errors import UserError

COMMANDS = {
    "serve": "minisgl.commands.serve",
    "chat": "minisgl.commands.chat",
    "batch": "minisgl.commands.batch",
    "simulate": "minisgl.commands.simulate",
    "prebuild": "minisgl.commands.prebuild",
    "selfcheck": "minisgl.selfcheck.command",
}


def main(argv: list[str]) -> int:
    """Run one command; without a command word it is `serve`.  Returns the exit code."""
    name = "serve"
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"minisgl: unknown command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(COMMANDS[name]).run(argv))
    except UserError as e:
        print(f"minisgl: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head`: the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

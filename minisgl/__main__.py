"""Dispatches `minisgl [COMMAND]`, which is also `python -m minisgl [COMMAND]`.

A UserError becomes one sentence and exit code 2.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path

from minisgl.errors import UserError

COMMANDS = {
    "serve": "minisgl.commands.serve",
    "chat": "minisgl.commands.chat",
    "batch": "minisgl.commands.batch",
    "batch-keys": "minisgl.commands.batch_keys",
    "doctor": "minisgl.commands.doctor.command",
    "fit": "minisgl.commands.fit.command",
    "explain": "minisgl.commands.explain.command",
    "top": "minisgl.commands.top",
    "cluster": "minisgl.deploy.cluster",
    "simulate": "minisgl.commands.simulate",
    "journal": "minisgl.commands.journal",
    "bench": "minisgl.bench.command",
    "trace": "minisgl.commands.trace",
    "prebuild": "minisgl.commands.prebuild",
    "selfcheck": "minisgl.selfcheck.command",
}


def main(argv: list[str]) -> int:
    """Run one command; without a command word it is `serve`.  Returns the exit code."""
    name = "serve"
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    if name in ("help", "version"):
        name, argv = "serve", [f"--{name}"]
    if name not in COMMANDS:
        print(f"minisgl: {_unknown(name)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(COMMANDS[name]).run(argv))
    except UserError as e:
        print(f"minisgl: {e}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("minisgl"):
            raise
        print(f"minisgl: the package {e.name} is not installed: `minisgl doctor` says how to get it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head`: the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _unknown(name: str) -> str:
    """One line about a word that is no command; people type models there, and what other engines have."""
    if "/" in name or name.endswith(".gguf") or name.startswith(("random:", "fake")):
        return f"unknown command {name!r}: to serve a model, `minisgl serve {name}`"
    others = {"run": "serve", "start": "serve", "server": "serve", "launch": "serve", "api": "serve", "launch_server": "serve"}
    others |= {"check": "doctor", "benchmark": "bench", "complete": "chat"}
    close = [others[name]] if name in others else difflib.get_close_matches(name, COMMANDS, 1)
    meant = f" (did you mean `minisgl {close[0]}`?)" if close else ""
    return f"unknown command {name!r}{meant}; the commands are {', '.join(COMMANDS)}"


def console() -> int:
    """The whole process of `minisgl`."""
    os.environ["PYTHONSAFEPATH"] = "1"  # child processes do not look into the current folder
    return main(sys.argv[1:])


if __name__ == "__main__":
    # `python -m` looks there first, whatever files and packages lie in it.
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] == os.getcwd() != str(Path(__file__).parents[1]):
        del sys.path[0]
    sys.exit(console())

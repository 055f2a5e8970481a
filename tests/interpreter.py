"""Triton's interpreter, which runs the GPU kernels on a CPU.  Import this before any module with a kernel in it."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is declared

from triton.runtime import interpreter

_set_attr = interpreter._LangPatchScope.set_attr


def _with_scalar_index(self, obj, name, value):  # type: ignore[no-untyped-def]
    """Scalars are arrays of one element to the interpreter, and numpy from 2.4 on makes no int of one that has an axis."""
    if name == "__index__":
        value = lambda tensor: int(tensor.handle.data.item())  # noqa: E731
    _set_attr(self, obj, name, value)


interpreter._LangPatchScope.set_attr = _with_scalar_index

"""Triton's interpreter, which runs the GPU kernels on a CPU.  Import this before any module with a kernel in it.

Half of its time goes into what it does again for every operation, and need not: see below.
"""

from __future__ import annotations

import functools
import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is declared

import triton.language as tl
from triton.runtime import interpreter

_set_attr = interpreter._LangPatchScope.set_attr


def _with_scalar_index(self, obj, name, value):  # type: ignore[no-untyped-def]
    """Scalars are arrays of one element to the interpreter, and numpy from 2.4 on makes no int of one that has an axis."""
    if name == "__index__":
        value = lambda tensor: int(tensor.handle.data.item())  # noqa: E731
    _set_attr(self, obj, name, value)


interpreter._LangPatchScope.set_attr = _with_scalar_index

_patch_lang, _get_np_dtype = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
_patched: set[str] = set()


def _patch_once(fn):  # type: ignore[no-untyped-def]
    """The interpreter replaces what the language can do for every call of a kernel and of functions in it: here it stays so."""
    if (module := fn.__module__) not in _patched:
        _patched.add(module)
        _patch_lang(fn)
    return interpreter._LangPatchScope()  # with nothing to restore


def _dtype_of(kind):  # type: ignore[no-untyped-def]
    """The interpreter makes a table of all types for every question."""
    kind = kind.scalar
    return _get_np_dtype(tl.uint64 if kind.is_ptr() else kind)


@functools.cache
def _shape_of(shape):  # type: ignore[no-untyped-def]
    return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))


def _init(self, handle, kind):  # type: ignore[no-untyped-def]
    """What tensor.__init__ does, with a shape that is made once."""
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = _shape_of(kind.shape if kind.is_block() else ())


interpreter._patch_lang = _patch_once
interpreter._get_np_dtype = _dtype_of
tl.tensor.__init__ = _init

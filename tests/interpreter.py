"""Triton's interpreter, which runs the GPU kernels on a CPU.  Import this before any module with a kernel in it.

Nine tenths of its time go into what it does again for every operation, and need not: see below.  The results are the same.
"""

from __future__ import annotations

import functools
import inspect
import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is declared

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.jit import mangle_type

builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic

# It computes twice, in 64 bits, whether an integer overflows, and looks at the outcome only where `debug` is set.
builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


# ---------------- what the language can do, replaced once for each module, without its wrappers
_patch_lang, _set_attr = interpreter._patch_lang, interpreter._LangPatchScope.set_attr
_WRAPPER = core.builtin(lambda _semantic=None: None).__code__  # looks that `_semantic` is there
_patched: set[str] = set()


def _patch_once(fn):  # type: ignore[no-untyped-def]
    """The interpreter replaces what the language can do for every call of a kernel and of functions in it: here it stays so."""
    if (module := fn.__module__) not in _patched:
        _patched.add(module)
        _patch_lang(fn)
    return interpreter._LangPatchScope()  # with nothing to restore


def _with_scalar_index(self, obj, name, value):  # type: ignore[no-untyped-def]
    """Scalars are arrays of one element to the interpreter, and numpy from 2.4 on makes no int of one that has an axis."""
    if name == "__index__":
        value = lambda tensor: int(tensor.handle.data.item())  # noqa: E731
    _set_attr(self, obj, name, value)


def _patch_attr(obj, name, member, builder, scope):  # type: ignore[no-untyped-def]
    plain = member.__wrapped__ if getattr(member, "__code__", None) is _WRAPPER else member

    def call(*args, **kwargs):  # type: ignore[no-untyped-def]
        kwargs["_semantic"] = semantic
        return plain(*args, **kwargs)

    scope.set_attr(obj, name, call)


# ---------------- types and shapes, made once
_block_init, _shapes, _blocks = tl.block_type.__init__, {}, {}


def _make_block(self, element_ty, shape):  # type: ignore[no-untyped-def]
    sizes = shape.__dict__.get("sizes") if type(shape) is tl.tuple else None
    if sizes is None:
        sizes = tuple(core._unwrap_shape(shape))
    kind = (type(element_ty), element_ty.name, sizes)
    if kind not in _blocks:
        _block_init(self, element_ty, shape)
        self.shape = _shapes.setdefault(sizes, self.shape)
        self.shape.sizes = sizes
        self.of_tensor = tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(math.prod(sizes))
        _blocks[kind] = self.__dict__
    self.__dict__ = _blocks[kind]


_NO_SHAPE = tl.tuple([]), tl.constexpr(1)


def _make_tensor(self, handle, kind):  # type: ignore[no-untyped-def]
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = kind.of_tensor if kind.is_block() else _NO_SHAPE


def _make_handle(self, data, dtype, attr=None):  # type: ignore[no-untyped-def]
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if not _fits(data, dtype):
        raise ValueError(f"{data.itemsize} bytes for {dtype}")


def _fits(data, dtype):  # type: ignore[no-untyped-def]
    return data.itemsize == 1 or dtype.is_ptr() or data.itemsize * 8 <= dtype.primitive_bitwidth


_get_np_dtype = functools.cache(interpreter._get_np_dtype)


def _dtype_of(kind):  # type: ignore[no-untyped-def]
    """The interpreter makes a table of all types for every question."""
    kind = kind.scalar
    return _get_np_dtype(tl.uint64 if kind.is_ptr() else kind)


_broadcast = TritonSemantic.broadcast_impl_value


def _broadcast_unlike(self, lhs, rhs):  # type: ignore[no-untyped-def]
    """Two blocks of one shape, or two scalars, are what they are."""
    a, b = lhs.type, rhs.type
    if not a.is_block():
        return (_spread(lhs, b), rhs) if b.is_block() else (lhs, rhs)
    if not b.is_block():
        return lhs, _spread(rhs, a)
    return (lhs, rhs) if a.shape is b.shape else _broadcast(self, lhs, rhs)


def _spread(scalar, like):  # type: ignore[no-untyped-def]
    handle = scalar.handle
    data = np.full(like.shape.sizes, handle.data, _dtype_of(handle.dtype))
    return tl.tensor(interpreter.TensorHandle(data, handle.dtype.scalar), tl.block_type(scalar.type, like.shape))


_computation_type = functools.cache(functools.partial(TritonSemantic.computation_type_impl, semantic))


# ---------------- launches, without copies of the tensors there and back: they are on the CPU
_parameters = functools.cache(inspect.signature)


@functools.cache
def _pointer_to(dtype):  # type: ignore[no-untyped-def]
    return tl.str_to_ty(mangle_type(torch.empty(0, dtype=dtype)), None)


def _argument(value):  # type: ignore[no-untyped-def]
    if isinstance(value, torch.Tensor):
        kind = _pointer_to(value.dtype)
        return tl.tensor(interpreter.TensorHandle(np.array([value.data_ptr()], np.uint64), kind), kind)
    return interpreter._implicit_cvt(value)


def _launch(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    _patch_once(self.fn)
    known = _parameters(self.fn)
    given = known.bind(*args, **{name: value for name, value in kwargs.items() if name in known.parameters})
    given.apply_defaults()
    arguments = {name: v if name in self.constexprs else _argument(v) for name, v in given.arguments.items()}
    grid = (self.grid(arguments) if callable(self.grid) else self.grid) + (1, 1)
    builder.set_grid_dim(*grid[:3])
    for place in np.ndindex(*grid[:3]):
        builder.set_grid_idx(*place)
        try:
            self.fn(**arguments)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e


interpreter._LangPatchScope.set_attr = _with_scalar_index
interpreter._patch_lang = _patch_once
interpreter._patch_attr = _patch_attr
interpreter._get_np_dtype = _dtype_of
interpreter._validate_np_data_size = _fits
interpreter.TensorHandle.__init__ = _make_handle
interpreter.GridExecutor.__call__ = _launch
tl.block_type.__init__ = _make_block
tl.tensor.__init__ = _make_tensor
TritonSemantic.broadcast_impl_value = _broadcast_unlike
TritonSemantic.computation_type_impl = staticmethod(_computation_type)

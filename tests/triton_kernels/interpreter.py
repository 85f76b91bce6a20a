"""Triton's interpreter, made to compute what a GPU computes, and each description only once.

It stands on what is within Triton; where that has changed, a test of the kernels fails.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_truncating = interpreter._convert_float
_numpy_type_of_numbers = functools.cache(interpreter._get_np_dtype)
_patched: set[int] = set()
_shapes: dict[tuple[int, ...], tuple[tl.tuple, tl.tuple, int]] = {}
_of_a_scalar = core.tuple([]), tl.constexpr(1)


def mend() -> None:
    """Rounding, maxima and fused products as on a GPU; types and shapes that are remembered."""
    interpreter._convert_float = _convert_float
    interpreter._get_np_dtype = _numpy_type
    builder = interpreter.InterpreterBuilder
    builder.create_fma = _fused
    # NumPy's maximum is NaN beside a NaN; a GPU's is the other number.
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.InterpretedFunction.__call__ = _call_device_function
    # Works out what only debugging reports, and no GPU does.
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
    core.block_type.__init__ = _make_block_type
    core.tensor.__init__ = _make_tensor


def _convert_float(values, source, target, rounding):
    # To bfloat16 the interpreter truncates, from it subnormal numbers become 0; every GPU
    # rounds to the nearest, and keeps these.
    if source == tl.bfloat16 and target == tl.float32:
        return (values.astype(np.uint32) << 16).view(np.float32)
    if source != tl.float32 or target != tl.bfloat16:
        return _truncating(values, source, target, rounding)
    rounded = torch.from_numpy(np.array(values, np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _fused(self, x, y, z):
    # The interpreter rounds a product before it adds to it; a GPU does not.
    with np.errstate(all="ignore"):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _numpy_type(type):
    scalar = type.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_type_of_numbers(scalar)


def _call_device_function(self, *args, **kwargs):
    # triton.language is patched once a module, not once a call.
    if id(self.fn.__globals__) not in _patched:
        _patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _described(shape):
    """Of a shape: as a type and as a tensor have it, and how many elements it has."""
    sizes = tuple([s if type(s) is int else core._unwrap_if_constexpr(s) for s in shape])
    if sizes not in _shapes:
        of_type = core.tuple(list(sizes))
        of_tensors = core.tuple([tl.constexpr(size) for size in sizes])
        _shapes[sizes] = of_type, of_tensors, core.validate_block_shape(of_type)
    return _shapes[sizes]


def _make_block_type(self, element_ty, shape):
    if not len(shape):
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.shape_of_tensors, self.numel = _described(shape)
    self.name = f"<{[*self.shape.values]}, {element_ty}>"


def _make_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if type.is_block():
        self.shape, self.numel = type.shape_of_tensors, tl.constexpr(type.numel)
    else:
        self.shape, self.numel = _of_a_scalar

"""Triton's interpreter as the tests run it: without a GPU, and without doing over again what it has done."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import math
import os

import numpy as np
import torch


def choose() -> None:
    """Run Triton's kernels in its interpreter where there is no GPU; this has to be said before triton is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        _patch_once()
        _look_dtypes_up()
        _compute_no_unread_checks()
        if importlib.metadata.version("triton").startswith("3.7."):
            _describe_shapes_once()
            _widen_by_shifts()
        if importlib.metadata.version("triton").startswith("3.6."):
            _read_loop_bounds()


def _patch_once() -> None:
    """Each call of a device function patches triton.language anew, a quarter of all time; it is patched already."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()

    @functools.cache
    def languages(fn):
        return [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]

    def patched(fn):
        return patch(fn) if any(tl.core.is_builtin(each.load) for each in languages(fn)) else nothing

    interpreter._patch_lang = patched


def _look_dtypes_up() -> None:
    """The table of dtypes is made once, not each time that it is read."""
    from triton.runtime import interpreter

    convert, known = interpreter._get_np_dtype, {}

    def found(dtype):
        if dtype.name not in known:
            known[dtype.name] = convert(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = found


def _compute_no_unread_checks() -> None:
    """The interpreter computes whether integers overflow, a third of the time, and without its debugging reads none."""
    from triton.runtime.interpreter import interpreter_builder

    if not interpreter_builder.options.debug:
        interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)


def _describe_shapes_once() -> None:
    """A block's type and a tensor spell their shape out, in objects of its sizes: once a shape, not once a value."""
    from triton.language import core

    @functools.cache
    def of_block(sizes: tuple[int, ...]):
        return core.tuple(list(sizes)), core.validate_block_shape(sizes)

    @functools.cache
    def of_tensor(sizes: tuple[int, ...]):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def block_type(self, element_ty, shape):
        sizes = tuple(core._unwrap_shape(shape) if isinstance(shape, core.constexpr) else map(_value, shape))
        if not sizes:
            raise TypeError("0d block_type is forbidden")
        if set(map(type, sizes)) != {int}:
            core.validate_block_shape(sizes)
        self.element_ty = element_ty
        self.shape, self.numel = of_block(sizes)

    def _value(size):
        return size.value if isinstance(size, core.constexpr) else size

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensor(tuple(type.shape.values) if type.is_block() else ())

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")


def _widen_by_shifts() -> None:
    """bfloat16 is the upper half of float32; the interpreter takes both apart instead, and small numbers wrongly."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(x, source, target, rounding_mode):
        if (source.name, target.name) == ("bf16", "fp32"):
            return x.view(np.uint16).astype(np.uint32) << 16
        if (source.name, target.name, rounding_mode) == ("fp32", "bf16", None):  # to zero
            return (x.view(np.uint32) >> 16).astype(np.uint16)
        return convert(x, source, target, rounding_mode)

    interpreter._convert_float = converted


def _read_loop_bounds() -> None:
    """Triton 3.6 takes int() of arrays of one element, which NumPy 2.4 refuses; as Triton 3.7 does it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched

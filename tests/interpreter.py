"""Triton's interpreter as the tests run it: without a GPU, and without doing over again what it has done."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import os

import torch


def choose() -> None:
    """Run Triton's kernels in its interpreter where there is no GPU; this has to be said before triton is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        _patch_once()
        _look_dtypes_up()
        _compute_no_unread_checks()
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


def _read_loop_bounds() -> None:
    """Triton 3.6 takes int() of arrays of one element, which NumPy 2.4 refuses; as Triton 3.7 does it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched

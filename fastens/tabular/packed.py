"""The native forest: trees packed for traversal, by ctypes calls of the CPU library, which serve every Python."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from fastens.reference.forest import Trees

MOST_CALLS = 64  # rules whose C form a forest keeps


class PackedForest:
    """Trees in the layout of the native kernels; immutable, and safe to share between threads.

    Args:
        library: from :func:`fastens._native.functions`.
        trees: all trees.
        double_inputs: thresholds are compared with float64 values, otherwise with values rounded to float32.
        allow_nan: whether NaN is a missing value, or an error.
        allow_inf: whether infinities are values, or an error.

    Raises:
        ValueError: the arrays are no forest.
        MemoryError: no memory for the packed trees.
    """

    def __init__(self, library: Any, trees: Trees, double_inputs: bool, allow_nan: bool, allow_inf: bool) -> None:
        self._library, self._outputs = library, trees.values.shape[1]
        self._predict = _function(library, "predict", _POINTER, _OBJECT, _OBJECT)
        self._free = _function(library, "free", _POINTER)
        self._calls: dict[tuple, _Call] = {}
        flag = ctypes.c_int
        make = _function(library, "make", _POINTER, _INT, flag, flag, flag, ctypes.POINTER(_POINTER))
        names = ("offsets", "feature", "threshold", "left", "right", "default_left", "values")
        arrays = (_OBJECT * len(names))(*(getattr(trees, name) for name in names))
        self._forest = _POINTER()
        self._check(make(arrays, trees.num_features, double_inputs, allow_nan, allow_inf, ctypes.byref(self._forest)))

    def __del__(self) -> None:
        if getattr(self, "_forest", None):
            self._free(self._forest)

    def predict(
        self,
        x: npt.NDArray,
        rule: str,
        option: str,
        values: tuple[float, ...],
        seed: int,
        offset: int,
        instruction_set: str,
    ) -> npt.NDArray:
        """Combine the trees by a rule, see :mod:`fastens.rules`, for float32 or float64 rows of any strides.

        Args:
            x: [n, features].
            rule: its name.
            option: of the rule.
            values: of the rule.
            seed: of a random rule.
            offset: of a random rule.
            instruction_set: one of csrc/isa/levels.h by its name, such as "avx2", or "auto" for the chosen one.

        Returns:
            float64 [n, p].

        Raises:
            ValueError: other features, NaN or infinities where they are errors, or no such kernels here.
        """
        call = self._calls.get((rule, option, values, instruction_set)) if seed == offset == 0 else None
        if call is None:
            call = self._call(rule, option, values, seed, offset, instruction_set)
        out = np.empty((len(x), self._outputs))
        status = self._predict(call.address, x, out)
        if status:
            self._check(status)
        return out

    def members(self, x: npt.NDArray, ranges: list[int], instruction_set: str) -> npt.NDArray:
        """Return [K, n, p]: member k sums trees [ranges[k], ranges[k + 1]); errors as :meth:`predict`."""
        count = len(ranges) - 1
        if count < 1:
            raise ValueError("forest: no members")
        out = np.empty((count, len(x), self._outputs))
        members = _function(self._library, "members", _POINTER, _OBJECT, _OBJECT, _POINTER, _INT, _POINTER)
        bounds = (_INT * len(ranges))(*ranges)
        self._check(members(self._forest, x, out, bounds, count, self._kernels(instruction_set)))
        return out

    def describe(self) -> dict[str, Any]:
        """How the trees are packed, and for which instruction set they would run."""
        self._check(_function(self._library, "describe", _POINTER)(self._forest))
        return json.loads(self._said())

    def _call(
        self, rule: str, option: str, values: tuple[float, ...], seed: int, offset: int, instruction_set: str
    ) -> _Call:
        """The C form of what is asked, kept where nothing is drawn."""
        held = (ctypes.c_double * len(values))(*values)
        kernels = self._kernels(instruction_set)
        call = _Call(self._forest, kernels, rule.encode(), option.encode(), held, len(values), seed, offset)
        call.address = ctypes.addressof(call)
        if seed == offset == 0:
            if len(self._calls) >= MOST_CALLS:
                self._calls.clear()
            self._calls[rule, option, tuple(values), instruction_set] = call
        return call

    def _kernels(self, instruction_set: str) -> ctypes.c_void_p:
        found = _POINTER()
        find = _function(self._library, "kernels", ctypes.c_char_p, ctypes.POINTER(_POINTER))
        self._check(find(instruction_set.encode(), ctypes.byref(found)))
        return found

    def _said(self) -> str:
        said = _function(self._library, "said")
        said.restype = ctypes.c_char_p
        return said().decode()

    def _check(self, status: int) -> None:
        if status == _NO_MEMORY:
            raise MemoryError("forest: no memory for the packed trees, or for the rows")
        if status:
            raise ValueError(self._said())


class _Call(ctypes.Structure):
    """A forest, the kernels that it is asked of, and a rule; it holds what those point to, but not the forest."""

    _fields_ = (
        ("forest", ctypes.c_void_p),
        ("kernels", ctypes.c_void_p),
        ("rule", ctypes.c_char_p),
        ("option", ctypes.c_char_p),
        ("values", ctypes.POINTER(ctypes.c_double)),
        ("num_values", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("offset", ctypes.c_int64),
    )
    address: int


_POINTER, _OBJECT, _INT = ctypes.c_void_p, ctypes.py_object, ctypes.c_int64
_NO_MEMORY = 2


def _function(library: Any, name: str, *types: Any) -> Any:
    function = getattr(library, f"fastens_forest_{name}")
    function.argtypes = types
    return function

"""Numbers among the arguments that vary from call to call, such as times: inputs of a plan, as tensors are.

While a pass is recorded, the network's Python meets such a number as a tensor of no dimension that has no value. What
Python makes of it alone, ``1000 * t``, is kept as an expression and evaluated in Python before the plan runs; where it
meets a tensor, the expression becomes an input of the plan.
"""

from __future__ import annotations

import math
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastens import reproducible
from fastens.engine.arguments import Arguments
from fastens.fold.callsite import calling_line
from fastens.fold.dispatch import READS, Fold
from fastens.fold.names import named
from fastens.fold.nested import leaves_of, mapped, name_of, plain
from fastens.fold.rules.elementwise import result_type
from fastens.fold.tensor import MemberTensor, ReadsValues, getters
from fastens.network.code import globals_in
from fastens.trace.record import NotRecordable, in_progress

Values = dict[int, float]  # by position among the leaves of the arguments
Expression = Callable[[Values], float]

_LEAST, _MOST = -(2**63), 2**63 - 1  # of what every dtype of a plan holds
_MOST_VALUES = 4  # of a number that has plans of its own
_MOST_KINDS = 64


class SeenNumbers:
    """Which numbers among the arguments of each kind of call have had several values."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Any, Values | dict[int, list[float]]] = OrderedDict()

    def note(self, arguments: Arguments) -> None:
        """Note the numbers of a call, and set ``varying`` and ``free`` of its arguments by what earlier calls had."""
        at = [i for i, x in enumerate(arguments.leaves) if type(x) is float or type(x) is int]
        if not at:
            return
        if reproducible.enabled():  # at once, since a constant's last bits may be others than an input's
            arguments.varying = {i: _another(arguments.leaves[i]) for i in at}
            return
        kind = arguments.kind()
        values: Any = self._seen.get(kind)
        if values is None:
            values = self._seen[kind] = {}
            if len(self._seen) > _MOST_KINDS:
                self._seen.popitem(last=False)
        for i in at:
            x, of_one = arguments.leaves[i], values.setdefault(i, [])
            if x not in of_one and len(of_one) <= _MOST_VALUES:
                of_one.append(x)
        several = {i: of_one for i in at if len(of_one := values[i]) > 1}
        arguments.varying = {i: next(x for x in of_one if x != arguments.leaves[i]) for i, of_one in several.items()}
        arguments.free = frozenset(i for i, of_one in several.items() if len(of_one) > _MOST_VALUES)


def _another(number: float) -> float:
    """Return another number of the same type, to tell an input of a plan from a constant."""
    return abs(number - 1) if type(number) is int else 0.875 * number or 0.125


def told(number: float, tell: Callable[[], None]) -> float:
    """A number like this one that tells where Python reads it: a network may have a branch for numbers of its own.

    What Python computes of it alone tells likewise; torch takes its value and tells nothing.

    Args:
        number: an integer or a float.
        tell: called where it is compared, looked up, converted, or written as text.
    """
    made: Any = _TOLD[type(number)](number)
    made.tell = tell
    return made


def _reading(kind: type, name: str) -> Any:
    method = getattr(kind, name)

    def read(self: Any, *args: Any) -> Any:
        # torch takes a whole number for a float's value by this method, too
        if name != "__float__" or "float" in globals_in(sys._getframe(1).f_code):
            self.tell()
        return method(self, *args)

    return read


def _computing(kind: type, name: str) -> Any:
    method = getattr(kind, name)

    def compute(self: Any, *args: Any) -> Any:
        result = method(self, *args)
        return told(result, self.tell) if type(result) in _TOLD else result

    return compute


def _of_numpy(self: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    self.tell()
    return NotImplemented


def _telling(kind: type) -> type:
    methods: dict[str, Any] = {name: _reading(kind, name) for name in _TELLING if hasattr(kind, name)}
    methods |= {name: _computing(kind, name) for name in _COMPUTED if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**methods, "__array_ufunc__": _of_numpy, "__array_function__": _of_numpy})


_TELLING = (
    "__bool__ __int__ __float__ __index__ __complex__ __hash__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __repr__"
    " __str__ __format__ __round__ __trunc__ __floor__ __ceil__ __divmod__ __rdivmod__ is_integer as_integer_ratio hex"
    " bit_length bit_count __and__ __rand__ __or__ __ror__ __xor__ __rxor__ __lshift__ __rlshift__ __rshift__"
    " __rrshift__ __invert__"
).split()
_COMPUTED = (
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __mod__"
    " __rmod__ __pow__ __rpow__ __neg__ __pos__ __abs__"
).split()
_TOLD: dict[type, type] = {kind: _telling(kind) for kind in (int, float)}


def _functions(names: str) -> set[Any]:
    return set(named(names))


def _in_python(names: str, function: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    return dict.fromkeys(named(names), function)


_PYTHON = {
    **_in_python("add __add__ __radd__ __iadd__", operator.add),
    **_in_python("sub subtract __sub__ __isub__", operator.sub),
    **_in_python("mul multiply __mul__ __rmul__ __imul__", operator.mul),
    **_in_python("div divide true_divide __truediv__ __div__ __itruediv__ __idiv__", operator.truediv),
    **_in_python("pow __pow__ __ipow__", operator.pow),
    **_in_python("floor_divide __floordiv__ __ifloordiv__", operator.floordiv),
    **_in_python("remainder __mod__ __imod__", operator.mod),
    **_in_python("neg negative __neg__", operator.neg),
    **_in_python("abs absolute __abs__", abs),
    **_in_python("rsub __rsub__", lambda a, b: b - a),
    **_in_python("__rdiv__ __rtruediv__", lambda a, b: b / a),
    **_in_python("__rpow__", lambda a, b: b**a),
    **_in_python("__rfloordiv__", lambda a, b: b // a),
    **_in_python("__rmod__", lambda a, b: b % a),
}
_MEETS_TENSORS = _functions(
    "add sub subtract rsub mul multiply div divide true_divide pow __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__"
    " __truediv__ __div__ __rdiv__ __rtruediv__ __pow__ __rpow__ add_ sub_ mul_ div_ __iadd__ __isub__ __imul__"
    " __itruediv__ where lerp"
)
_AS_TENSOR = _functions(
    "to float double long int shape ndim dim size numel nelement is_floating_point is_complex dtype device __len__"
    " expand reshape view unsqueeze repeat flatten __getitem__ expand_as broadcast_to type_as clone detach contiguous"
)
_GETTERS = set(getters("shape ndim dtype device is_cuda requires_grad"))
_FILL = _functions("full full_like new_full")
_FROM_DATA = _functions("tensor as_tensor scalar_tensor asarray new_tensor")
_MAKES = {  # what their arguments are by position
    "full": ("size", "value"),
    "full_like": ("like", "value"),
    "new_full": ("like", "size", "value"),
    "new_tensor": ("like", "value"),
    "tensor": ("value",),
    "as_tensor": ("value", "dtype", "device"),
    "asarray": ("value",),
    "scalar_tensor": ("value",),
}
_NAMES = {"data": "value", "obj": "value", "s": "value", "fill_value": "value", "input": "like"}


class Numbers:
    """The varying numbers of one call that is recorded.

    Args:
        values: what they are in this call.
        others: what they were in another.

    Attributes:
        used: what tensors met, in the order of the plan's inputs behind the tensors of the call.
    """

    def __init__(self, values: Values, others: Values) -> None:
        self.values = values
        self.others = others
        self.used: list[tuple[Expression, torch.dtype, type]] = []
        self._known: dict[int, tuple[MemberTensor, Expression]] = {}
        self._inputs: dict[tuple[int, torch.dtype], MemberTensor] = {}

    def tensors(self, values: Values) -> list[Tensor] | None:
        """The plan's inputs for other numbers; none where what Python makes of them is an error or of another type."""
        try:
            found = [expression(values) for expression, *_ in self.used]
            if any(type(x) is not kind for x, (_, _, kind) in zip(found, self.used, strict=True)):
                return None
            if any(math.isfinite(x) and not _LEAST <= x <= _MOST for x in found):  # torch may refuse it
                return None
            return [torch.tensor(x, dtype=dtype) for x, (_, dtype, _) in zip(found, self.used, strict=True)]
        except Exception:  # which the network's own code may catch
            return None

    def argument(self, fold: Fold, position: int) -> MemberTensor:
        """What the network gets in the place of a number."""
        return self._symbol(fold, lambda values: values[position])

    def _symbol(self, fold: Fold, expression: Expression) -> MemberTensor:
        """What stands for a number: a tensor of no dimension without memory, so that nothing can read it."""
        kind = type(expression(self.values))
        if kind not in (int, float):
            raise NotRecordable(f"a number of the call becomes a {kind.__name__}")
        dtype = torch.float64 if kind is float else torch.int64
        symbol: MemberTensor = fold.common(torch.empty((), dtype=dtype, device="meta"))
        symbol._known = symbol.shape, dtype, torch.device("cpu")
        symbol.symbol = True
        self._known[id(symbol)] = symbol, expression
        return symbol

    def _expression(self, x: Any) -> Expression | None:
        found = self._known.get(id(x))
        return None if found is None else found[1]

    def resolved(
        self, fold: Fold, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """What a function makes of numbers alone, else ``NotImplemented`` and its arguments with inputs in their place.

        Raises:
            ReadsValues: Python reads a number, or torch takes it for something else than a value.
        """
        leaves = list(leaves_of((args, kwargs)))
        if not any(id(x) in self._known for x in leaves):
            return NotImplemented, args, kwargs
        if func in _PYTHON and not kwargs and all(id(x) in self._known or type(x) in (int, float) for x in args):
            return self._symbol(fold, self._applied(_PYTHON[func], args)), args, kwargs
        if func in _FROM_DATA or func in _FILL:
            return self._made(fold, func, args, kwargs), args, kwargs
        given = sum(id(x) in self._known for x in leaves_of(args[:3]))
        plainly = given == sum(id(x) in self._known for x in leaves)

        def inputs(dtype: torch.dtype | None = None) -> Any:
            return mapped(lambda x: self._input(fold, x, dtype or x.dtype) if self._is(x) else x, (args, kwargs))

        if func in _AS_TENSOR or func in _GETTERS:
            return NotImplemented, *inputs()
        if func in READS or func not in _MEETS_TENSORS or not plainly:
            raise ReadsValues(f"{name_of(func)} takes a number of the call by its value in {calling_line()}")
        dtype = _common_dtype([x for x in leaves if isinstance(x, Tensor)], self._is)
        if dtype in (torch.float16, torch.bfloat16) or dtype.is_complex:
            raise NotRecordable(f"{name_of(func)} of {dtype} and a number")
        return NotImplemented, *inputs(dtype)

    def _is(self, x: Any) -> TypeGuard[MemberTensor]:
        return id(x) in self._known

    def _applied(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Expression:
        parts = [self._expression(x) or (lambda values, x=x: x) for x in args]
        return lambda values: function(*(part(values) for part in parts))

    def _input(self, fold: Fold, symbol: MemberTensor, dtype: torch.dtype) -> MemberTensor:
        """A number as an input of the plan, of a dtype."""
        found = self._inputs.get((id(symbol), dtype))
        if found is None:
            recording, expression = in_progress(), self._expression(symbol)
            assert recording is not None
            assert expression is not None
            number = expression(self.values)
            value = torch.tensor(number, dtype=dtype)
            recording.add_input(value)
            self.used.append((expression, dtype, type(number)))
            found = self._inputs[id(symbol), dtype] = fold.common(value)
        return found

    def _made(self, fold: Fold, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor that is made of a number: filled with it, or of a list that holds nothing else."""
        given = dict(zip(_MAKES[func.__name__], args, strict=False)) | {_NAMES.get(k, k): v for k, v in kwargs.items()}
        like, size, value = given.pop("like", None), given.pop("size", None), given.pop("value")
        if func.__name__ == "full_like":
            size = like.shape
        if isinstance(value, list | tuple):
            size = (len(value),)
            value = value[0] if len({id(x) for x in value}) == 1 else None
        if not self._is(value) or set(given) - {"dtype", "device", "requires_grad", "pin_memory"}:
            raise ReadsValues(f"{name_of(func)} takes a number of the call by its value in {calling_line()}")
        dtype = given.get("dtype")
        if dtype is None and func in _FILL and isinstance(like, Tensor):
            dtype = like.dtype
        elif dtype is None:
            dtype = torch.get_default_dtype() if value.dtype == torch.float64 else torch.int64
        made: Any = plain(self._input(fold, value, dtype))
        device = given.get("device") or (like.device if isinstance(like, Tensor) else None)
        made = made if device is None else made.to(device)
        return fold.common(made if size is None else made.expand(tuple(map(int, size))).contiguous())


def _common_dtype(tensors: list[Tensor], is_number: Callable[[Any], bool]) -> torch.dtype:
    """The dtype in which tensors meet numbers: these decide between kinds of dtypes only."""
    found = result_type([torch.empty((1,) * min(x.ndim, 1), dtype=x.dtype) for x in tensors if not is_number(x)])
    floating = any(x.dtype == torch.float64 for x in tensors if is_number(x))
    return torch.result_type(torch.empty(1, dtype=found), 1.0 if floating else 1)

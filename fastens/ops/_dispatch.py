"""The registry of ops, and which backend runs one: every module of :mod:`fastens.ops` uses both in the same way."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from fastens import _native
from fastens.device import device_of

BACKENDS = ("auto", "reference", "native", "triton")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Result = Tensor | tuple[Tensor, ...] | list[Tensor]
LIBRARY = torch.library.Library("fastens", "FRAGMENT")


class Op:
    """One op: ``fastens::<name>``, which is its reference, and a private op ``fastens::_<name>_<backend>`` per kernel.

    The reference is composed of differentiable torch ops (CompositeImplicitAutograd): gradients of any order come with
    it, and compilers see through it. A kernel is opaque; its gradient is the reference's. ``native`` is C++ for the CPU
    and CUDA C++ for a GPU, ``triton`` is ``fastens/kernels/<name>.py``.

    Args:
        schema: of the op, without namespace.
        reference: the naive PyTorch function of these arguments.
        kernels: backend -> fake of its kernel, strongest first.
        record: how many of the arguments are one record, and what makes it of them: the reference, the fakes and
            Triton's launcher take it in their place; none where they take the arguments as they are.

    Attributes:
        name: basename of the op in every folder (``ops/<name>.py``, ``reference/<name>.py``, ``csrc/cpu/<name>.cpp``).
        kernels: backend -> name of the private op.
        default: ``fastens::<name>``, the reference.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Result],
        kernels: dict[str, Callable[..., Result]] | None = None,
        record: tuple[int, Callable[[tuple[Any, ...]], Any]] | None = None,
    ) -> None:
        self.name, arguments = schema.split("(", 1)
        reference = _of_record(record, reference)
        self.kernels = {backend: f"_{self.name}_{backend}" for backend in kernels or {}}
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, reference, "CompositeImplicitAutograd")
        for backend, fake in (kernels or {}).items():
            _define_kernel(self.kernels[backend], arguments, reference, _of_record(record, fake))
        if "triton" in self.kernels:
            for key in ("CUDA", "CPU"):  # on the CPU in Triton's interpreter
                LIBRARY.impl(self.kernels["triton"], _of_record(record, _launcher(self.name)), key)
        self.default = getattr(torch.ops.fastens, self.name).default
        OPS[self.name] = self

    def resolve(self, backend: str, tensors: Iterable[Tensor]) -> Callable[..., Any]:
        """Return the op to call: a backend's private one, or the reference.

        ``"auto"`` takes the strongest kernel that is available, and the reference where a derivative is wanted.

        Args:
            backend: one of BACKENDS.
            tensors: the floating-point arguments, of one dtype and device.

        Raises:
            ValueError: ``backend`` is unknown.
            RuntimeError: ``backend`` was asked for by name and is not available; the causes are named.
        """
        tensors = list(tensors)
        differentiates = _differentiates(tensors)
        if backend == "auto" and (not self.kernels or differentiates):
            backend = "reference"
        device, dtype = (tensors[0].device, tensors[0].dtype) if tensors else (torch.device("cpu"), torch.float32)
        kernel = _kernel(self.name, tuple(self.kernels.items()), backend, device, dtype)
        if kernel == self.name or differentiates or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return getattr(torch.ops.fastens, kernel)
        return _below_autograd(kernel)


OPS: dict[str, Op] = {}


def _of_record(record: tuple[int, Callable[[tuple[Any, ...]], Any]] | None, function: Callable[..., Any]) -> Any:
    """A function of an op's arguments, from one that takes a record in the place of the first."""
    if record is None:
        return function
    count, made = record
    return lambda *arguments: function(made(arguments[:count]), *arguments[count:])


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"`backend`: unknown backend {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")


def missing(kernel: str | None, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None where ``backend`` can run the op on ``device``, or why it cannot.

    Args:
        kernel: name of the op's kernel for this backend, or None where it has none.
        backend: "native" or "triton".
        device: where the tensors are.
        dtype: dtype of the tensors.
    """
    if kernel is None:
        return f"this op has no {backend} kernel"
    if dtype not in KERNEL_DTYPES:
        return f"its kernel takes {', '.join(map(str, KERNEL_DTYPES))}, and these tensors are {dtype}"
    if backend == "triton":
        return missing_triton(device)
    library = device_of(device).library
    if library is None:
        return f"the compiled libraries serve CPU and CUDA tensors, and these are on {device}"
    if not _native.load(library):
        return f"the compiled library is not loaded: {_native.status(library)}"
    if not _native.has_kernel(kernel, library):
        where = library.upper()
        return f"the loaded library has no {where} kernel for fastens::{kernel}: if it should have one, rebuild it"
    return None


def missing_triton(device: torch.device) -> str | None:
    """Return None where Triton's kernels can run on ``device``, or why they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    capability = device_of(device).capability
    if capability is None:
        return f"triton kernels serve CUDA tensors, and these are on {device}"
    major, minor = capability
    return None if major >= 8 else f"triton kernels need compute capability 8.0, and {device} has {major}.{minor}"


def _launcher(name: str) -> Callable[..., Any]:
    """Return the op's Triton launcher, imported when it is first called."""

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"fastens.kernels.{name}"), name)(*arguments)

    return launch


def _kernel(
    name: str, kernels: tuple[tuple[str, str], ...], backend: str, device: torch.device, dtype: torch.dtype
) -> str:
    """Let a compiler take the choice as a constant, which it does not for a cached function itself."""
    return _choice(name, kernels, backend, device, dtype)


# What torch.compiler.assume_constant_result does, which would import the compiler for it: seconds.
_kernel._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # read by dynamo


@functools.cache
def _choice(
    name: str, kernels: tuple[tuple[str, str], ...], backend: str, device: torch.device, dtype: torch.dtype
) -> str:
    check_backend(backend)
    if backend == "reference":
        return name
    if backend == "auto":
        # Triton's interpreter, which "auto" never takes, is there to be asked for by name
        usable = [(each, kernel) for each, kernel in kernels if each != "triton" or device_of(device).launches]
        return next((kernel for each, kernel in usable if missing(kernel, each, device, dtype) is None), name)
    kernel = dict(kernels).get(backend)
    cause = missing(kernel, backend, device, dtype)
    if kernel is None or cause is not None:
        raise RuntimeError(
            f"`backend`: {backend!r} cannot run {name!r}: {cause}. "
            "Use backend='auto' to fall back, or backend='reference'"
        )
    return kernel


@functools.cache
def _below_autograd(kernel: str) -> Callable[..., Tensor]:
    """The private op without its autograd in Python, which costs as much as a small kernel."""
    op = getattr(torch.ops.fastens, kernel).default

    def call(*arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


def _differentiates(tensors: list[Tensor]) -> bool:
    """Whether a derivative or another transform of torch.func goes through these tensors."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _define_kernel(name: str, arguments: str, reference: Callable[..., Result], fake: Callable[..., Result]) -> None:
    """Register a private op: its schema, its fake, and gradient and vmap by way of the reference."""
    LIBRARY.define(f"{name}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"fastens::{name}"

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        leaves, ctx.spec = pytree.tree_flatten(inputs)
        ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.are_tensors = [isinstance(x, Tensor) for x in leaves]
        ctx.save_for_backward(*(x for x in leaves if isinstance(x, Tensor)))

    def backward(ctx: Any, *grads_out: Any) -> tuple[Any, ...]:
        if isinstance(grads_out[0], list):  # of an op that returns a list
            (grads_out,) = grads_out
        tensors = iter(ctx.saved_tensors)
        with torch.enable_grad():
            # an alias of each, because one tensor may be several arguments
            leaves = [_alias(next(tensors)) if held else x for held, x in zip(ctx.are_tensors, ctx.others, strict=True)]
            output = reference(*pytree.tree_unflatten(leaves, ctx.spec))
        outputs = [output] if isinstance(output, Tensor) else output
        pairs = [(y, g) for y, g in zip(outputs, grads_out, strict=True) if g is not None and y.requires_grad]
        sources = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        wanted = torch.autograd.grad(
            [y for y, _ in pairs],
            sources,
            [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
            materialize_grads=True,
        )
        found = iter(wanted)
        grads = [next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in leaves]
        # torch wants a list where it got a list of tensors (an empty one counts), and None for a list of numbers
        return tuple(
            gradient if not isinstance(argument, list) or all(isinstance(x, Tensor) for x in argument) else None
            for argument, gradient in zip(
                pytree.tree_unflatten(leaves, ctx.spec), pytree.tree_unflatten(grads, ctx.spec), strict=True
            )
        )

    def vmapped(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        op = getattr(torch.ops.fastens, name)
        calls = [op(*_selected(inputs, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        stacked = map(torch.stack, zip(*calls, strict=True))
        if isinstance(calls[0], list):
            return list(stacked), [0] * len(calls[0])
        return tuple(stacked), (0,) * len(calls[0])

    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_vmap(qualified, vmapped, lib=LIBRARY)


def _alias(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else x


def _selected(inputs: Any, in_dims: Any, i: int) -> list[Any]:
    """Sample i of arguments, or of a list among them, that vmap maps along ``in_dims``."""

    def selected(x: Any, dim: Any) -> Any:
        if dim is None:
            return x
        return _selected(x, dim, i) if isinstance(x, list | tuple) else x.select(dim, i)

    return [selected(x, dim) for x, dim in zip(inputs, in_dims, strict=True)]

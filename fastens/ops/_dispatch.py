"""The registry of ops, and which backend runs one: every module of :mod:`fastens.ops` uses both in the same way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import forward_ad

from fastens import _native

BACKENDS = ("auto", "reference", "native", "triton")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIBRARY = torch.library.Library("fastens", "FRAGMENT")


class Op:
    """One op: ``fastens::<name>``, which is its reference, and a private op ``fastens::_<name>_<backend>`` per kernel.

    The reference is composed of differentiable torch ops (CompositeImplicitAutograd): gradients of any order come with
    it, and compilers see through it. A kernel is opaque; its gradient is the reference's.

    Args:
        schema: of the op, without namespace.
        reference: the naive PyTorch function of these arguments.
        kernels: backend -> fake of its kernel, strongest first.

    Attributes:
        name: basename of the op in every folder (``ops/<name>.py``, ``reference/<name>.py``, ``csrc/cpu/<name>.cpp``).
        kernels: backend -> name of the private op.
        default: ``fastens::<name>``, the reference.
    """

    def __init__(
        self, schema: str, reference: Callable[..., Tensor], kernels: dict[str, Callable[..., Tensor]] | None = None
    ) -> None:
        self.name, arguments = schema.split("(", 1)
        self.kernels = {backend: f"_{self.name}_{backend}" for backend in kernels or {}}
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, reference, "CompositeImplicitAutograd")
        for backend, fake in (kernels or {}).items():
            _define_kernel(self.kernels[backend], arguments, reference, fake)
        self.default = getattr(torch.ops.fastens, self.name).default
        OPS[self.name] = self

    def resolve(self, backend: str, tensors: Iterable[Tensor]) -> Callable[..., Tensor]:
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
        return None if device.type == "cuda" else f"triton kernels serve CUDA tensors, and these are on {device}"
    if device.type != "cpu":
        return f"the compiled library serves CPU tensors, and these are on {device}"
    if not _native.load():
        return f"the compiled library is not loaded: {_native.status()}"
    if not _native.has_kernel(kernel):
        return f"the loaded library is older than this package: it has no kernel for fastens::{kernel}; rebuild it"
    return None


def _kernel(
    name: str, kernels: tuple[tuple[str, str], ...], backend: str, device: torch.device, dtype: torch.dtype
) -> str:
    """Let a compiler take the choice as a constant, which it does not for a cached function itself."""
    return _choice(name, kernels, backend, device, dtype)


# What torch.compiler.assume_constant_result does, which would import the compiler for it: seconds.
_kernel._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _choice(
    name: str, kernels: tuple[tuple[str, str], ...], backend: str, device: torch.device, dtype: torch.dtype
) -> str:
    check_backend(backend)
    if backend == "reference":
        return name
    if backend == "auto":
        return next((kernel for each, kernel in kernels if missing(kernel, each, device, dtype) is None), name)
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
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _define_kernel(name: str, arguments: str, reference: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Register a private op: its schema, its fake, and gradient and vmap by way of the reference."""
    LIBRARY.define(f"{name}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"fastens::{name}"

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        leaves, ctx.spec = pytree.tree_flatten(inputs)
        ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.are_tensors = [isinstance(x, Tensor) for x in leaves]
        ctx.save_for_backward(*(x for x in leaves if isinstance(x, Tensor)))

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        with torch.enable_grad():
            # an alias of each, because one tensor may be several arguments
            leaves = [_alias(next(tensors)) if held else x for held, x in zip(ctx.are_tensors, ctx.others, strict=True)]
            output = reference(*pytree.tree_unflatten(leaves, ctx.spec))
        sources = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        found = iter(torch.autograd.grad(output, sources, grad, create_graph=torch.is_grad_enabled()))
        grads = [next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in leaves]
        # torch wants a list where it got a list of tensors (an empty one counts), and None for a list of numbers
        return tuple(
            gradient if not isinstance(argument, list) or all(isinstance(x, Tensor) for x in argument) else None
            for argument, gradient in zip(
                pytree.tree_unflatten(leaves, ctx.spec), pytree.tree_unflatten(grads, ctx.spec), strict=True
            )
        )

    def vmapped(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        op = getattr(torch.ops.fastens, name)
        calls = (op(*_selected(inputs, in_dims, i)) for i in range(info.batch_size))
        return torch.stack(list(calls)), 0

    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_vmap(qualified, vmapped, lib=LIBRARY)


def _alias(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else x


def _selected(inputs: Any, in_dims: Any, i: int) -> list[Any]:
    """Sample i of arguments, or of a list among them, that vmap maps along ``in_dims``."""
    return [
        _selected(x, d, i) if isinstance(x, list | tuple) and d is not None else x if d is None else x.select(d, i)
        for x, d in zip(inputs, in_dims, strict=True)
    ]

"""The check of a folded pass against the loop, and what a first pass establishes about the network."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens.fold.looped import call_member, member_tensors
from fastens.fold.member_tensor import MemberTensor
from fastens.fold.network import folded_modules
from fastens.fold.registry import FoldedLayer

# The largest error of the fold against the loop, relative to the largest magnitude of the loop's output. Both do the
# same arithmetic in another order; a network of some hundred layers adds up a few hundred rounding errors.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TOLERANCE_TF32 = 1e-2  # GPU convolutions round their operands to 10 bits unless told otherwise

Shapes = list[tuple[int, ...] | None]


def tolerance_for(tensor: Tensor, network: nn.Module) -> float:
    """The tolerance for one output of a network, which computes no more exactly than its weights are."""
    # allow_tf32, the older name, raises where one of these was set
    precisions = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    tf32 = tensor.is_cuda and "tf32" in precisions
    tolerances = {**TOLERANCE, torch.float32: TOLERANCE_TF32} if tf32 else TOLERANCE
    weights = (tolerances.get(parameter.dtype, 0.0) for parameter in network.parameters())
    return max(tolerances[tensor.dtype], *weights) if tensor.dtype in tolerances else 0.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Max |actual - expected| / max |expected|; NaN and inf must stand in the same places, else inf."""
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    a, e = actual.detach().double(), expected.detach().double()
    finite = torch.isfinite(e)
    if not torch.equal(torch.where(finite, 0.0, a).nan_to_num(7.0), torch.where(finite, 0.0, e).nan_to_num(7.0)):
        return float("inf")
    a, e = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    error, scale = float((a - e).abs().max()), float(e.abs().max())
    return error if error != error else error / scale if scale else error


def _shapes(*trees: Any) -> Shapes:
    leaves = pytree.tree_leaves(trees)
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]


def batch_dims(folded: Shapes, member: Shapes, rows: int, batch: int = 1) -> list[int | None] | None:
    """Where tensors carry the batch: the dimension that is ``rows / batch`` times as large in the folded pass.

    Returns:
        One entry per tensor, none where no dimension differs; or none where the two passes do not match.
    """
    if len(folded) != len(member):
        return None
    dims: list[int | None] = []
    for ours, theirs in zip(folded, member, strict=True):
        if ours is None or theirs is None or len(ours) != len(theirs):
            return None
        different = [d for d, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        if not different:
            dims.append(None)
        elif len(different) == 1 and ours[different[0]] * batch == rows * theirs[different[0]]:
            dims.append(different[0])
        else:
            return None
    return dims


class Recording:
    """What each module of one member saw in the loop: shapes in, shapes out, by path and call."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Shapes]] = defaultdict(list)
        self.outputs: dict[str, list[Shapes]] = defaultdict(list)

    @property
    def num_elements(self) -> int:
        """How many numbers the modules returned."""
        calls = (shapes for calls in self.outputs.values() for shapes in calls)
        return sum(math.prod(shape) for shapes in calls for shape in shapes if shape is not None)

    @contextmanager
    def of(self, skeleton: nn.Module) -> Iterator[None]:
        """Record while the skeleton runs as one member."""
        handles = []
        for path, module in skeleton.named_modules():

            def before(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
                self.inputs[path].append(_shapes(args, kwargs))

            def after(_: Any, __: Any, ___: Any, output: Any, path: str = path) -> None:
                self.outputs[path].append(_shapes(output))

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Undo what passes in training mode do to buffers, as to the statistics of batch normalisation."""
    training = any(module.training for module in network.modules())
    saved = [(buffer, buffer.clone()) for buffer in network.buffers()] if training else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def establishing(network: nn.Module, recording: Recording, rows: int, batch: int) -> Iterator[None]:
    """While a folded pass of ``rows`` runs, tell modules where their batch is, from what a member saw of ``batch``."""
    calls: dict[str, int] = defaultdict(int)
    handles = []
    for path, module in folded_modules(network).items():

        def before(module: Any, args: Any, kwargs: Any, path: str = path) -> None:
            call = calls[path]
            calls[path] += 1
            if call >= len(recording.inputs[path]):
                return
            dims = batch_dims(_shapes(args, kwargs), recording.inputs[path][call], rows, batch)
            if dims is None:
                return
            if isinstance(module, FoldedLayer):
                if dims and isinstance(pytree.tree_leaves((args, kwargs))[0], Tensor):
                    module.__dict__["batch_dim"] = dims[0]
                return
            outputs = recording.outputs[path][call] if call < len(recording.outputs[path]) else []
            module.__dict__["layout"] = (dims, _output_dims(module, args, kwargs, outputs, dims, rows, batch))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_dims(
    module: Any, args: Any, kwargs: Any, member: Shapes, dims: list[int | None], rows: int, batch: int
) -> list[int | None] | None:
    if not any(dim is not None for dim in dims) or any(
        isinstance(leaf, MemberTensor) for leaf in pytree.tree_leaves((args, kwargs))
    ):
        nowhere: list[int | None] = [None] * len(member)
        return nowhere if all(dim is None for dim in dims) else None
    if rows == batch or all(shape is None for shape in member):
        return None
    first = next(dim for dim in dims if dim is not None)
    if all(shape is not None and len(shape) > first for shape in member) and first == 0 and len(member) == 1:
        return [0]  # one result, batch first in and out: what nearly every module does
    with torch.no_grad():  # one member on the whole folded batch shows which dimension of each result grows
        whole = call_member(module.skeleton[0], member_tensors(module, 0), args, kwargs)
    return batch_dims(_shapes(whole), member, rows, batch)


def first_parting(
    network: nn.Module,
    run_fold: Callable[[], Any],
    run_member: Callable[[int], Any],
    skeleton: nn.Module,
    num_members: int,
) -> str | None:
    """The first module, in order of completion, whose folded output is not that of the members joined."""
    folded: dict[str, Tensor] = {}
    paths = list(folded_modules(network))

    def watch(root: nn.Module, keep: Callable[[str, Tensor], None]) -> list[Any]:
        def hook(path: str) -> Callable[..., None]:
            def after(_: Any, __: Any, output: Any) -> None:
                leaf = next((x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)), None)
                if leaf is not None:
                    keep(path, leaf.detach())

            return after

        return [root.get_submodule(path).register_forward_hook(hook(path)) for path in paths]

    handles = watch(network, folded.setdefault)
    try:
        run_fold()
    except Exception:
        folded.setdefault("", torch.empty(0))  # what completed before the error is still compared
    finally:
        for handle in handles:
            handle.remove()
    compared: dict[str, int] = defaultdict(int)
    parting: set[str] = set()
    for k in range(num_members):  # one at a time, so that no more than one member's outputs are held beside the fold's
        looped: dict[str, Tensor] = {}
        handles = watch(skeleton, looped.setdefault)
        try:
            run_member(k)
        finally:
            for handle in handles:
                handle.remove()
        for path in folded.keys() & looped.keys():
            output, expected = folded[path], looped[path]
            dims = batch_dims([tuple(output.shape)], [tuple(expected.shape)], num_members)
            if dims and dims[0] is not None:
                output = output.narrow(dims[0], k * expected.shape[dims[0]], expected.shape[dims[0]])
            compared[path] += 1
            if relative_error(output, expected) > tolerance_for(expected, network):
                parting.add(path)
    return next((path for path in folded if path in parting and compared[path] == num_members), None)

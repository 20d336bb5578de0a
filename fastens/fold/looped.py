"""One module run member by member, where it has no member-batched form."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call

from fastens.fold.member_tensor import MemberTensor


def member_tensors(module: nn.Module, k: int) -> dict[str, Tensor]:
    """The tensors of member k of a folded module and its children, by the member's names (views of the stacks)."""
    tensors: dict[str, Tensor] = {}
    for path, child in module.named_modules():
        shared = getattr(child, "shared", frozenset())
        prefix = f"{path}." if path else ""
        for owned in (child._parameters, child._buffers):
            for name, t in owned.items():
                if t is not None:
                    tensors[prefix + name] = t if name in shared else t[k]
    return tensors


def call_member(skeleton: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the skeleton with one member's tensors."""
    modules = list(skeleton.named_modules())
    # Recurrent layers hold a second reference to their weights.
    flat = [(f"{path}." if path else "", m) for path, m in modules if isinstance(m, nn.RNNBase)]
    saved = [(m, m._flat_weights) for _, m in flat]
    try:
        for prefix, m in flat:
            m._flat_weights = [tensors[prefix + name] for name in m._flat_weights_names]
        if torch.compiler.is_compiling():
            return functional_call(skeleton, tensors, args, kwargs, strict=True)
        return _call_with(skeleton, modules, tensors, args, kwargs)
    finally:
        for m, weights in saved:
            m._flat_weights = weights


def _call_with(
    skeleton: nn.Module,
    modules: list[tuple[str, nn.Module]],
    tensors: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``functional_call`` without its checks, which take longer than a small network."""
    saved: list[tuple[dict[str, Any], str, Tensor]] = []
    first: dict[int, Tensor] = {}  # a tied tensor has a value under its first name
    try:
        for path, module in modules:
            prefix = f"{path}." if path else ""
            for owned in (module._parameters, module._buffers):
                for name, t in owned.items():
                    if t is not None:
                        saved.append((owned, name, t))
                        owned[name] = first.setdefault(id(t), tensors.get(prefix + name, t))
        return skeleton(*args, **kwargs)
    finally:
        for owned, name, t in saved:
            owned[name] = t


def run_looped(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Split the batch by member, run the member's own module on each part, and join the results.

    Where the batch is in each argument and result is ``module.layout``: (argument dimensions, result dimensions),
    one entry per tensor leaf, none for a tensor without batch. Without a layout dimension 0 is taken.
    """
    rows = module.rows
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if module.layout is None:
        in_dims = [0 if rows.carries_batch(leaves[i]) else None for i in tensors]
        out_dims = None
    else:
        in_dims, out_dims = module.layout
    skips = rows.offsets is not None and (out_dims is None or None not in out_dims)
    results = []
    for k in range(rows.num_members):
        if skips and rows.total > 0 and rows.offsets[k] == rows.offsets[k + 1]:
            continue  # batch statistics of no rows would be no numbers
        taken = list(leaves)
        for i, dim in zip(tensors, in_dims, strict=True):
            if dim is not None:
                taken[i] = _group(leaves[i], dim, k, rows)
        taken = [leaf.stack[k] if isinstance(leaf, MemberTensor) else leaf for leaf in taken]
        member_args, member_kwargs = pytree.tree_unflatten(taken, spec)
        results.append(call_member(module.skeleton[0], member_tensors(module, k), member_args, member_kwargs))
    columns = [pytree.tree_leaves(result) for result in results]
    count = sum(isinstance(leaf, Tensor) for leaf in columns[0])
    dims = iter([0] * count if out_dims is None else out_dims)
    joined = [_join(column, dims, rows) for column in zip(*columns, strict=True)]
    return pytree.tree_unflatten(joined, pytree.tree_structure(results[0]))


def _group(x: Tensor, dim: int, k: int, rows: Any) -> Tensor:
    offsets = rows.scaled_offsets(x.shape[dim])
    if offsets is None:
        size = x.shape[dim] // rows.num_members
        return x.narrow(dim, k * size, size)
    return x.narrow(dim, int(offsets[k]), int(offsets[k + 1] - offsets[k]))


def _join(column: tuple[Any, ...], dims: Any, rows: Any) -> Any:
    if not isinstance(column[0], Tensor):
        return column[0]
    dim = next(dims)
    if dim is None:
        return MemberTensor(torch.stack(column), rows)
    return torch.cat(column, dim)

"""Reading members: their skeleton, their tensors stacked, and where two of them differ."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastens.fold.registry import is_registered


class DifferentMembers(ValueError):
    """Members whose structure or parameter shapes differ, so that only the loop can run them."""


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tied tensor once under its first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def replaced(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Copy a module with its parameters and buffers replaced, ties and second references kept."""
    originals = tensors_of(module)
    memo = {id(originals[name]): tensor for name, tensor in tensors.items()}
    return copy.deepcopy(module, memo)


def make_skeleton(member: nn.Module) -> nn.Module:
    """Copy a member's structure without its weights: parameters and buffers on the meta device."""

    def empty(tensor: Tensor) -> Tensor:
        shell = torch.empty_like(tensor, device="meta")
        return nn.Parameter(shell, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shell

    return replaced(member, {name: empty(tensor) for name, tensor in tensors_of(member).items()})


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name == "training" or name.startswith("_"):
            continue
        if value is None or isinstance(value, bool | int | float | str | tuple | torch.dtype | Tensor):
            yield name, value


def _class_names(module: nn.Module) -> list[tuple[str, str]]:
    # Names, not identity: parametrizations give every module a class of its own.
    return [(parent.__module__, parent.__qualname__) for parent in type(module).__mro__]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and a == b


def first_difference(first: nn.Module, other: nn.Module) -> str | None:
    """Where two members differ in class, settings or parameter shapes, or none: ``path: this against that``."""
    ours, theirs = dict(first.named_modules()), dict(other.named_modules())
    for path in [*ours, *theirs]:
        if path not in ours or path not in theirs:
            return f"{path}: present in one and absent in the other"
        a, b = ours[path], theirs[path]
        if _class_names(a) != _class_names(b):
            return f"{path or 'the root'}: {type(a).__name__} against {type(b).__name__}"
        there = dict(_settings(b))
        for name, value in _settings(a):
            if not _same(value, there.get(name)):
                return f"{f'{path}.' if path else ''}{name}: {value!r} against {there.get(name)!r}"
    a_tensors, b_tensors = tensors_of(first), tensors_of(other)
    for name in [*a_tensors, *b_tensors]:
        if name not in a_tensors or name not in b_tensors:
            return f"{name}: present in one and absent (or tied) in the other"
        if a_tensors[name].shape != b_tensors[name].shape:
            return f"{name}: shape {list(a_tensors[name].shape)} against {list(b_tensors[name].shape)}"
    return None


def check_members(members: Any) -> None:
    """Raise unless ``members`` is a sequence of at least one module, or of at least one path.

    A lazy sequence (:func:`fastens.load_members`) reads its files when it is indexed and is not looked into.

    Raises:
        TypeError: no sequence, or an entry that is neither, or modules and paths mixed.
        ValueError: no entry.
    """
    if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList):
        raise TypeError("members is one module, expected a sequence of them: Ensemble([model, ...])")
    if isinstance(members, str | Path):
        raise TypeError(f"members is one path, expected a sequence of them: Ensemble([{str(members)!r}])")
    if not (hasattr(members, "__len__") and hasattr(members, "__getitem__")) or isinstance(members, dict):
        raise TypeError(f"members is a {type(members).__name__}, expected a sequence: Ensemble(list(...))")
    if len(members) == 0:
        raise ValueError("members is empty, expected at least one module or checkpoint")
    if not isinstance(members, list | tuple | nn.ModuleList):
        return
    wanted = (str, Path) if isinstance(members[0], str | Path) else (nn.Module,)
    for k, member in enumerate(members):
        if isinstance(member, nn.Module | str | Path) and not isinstance(member, wanted):
            raise TypeError(f"member {k} is a {type(member).__name__}, but member 0 a {type(members[0]).__name__}")
        if not isinstance(member, wanted):
            raise TypeError(
                f"member {k} is a {type(member).__name__}, expected a torch.nn.Module or the path of a checkpoint"
            )


def check_placement(first: dict[str, Tensor], other: dict[str, Tensor], k: int) -> None:
    """Raise if member k's tensors differ from the first's in dtype or device."""
    for name, tensor in other.items():
        expected = first[name]
        if tensor.dtype != expected.dtype:
            raise ValueError(
                f"member {k}: {name} is {tensor.dtype}, but {expected.dtype} in member 0; "
                f"convert the members to one dtype first, e.g. member.to({expected.dtype})"
            )
        if tensor.device != expected.device:
            raise ValueError(
                f"member {k}: {name} is on {tensor.device}, but on {expected.device} in member 0; "
                f"move the members to one device first, e.g. member.to('{expected.device}')"
            )


def stack_members(members: Sequence[nn.Module]) -> tuple[nn.Module, dict[str, Tensor], frozenset[str]]:
    """Read the members one at a time into stacks.

    Args:
        members: K modules of one structure; a lazy sequence is indexed once per member, so that only one is in memory.

    Returns:
        The skeleton; the stacks [K, ...] by name (a shared tensor as it is); and the names of the shared tensors, which
        are the fixed ones of modules that are not registered, equal in all members.

    Raises:
        DifferentMembers: structure, settings or shapes differ; names the first difference.
        ValueError: dtypes or devices differ.
    """
    num_members = len(members)
    first = members[0]
    skeleton = make_skeleton(first)
    tensors = tensors_of(first)
    fixed = _fixed(first, tensors)
    stacks: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stack = _empty_stack(num_members, tensor)
        stack[0].copy_(tensor.detach())
        stacks[name] = nn.Parameter(stack, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else stack
    for k in range(1, num_members):
        member = members[k]
        difference = first_difference(first, member)
        if difference is not None:
            raise DifferentMembers(f"member {k} differs from member 0 at {difference}")
        others = tensors_of(member)
        check_placement(tensors, others, k)
        for name, tensor in others.items():
            stacks[name].data[k].copy_(tensor.detach())
            if name in fixed and not torch.equal(tensor, tensors[name]):
                fixed.discard(name)
    for name in fixed:
        shared = stacks[name].data[0].clone()
        stacks[name] = nn.Parameter(shared, False) if isinstance(stacks[name], nn.Parameter) else shared
    return skeleton, stacks, frozenset(fixed)


def _empty_stack(num_members: int, tensor: Tensor) -> Tensor:
    """Memory for [K, ...]. Kernels in ``channels_last`` stay so: a GPU's library would rearrange them in every call."""
    shape, like = tensor.shape, {"dtype": tensor.dtype, "device": tensor.device}
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.empty((num_members, shape[0], *shape[2:], shape[1]), **like).movedim(-1, 2)
    return torch.empty((num_members, *shape), **like)


def in_format(stack: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A stack [K, ...] with each member's tensor in a memory format, where that is one for its number of dimensions."""
    if memory_format is torch.contiguous_format:
        return stack.contiguous()
    ndim = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
    return stack.movedim(2, -1).contiguous().movedim(-1, 2) if stack.ndim - 1 == ndim else stack


def _fixed(member: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    modules = dict(member.named_modules())
    return {
        name
        for name, tensor in tensors.items()
        if not tensor.requires_grad and not is_registered(modules[name.rpartition(".")[0]])
    }

"""Reading members: their structure, and their tensors stacked."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastens.fold.attributes import attributes_of, give
from fastens.fold.tensor import MemberTensor, modules_of, tensors_of
from fastens.network.alike import HOOK_TABLES, attributes_apart, first_difference
from fastens.network.deep_copies import copied
from fastens.network.overlaps import overlapping, trained_together
from fastens.network.parametrized import with_own_classes
from fastens.network.reaching_back import reaches_back
from fastens.network.snapshots import held_tensors, same_bits
from fastens.network.tables import tables_of

__all__ = [
    "AS_THEY_ARE",
    "DifferentMembers",
    "Placement",
    "Stacked",
    "check_members",
    "make_skeleton",
    "replaced",
    "set_format",
    "stack_members",
    "tensors_of",
]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where stacks are made, and in which floating-point dtype; none for that of the members.

    Attributes:
        device: of all tensors.
        dtype: of those of floating-point numbers.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, device: torch.device | str | None, dtype: torch.dtype | None) -> "Placement":
        """What was asked for.

        Raises:
            TypeError: ``dtype`` is no floating-point dtype of torch.
            RuntimeError: ``device`` is none of torch's.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype is {dtype!r}, expected a floating-point dtype of torch, as torch.bfloat16")
        return cls(None if device is None else torch.device(device), dtype)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What ``nn.Module.to`` takes."""
        return tuple(each for each in (self.device, self.dtype) if each is not None)

    @property
    def changes(self) -> bool:
        """Whether anything was asked for."""
        return bool(self.arguments)

    def like(self, tensor: Tensor) -> dict[str, Any]:
        """Device and dtype of what becomes of a tensor."""
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return {"dtype": dtype, "device": tensor.device if self.device is None else self.device}


AS_THEY_ARE = Placement()
_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # the classes of tensors that stacks stand for


class DifferentMembers(ValueError):
    """Members whose structure or parameter shapes differ, so that only the loop can run them."""


class Stacked(NamedTuple):
    """Members of one structure, as they were read.

    Attributes:
        skeleton: one member's structure, parameters and buffers on the meta device.
        stacks: its tensors [K, ...] by name, a shared one as it is.
        shared: the names of those that are held once.
        overlapping: the names of those that share memory in a member, which stacks hold apart, attributes among them:
            code may read and not write to them, and they are not trained; see :mod:`fastens.network.overlaps`.
    """

    skeleton: nn.Module
    stacks: dict[str, Tensor]
    shared: frozenset[str]
    overlapping: frozenset[str]


def replaced(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Copy a module with its parameters and buffers replaced, ties and second references kept."""
    originals = tensors_of(module)
    memo = {id(originals[name]): tensor for name, tensor in tensors.items()}
    memo |= {id(tensor): tensor.detach().clone() for tensor in _made_anew(module)}
    attributes = {name: kept for name in tensors if (kept := attributes_of(originals[name]))}
    # which may refer to parts of the module
    made, attributes = copied((module, attributes), memo) if attributes else (copied(module, memo), attributes)
    for name, kept in attributes.items():
        tensor = tensors[name]
        give(tensor.stack if isinstance(tensor, MemberTensor) else tensor, kept)
    with_own_classes(each for _, each in modules_of(made))
    for (_, one), (_, other) in zip(modules_of(made), modules_of(module), strict=True):
        one.training = other.training  # which some classes do not copy
    return made


def difference_of_copy(member: nn.Module, made: nn.Module) -> str | None:
    """The first attribute in which a copy of a member differs from it, by its path; none where it is alike."""
    apart = attributes_apart(member, made, {*HOOK_TABLES, "training"})
    for (path, module), (_, other) in zip(modules_of(member), modules_of(made), strict=True):
        for name in apart(module, other):
            return f"{path}.{name}" if path else name
    return None


_COMPUTING = {  # hooks of torch, and what does the same without an attribute
    BasePruningMethod: "pruning computes and keeps: make it a parameter by torch.nn.utils.prune.remove",
    WeightNorm: "weight_norm computes and keeps: use torch.nn.utils.parametrizations.weight_norm",
    SpectralNorm: "spectral_norm computes and keeps: use torch.nn.utils.parametrizations.spectral_norm",
}


def _computed(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """The weights that hooks of torch compute before every call: names, values, and what to do to be folded."""
    for path, each in modules_of(module):
        for hook in each._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
                name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
                weight = vars(each).get(name)
                if isinstance(weight, Tensor):
                    kind = next(base for base in type(hook).__mro__ if base in _COMPUTING)
                    yield f"{path}.{name}" if path else name, weight, _COMPUTING[kind]


def _made_anew(module: nn.Module) -> Iterator[Tensor]:
    """Those of them that autograd made: Python cannot copy those."""
    return (weight for _, weight, _ in _computed(module) if not weight.is_leaf)


def _remedy(member: nn.Module, difference: str) -> str:
    """What to do where members differ in what a hook of torch computes of their weights; empty where they do not."""
    found = (what for name, _, what in _computed(member) if difference.startswith(f"{name}:"))
    return next((f", which {what} on every member, and they are evaluated at once" for what in found), "")


def make_skeleton(member: nn.Module) -> nn.Module:
    """Copy a member's structure without its weights: parameters and buffers on the meta device."""

    def empty(tensor: Tensor) -> Tensor:
        shell = torch.empty_like(tensor, device="meta")
        return nn.Parameter(shell, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shell

    return replaced(member, {name: empty(tensor) for name, tensor in tensors_of(member).items()})


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


def check_placement(first: dict[str, Tensor], other: dict[str, Tensor], k: int, place: Placement) -> None:
    """Raise if member k's tensors differ from the first's in dtype or device, where nobody said which to take."""
    for name, tensor in other.items():
        expected = first[name]
        if place.like(tensor)["dtype"] != place.like(expected)["dtype"]:
            raise ValueError(
                f"member {k}: {name} is {tensor.dtype}, but {expected.dtype} in member 0; "
                f"convert the members to one dtype first, e.g. member.to({expected.dtype}), or say dtype="
            )
        if tensor.device != expected.device and place.device is None:
            raise ValueError(
                f"member {k}: {name} is on {tensor.device}, but on {expected.device} in member 0; "
                f"move the members to one device first, e.g. member.to('{expected.device}'), or say device="
            )


def stack_members(
    members: Sequence[nn.Module],
    place: Placement = AS_THEY_ARE,
    into: Mapping[str, Tensor] | None = None,
    known: Iterable[str] = (),
) -> Stacked:
    """Read the members one at a time into stacks.

    Args:
        members: K modules of one structure; a lazy sequence is indexed once per member, so that only one is in memory.
        place: device and dtype of the stacks.
        into: stacks by name that take the members' values where these fit; what members had apart stays apart.
        known: names of tensors that shared memory in what the members were made from.

    Returns:
        What was read. Shared are tensors that are one in all members, and those that are equal in all of them and are
        not trained.

    Raises:
        DifferentMembers: members differ in anything but the values of their tensors; names the first difference.
        ValueError: dtypes or devices differ.
    """
    num_members, into = len(members), into or {}
    first = members[0]
    for member in members if isinstance(members, list | tuple | nn.ModuleList) else (first,):
        check_apart(member)
    back = reaches_back(first)
    if back is not None:
        raise DifferentMembers(f"{back.name} reaches a part of its member {back.how}, which a copy of it would share")
    for name, tensor in tensors_of(first).items():
        if is_lazy(tensor):
            raise DifferentMembers(
                f"{name} has no shape before the first call of its member; call each member once, then make the "
                "ensemble of them"
            )
    try:
        skeleton = make_skeleton(first)
    except Exception as error:
        raise DifferentMembers(f"members cannot be copied ({type(error).__name__}: {error})") from error
    tensors = tensors_of(first)
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise DifferentMembers(
                f"{name} is {str(tensor.layout).removeprefix('torch.')}, of which there are no stacks"
            )
    referring = _refers_to_weight(tensors)
    if referring is not None:
        raise DifferentMembers(f"{referring}, an attribute of a parameter or buffer, holds a weight of its member")
    found = overlapping([first]).union(known)
    identical = set(tensors)
    equal = {name for name, tensor in tensors.items() if not tensor.requires_grad} - set(_statistics(first))
    equal -= {name for name in equal if name in into and into[name].ndim > tensors[name].ndim}
    stacks: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stack = _empty_stack(num_members, tensor, place.like(tensor))
        stack[0].copy_(tensor.detach())
        stacks[name] = nn.Parameter(stack, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else stack
    for k in range(1, num_members):
        member = members[k]
        check_apart(member)
        found |= overlapping([member])
        difference = first_difference(first, member)
        if difference is not None:
            raise DifferentMembers(f"member {k} differs from member 0 at {difference}{_remedy(first, difference)}")
        others = tensors_of(member)
        check_placement(tensors, others, k, place)
        for name, tensor in others.items():
            stack = stacks[name].data
            with torch.no_grad():
                stack[k].copy_(tensor.detach())
            if tensor is not tensors[name]:
                identical.discard(name)
                if name in equal and not _same_values(stack[k], stack[0]):
                    equal.discard(name)
    difference = difference_of_copy(first, skeleton)
    if difference is not None:
        raise DifferentMembers(f"a copy of a member differs from it at {difference}")
    if num_members == 1:
        identical = set()
    shared = identical | equal
    if num_members > 1 and tensors and all(n in shared or _equal_in_all(s.data) for n, s in stacks.items()):
        warnings.warn(
            f"fastens: all {num_members} members hold the same weights, so they are one network {num_members} times; "
            "are these checkpoints of different runs?",
            stacklevel=3,
        )
    for name in shared:
        one = stacks[name].data[0].clone()
        trained = tensors[name].requires_grad
        stacks[name] = nn.Parameter(one, trained) if isinstance(stacks[name], nn.Parameter) else one
    stacks = {name: written_into(into.get(name), stack) for name, stack in stacks.items()}
    return Stacked(skeleton, stacks, frozenset(shared), found)


def check_apart(member: nn.Module) -> None:
    """Raise where a member has parts that no stacks can stand for.

    Raises:
        DifferentMembers: names the part.
    """
    for path, module in modules_of(member):
        where = path or "the member"
        if isinstance(module, torch.jit.ScriptModule):
            raise DifferentMembers(f"{where} is a TorchScript module, whose functions the fold does not see")
        if "_engine" in vars(module):
            raise DifferentMembers(
                f"{where} is an ensemble itself, which evaluates its members by itself: where all are to be evaluated "
                "at once, make one ensemble of them"
            )
    for name, tensor in tensors_of(member).items():
        if not (type(tensor) in _PLAIN or is_lazy(tensor)):
            kind = type(tensor).__qualname__
            raise DifferentMembers(f"{name} is a {kind}, a class of its own, which no stack of all members has")
    if (pair := trained_together(member)) is not None:
        raise DifferentMembers(f"{' and '.join(pair)} share memory in a member, which stacks hold apart")


def written_into(held: Tensor | None, stack: Tensor) -> Tensor:
    """What is held with the values of a stack, where it can have them; else the stack."""
    place = ("shape", "dtype", "device")
    if held is None or held.is_inference() or type(held) is not type(stack):
        return stack
    if any(getattr(held, n) != getattr(stack, n) for n in place):
        return stack
    if not same_bits(held, stack):
        with torch.no_grad():
            held.copy_(stack)
    return held if held.requires_grad is stack.requires_grad else held.requires_grad_(stack.requires_grad)


def _refers_to_weight(tensors: dict[str, Tensor]) -> str | None:
    """The first attribute that a parameter or buffer has and that reaches one of them, by its path."""
    own = {id(tensor) for tensor in tensors.values()}
    for name, tensor in tensors.items():
        for attribute, value in attributes_of(tensor).items():
            holder = nn.Module()
            vars(holder)[attribute] = value
            if any(id(held) in own for held in held_tensors(holder)):
                return f"{name}.{attribute}"
    return None


def _equal_in_all(stack: Tensor) -> bool:
    return all(_same_values(own, stack[0]) for own in stack[1:])


def _same_values(a: Tensor, b: Tensor) -> bool:
    return not (a.is_meta or b.is_meta) and same_bits(a, b)


def _statistics(member: nn.Module) -> Iterator[str]:
    """The buffers that normalisations write in training: each member's own, also while they are equal."""
    for path, module in modules_of(member):
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for name, _ in module.named_buffers(recurse=False):
                yield f"{path}.{name}" if path else name


def _empty_stack(num_members: int, tensor: Tensor, like: dict[str, Any]) -> Tensor:
    """Memory for [K, ...]. Kernels in ``channels_last`` stay so: a GPU's library would rearrange them in every call."""
    shape = tensor.shape
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.empty((num_members, shape[0], *shape[2:], shape[1]), **like).movedim(-1, 2)
    return torch.empty((num_members, *shape), **like)


def set_format(network: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out each member's tensors of a folded network in a memory format, where it is one for their dimensions."""
    ndim = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
    for _, _, table in tables_of(network):
        for name, stack in table.items():
            if stack is None or name in table.common:
                continue
            if memory_format is torch.contiguous_format:
                stack.data = stack.data.contiguous()
            elif stack.ndim - 1 == ndim:
                stack.data = stack.data.movedim(2, -1).contiguous().movedim(-1, 2)

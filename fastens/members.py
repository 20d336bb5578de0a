"""One member of an ensemble: handed out as a copy, and replaced by another."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastens.fold.attributes import standing_for
from fastens.fold.tensor import modules_of
from fastens.internal import engine_of, modules_apart
from fastens.modes import in_mode, moved
from fastens.network.alike import first_difference
from fastens.network.overlaps import overlapping
from fastens.network.own_states import State, own_state
from fastens.network.own_states import moved as moved_state
from fastens.network.own_states import write as write_state
from fastens.network.reaching_back import reaches_back
from fastens.network.snapshots import exchange
from fastens.network.stacking import difference_of_copy, make_skeleton, replaced, tensors_of, written_into

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble


class Members(Sequence[nn.Module]):
    """The members of an ensemble, each made when it is asked for, with a copy of its weights."""

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble

    def __len__(self) -> int:
        return self._ensemble.num_members

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        k = checked_index(k, len(self))
        ensemble = self._ensemble
        engine = engine_of(ensemble)
        return copied(modules_apart(ensemble).get()[k]) if engine is None else engine.member(k)


def checked_index(k: int, num_members: int) -> int:
    """The number of a member from 0, also where it is counted from the end.

    Raises:
        IndexError: there is no such member.
    """
    if not -num_members <= k < num_members:
        raise IndexError(f"member {k} of {num_members}")
    return k % num_members


def copied(member: nn.Module) -> nn.Module:
    """A module with tensors of its own.

    One comes as it is that cannot be copied, whose copy differs from it or would reach it, and in which
    tensors share memory, which a copy would hold apart.
    """
    if reaches_back(member) is not None or overlapping([member]):
        return member
    try:
        made = copy_of(member)
    except Exception:  # it refers to what Python cannot copy
        return member
    return made if difference_of_copy(member, made) is None else member


def copy_of(module: nn.Module) -> nn.Module:
    """A copy of a module, also of one whose hooks computed weights of it by autograd, which ``deepcopy`` refuses.

    Raises:
        Exception: it refers to what Python cannot copy.
    """

    def own(tensor: Tensor) -> Tensor:
        if is_lazy(tensor) or (isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter):  # of its class
            return copy.deepcopy(tensor)
        clone = tensor.detach().clone()
        return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone

    return replaced(module, {name: own(tensor) for name, tensor in tensors_of(module).items()})


def replace_member(ensemble: Ensemble, k: int, member: nn.Module | Mapping[str, Any]) -> None:
    """See :meth:`fastens.Ensemble.replace_member`."""
    k = checked_index(k, ensemble.num_members)
    engine = engine_of(ensemble)
    if engine is not None and not engine.kind.own_weights:
        raise ValueError("members are dropout masks on one set of weights; change that by load_state_dict")
    if isinstance(member, nn.Module):
        module = member
    elif isinstance(member, Mapping):
        module = ensemble.members[k]
        try:
            module.load_state_dict(member)
        except RuntimeError as error:
            raise ValueError(f"the state_dict does not fit member {k}: {' '.join(str(error).split())}") from error
    else:
        raise TypeError(f"member is a {type(member).__name__}, expected a torch.nn.Module or a state_dict")
    with torch.inference_mode(False):
        if engine is None:
            held = list(ensemble.network.children())[k]
            _check_dtypes(held, module, k)
            own = copied(module)
            if own.training is not held.training:  # of parts the modes stay, as those of a member that is loaded into
                own = in_mode(own, held.training)
            own = moved(own, ensemble.device)
            if own is not module and copied(held) is not held:  # which could not be copied, and are the user's
                _hold_parameters(held, own)
            ensemble.network.register_module(str(k), own)
        else:
            _write(engine, k, module, with_state=module is member)
    ensemble.refresh()


def _hold_parameters(held: nn.Module, own: nn.Module) -> None:
    """Let a module have the parameters of another, where its own values fit into them: an optimizer may hold those."""
    before, kept = tensors_of(held), dict[int, Any]()
    for name, p in tensors_of(own).items():
        if isinstance(p, nn.Parameter) and (other := written_into(before.get(name), p)) is not p:
            kept[id(p)] = standing_for(other, p)
    for _, each in modules_of(own):
        each._parameters.update({n: kept[id(p)] for n, p in each._parameters.items() if id(p) in kept})
    exchange(own, kept)


def _write(engine: Any, k: int, module: nn.Module, with_state: bool) -> None:
    """Copy a module's tensors into member k's part of the stacks, once it is known to fit; and its Python state."""
    skeleton = engine.skeleton
    state = _new_state(engine, skeleton, module, k) if with_state else None
    tensors, stacks = tensors_of(module), tensors_of(engine.network)
    for name, tensor in tensors.items():
        if name not in stacks:
            raise ValueError(f"member {k}: {name} is a tensor that calls made, of which there is no stack; {_anew(k)}")
        shape = stacks[name].shape if name in engine.shared else stacks[name].shape[1:]
        if tensor.shape != shape:  # one that the member itself put there
            raise ValueError(f"member {k}: {name} is {list(tensor.shape)}, but {list(shape)} in others; {_anew(k)}")
        if tensor.dtype != stacks[name].dtype:
            raise ValueError(
                f"member {k}: {name} is {tensor.dtype}, but {stacks[name].dtype} in the ensemble; "
                f"convert it first, e.g. member.to({stacks[name].dtype})"
            )
    try:
        engine.check_overlaps(module)
    except ValueError as error:
        raise ValueError(f"member {k}: {error}; {_anew(k)}") from error
    shared = [name for name in engine.shared if not torch.equal(tensors[name].to(stacks[name].device), stacks[name])]
    engine.unshare(shared)
    one = next((name for name in shared if name in engine.shared), None)
    if one is not None:
        raise ValueError(
            f"member {k}: {one} is another one than that of the ensemble, which is one object in all members or in a "
            f"module that was put in; {_anew(k)}"
        )
    for name, stack in tensors_of(engine.network).items():
        if name not in engine.shared:
            with torch.inference_mode() if stack.is_inference() else torch.no_grad():
                stack[k].copy_(tensors[name].detach())
    if state is not None:
        engine.take_state(skeleton, k, state)


def _check_dtypes(before: nn.Module, module: nn.Module, k: int) -> None:
    """Raise ValueError where a module has tensors of a floating-point dtype that the one before it had not."""
    old, new = ({t.dtype for t in tensors_of(m).values() if t.is_floating_point()} for m in (before, module))
    if not new <= old:
        had = ", ".join(sorted(map(str, old)))
        found = next(f"{n} is {t.dtype}" for n, t in tensors_of(module).items() if t.dtype in new - old)
        raise ValueError(f"member {k}: {found}, but {had} in the ensemble; convert it first, as by member.to")


def _new_state(engine: Any, skeleton: nn.Module, module: nn.Module, k: int) -> State | None:
    """What a module wrote to itself, where it is not what member k did; modes apart.

    Raises:
        ValueError: it differs from the members in more, or members run as one.
    """
    back = reaches_back(module)
    if back is not None:
        raise ValueError(
            f"member {k}: {back.name} reaches a part of its member {back.how}, which a copy of it would share"
        )
    shell = _shell(module, skeleton)
    if first_difference(_shell(engine.member(k), skeleton), shell) is None:
        return None
    state: State = [{} for _ in skeleton.modules()]
    difference = first_difference(skeleton, shell)
    if difference is not None and engine.behaviour.looped and _same_modules(skeleton, shell):
        own = [{n: x for n, x in each.items() if n != "_modules"} for each in own_state(shell, skeleton)]
        state, trial = moved_state(own, shell, skeleton), make_skeleton(skeleton)
        write_state(trial, moved_state(state, skeleton, trial))
        difference = first_difference(trial, shell)
    if difference is not None:
        raise ValueError(
            f"member {k} cannot be replaced: the ensemble's members and this one differ at {difference}; give its "
            f"state_dict where only its weights are meant, or {_anew(k)}"
        )
    return state


def _shell(module: nn.Module, like: nn.Module) -> nn.Module:
    """A module without its weights, in the modes of another."""
    shell = make_skeleton(module)
    modes = {path: each.training for path, each in like.named_modules()}
    for path, each in shell.named_modules():
        each.training = modes.get(path, each.training)
    return shell


def _same_modules(first: nn.Module, other: nn.Module) -> bool:
    paths = [[(path, type(each)) for path, each in module.named_modules()] for module in (first, other)]
    return paths[0] == paths[1]


def _anew(k: int) -> str:
    return f"make another ensemble: members = list(ens.members); members[{k}] = member; fastens.Ensemble(members)"

"""What looped members wrote to themselves: found, copied for others, and given to them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastens.fold.tensor import TABLES, modules_of, tensors_of
from fastens.network.alike import HOOK_TABLES, attributes_apart
from fastens.network.containers import items_in, pairs_in
from fastens.network.deep_copies import copied
from fastens.network.made import MadeWhenCalled, has_tensors, is_apart
from fastens.network.member_tables import MemberTable, names_read
from fastens.network.snapshots import can_change, held_tensors
from fastens.network.stacking import replaced
from fastens.network.state import REREAD

GONE = "fastens: no such attribute"
NO_STATE = {"_barrier", "training"}
TENSORS = ("_parameters", "_buffers")
State = list[dict[str, Any]]  # of a member: attributes for each of its modules


def own_state(member: nn.Module, given: nn.Module) -> State:
    """What a member wrote to itself, as against a member in which no code ran."""
    apart, state = attributes_apart(member, given, NO_STATE), []
    for module, other in pairs_of(member, given):
        if module is None:
            state.append({})
            continue
        names = [name for name in apart(module, other) if "_hooks" not in name and name not in REREAD]
        attributes = {name: vars(module).get(name, GONE) for name in names}
        for table in TENSORS:
            own = module.__dict__[table]
            if isinstance(own, MemberTable) and own.own:
                attributes[table] = {name: own[name] for name in own.own}
        made = {n: x for n, x in module._modules.items() if x is not None and (n not in other._modules or is_apart(x))}
        removed = [name for name in other._modules if name not in module._modules]
        if made or removed:
            attributes["_modules"] = made, removed, module.training
        state.append(attributes)
    return state


def pairs_of(member: nn.Module, network: nn.Module) -> list[tuple[nn.Module | None, nn.Module]]:
    """Each module of a network with the member's, none where the member removed it; what the member made is left out.

    Raises:
        MadeWhenCalled: the member removed some that have tensors.
    """
    own, theirs = dict(modules_of(member)), modules_of(network)
    if removed := [path for path, each in theirs if path not in own and has_tensors(each)]:
        raise MadeWhenCalled(removed)
    return [(own.get(path), each) for path, each in theirs]


def standing_alone(view: nn.Module, skeleton: nn.Module) -> nn.Module:
    """A member with copies of its tensors and of its state, in its structure."""
    tensors = tensors_of(view)

    def cloned(name: str, like: Tensor) -> Tensor:
        clone = tensors[name].detach().clone()
        return nn.Parameter(clone, like.requires_grad) if isinstance(like, nn.Parameter) else clone

    member = replaced(skeleton, {name: cloned(name, like) for name, like in tensors_of(skeleton).items()})
    write(member, moved(own_state(view, member), view, member))
    return member


def moved(state: State, source: nn.Module, target: nn.Module) -> State:
    """A copy of the state of a member for another, with the other's modules and tensors in the place of its own."""
    if not any(state):
        return state
    kept = [tensor for attributes in state for table in TENSORS for tensor in attributes.get(table, {}).values()]
    made = [x for x in (*held_tensors(source), *kept) if isinstance(x, Tensor) and not x.is_leaf]
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in made}  # which Python cannot copy
    put_in = [each for attributes in state if "_modules" in attributes for each in attributes["_modules"][0].values()]
    own, modules = {id(x) for each in put_in for x in each.modules()}, dict(modules_of(target))
    theirs = {id(x): modules[path] for path, x in modules_of(source) if path in modules and id(x) not in own}
    tensors = tensors_of(target)
    apart = {id(tensor) for tensor in kept}  # from the other's, which has that name too
    parts = {read: tensors[name] for read, name in names_read(source).items() if name in tensors and read not in apart}
    memo |= theirs | parts
    sources = {path: vars(x) for path, x in modules_of(source) if id(x) in theirs}
    for (path, module), attributes in zip(modules.items(), state, strict=True):  # what is alike is the other's own
        mine = sources.get(path, {})
        for name in mine.keys() & vars(module).keys() - attributes.keys() - {*TABLES, *HOOK_TABLES}:
            same_objects(mine[name], vars(module)[name], memo)
    return copied(state, memo)


def same_objects(fresh: Any, own: Any, memo: dict[int, Any]) -> None:
    """Note what a member has of its own in the place of each object of a value that it was given."""
    for one, other in in_same_places(fresh, own, memo):
        memo[id(one)] = other


def in_same_places(value: Any, other: Any, known: Container[int]) -> Iterator[tuple[Any, Any]]:
    """The objects of a value that can change, each with what another one has in its place.

    Args:
        value: what is followed.
        other: what is like it.
        known: identities of objects that are left out; what was yielded is to be added before the next.
    """
    if not can_change(value) or id(value) in known:
        return
    yield value, other
    mine, theirs = (x if isinstance(x, dict | list) else getattr(x, "__dict__", {}) for x in (value, other))
    if isinstance(mine, dict) and isinstance(theirs, dict):
        others = dict(pairs_in(theirs))
        for key, one in pairs_in(mine):
            if key in others:
                yield from in_same_places(one, others[key], known)
    elif isinstance(mine, list) and isinstance(theirs, list):
        for one, another in zip(items_in(mine), items_in(theirs), strict=False):
            yield from in_same_places(one, another, known)


def known_places(value: Any, fresh: Any, own: Mapping[int, Any], memo: dict[int, Any]) -> None:
    """Note, for the copy of a value, what a member has of its own in the place of objects that the value reaches.

    Args:
        value: of the network.
        fresh: the copy.
        own: by identity of such objects, the member's.
        memo: by identity of objects of the copy.
    """
    seen = set[int]()
    for one, other in in_same_places(value, fresh, seen):
        seen.add(id(one))
        if id(one) in own:
            same_objects(other, own[id(one)], memo)


def write(member: nn.Module, state: State) -> None:
    """Give a member the state that another one had."""
    for (_, module), attributes in zip(modules_of(member), state, strict=True):
        for name, value in attributes.items():
            if name == "_modules":
                made, removed, module.training = value  # what was made has this mode until the module is given another
                module._modules.update(made)
                for each in removed:
                    module._modules.pop(each, None)
            elif name in TENSORS:
                table = module.__dict__[name]
                for each, tensor in value.items():
                    (table.keep if isinstance(table, MemberTable) else table.__setitem__)(each, tensor)
            elif isinstance(value, str) and value == GONE:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value

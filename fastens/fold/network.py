"""The folded network: a member's own modules and code, whose tables hold the stacks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastens.fold.alike import tensors_of
from fastens.fold.barrier import unwatched
from fastens.fold.members import replaced
from fastens.fold.nested import contents
from fastens.fold.registry import fold_registered
from fastens.fold.tables import OfMember, Stacks, settle
from fastens.fold.tensor import MemberTensor, all_members
from fastens.report import LayerReport

_REREAD = ("_flat_weights", "_flat_weight_refs")  # which recurrent layers make anew in their forward
_TABLES = ("_parameters", "_buffers", "_modules")


def build_network(
    skeleton: nn.Module, stacks: dict[str, Tensor], shared: frozenset[str], num_members: int
) -> nn.Module:
    """Fold a network.

    Args:
        skeleton: the member's structure, parameters and buffers on the meta device.
        stacks: its tensors [K, ...] by name, which become the folded network's parameters and buffers.
        shared: the names of those that are not stacked.
        num_members: K.

    Returns:
        A module of the member's structure and classes; its own code sees one member's shapes.
    """
    hidden = all_members(num_members)
    seen = {name: t if name in shared else MemberTensor(t, hidden) for name, t in stacks.items()}
    network = replaced(skeleton, seen)
    common = {id(t) for name, t in stacks.items() if name in shared}
    for module in network.modules():
        for name in ("_parameters", "_buffers"):
            found = [(n, t.stack if isinstance(t, MemberTensor) else t) for n, t in module.__dict__[name].items()]
            module.__dict__[name] = Stacks(found, num_members, [n for n, t in found if id(t) in common])
    fold_registered(network)
    return network


def skeleton_of(network: nn.Module) -> nn.Module:
    """One member's structure as it is now, with parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, stack in table.items():
                if stack is not None and id(stack) not in memo:
                    one = stack if not isinstance(table, Stacks) or name in table.common else stack[0]
                    shell = one.detach().to("meta", copy=True)
                    shell = nn.Parameter(shell, stack.requires_grad) if isinstance(stack, nn.Parameter) else shell
                    memo[id(stack)] = shell
                    if isinstance(table, Stacks):
                        memo[id(table[name])] = shell
    skeleton = unwatched(copy.deepcopy(network, memo))
    for module in skeleton.modules():
        for name in ("_parameters", "_buffers"):
            module.__dict__[name] = dict(module.__dict__[name].items())
    return skeleton


def shared_names(network: nn.Module) -> frozenset[str]:
    """The names of the tensors that all members share."""
    common: set[int] = set()
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            if isinstance(table, Stacks):
                common.update(id(t) for name, t in table.items() if name in table.common)
    return frozenset(name for name, t in tensors_of(network).items() if id(t) in common)


def lists_weights(network: nn.Module) -> bool:
    """Whether a forward keeps what it reads of its tensors in an attribute, so that others are written there."""
    return any(isinstance(module, nn.RNNBase) for module in network.modules())


class NetworkState:
    """A network's Python state and buffers, to be put back."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._saved = [
            (path, module, _snapshot(module), _tensors(module), _names(module))
            for path, module in network.named_modules()
        ]

    def put_back(self) -> set[str]:
        """Undo what happened to it; return the names of what had been changed."""
        changed = settle(self._network, keeps=False)
        for path, module, before, tensors, tables in self._saved:
            prefix = f"{path}." if path else ""
            now = vars(module)
            for name in [n for n in now if n not in before and n not in (*_TABLES, *_REREAD)]:
                changed.add(f"{prefix}{name}")
                del now[name]
            for name, (value, content) in before.items():
                if now.get(name, changed) is not value:
                    changed.add(f"{prefix}{name}")
                    now[name] = value
                for held, was in content:
                    if not _same_content(held, was):
                        changed.add(f"{prefix}{name}")
                        _restore(held, was)
            for tensor in tensors:
                if tensor.restored():
                    changed.add(f"{prefix}{tensor.name}")
            for table, names in tables:
                for name in set(table) - names:  # registered meanwhile
                    changed.add(f"{prefix}{name}")
                    dict.pop(table, name)
        return changed


def random_kept() -> AbstractContextManager[None]:
    """Undo what is drawn from torch's generators."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


@contextmanager
def state_kept(network: nn.Module) -> Iterator[set[str]]:
    """Undo what a pass does to a network's Python state and to its buffers; yields the names of what it changed."""
    changed: set[str] = set()
    state = NetworkState(network)
    try:
        yield changed
    finally:
        changed |= state.put_back()


class Structure:
    """What a network consisted of, its Python state among it, to go back to where a change of it failed halfway."""

    def __init__(self, network: nn.Module) -> None:
        self._state = [(module, vars(module).copy(), _snapshot(module)) for module in network.modules()]
        tables = [state[name] for _, state, _ in self._state for name in _TABLES]
        self._tables = [(table, dict(dict.items(table)), set(getattr(table, "common", ()))) for table in tables]
        self._versions = {name: tensor._version for name, tensor in tensors_of(network).items()}
        self._network = network

    def restore(self) -> bool:
        """Go back; return whether that is all, which it is not where values of tensors were changed."""
        for module, state, attributes in self._state:
            vars(module).clear()
            vars(module).update(state)
            for _, content in attributes.values():
                for held, was in content:
                    _restore(held, was)
        for table, content, common in self._tables:
            dict.clear(table)
            dict.update(table, content)
            if isinstance(table, Stacks):
                table.common = common
        return self._versions == {name: tensor._version for name, tensor in tensors_of(self._network).items()}


class _Kept:
    """One parameter or buffer as it was: in its table, in memory and, for a buffer, in value."""

    def __init__(self, table: dict[str, Any], name: str, tensor: Tensor) -> None:
        self.name = name
        self._table, self._tensor, self._data = table, tensor, tensor.data
        self._common = isinstance(table, Stacks) and name in table.common
        self._value = None if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    def restored(self) -> bool:
        """Put it back; return whether it had been changed."""
        tensor, changed = self._tensor, False
        if dict.get(self._table, self.name) is not tensor:
            dict.__setitem__(self._table, self.name, tensor)
            changed = True
        if isinstance(self._table, Stacks) and (self.name in self._table.common) is not self._common:
            (self._table.common.add if self._common else self._table.common.discard)(self.name)
        if tensor.data_ptr() != self._data.data_ptr():
            tensor.data = self._data
            changed = True
        if self._value is not None and not _same_bits(tensor, self._value):  # some kernels write without a version
            with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                tensor.copy_(self._value)
            changed = True
        return changed


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all()))


def _tensors(module: nn.Module) -> list[_Kept]:
    found: list[_Kept] = []
    for table in (module._parameters, module._buffers):
        if type(table) in (dict, Stacks, OfMember):
            names = table.own if isinstance(table, OfMember) else table  # the others are the stacks'
            found += [_Kept(table, n, x) for n, x in table.items() if n in names and x is not None]
    return found


def _names(module: nn.Module) -> list[tuple[dict[str, Any], set[str]]]:
    """The module's tables, those of a member's stacks aside, and the names in each."""
    return [(table, set(table)) for table in (module._parameters, module._buffers) if type(table) in (dict, Stacks)]


def _snapshot(module: nn.Module) -> dict[str, tuple[Any, list[tuple[Any, Any]]]]:
    """Every attribute, with the containers that are reached by it and what they hold."""
    skipped = (*_TABLES, *(_REREAD if isinstance(module, nn.RNNBase) else ()))
    return {name: (value, list(contents(value))) for name, value in vars(module).items() if name not in skipped}


def _same_content(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(name in value and value[name] is item for name, item in content.items())
    return value == content if isinstance(value, set) else all(a is b for a, b in zip(value, content, strict=True))


def _restore(value: Any, content: Any) -> None:
    if isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)


def layer_reports(
    network: nn.Module, num_members: int, ways: dict[int, str], why_loop: str | None
) -> list[LayerReport]:
    """What each module of a folded network that owns tensors got.

    Args:
        network: the folded network.
        num_members: K.
        ways: of convolution that the last pass took, by the identity of their kernels.
        why_loop: why the whole network is looped, none where it is folded.
    """
    layers: list[LayerReport] = []
    for path, module in network.named_modules():
        owned = [(n, t, n in table.common) for table in (module._parameters, module._buffers)
                 if isinstance(table, Stacks) for n, t in table.items() if t is not None]  # fmt: skip
        if not owned:
            continue
        how = "looped" if why_loop is not None else "shared" if all(common for _, _, common in owned) else "folded"
        number = sum(t.numel() // (1 if common else num_members) for _, t, common in owned)
        way = next((ways[id(t)] for _, t, _ in owned if id(t) in ways), "torch")
        by = "torch" if how == "looped" else way
        layers.append(LayerReport(path, type(module).__name__, how, by, why_loop or "", number))
    return layers

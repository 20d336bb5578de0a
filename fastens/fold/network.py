"""The folded network: a member's own modules and code, whose tables hold the stacks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastens.fold.alike import tensors_of
from fastens.fold.members import replaced
from fastens.fold.registry import fold_registered
from fastens.fold.tables import Stacks
from fastens.fold.tensor import MemberTensor, all_members
from fastens.report import LayerReport

_REREAD = ("_flat_weights", "_flat_weight_refs")  # which recurrent layers make anew in their forward
_TABLES = ("_parameters", "_buffers", "_modules")


def build_network(skeleton: nn.Module, stacks: dict[str, Tensor], shared: frozenset[str], num_members: int) -> nn.Module:
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
    skeleton = copy.deepcopy(network, memo)
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


@contextmanager
def state_kept(network: nn.Module) -> Iterator[set[str]]:
    """Undo what a pass does to the Python state of a network; yields the names of the attributes that it changed."""
    changed: set[str] = set()
    saved = [(path, module, _snapshot(module)) for path, module in network.named_modules()]
    buffers = [(b, b._version, None) for b in network.buffers() if not isinstance(b, MemberTensor)]
    try:
        yield changed
    finally:
        for path, module, before in saved:
            now = vars(module)
            for name in [n for n in now if n not in before and n not in (*_TABLES, *_REREAD)]:
                changed.add(f"{path}.{name}" if path else name)
                del now[name]
            for name, (value, content) in before.items():
                if now.get(name, changed) is not value:
                    changed.add(f"{path}.{name}" if path else name)
                    now[name] = value
                if content is not None and not _same_content(value, content):
                    changed.add(f"{path}.{name}" if path else name)
                    _restore(value, content)
        for buffer, version, _ in buffers:
            if not buffer.is_inference() and buffer._version != version:
                changed.add("a buffer")


def _snapshot(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    skipped = (*_TABLES, *(_REREAD if isinstance(module, nn.RNNBase) else ()))
    return {
        name: (value, copy.copy(value) if type(value) in (list, dict, set) else None)
        for name, value in vars(module).items()
        if name not in skipped
    }


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


def layer_reports(network: nn.Module, num_members: int, why_loop: str | None) -> list[LayerReport]:
    """What each module of a folded network that owns tensors got.

    Args:
        network: the folded network.
        num_members: K.
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
        layers.append(LayerReport(path, type(module).__name__, how, "torch" if how == "looped" else "", why_loop or "", number))
    return layers

"""The folded network: a member's own modules and code, whose tables hold the stacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastens.fold.attributes import attributes_of, give
from fastens.fold.tensor import MemberTensor, modules_of, of_stack, tensors_of
from fastens.network.barrier import unwatched
from fastens.network.deep_copies import copied
from fastens.network.registry import fold_registered
from fastens.network.snapshots import held_tensors, member_values
from fastens.network.stacking import replaced
from fastens.network.tables import Stacks, unsaved_in
from fastens.report import LayerReport


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
    # Attributes that refer to a weight refer to what the tables give for it, here and in every copy.
    seen = {name: t if name in shared else of_stack(t, num_members) for name, t in stacks.items()}
    network = replaced(skeleton, seen)
    common = {id(t) for name, t in stacks.items() if name in shared}
    for _, module in modules_of(network):
        for name in ("_parameters", "_buffers"):
            found = [(n, t.stack if isinstance(t, MemberTensor) else t) for n, t in module.__dict__[name].items()]
            same = [n for n, t in found if id(t) in common]
            module.__dict__[name] = Stacks(found, num_members, same, unsaved=unsaved_in(module, name))
    fold_registered(network)
    return network


def skeleton_of(network: nn.Module) -> nn.Module:
    """One member's structure as it is now, with parameters and buffers on the meta device.

    What autograd made and the network kept comes without its graph: Python cannot copy that.
    """
    memo = _without_graphs(network)
    for _, module in modules_of(network):
        for table in (module._parameters, module._buffers):
            for name, stack in table.items():
                if stack is not None and id(stack) not in memo:
                    one = stack if not isinstance(table, Stacks) or name in table.common else stack[0]
                    shell = one.detach().to("meta", copy=True)
                    shell = nn.Parameter(shell, stack.requires_grad) if isinstance(stack, nn.Parameter) else shell
                    memo[id(stack)] = shell
                    if isinstance(table, Stacks):
                        memo[id(table[name])] = shell
    attributes = {name: kept for name, x in tensors_of(network).items() if (kept := attributes_of(x))}
    shells = {name: memo[id(x)] for name, x in tensors_of(network).items()}
    skeleton, attributes = copied((network, attributes), memo) if attributes else (copied(network, memo), attributes)
    for name, kept in attributes.items():
        give(shells[name], kept)
    unwatched(skeleton)
    for _, module in modules_of(skeleton):
        for name in ("_parameters", "_buffers"):
            module.__dict__[name] = dict(module.__dict__[name].items())
    return skeleton


def _without_graphs(network: nn.Module) -> dict[int, Any]:
    """Copies of the values that autograd made and that a network keeps in its attributes, by the identity of those."""
    copies: dict[int, Any] = {}
    for each in held_tensors(network):
        if not each.is_leaf:
            copies[id(each)] = each.detach().clone()
    for each in member_values(network):
        if not each.stack.is_leaf:
            copies[id(each)] = MemberTensor(each.stack.detach().clone(), each.hidden, each.alias)
    return copies


def shared_names(network: nn.Module) -> frozenset[str]:
    """The names of the tensors that all members share, those of modules that were put in later among them."""
    stacked: set[int] = set()
    for _, module in modules_of(network):
        for table in (module._parameters, module._buffers):
            if isinstance(table, Stacks):
                stacked.update(id(t) for name, t in table.items() if name not in table.common)
    return frozenset(name for name, t in tensors_of(network).items() if id(t) not in stacked)


def lists_weights(network: nn.Module) -> bool:
    """Whether a forward keeps what it reads of its tensors in an attribute, so that others are written there."""
    return any(isinstance(module, nn.RNNBase) for _, module in modules_of(network))


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
    for path, module in modules_of(network):
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

"""The folded network: a member's structure with stacked tensors and folded layers in place of its own."""

from typing import Any

from torch import Tensor, nn

from fastens.fold.members import replaced, tensors_of
from fastens.fold.registry import FoldedModule, folded_class_of
from fastens.fold.rows import Rows


def build_network(skeleton: nn.Module, stacks: dict[str, Tensor], shared: frozenset[str], rows: Rows) -> nn.Module:
    """Fold a network.

    Args:
        skeleton: the member's structure, parameters and buffers on the meta device.
        stacks: its tensors [K, ...] by name, which become the folded network's parameters and buffers.
        shared: the names of those that are not stacked.
        rows: the object in which the ensemble says which rows a pass has.

    Returns:
        A module of the member's structure that takes the folded batch; every module in it that owns tensors has
        taken a class that is also its own, see :func:`folded_class_of`.
    """
    network = replaced(skeleton, stacks)
    originals = dict(skeleton.named_modules(remove_duplicate=False))
    by_identity = {id(tensor): name for name, tensor in tensors_of(network).items()}
    for path, module in network.named_modules():
        owned = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if owned:
            fold_in_place(module, path, originals[path], rows)
            module.__dict__["shared"] = frozenset(name for name, t in owned if by_identity[id(t)] in shared)
    return network


def fold_in_place(module: Any, path: str, skeleton: nn.Module, rows: Rows) -> None:
    """Give a module its folded class, keeping its identity, so that every reference to it holds."""
    names = tuple(name for names in (module._parameters, module._buffers) for name in names)
    module.__class__ = folded_class_of(type(module), names)
    # Past nn.Module.__setattr__, which would register the skeleton as a child.
    module.__dict__.update(rows=rows, path=path, skeleton=[skeleton])


def folded_modules(network: nn.Module) -> dict[str, FoldedModule]:
    """The modules of a folded network that own tensors, by path."""
    return {path: module for path, module in network.named_modules() if isinstance(module, FoldedModule)}

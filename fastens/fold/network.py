"""The folded network: a member's structure with stacked tensors and folded layers in place of its own."""

from typing import Any

from torch import Tensor, nn

from fastens.fold.members import replaced, tensors_of
from fastens.fold.registry import FoldedModule, RawModule, folded_class_of
from fastens.fold.rows import Rows
from fastens.report import LayerReport


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


def layer_reports(network: nn.Module, num_members: int, why_loop: str | None) -> list[LayerReport]:
    """What each module of a folded network that owns tensors got.

    Args:
        network: the folded network.
        num_members: K.
        why_loop: why the whole network is looped, none where it is folded.
    """
    layers: list[LayerReport] = []
    within = None
    for path, module in folded_modules(network).items():
        if within is not None and path.startswith(within):
            continue
        names = [*module._parameters, *module._buffers]
        owned = [module.stack(name) for name in names]
        if why_loop is not None or module.looped is not None:
            how, why = "looped", module.looped or why_loop or ""
            within = f"{path}." if path else ""
        elif isinstance(module, RawModule):
            how, why = ("shared" if module.shared == set(names) else "raw"), ""
        else:
            how, why = "folded", ""
        counted = list(module.parameters()) if how == "looped" else [t for t in owned if t is not None]
        number = sum(t.numel() for t in counted) // (1 if how == "shared" else num_members)
        layer = next(each for each in type(module).__mro__ if not issubclass(each, FoldedModule)).__name__
        layers.append(LayerReport(path, layer, how, "torch" if how == "looped" else module.run_by, why, number))
    return layers

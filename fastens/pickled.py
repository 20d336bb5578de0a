"""An ensemble put together from what pickling or a file keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from fastens import rules
from fastens.fold.attributes import attributes_of, give
from fastens.internal import begin, engine_of, hold_modules, hold_stacks
from fastens.network.loading import fit, load_own, save_own
from fastens.network.stacking import Stacked, tensors_of

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble

# Whether members are masks of one set of weights -> their class; each class puts itself here, being of modules above.
KINDS: dict[bool, type[Ensemble]] = {}
_MODULE = vars(nn.Module())
_REMADE = {
    *("num_members", "forward", "_rule", "_settings", "_recorded", "_views", "_engine", "_why_loop"),
    *(name for name in _MODULE if "_hooks" not in name and name != "training"),
}


class Pickled(nn.Module):
    """How an ensemble is copied, pickled and loaded: as skeleton and stacks, without the classes made on the fly."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """What :func:`rebuild` takes; then what is its own and may refer to it: attributes, hooks, draws."""
        engine = self._engine
        if engine is None:
            content: Any = (None, self.network.get(), self.__dict__["_why_loop"])
        else:
            skeleton = engine.skeleton
            stacked = Stacked(skeleton, tensors_of(self.network), engine.shared, engine.overlapping)
            content = (*stacked, *engine.states_of_copy(skeleton))
        own = {name: x for name, x in vars(self).items() if name not in _REMADE and (name not in _MODULE or x)}
        own["training"] = self.training
        added = {name: module for name, module in self._modules.items() if name != "network"}
        modules = content[1] if content[0] is None else content[:1]
        attributes = [{name: attributes_of(x) for name, x in tensors_of(module).items()} for module in modules]
        return rebuild, (self.num_members, self.rule, self._settings, content, self._kind(), attributes), (own, added)

    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load what is the ensemble's own; its network is loaded next, from the same dictionary."""
        engine = self._engine
        if engine is not None and engine.kind.own_weights:
            fit(self.network, state_dict, f"{prefix}network.", engine.unshare)
            missing = kwargs["missing_keys"] if "missing_keys" in kwargs else args[2]
            load_own(engine.views if engine.behaviour.looped else [], state_dict, f"{prefix}network.", missing)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save what is the ensemble's own, and what looped members registered themselves; its network is saved next."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        engine = self._engine
        if engine is not None and engine.behaviour.looped:
            save_own(engine.views, destination, f"{prefix}network.")

    def __setstate__(self, state: Any) -> None:
        """Take what was the ensemble's own."""
        own, added = state
        vars(self).update(own)
        self._modules.update(added)


def rebuild(
    num_members: int,
    rule: rules.Rule,
    settings: dict[str, Any],
    content: Any,
    kind: type[Ensemble],
    attributes: Sequence[dict[str, dict[str, Any]]] = (),
) -> Ensemble:
    """Put an ensemble together.

    Args:
        num_members: K.
        rule: its rule.
        settings: as :func:`fastens.settings.check_settings` gives them.
        content: what :class:`Stacked` consists of, and where members are looped what they wrote to themselves and why
            they are looped; or none, modules, and why.
        kind: its class, before a framework's own base class is added.
        attributes: of the skeleton, or of each module, what code set on its parameters and buffers, by their names:
            copies of torch's come without.
    """
    ensemble = kind.__new__(kind)
    nn.Module.__init__(ensemble)
    begin(ensemble, num_members, rule, settings)
    skeleton, *rest = content
    for module, kept in zip(rest[0] if skeleton is None else [skeleton], attributes, strict=False):
        for name, tensor in tensors_of(module).items():
            give(tensor, kept[name])
    if skeleton is None:
        modules, why = rest
        hold_modules(ensemble, modules, why)
    else:
        stacks, shared, overlapping, *own = rest
        hold_stacks(ensemble, Stacked(skeleton, stacks, shared, overlapping))
        engine = engine_of(ensemble)
        if own and engine is not None:  # files have none
            engine.adopt_states(skeleton, *own)
    return ensemble

"""An ensemble put together from what pickling or a file keeps of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fastens import rules
from fastens.fold.members import tensors_of

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble


_MODULE = vars(nn.Module())
_REMADE = {
    *(
        "num_members",
        "training",
        "forward",
        "_rule",
        "_settings",
        "_draws",
        "_recorded",
        "_views",
        "_engine",
        "_why_loop",
    ),
    *(name for name in _MODULE if "_hooks" not in name),
}


def kept(ensemble: Ensemble) -> tuple[Any, ...]:
    """The arguments of :func:`rebuild`: skeleton and stacks, so that classes made on the fly are not pickled."""
    engine = ensemble._engine
    if engine is None:
        content: Any = (None, list(ensemble.network), ensemble.__dict__["_why_loop"])
    else:
        content = (engine.skeleton, tensors_of(ensemble.network), engine.shared, *engine.own_states())
    own = {
        name: value for name, value in vars(ensemble).items() if name not in _REMADE and (name not in _MODULE or value)
    }
    mode = ensemble.training
    return ensemble.num_members, ensemble.rule, ensemble._settings, content, mode, ensemble._kind(), own


def rebuild(
    num_members: int,
    rule: rules.Rule,
    settings: dict[str, Any],
    content: Any,
    training: bool,
    kind: type[Ensemble],
    attributes: dict[str, Any] | None = None,
) -> Ensemble:
    """Put an ensemble together.

    Args:
        num_members: K.
        rule: its rule.
        settings: as :func:`fastens.settings.check_settings` gives them.
        content: skeleton, stacks, names of shared tensors, and where members are looped what they wrote to themselves
            and why they are looped; or none, modules, and why.
        training: its mode.
        kind: its class, before a framework's own base class is added.
        attributes: of its own, hooks and the count of its draws among them; none from files.
    """
    ensemble = kind.__new__(kind)
    nn.Module.__init__(ensemble)
    ensemble._setup(num_members, rule, settings)
    skeleton, *rest = content
    if skeleton is None:
        modules, why = rest
        ensemble.__dict__.update(_engine=None, _why_loop=why)
        ensemble.network = nn.ModuleList(modules)
        ensemble._become_member_like(modules[0])
    else:
        stacks, shared, *own = rest
        ensemble._adopt(skeleton, stacks, shared)
        if own:  # files have none
            ensemble._engine.adopt_states(*own)
    vars(ensemble).update(attributes or {}, training=training)
    return ensemble

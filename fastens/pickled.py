"""An ensemble put together from what pickling or a file keeps of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fastens import rules
from fastens.fold.members import tensors_of

if TYPE_CHECKING:
    from fastens.ensemble import Ensemble


def kept(ensemble: Ensemble) -> tuple[Any, ...]:
    """The arguments of :func:`rebuild`: skeleton and stacks, so that classes made on the fly are not pickled."""
    engine = ensemble._engine
    if engine is None:
        content: Any = (None, list(ensemble.network), ensemble.__dict__["_why_loop"])
    else:
        content = (engine.skeleton, tensors_of(ensemble.network), engine.shared, *engine.own_states())
    return ensemble.num_members, ensemble.rule, ensemble._settings, content, ensemble.training, ensemble._kind()


def rebuild(
    num_members: int, rule: rules.Rule, settings: dict[str, Any], content: Any, training: bool, kind: type[Ensemble]
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
    return ensemble.train(training)

"""Steps under function transforms: forward-mode derivatives and vmap of the whole ensemble."""

from random import Random
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from tests.fuzz import oracle
from tests.fuzz.inputs import Form, copied
from tests.fuzz.run import Run
from tests.fuzz.sequences import step


def _function(network: Any, t: Any) -> Any:
    return lambda x: network(x, t)


@step(0.4)
def forward_derivative(run: Run, draw: Random) -> None:
    """The derivative along a direction, by ``torch.func.jvp`` or by dual numbers, with gradients disabled too."""
    if run.spec.output != "tensor" or run.random or run.stateful or run.rule not in ("mean", "sum"):
        return
    (x, t, *_), _ = run.make(draw, Form(run.spec.rows))
    (v, *_), _ = run.make(draw, Form(run.spec.rows))
    how, enabled = draw.choice(["jvp", "dual"]), draw.random() < 0.5
    run.step += f" ({how}, {'with' if enabled else 'without'} gradients)"

    def derivative(network: Any) -> list[Tensor]:
        if how == "jvp":
            return list(torch.func.jvp(_function(network, t), (x.clone(),), (v.clone(),)))
        with fwAD.dual_level():
            found = fwAD.unpack_dual(network(fwAD.make_dual(x.clone(), v.clone()), t))
            tangent = torch.zeros_like(found.primal) if found.tangent is None else found.tangent
            return [found.primal.clone(), tangent.clone()]

    with torch.set_grad_enabled(enabled):
        outputs = run.loop(derivative)
        expected = oracle.combined(outputs, oracle.RULES[run.rule])
        run.outcome.calls += 1
        run.attempt(
            lambda: derivative(run.ensemble),
            lambda answer: oracle.check(answer, expected, 10 * oracle.tolerance(run.coarsest)),
        )
    with torch.no_grad():
        run.call(run.make(draw, Form(run.spec.rows)))


@step(0.3)
def mapped(run: Run, draw: Random) -> None:
    """``torch.vmap`` of the ensemble over several batches."""
    if run.spec.output != "tensor" or run.random or run.stateful:
        return
    calls = [copied(run.make(draw, Form(run.spec.rows, context="absent"))) for _ in range(2)]
    x, t = torch.stack([call[0][0] for call in calls]), calls[0][0][1]

    def over(network: Any) -> Tensor:
        return torch.vmap(_function(network, t))(x)

    with torch.no_grad():
        outputs = run.loop(over)
        expected = torch.stack([oracle.RULES[run.rule](s) for s in torch.stack(outputs).unbind(1)])
        run.outcome.calls += 1
        run.attempt(
            lambda: over(run.ensemble), lambda answer: oracle.check(answer, expected, oracle.tolerance(run.coarsest))
        )

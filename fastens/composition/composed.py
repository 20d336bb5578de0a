"""An ensemble with guidance: a module that stands where the model stood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastens import parameterisation
from fastens.composition.branches import Branches, mapped
from fastens.composition.rows import Call, Names
from fastens.composition.terms import Autoguided, Guided, Term
from fastens.engine.arguments import Arguments
from fastens.ensemble import Ensemble
from fastens.internal import prediction_of
from fastens.schedules import Prediction, Schedule
from fastens.schedules.prediction import agree


def compose(model: Any, *terms: Term, order: str = "after", together: bool = True) -> Composed:
    """Put guidance on an ensemble: ``main + sum_j (scale_j - 1) (main - branch_j)``, evaluated in few passes.

    The branches of :class:`Guided` are rows of one folded pass, the (n + 1) B rows of all K members; a network of
    :class:`Autoguided` is planned and called by itself. What comes out has the members' signature and return type, and
    goes into any sampler.

    ``order="after"`` guides what the rule made of the members, as pipelines do that pass two blocks of rows and take
    the difference of what they get. ``"before"`` guides each member by its own difference and then applies the rule.
    For weighted means the two are one number; for a median, or what is dominant, they are not. A weak network is one
    for all members in both.

    Args:
        model: an :class:`fastens.Ensemble`, or a module, which becomes one of one member.
        *terms: :class:`Guided` and :class:`Autoguided`; one after the other they add up, so that a negative prompt is a
            second :class:`Guided`.
        order: ``"after"`` or ``"before"``.
        together: whether branches are rows of one pass; else they are evaluated one after the other.

    Raises:
        TypeError: no module; no terms, or others.
        ValueError: another order; members that take no such condition; a scale by noise level, or networks of different
            predictions, without a schedule; conditions that contradict each other.
    """
    return Composed(model, terms, order, together)


class Composed(nn.Module):
    """What :func:`compose` returns; attributes that it has not itself are the ensemble's."""

    def __init__(self, model: Any, terms: Sequence[Term], order: str, together: bool) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"compose: model is a {type(model).__name__}, expected a fastens.Ensemble")
        if not terms or not all(isinstance(term, Guided | Autoguided) for term in terms):
            raise TypeError(f"compose: expected Guided or Autoguided after the model, got {list(terms)!r}")
        self.ensemble = model if isinstance(model, Ensemble) else Ensemble([model])
        self.guided = [term for term in terms if isinstance(term, Guided)]
        self.autoguided = [term for term in terms if isinstance(term, Autoguided)]
        self.weak = nn.ModuleList([term.weak for term in self.autoguided])
        self.order = order
        self._branches = Branches(self.ensemble, order, together)
        self.conditional: dict[str, Any] = {}
        for term, (name, value) in ((t, item) for t in self.guided for item in t.conditional.items()):
            if name in self.conditional and self.conditional[name] is not value:
                raise ValueError(f"compose: two conditions by {name!r}, {term!r} has the second; pass it once")
            self.conditional[name] = value
        self._names = Names(self.ensemble.forward)
        self.training = self.ensemble.training
        for term in self.guided:
            self._names.check((*term.conditional, *term.unconditional))
        if any(term.needs_noise_level for term in terms) and self._schedule is None:
            raise ValueError(
                "compose: a scale by noise level (interval=, log_snr=) needs the noise schedule that the members were "
                "trained with; pass schedule= to the ensemble, one of fastens.schedules or the diffusers scheduler"
            )
        self._weak_predictions = [self._prediction_of(term.weak) for term in self.autoguided]

    @property
    def _prediction(self) -> Prediction:
        return prediction_of(self.ensemble)

    @property
    def _schedule(self) -> Schedule | None:
        return self._prediction.schedule

    def _prediction_of(self, weak: Ensemble) -> Prediction:
        """What a weak network predicts, as it can be said of the strong one's path.

        Raises:
            ValueError: another kind without a schedule, or another path or input.
        """
        ours, said = self._prediction, weak._prediction
        other = said.filled(kind=ours.kind, schedule=ours.schedule, sigma_data=ours.sigma_data)
        scalings = {each.input_scaling or "none" for each in (ours, other)}
        if len(scalings) > 1 or ours.noisy_channels != other.noisy_channels:
            raise ValueError(
                f"compose: the networks take other inputs (input_scaling {ours.input_scaling!r} and "
                f"{other.input_scaling!r}, noisy_channels {ours.noisy_channels} and {other.noisy_channels}); wrap the "
                "weak one in a module that takes the strong one's"
            )
        if ours.schedule is not None and other.schedule is not None and not agree(ours.schedule, other.schedule):
            raise ValueError(
                f"compose: the networks were trained under {ours.schedule} and {other.schedule}; wrap the weak one in "
                "a module that takes the strong one's times and inputs"
            )
        if other.kind != ours.kind and (ours.kind is None or ours.schedule is None):
            missing = "schedule=" if ours.kind is not None else "prediction= and schedule="
            raise ValueError(
                f"compose: the strong network predicts {ours.kind!r} and the weak one {other.kind!r}, which a noise "
                f"schedule converts; pass {missing} to the ensemble"
            )
        return other

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the branches and add them up; the members' signature and return type."""
        main = self._names.replaced((args, kwargs), self.conditional)
        arguments = Arguments(*main)
        others = [(self._factor(term, arguments, main), term.unconditional) for term in self.guided]
        others = [
            (factor, self._names.replaced(main, unconditional, arguments.batch_size))
            for factor, unconditional in others
            if not _is_zero(factor)
        ]
        weak = []
        for term, said in zip(self.autoguided, self._weak_predictions, strict=True):
            factor = self._factor(term, arguments, main)
            if not _is_zero(factor):
                weak.append((factor, self._as_ours(term.weak(*main[0], **main[1]), said, arguments, main)))
        return self._branches(main, others, weak)

    def _as_ours(self, output: Any, said: Prediction, arguments: Arguments, call: Call) -> Any:
        """What a weak network returns, in the strong one's parameterisation; of variances nothing."""
        ours, forward = self._prediction, self.ensemble.forward
        x = parameterisation.noisy_input(forward, arguments, *call)

        def moved(y: Tensor) -> Tensor:
            channels = parameterisation.predicted_channels(said, x, y.shape) if y.ndim > 1 else 1
            y = y[:, :channels] if y.ndim > 1 else y
            if said.kind == ours.kind and said.sigma_data == ours.sigma_data:
                return y
            assert said.kind is not None
            assert ours.kind is not None
            assert ours.schedule is not None
            t = ours.schedule.time(parameterisation.time_of(forward, arguments, *call))
            noisy = parameterisation.path_input(ours, x, t, channels)
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            data = parameterisation.convert(y, noisy, t, ours.schedule, said.kind, "x0", said.sigma_data)
            return parameterisation.convert(data, noisy, t, ours.schedule, "x0", ours.kind, ours.sigma_data)

        return mapped(moved, [output])

    def _factor(self, term: Term, arguments: Arguments, call: Call) -> Any:
        if not term.needs_noise_level:
            return term.factor(None, None)
        assert self._schedule is not None
        t = self._schedule.time(parameterisation.time_of(self.ensemble.forward, arguments, *call))
        return term.factor(self._schedule, t)

    def trajectory(
        self,
        batch_size: int,
        generator: torch.Generator | int | None = None,
        *,
        samples: Tensor | None = None,
    ) -> Any:
        """Scope of one run of a sampler; see :meth:`fastens.Ensemble.trajectory`."""
        return self.ensemble.trajectory(batch_size, generator, samples=samples)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: a composition is made again from its parts."""
        raise ValueError(
            "a composition is not written to files; save its ensembles (composed.ensemble.save_pretrained) and compose "
            "them again"
        )

    def __getattr__(self, name: str) -> Any:
        """Look like the ensemble."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "ensemble" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("ensemble"), name)


def _is_zero(factor: Any) -> bool:
    """Whether a branch counts for no row; a factor on a GPU is not waited for."""
    if isinstance(factor, Tensor):
        return factor.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(factor.any())
    return factor == 0

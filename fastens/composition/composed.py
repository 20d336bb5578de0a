"""An ensemble with guidance: a module that stands where the model stood."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens import parameterisation
from fastens.composition.rows import Apart, Call, Names, check_rows, side_by_side
from fastens.composition.terms import Autoguided, Guided, Term
from fastens.draws import assigned_to
from fastens.ensemble import Ensemble
from fastens.fold.arguments import Arguments
from fastens.outputs import is_scores
from fastens.schedules import Prediction, Schedule, per_sample
from fastens.schedules.prediction import agree

ORDERS = ("after", "before")


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
        if order not in ORDERS:
            raise ValueError(f"compose: order {order!r} is unknown, expected one of {', '.join(map(repr, ORDERS))}")
        self.ensemble = model if isinstance(model, Ensemble) else Ensemble([model])
        self.guided = [term for term in terms if isinstance(term, Guided)]
        self.autoguided = [term for term in terms if isinstance(term, Autoguided)]
        self.weak = nn.ModuleList([term.weak for term in self.autoguided])
        self.order, self.together = order, together
        self.conditional: dict[str, Any] = {}
        for term, (name, value) in ((t, item) for t in self.guided for item in t.conditional.items()):
            if name in self.conditional and self.conditional[name] is not value:
                raise ValueError(f"compose: two conditions by {name!r}, {term!r} has the second; pass it once")
            self.conditional[name] = value
        self._held: set[Any] = set()
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
        return self.ensemble._prediction

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
        x = parameterisation.noisy_input(self.ensemble.forward, arguments, *main)
        guided = [(self._factor(term, arguments, main), term) for term in self.guided]
        guided = [(factor, term) for factor, term in guided if not _is_zero(factor)]
        rows = arguments.batch_size
        others = [self._names.replaced(main, term.unconditional, rows) for _, term in guided]
        if self.order == "after" or not guided or self._combines_alike:
            outputs = self._branches([main, *others], rows)
            factors = [factor for factor, _ in guided]
            output = self._mapped(lambda *parts: self._added(x, factors, parts), outputs)
            return self._against_weak(output, outputs[0], x, arguments, main)
        return self._before(main, others, [factor for factor, _ in guided], x, arguments)

    @property
    def _combines_alike(self) -> bool:
        """Whether guidance before the rule is guidance after it."""
        rule = self.ensemble.rule
        return rule.linear or rule.random or assigned_to(self.ensemble) is not None

    def _branches(self, calls: list[Call], batch: int) -> list[Any]:
        """What the ensemble returns for each call."""
        ensemble = self.ensemble
        joined = self._joined(calls, batch)
        if joined is None:
            return [ensemble(*args, **kwargs) for args, kwargs in calls]
        if self._combines_alike:
            leaves, spec = pytree.tree_flatten(ensemble(*joined[0], **joined[1]))
            blocks = zip(*(_blocks(leaf, len(calls), batch) for leaf in leaves), strict=True)
            return [pytree.tree_unflatten(block, spec) for block in blocks]
        # a rule may look at the whole batch, so each branch is one
        parts = self._parts(joined, len(calls), batch)
        return [ensemble._combine(part, ensemble._aggregation(*call)) for part, call in zip(parts, calls, strict=True)]

    def _parts(self, joined: Call, number: int, batch: int) -> list[list[Any]]:
        """Of each of several calls what all members return: leaves of K parts, and their structure."""
        *leaves, spec = self.ensemble._evaluate(*joined)
        blocks = [list(zip(*(_blocks(y, number, batch) for y in leaf), strict=True)) for leaf in leaves]
        return [[*(list(leaf[i]) for leaf in blocks), spec] for i in range(number)]

    def _before(self, main: Call, others: list[Call], factors: list[Any], x: Tensor, arguments: Arguments) -> Any:
        """Each member guided by its own difference, and by the weak networks; then the rule."""
        ensemble, calls = self.ensemble, [main, *others]
        joined = self._joined(calls, arguments.batch_size)
        if joined is None:
            parts = [ensemble._evaluate(*call) for call in calls]
        else:
            parts = self._parts(joined, len(calls), arguments.batch_size)
        guided = []
        for column in zip(*(part[:-1] for part in parts), strict=True):
            if not is_scores(column[0]):
                guided.append(column[0])
                continue
            members = zip(*column, strict=True)
            guided.append([self._added(x, factors, branches) for branches in members])
        if self.autoguided:
            members = range(ensemble.num_members)
            strong, moved = (
                [pytree.tree_unflatten([leaf[k] for leaf in leaves], parts[0][-1]) for k in members]
                for leaves in (parts[0][:-1], guided)
            )
            outputs = [self._against_weak(moved[k], strong[k], x, arguments, main) for k in members]
            guided = [list(column) for column in zip(*(pytree.tree_leaves(o) for o in outputs), strict=True)]
        return ensemble._combine([*guided, parts[0][-1]], ensemble._aggregation(*main))

    def _joined(self, calls: list[Call], batch: int) -> Call | None:
        """The calls as one, none where they are made one after the other."""
        if not self.together or len(calls) == 1:
            return None
        try:
            joined = side_by_side(calls, batch)
            if not torch.compiler.is_compiling():
                self._hold(joined, calls, batch)
        except Apart as why:
            warnings.warn(f"fastens: branches are evaluated one after the other: {why}", stacklevel=3)
            self.together = False
            return None
        return joined

    def _hold(self, joined: Call, calls: list[Call], batch: int) -> None:
        """Check once for every kind of call that no member mixes the branches' rows."""
        shapes = [(x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in pytree.tree_leaves(joined)]
        key = (batch, len(calls), str(shapes), self.ensemble.training)
        if key not in self._held and batch:
            check_rows(self.ensemble, joined, calls, batch)
            self._held.add(key)

    def _added(self, x: Tensor, factors: list[Any], parts: Sequence[Tensor]) -> Tensor:
        """``main + sum_j factor_j (main - branch_j)`` on what is predicted; variances beside it are the main's."""
        main, *branches = parts
        if not branches:
            return main
        channels = self._channels(x, main)
        head = main[:, :channels] if main.ndim > 1 else main
        wide = torch.promote_types(main.dtype, torch.float32)
        total = head.to(wide)
        for factor, branch in zip(factors, branches, strict=True):
            total = total + _scaled(factor, main.to(wide), branch.to(wide), channels)
        total = total.to(main.dtype)
        return total if main.ndim < 2 or channels == main.shape[1] else torch.cat([total, main[:, channels:]], 1)

    def _channels(self, x: Tensor, main: Tensor) -> int:
        return parameterisation.predicted_channels(self._prediction, x, main.shape) if main.ndim > 1 else 1

    def _against_weak(self, output: Any, strong: Any, x: Tensor, arguments: Arguments, call: Call) -> Any:
        """Add the terms of the weak networks to an output: how far the strong prediction is from theirs."""
        for term, said in zip(self.autoguided, self._weak_predictions, strict=True):
            factor = self._factor(term, arguments, call)
            if _is_zero(factor):
                continue
            weak = term.weak(*call[0], **call[1])

            def added(y: Tensor, main: Tensor, branch: Tensor, factor: Any = factor, said: Prediction = said) -> Tensor:
                channels = self._channels(x, main)
                branch = self._as_ours(branch, said, x, channels, arguments, call)
                wide = torch.promote_types(main.dtype, torch.float32)
                head = y[:, :channels] if y.ndim > 1 else y
                head = (head.to(wide) + _scaled(factor, main.to(wide), branch.to(wide), channels)).to(y.dtype)
                return head if y.ndim < 2 or channels == y.shape[1] else torch.cat([head, y[:, channels:]], 1)

            output = self._mapped(added, [output, strong, weak])
        return output

    def _as_ours(
        self, branch: Tensor, said: Prediction, x: Tensor, channels: int, arguments: Arguments, call: Call
    ) -> Tensor:
        """What a weak network predicts, in the strong one's parameterisation."""
        ours = self._prediction
        if branch.ndim > 1 and branch.shape[1] > channels:
            branch = branch[:, :channels]
        if said.kind == ours.kind and said.sigma_data == ours.sigma_data:
            return branch
        assert said.kind is not None
        assert ours.kind is not None
        assert ours.schedule is not None
        t = ours.schedule.time(parameterisation.time_of(self.ensemble.forward, arguments, *call))
        noisy = parameterisation.path_input(ours, x, t, channels)
        data = parameterisation.convert(branch, noisy, t, ours.schedule, said.kind, "x0", said.sigma_data)
        return parameterisation.convert(data, noisy, t, ours.schedule, "x0", ours.kind, ours.sigma_data)

    def _factor(self, term: Term, arguments: Arguments, call: Call) -> Any:
        if not term.needs_noise_level:
            return term.factor(None, None)
        assert self._schedule is not None
        t = self._schedule.time(parameterisation.time_of(self.ensemble.forward, arguments, *call))
        return term.factor(self._schedule, t)

    def _mapped(self, function: Any, outputs: list[Any]) -> Any:
        """A function of the scores in outputs of one structure; what is no score is the first's.

        Raises:
            ValueError: another number of scores, or other shapes.
        """
        flat = [pytree.tree_flatten(output) for output in outputs]
        if any(len(leaves) != len(flat[0][0]) for leaves, _ in flat):
            raise ValueError(
                f"compose: networks return {', '.join(str(spec) for _, spec in flat)}, expected one structure; wrap "
                "one in a module that returns what the other does"
            )
        leaves = []
        for column in zip(*(leaves for leaves, _ in flat), strict=True):
            scores = all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in column)
            leaves.append(function(*column) if scores else column[0])
        return pytree.tree_unflatten(leaves, flat[0][1])

    def trajectory(self, batch_size: int, generator: torch.Generator | int | None = None) -> Any:
        """Scope of one run of a sampler; see :meth:`fastens.Ensemble.trajectory`."""
        return self.ensemble.trajectory(batch_size, generator)

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


def _blocks(leaf: Any, number: int, batch: int) -> Sequence[Any]:
    """An output of several blocks of rows as those of each; what is no tensor is that of each.

    Raises:
        ValueError: a tensor without rows.
    """
    if not isinstance(leaf, Tensor):
        return [leaf] * number
    if leaf.ndim == 0 or leaf.shape[0] != number * batch:
        raise ValueError(
            f"compose: the members return {list(leaf.shape)} for {number * batch} rows, which are not those of "
            f"{number} branches; compose(..., together=False) evaluates the branches one after the other"
        )
    return leaf.split(batch)


def _is_zero(factor: Any) -> bool:
    """Whether a branch counts for no row; a factor on a GPU is not waited for."""
    if isinstance(factor, Tensor):
        return factor.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(factor.any())
    return factor == 0


def _scaled(factor: Any, main: Tensor, branch: Tensor, channels: int) -> Tensor:
    """``factor (main - branch)``, in which a row of factor zero does not look at the branch, NaN or not."""
    if main.ndim > 1:
        main, branch = main[:, :channels], branch[:, :channels]
    if main.shape != branch.shape:
        raise ValueError(
            f"compose: the networks return {list(main.shape)} and {list(branch.shape)}, expected one shape"
        )
    if not isinstance(factor, Tensor):
        return factor * (main - branch)
    shaped = per_sample(factor.reshape(-1) if factor.numel() > 1 else factor.reshape(()), main).to(main.dtype)
    return torch.where(shaped == 0, 0, shaped * (main - branch))

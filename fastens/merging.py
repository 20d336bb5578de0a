"""Members merged into one network, by weights on their weights: uniform, greedy, or fitted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastens.ensemble import Ensemble
from fastens.internal import engine_of, settings_of, why_looped
from fastens.modes import evaluating
from fastens.network.alike import first_difference
from fastens.network.stacking import DifferentMembers, Stacked, check_members, replaced, tensors_of
from fastens.pickled import rebuild
from fastens.rules import Mean

HOW = ("uniform", "greedy", "fitted")
Weights = Mapping[str, Sequence[float]]
Loss = Callable[[Ensemble], Tensor]


def merge(
    members: Any, weights: str | Sequence[float] | Weights = "uniform", loss: Loss | None = None, **how: Any
) -> Any:
    """Merge members into one network of one member's size, whose weights are sums of theirs.

    ``theta = sum_k w_k theta_k`` with weights of sum 1, of either sign. It works for members along one run, whose
    losses do not rise between them (Izmailov et al., arXiv 1803.05407), and fails for those of different seeds, which
    an ensemble combines: hold the merge against both, as ``fastens evaluate RUN_FOLDER`` does. Running statistics of
    batch norms are averaged too; ``torch.optim.swa_utils.update_bn`` takes them anew.

    Args:
        members: an :class:`fastens.Ensemble`, modules, or checkpoints (:func:`fastens.load_members`), which are read
            one at a time where the weights are given or uniform.
        weights: K numbers, or a mapping from the beginnings of tensors' names to K numbers each, of which the longest
            holds and ``""`` is the rest (``{"": [1, 0], "mid_block": [0.5, 0.5]}``); or ``"uniform"``, ``"greedy"`` or
            ``"fitted"``, see :func:`merge_weights`.
        loss: as for :func:`merge_weights`.
        **how: likewise.

    Returns:
        A module of the members' class, in evaluation mode, with tensors of its own.

    Raises:
        TypeError: members of another kind.
        ValueError: members of different structure, which have no sum; dropout masks; weights that are not finite, not
            one per member or do not sum to 1; names that none begins with; no loss where one is needed.
    """
    members = _checked(members)
    if isinstance(weights, str):
        weights = merge_weights(members, weights, loss, **how)
    elif loss is not None or how:
        raise ValueError(
            "merge: the weights are given, so there is nothing to fit: leave out loss= and what follows it"
        )
    factors = _Factors.of(weights, _count(members))
    first: Any = None
    totals: dict[str, Tensor] = {}
    for k, member in enumerate(_each(members)):
        if k == 0:
            first = member
            factors.check(tensors_of(member))
        elif (difference := first_difference(first, member)) is not None:
            raise _different(f"member {k} differs from member 0 at {difference}")
        for name, tensor in tensors_of(member).items():
            if not _merges(tensor):
                totals.setdefault(name, tensor.detach().clone())
            elif factors.at(name)[k]:  # a member of weight zero is not looked at, NaN or not
                part = tensor.detach().to(_wide(tensor)) * factors.at(name)[k]
                totals[name] = totals[name].add_(part) if name in totals else part

    def own(name: str, like: Tensor) -> Tensor:
        merged = totals[name].to(like.dtype)
        return nn.Parameter(merged, like.requires_grad) if isinstance(like, nn.Parameter) else merged

    return evaluating(replaced(first, {name: own(name, tensor) for name, tensor in tensors_of(first).items()}))


def merge_weights(
    members: Any,
    how: str,
    loss: Loss | None = None,
    *,
    layers: str | Sequence[str] | None = None,
    validation: Loss | None = None,
    signed: bool = True,
    penalties: Sequence[float] = (0.0, 0.1, 1.0),
    steps: int = 100,
    learning_rate: float = 0.02,
) -> dict[str, tuple[float, ...]]:
    """Weights of a merge, as :func:`merge` takes them; candidates are evaluated in one folded pass.

    ``"greedy"`` begins with the best member and adds, as long as the loss falls, the one whose addition makes it fall
    most; what was taken is merged uniformly (Wortsman et al., arXiv 2203.05482, who try members in one order).
    ``"fitted"`` follows the loss's gradient by Adam, from uniform weights, under a penalty on their squared distance
    from uniform: of all penalties at once, as the members of one ensemble, through which the gradient goes. That of
    least validation loss is taken, or uniform weights where those have less.

    Args:
        members: as for :func:`merge`.
        how: ``"uniform"``, ``"greedy"`` or ``"fitted"``.
        loss: of an ensemble of candidates, [C, ...], of which the mean is each candidate's: ``lambda ens:
            (ens.member_outputs(noisy, t) - noise).square()``, of fixed or of new rows at each call;
            :func:`fastens.evaluation.merge_loss` makes one of data and a schedule.
        layers: that have weights of their own, of fitted ones: beginnings of names (``["down_blocks", "mid_block"]``),
            or ``"each"`` for every module with tensors; none for one weight per member.
        validation: the loss that a penalty is chosen by, of other rows; none for ``loss``.
        signed: whether weights may be negative.
        penalties: on ``K sum_k (w_k - 1/K)^2``, in units of the uniform merge's loss.
        steps: of the fit.
        learning_rate: of the fit.

    Returns:
        Weights of each member, by the beginnings of names; under ``""`` those of all other tensors.

    Raises:
        ValueError: another way; no loss; options of another way; layers that no tensor's name begins with; a loss that
            is not a number for any candidate.
    """
    members = _checked(members)
    if how not in HOW:
        raise ValueError(f"merge: weights {how!r} is unknown, expected numbers or one of {', '.join(map(repr, HOW))}")
    count = _count(members)
    if layers is not None and how != "fitted":
        raise ValueError(f"merge: layers= is of 'fitted' weights, and these are {how!r}; pass a mapping of weights")
    if how == "uniform":
        return {"": (1 / count,) * count}
    if loss is None:
        raise ValueError(
            f"merge: {how!r} weights need loss=, a function of an ensemble of candidates that gives their losses "
            "[C, ...]; fastens.evaluation.merge_loss(data, schedule) makes one"
        )
    source = members if isinstance(members, Ensemble) else _ensemble(members)
    if how == "greedy":
        return {"": _greedy(source, loss)}
    return _Fit(source, _groups(source, layers), signed, penalties).run(loss, validation or loss, steps, learning_rate)


def _greedy(source: Ensemble, loss: Loss) -> tuple[float, ...]:
    count = source.num_members
    taken, least = [0.0] * count, math.inf
    while True:
        left = [k for k in range(count) if not taken[k]]
        tried = torch.tensor([[float(v or k == i) for i, v in enumerate(taken)] for k in left], dtype=torch.float64)
        if not left:
            break
        losses = _values(loss, _Candidates(source, [""]), (tried / tried.sum(1, keepdim=True)).unsqueeze(2))
        best = int(losses.nan_to_num(math.inf).argmin())
        if not float(losses[best]) < least:
            break
        least, taken[left[best]] = float(losses[best]), 1.0
    if not any(taken):
        raise ValueError("merge: the loss of every member is not a number")
    return tuple(value / sum(taken) for value in taken)


class _Candidates:
    """Merges of an ensemble's members, as an ensemble that follows their weights.

    Args:
        source: the members.
        groups: beginnings of names.
    """

    def __init__(self, source: Ensemble, groups: Sequence[str]) -> None:
        self._source, self._groups = source, list(groups)
        engine = engine_of(source)
        shared = frozenset() if engine is None else engine.shared
        tensors = tensors_of(source.network)
        self._merged = {n: t.detach() for n, t in tensors.items() if n not in shared and _merges(t)}
        self._kept = {
            n: t.detach() if n in shared else t.detach()[0] for n, t in tensors.items() if n not in self._merged
        }
        self._place = {name: self._groups.index(_longest(self._groups, name)) for name in self._merged}
        self._ensemble: Ensemble | None = None

    def sums(self, weights: Tensor) -> dict[str, Tensor]:
        """The merged tensors [C, ...] of weights [C, K, G], to which gradients go back."""
        found = {}
        for name, stack in self._merged.items():
            wide, factors = stack.to(_wide(stack)), weights[:, :, self._place[name]]
            if not (factors.all() or wide.isfinite().all()):  # a member of weight zero is not looked at, NaN or not
                parts = [torch.tensordot(row[row != 0].to(wide), wide[row != 0], 1) for row in factors]
                found[name] = torch.stack(parts).to(stack.dtype)
                continue
            found[name] = torch.tensordot(factors.to(wide), wide, 1).to(stack.dtype)
        return found

    def ensemble(self, sums: dict[str, Tensor]) -> Ensemble:
        """The candidates with these tensors."""
        count = len(next(iter(sums.values())))
        if self._ensemble is None:
            engine: Any = engine_of(self._source)
            parameters = {n for n, x in tensors_of(engine.skeleton).items() if isinstance(x, nn.Parameter)}
            stacks = {**self._kept, **{name: value.detach().clone() for name, value in sums.items()}}
            stacks = {n: nn.Parameter(x, n in sums) if n in parameters else x for n, x in stacks.items()}
            settings = {**settings_of(self._source), "engine": "fold"}
            content = Stacked(engine.skeleton, stacks, frozenset(self._kept), engine.overlapping)
            made = rebuild(count, Mean(), settings, content, Ensemble)
            self._ensemble = evaluating(made)
        else:
            own = tensors_of(self._ensemble.network)
            with torch.no_grad():
                for name, value in sums.items():
                    own[name].copy_(value)
                    own[name].grad = None
        return self._ensemble


class _Fit:
    """Weights [C, K, G] that follow a loss's gradient, one candidate for each penalty.

    Args:
        source: the members.
        groups: beginnings of names, with weights of their own each.
        signed: whether weights may be negative.
        penalties: of the candidates.
    """

    def __init__(self, source: Ensemble, groups: list[str], signed: bool, penalties: Sequence[float]) -> None:
        self._penalties = torch.tensor(list(penalties), dtype=torch.float64)
        if not len(self._penalties) or not bool((self._penalties >= 0).all()):
            raise ValueError(f"merge: penalties are {list(penalties)}, expected numbers of at least 0")
        self._source, self._groups, self._signed = source, groups, signed
        self._shape = len(self._penalties), source.num_members, len(groups)

    def _weights(self, free: Tensor) -> Tensor:
        """The members' shares of each group of tensors, [G, K]: of sum 1, below zero only where that was allowed."""
        if not self._signed:
            return (free * self._shape[1]).softmax(1)
        return 1 / self._shape[1] + free - free.mean(1, keepdim=True)

    def run(self, loss: Loss, validation: Loss, steps: int, learning_rate: float) -> dict[str, tuple[float, ...]]:
        """Fit, choose, and give the weights by group."""
        free = torch.zeros(self._shape, dtype=torch.float64, requires_grad=True)
        candidates = _Candidates(self._source, self._groups)
        optimizer = torch.optim.Adam([free], learning_rate)
        scale: Tensor | None = None
        for _ in range(steps):
            weights = self._weights(free)
            sums = candidates.sums(weights)
            ensemble = candidates.ensemble({name: value.detach() for name, value in sums.items()})
            with torch.enable_grad():
                losses = _means(loss(ensemble), self._shape[0])
                if not losses.requires_grad:
                    raise ValueError("merge: the loss has no gradient; take one that is not under torch.no_grad()")
                losses.sum().backward()
            scale = losses.detach()[0].double().cpu() if scale is None else scale
            own = tensors_of(ensemble.network)
            moved = [(value, own[name].grad) for name, value in sums.items() if own[name].grad is not None]
            optimizer.zero_grad()
            distance = self._shape[1] * (weights - 1 / self._shape[1]).square().sum(1).mean(1)
            torch.autograd.backward(
                [*(value for value, _ in moved), (scale * self._penalties * distance).sum()],
                [*(gradient for _, gradient in moved), None],
            )
            optimizer.step()
        uniform = torch.full((1, *self._shape[1:]), 1 / self._shape[1], dtype=torch.float64)
        found = torch.cat([uniform, self._weights(free).detach()])
        losses = _values(validation, _Candidates(self._source, self._groups), found)
        if losses.isnan().all():
            raise ValueError(
                "merge: the loss of every merge is not a number: look for a member with NaN, or infinities"
            )
        best = found[int(losses.nan_to_num(math.inf).argmin())]
        return {name: tuple(best[:, g].tolist()) for g, name in enumerate(self._groups)}


def _values(loss: Loss, candidates: _Candidates, weights: Tensor) -> Tensor:
    """The losses of merges by weights [C, K, G], [C], without gradients."""
    with torch.no_grad():
        return _means(loss(candidates.ensemble(candidates.sums(weights))), len(weights)).double().cpu()


def _means(losses: Tensor, count: int) -> Tensor:
    if losses.ndim == 0 or len(losses) != count:
        raise ValueError(
            f"merge: loss gave {list(losses.shape)} for an ensemble of {count} candidates, expected [{count}, ...]: a "
            "loss for each, as of ens.member_outputs(...)"
        )
    return losses.reshape(count, -1).mean(1)


@dataclasses.dataclass(frozen=True)
class _Factors:
    """Weights of each member, by the beginnings of names."""

    weights: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, weights: Any, count: int) -> _Factors:
        """Check them."""
        rows = dict(weights) if isinstance(weights, Mapping) else {"": weights}
        found = {}
        for name, row in rows.items():
            values = tuple(float(value) for value in row)
            if len(values) != count or not all(map(math.isfinite, values)):
                raise ValueError(f"merge: weights {list(row)}, expected {count} finite numbers, one per member")
            if abs(math.fsum(values) - 1) > 1e-4:
                raise ValueError(
                    f"merge: weights {list(row)} sum to {math.fsum(values):g}, expected 1: another sum makes every "
                    "weight of the network larger or smaller; divide them by their sum"
                )
            found[name] = values
        return cls(found)

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Raise unless every tensor has weights, and every name is one's beginning."""
        used = {_longest(self.weights, name) for name in tensors}
        for name in self.weights:
            if name and name not in used:
                raise ValueError(
                    f"merge: no tensor's name begins with {name!r}; there are {', '.join(list(tensors)[:4])}, ..."
                )

    def at(self, name: str) -> tuple[float, ...]:
        """The weights of a tensor."""
        return self.weights[_longest(self.weights, name)]


def _longest(beginnings: Any, name: str) -> str:
    """The longest beginning of a name, in whole parts."""
    found = [each for each in beginnings if not each or name == each or name.startswith(f"{each}.")]
    if not found:
        raise ValueError(f"merge: tensor {name!r} has no weights; give those of all others under ''")
    return max(found, key=len)


def _groups(source: Ensemble, layers: Any) -> list[str]:
    names = [name for name, tensor in tensors_of(source.network).items() if _merges(tensor)]
    if layers is None:
        return [""]
    if isinstance(layers, str):
        if layers != "each":
            raise ValueError(f"merge: layers is {layers!r}, expected 'each' or a list of the beginnings of names")
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    groups = ["", *layers]
    for layer in layers:
        if not any(_longest(groups, name) == layer for name in names):
            raise _unknown(layer, names)
    return groups


def _unknown(beginning: str, names: list[str]) -> ValueError:
    return ValueError(f"merge: no tensor's name begins with {beginning!r}; there are {', '.join(names[:4])}, ...")


def _checked(members: Any) -> Any:
    """Members that can be merged."""
    if not isinstance(members, Ensemble):
        check_members(members)
        if isinstance(members, list | tuple) and isinstance(members[0], str | Path):
            from fastens.checkpoints import load_members

            return load_members(members)
        return members
    if "masks" in settings_of(members):
        raise ValueError("merge: members are dropout masks on one set of weights; there is nothing to merge")
    if engine_of(members) is None:
        raise _different(why_looped(members))
    return members


def _count(members: Any) -> int:
    return members.num_members if isinstance(members, Ensemble) else len(members)


def _each(members: Any) -> Iterator[nn.Module]:
    return iter(members.members) if isinstance(members, Ensemble) else (members[k] for k in range(len(members)))


def _ensemble(members: Any) -> Ensemble:
    try:
        return Ensemble(members, engine="fold")
    except ValueError as error:
        if isinstance(error.__cause__, DifferentMembers):
            raise _different(str(error.__cause__)) from error
        raise


def _different(why: str) -> ValueError:
    return ValueError(
        f"merge: {why}; members of different structure have no sum of weights: combine what they predict, by "
        "fastens.Ensemble, or distil it, by fastens.training.distill"
    )


def _merges(tensor: Tensor) -> bool:
    """Whether a tensor is summed; counters and other integers are the first member's."""
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

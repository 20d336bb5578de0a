"""MC Dropout: one network as an ensemble of its dropout masks (Gal and Ghahramani, arXiv 1506.02142)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastens import rules
from fastens.adaptive import refuse_adaptive
from fastens.draws import Evaluation
from fastens.ensemble import Ensemble, check_settings
from fastens.fold.arguments import Arguments
from fastens.fold.engine import FoldEngine
from fastens.fold.first import Established
from fastens.fold.looped import call_member, member_tensors
from fastens.fold.masks import Masks, masked
from fastens.fold.members import replaced, stack_members, tensors_of

_NOTHING = (
    "MC Dropout: the network applied {found}, so all members would be the same; networks are often built with p = 0 "
    "or leave dropout out in evaluation: pass p=0.1, or wrap a network that calls dropout"
)


class DropoutEngine(FoldEngine):
    """K sets of masks on one network: every pass runs the one set of weights on [K*B] rows."""

    sums = False  # an evaluation begins with its masks, and the weights are one member's

    def __init__(
        self,
        skeleton: nn.Module,
        stacks: dict[str, Tensor],
        shared: frozenset[str],
        masks: Masks,
        settings: dict[str, Any],
    ) -> None:
        masked(skeleton, masks)
        super().__init__(skeleton, stacks, shared, 1, settings)
        self.masks = masks
        self.num_members = masks.num_members
        self.num_samples = 0
        self._discovering = False
        self._discovered = False
        self._layouts: dict[Any, tuple[Tensor, Tensor]] = {}
        self._dealt_samples: Tensor | None = None  # of the rows in progress, where they are dealt out
        self.plans.masks = masks

    def refresh(self) -> None:
        """Forget which signatures were checked, and the masks that were kept."""
        super().refresh()
        self.masks.forget()

    def member(self, k: int) -> nn.Module:
        """A module with a copy of the weights that always applies the masks of member k."""
        values = member_tensors(self.network, 0)
        copies = {name: _copied(values[name], like) for name, like in tensors_of(self.skeleton).items()}
        return _Fixed(replaced(self.skeleton, copies), self, k)

    def _call(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._masked_rows(self.skeleton, Arguments(args, kwargs), None, k):
            return call_member(self.skeleton, member_tensors(self.network, 0), args, kwargs)

    def _pass(self, arguments: Arguments, index: Tensor | None, offsets: Tensor | None) -> Any:
        if index is None:
            args, kwargs = arguments.repeated(self.num_members)
            self.rows.set(self.num_members * arguments.batch_size)
        else:
            args, kwargs = arguments.selected(index).call
            self.rows.set(len(index))
        with self._masked_rows(self.network, arguments, index, offsets):
            return self.network(*args, **kwargs)

    def _dealt_pass(self, arguments: Arguments, offsets: Tensor, row_members: Tensor) -> Any:
        args, kwargs = arguments.call
        self.rows.set(len(row_members))
        samples = self._dealt_samples if self.masks.fresh else row_members
        assert samples is not None
        with self.masks.rows(self.network, row_members, samples, False, self._discovering):
            return self.network(*args, **kwargs)

    def _inputs(self, arguments: Arguments, order: Tensor | None = None) -> list[Tensor]:
        if not self.masks.fresh:
            return super()._inputs(arguments, order)
        if order is None:
            samples = self._layout(arguments, None)[1]
        else:
            samples = self._dealt_samples = order % max(self.num_samples, 1)
        return [*arguments.tensors, self.masks.drawn(), samples]

    def _planned(self, *args: Any, **kwargs: Any) -> Any:
        with self.masks.recorded():
            return super()._planned(*args, **kwargs)

    def _planned_drawn(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with self.masks.recorded():
                return super()._planned_drawn(*args, **kwargs)
        finally:
            self._dealt_samples = None

    def _layout(self, arguments: Arguments, which: int | None) -> tuple[Tensor, Tensor]:
        """Member and sample of each row of a whole pass, or of one of member ``which``."""
        batch, device = arguments.batch_size, arguments.batch.device
        identity = (batch, self.num_samples, which, device)
        if identity not in self._layouts:
            samples = torch.arange(batch, device=device) % max(self.num_samples, 1)
            if which is None:
                members = torch.arange(self.num_members, device=device).repeat_interleave(batch)
                samples = samples.repeat(self.num_members)
            else:
                members = torch.full((batch,), which, device=device)
            self._layouts = {} if len(self._layouts) > 64 else self._layouts
            self._layouts[identity] = members, samples
        return self._layouts[identity]

    @contextmanager
    def _masked_rows(
        self, network: nn.Module, arguments: Arguments, index: Tensor | None, which: Tensor | int | None
    ) -> Iterator[None]:
        batch, device = arguments.batch_size, arguments.batch.device
        if index is None:
            members, samples = self._layout(arguments, None if which is None else int(which))
            if which is not None and self._dealt_samples is not None:
                samples = self._dealt_samples.to(device)
        else:
            assert isinstance(which, Tensor)
            counts = which.diff()
            members = torch.repeat_interleave(torch.arange(self.num_members), counts, output_size=len(index)).to(device)
            samples = (index % max(self.num_samples, 1)).to(device)
        uniform = index is None and which is None
        with self.masks.rows(network, members, samples, uniform, self._discovering):
            yield
        if not self.masks.applied and batch:
            calls = sum(self.masks.calls.values())
            raise ValueError(_NOTHING.format(found=f"{calls} dropouts with p = 0" if calls else "no dropout"))

    def _established(self, arguments: Arguments, training: bool, plannable: bool = False) -> Established:
        if torch.compiler.is_compiling() and not self._discovered:
            raise RuntimeError(
                "MC Dropout: call the ensemble once before it is compiled, so that its dropouts are known"
            )
        return super()._established(arguments, training, plannable)

    def _first(self, arguments: Arguments, key: Any, plannable: bool) -> Established:
        with self._discovery():
            return super()._first(arguments, key, plannable)

    def _first_drawn(self, *args: Any, **kwargs: Any) -> Any:
        with self._discovery():
            return super()._first_drawn(*args, **kwargs)

    def _loop(self, arguments: Arguments) -> list[Any]:
        if self._discovered or torch.compiler.is_compiling():
            return super()._loop(arguments)
        with self._discovery():
            return super()._loop(arguments)

    def evaluate_drawn(self, arguments: Arguments, members: Tensor, training: bool) -> Any:
        """As other engines do; a loop has its functional dropouts looked for first."""
        unknown = self.engine == "loop" and not self._discovered and not torch.compiler.is_compiling()
        with self._discovery() if unknown else nullcontext():
            return super().evaluate_drawn(arguments, members, training)

    def _call_some(self, k: int, index: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, self._dealt_samples = self._dealt_samples, index % max(self.num_samples, 1)
        try:
            return super()._call_some(k, index, args, kwargs)
        finally:
            self._dealt_samples = before

    @contextmanager
    def _discovery(self) -> Iterator[None]:
        """While dropouts that are functions are looked for in every module."""
        self._discovering = True
        try:
            yield
        finally:
            self._discovering = False
            self._discovered = True


class _Fixed(nn.Module):
    """Member k of an MC Dropout ensemble as a module of its own."""

    def __init__(self, network: nn.Module, engine: DropoutEngine, k: int) -> None:
        super().__init__()
        masks = Masks(engine.num_members, engine.masks.seed, engine.masks.fresh, engine.masks.p)
        masks.owners = set(engine.masks.owners)
        masked(network, masks)
        self.network = network
        self.__dict__.update(masks=masks, member=k)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with the member's masks."""
        x = Arguments(args, kwargs).batch
        members, samples = torch.full((len(x),), self.member, device=x.device), torch.arange(len(x), device=x.device)
        with self.masks.rows(self.network, members, samples, False, False):
            return self.network(*args, **kwargs)


def _copied(value: Tensor, like: Tensor) -> Tensor:
    clone = value.detach().clone()
    return nn.Parameter(clone, like.requires_grad) if isinstance(like, nn.Parameter) else clone


class MCDropout(Ensemble):
    """One network with K sets of dropout masks, called like the network: every evaluation applies dropout.

    The weights are held once; a pass runs the network on K copies of the batch, each row under its member's mask. Masks
    are counter-based: the same on every device, whatever the batch. Neither ``train`` nor ``eval`` changes what is
    computed: the network runs in evaluation mode, and its dropouts (layers, functions, attention) drop.

    Args:
        model: the network; left as it is.
        num_members: K, the number of masks.
        rule: as for :class:`fastens.Ensemble`.
        masks: ``"fixed"``: member k's masks depend on seed, member and layer only, so that each member is one network;
            ``"fresh"``: they are drawn anew for each sample at each evaluation, and the rows of one guided sample share
            them.
        p: the probability for all dropouts, for networks that were built with p = 0; none for their own. Attention
            weights are dropped where the network itself does.
        seed: of the masks.
        engine: as for :class:`fastens.Ensemble`, as are backend, max_fold, prediction, aggregate_in and schedule.
        backend: see there.
        max_fold: see there.
        prediction: see there.
        aggregate_in: see there.
        schedule: see there.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no members, p outside [0, 1), an unknown kind of masks; at the first call: a network that drops
            nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        num_members: int,
        rule: str | rules.Rule = "mean",
        *,
        masks: str = "fixed",
        p: float | None = None,
        seed: int = 0,
        engine: str = "auto",
        backend: str = "auto",
        max_fold: int | None = None,
        prediction: str | None = None,
        aggregate_in: str | None = None,
        schedule: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
        if num_members < 1:
            raise ValueError(f"num_members is {num_members}, expected at least one set of masks")
        if masks not in ("fixed", "fresh"):
            raise ValueError(f"masks {masks!r} is unknown, expected 'fixed' or 'fresh'")
        if p is not None and not 0 < p < 1:
            raise ValueError(f"p is {p}, expected a probability above 0 and below 1, or none for the network's own")
        settings = check_settings(engine, backend, max_fold, prediction, aggregate_in, schedule)
        self._setup(num_members, rule, {**settings, "masks": masks, "p": p, "seed": seed})
        self._adopt(*stack_members([model]))

    @classmethod
    def _kind(cls) -> type[Ensemble]:
        return MCDropout

    def _adopt(self, skeleton: nn.Module, stacks: dict[str, Tensor], shared: frozenset[str]) -> None:
        settings = self._settings
        skeleton.eval()
        recurrent = [path for path, m in skeleton.named_modules() if isinstance(m, nn.RNNBase) and m.dropout > 0]
        if recurrent:
            warnings.warn(
                f"fastens: the dropout between the layers of {', '.join(recurrent)} is inside a recurrent kernel and "
                "has no masks; it stays off",
                stacklevel=3,
            )
        masks = Masks(self.num_members, settings["seed"], settings["masks"] == "fresh", settings["p"])
        engine = DropoutEngine(skeleton, stacks, shared, masks, settings)
        self.__dict__["_engine"] = engine
        self.network = engine.network
        self._become_member_like(skeleton)
        self.training = False

    def train(self, mode: bool = True) -> "MCDropout":
        """Keep the mode for callers that read it; the network stays in evaluation mode, with dropout on."""
        self.training = mode
        return self

    def _why_not_recorded(self) -> str | None:
        """Fresh masks too are other masks at every call."""
        fresh = "fresh masks are drawn at every call; use masks='fixed'"
        return fresh if self._engine.masks.fresh else super()._why_not_recorded()

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if self._engine.masks.fresh:
            self._begin(Arguments(args, kwargs).batch)
        return self._engine.evaluate(Arguments(args, kwargs), False)

    def _begin(self, x: Tensor) -> Evaluation:
        """Start an evaluation: fresh masks depend on its number, and on the trajectory's seed where there is one."""
        evaluation = super()._begin(x)
        if self._engine.masks.fresh:
            refuse_adaptive("fresh dropout masks are drawn", "use masks='fixed'")
            self._engine.num_samples = evaluation.num_samples
            self._engine.masks.start(evaluation.seed, evaluation.number)
        return evaluation

    def verify(self, *args: Any, **kwargs: Any) -> float:
        """Evaluate fold and loop on this input; return the largest error relative to the largest output magnitude."""
        if self._engine.masks.fresh:
            self._begin(Arguments(args, kwargs).batch)
        return self._engine.verify(Arguments(args, kwargs))

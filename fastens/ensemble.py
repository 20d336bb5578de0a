"""The ensemble: K members behind the interface of one."""

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens import reproducible, rules, schedules
from fastens.adapters import MemberLike, adapter_of, with_signature
from fastens.aggregation import aggregation, by_kernels, check_rule, of_each_row, summed
from fastens.by_rows import ByRows
from fastens.capture import Capturing
from fastens.draws import Draws
from fastens.engine import inspection
from fastens.engine.arguments import Arguments
from fastens.engine.compiled import compiled_pass, drawn_pass
from fastens.engine.engine import Engine
from fastens.engine.entering import call
from fastens.engine.kinds import PLAIN, MemberKind
from fastens.engine.row_by_row import Modules, each_member, rows_of
from fastens.members import Members, copied, replace_member
from fastens.network.abandoned import abandon
from fastens.network.gradients import warn_of_hooks
from fastens.network.modules_apart import ModulesApart
from fastens.network.stacking import DifferentMembers, Placement, Stacked, check_members, set_format, stack_members
from fastens.ops.member_variance import member_variance
from fastens.outputs import agreed, combined, enters, plain, stacked
from fastens.pickled import KINDS, Pickled
from fastens.report import Report
from fastens.settings import check_settings
from fastens.summary import summary
from fastens.views import Views, view_of


class Ensemble(MemberLike, ByRows, Capturing, Pickled):
    """An ensemble of score models that is called, and looks from outside, like one of its members.

    The members' weights are copied into stacks [K, ...], the ensemble's only parameters; the members themselves are
    left as they are and can be dropped. All members are evaluated in one folded forward pass where their structure
    allows, and their outputs are combined by an aggregation rule (arXiv 2601.11444).

    Args:
        members: K >= 1 modules, or checkpoints from :func:`fastens.load_members`, or paths of diffusers folders.
        rule: name, alias or value of an aggregation rule, see :mod:`fastens.rules`.
        engine: ``"fold"`` evaluates all members in one pass and needs members of one structure, ``"loop"`` evaluates
            them one by one, ``"auto"`` folds where it can and says when it cannot.
        backend: the code that runs the ops: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``.
        max_fold: the most rows (members times batch) in one pass, to bound memory; none for no bound.
        prediction: what the members predict: ``"epsilon"``, ``"x0"``, ``"v"``, ``"score"``, ``"flow"``, or a
            :class:`fastens.schedules.Prediction`, which says more (noisy channels, variances, preconditioning); none to
            take it from a scheduler. Of an output [B, 2C, ...] for [B, C, ...] the second half is averaged under every
            rule, as variances, with a warning where ``variances`` is not said.
        aggregate_in: the parameterisation that the rule is applied in; none for that of ``prediction``.
        schedule: the noise schedule of such a conversion, or of a rule that depends on the noise level: one of
            :mod:`fastens.schedules`, or a diffusers scheduler.
        device: where the stacks are made; none for where the members are.
        dtype: of their floating-point tensors; none for the members' own.

    Raises:
        ValueError: no members; members that differ under ``engine="fold"``, or in dtype or device unless those are
            given; an unknown rule, engine or backend; weights of another number than K; a conversion or rule that lacks
            prediction or schedule; a scheduler that contradicts ``prediction`` or is refused.
        TypeError: no sequence, or a member that is not a module; modules and paths mixed.
    """

    def __init__(
        self,
        members: Sequence[nn.Module | str | Path],
        rule: str | rules.Rule = "mean",
        *,
        engine: str = "auto",
        backend: str = "auto",
        max_fold: int | None = None,
        prediction: str | schedules.Prediction | None = None,
        aggregate_in: str | None = None,
        schedule: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_members(members)
        place = Placement.of(device, dtype)
        if isinstance(members, list | tuple) and isinstance(members[0], str | Path):
            from fastens.checkpoints import load_members

            members = load_members(cast("Sequence[str | Path]", members))
        members = cast(Sequence[nn.Module], members)
        settings = check_settings(engine, backend, max_fold, prediction, aggregate_in, schedule)
        self._setup(len(members), rule, settings)
        warn_of_hooks(members if isinstance(members, list | tuple | nn.ModuleList) else ())  # others are files
        self._take(members, place)
        self.training = members[0].training

    # Construction

    def _take(self, members: Sequence[nn.Module], place: Placement, into: Any = None, known: Any = ()) -> None:
        """Become the ensemble of these members, its views too; see :func:`stack_members`."""
        engine = self.__dict__.get("_engine")
        stacks = {} if engine is None else dict(engine.network.named_parameters())
        try:
            with torch.inference_mode(False):  # stacks that autograd and version counters know
                self._adopt(stack_members(members, place, into, known), originals=None if place.changes else members)
        except DifferentMembers as error:
            if self._settings["engine"] == "fold":
                raise ValueError(f"{error}; members of different structure run with engine='loop' or 'auto'") from error
            if self._settings["engine"] == "auto":
                warnings.warn(f"fastens: members are evaluated one by one: {error}", stacklevel=3)
            with torch.inference_mode(False):
                self._hold([copied(member) for member in members], str(error))
            if place.changes:
                self.to(*place.arguments)
        abandon(stacks, self.network, members)
        self._recorded.clear()
        self._views.follow(self)

    def _setup(self, num_members: int, rule: str | rules.Rule, settings: dict[str, Any]) -> None:
        state = self.__dict__
        state["num_members"] = num_members
        state["_settings"] = settings
        state["_draws"] = Draws(num_members)
        state["_recorded"] = {}  # signature of a call -> its recording
        state["_views"] = Views()
        self._views.add(self)
        self.rule = rule

    def _adopt(self, stacked: Stacked, originals: Any = None) -> None:
        kind = self._kind_of_members(stacked.skeleton)
        engine = Engine(stacked, self.num_members, self._settings, originals, kind)
        self.__dict__["_engine"] = engine
        self.network = engine.network
        self._become_member_like(stacked.skeleton)
        if kind.mode is not None:
            self.training = kind.mode

    def _kind_of_members(self, skeleton: nn.Module) -> MemberKind:
        """What the members of this family have for themselves, given one member's structure."""
        return PLAIN

    def _hold(self, modules: Sequence[nn.Module], why: str) -> None:
        self.__dict__.update(_engine=None, _why_loop=why)
        self.network = ModulesApart(modules)
        self._become_member_like(modules[0])

    def _become_member_like(self, member: nn.Module) -> None:
        base = self._kind()
        adapter = adapter_of(member)
        if adapter is not None:
            base = importlib.import_module(adapter).ensemble_class(member, base)
        # Only here, where members given as paths have been read, is it known which framework's class it has to be of.
        self.__class__ = with_signature(base, type(member))  # pyright: ignore[reportAttributeAccessIssue]  # of its kind
        self._check_members()
        check_rule(self.rule, self._prediction, self._settings)

    @classmethod
    def _kind(cls) -> "type[Ensemble]":
        """The class that a framework's own base class is added to."""
        return Ensemble

    def _check_members(self) -> None:
        """Raise where members do not belong together, for families that demand more than equal structure."""

    # Evaluation

    def _evaluated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule, assigned = self.rule, self._draws.assignment()
        if assigned is not None:
            return assigned.evaluate(self, args, kwargs)
        if rule.per_evaluation or rule.per_trajectory:
            return drawn_pass(self._drawn, args, kwargs) if torch.compiler.is_compiling() else self._drawn(args, kwargs)
        found = summed(self._engine, rule, args, kwargs)
        return self._combine(self._evaluate(args, kwargs), self._aggregation(args, kwargs)) if found is None else found

    def member_outputs(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate all members without combining them.

        Returns:
            [K, B, ...]; for a diffusers output its tensor; in other structures each tensor, of any dtype, is stacked.
        """
        return plain(self._combine(self._evaluate(args, kwargs), stacked))

    def forward_with_variance(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Evaluate all members once and return their aggregate and their variance.

        Returns:
            What the ensemble returns, and the variance over members (normalised by K, around the mean) in the structure
            of :meth:`member_outputs`, [B, ...].
        """
        if self.rule.random or self._draws.assignment() is not None:
            what = f"rule {self.rule.name!r}" if self.rule.random else "ens.assigned"
            raise ValueError(f"{what} evaluates one member a sample, so there is no variance over members")
        outputs = self._evaluate(args, kwargs)
        return self._combine(outputs, self._aggregation(args, kwargs)), plain(self._combine(outputs, member_variance))

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Leaves of the members' outputs, each [K, B, ...] or a list of K, and their structure."""
        engine = self._engine
        if engine is not None and engine.kind.fresh and torch.compiler.is_compiling():
            return drawn_pass(self._evaluate, args, kwargs)
        if engine is not None and torch.compiler.is_dynamo_compiling():
            return compiled_pass(engine, args, kwargs)
        arguments = self._arguments(args, kwargs)
        if engine is not None:
            return engine.evaluate(arguments, self.training)
        return each_member(self.network, arguments, self._call_module)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        arguments = Arguments(args, kwargs, self.num_members)
        if self._fresh:
            self._begin(arguments)
        return arguments

    def _call_module(self, k: int, arguments: Arguments, method: str = "forward") -> Any:
        """What member k returns, where members are modules of their own."""
        apart: Any = self.network
        member = apart.get()[k]
        with apart.running([k]):
            return call(member, method, *arguments.of_member(k))

    def _aggregation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], Tensor]:
        """How scores [K, B, ...] of this call become one: in which parameterisation, and variances apart."""
        forward = functools.partial(type(self).forward, self)
        make = functools.partial(aggregation, self.rule, self._settings, self._prediction, forward)
        if not reproducible.enabled() or by_kernels(self.rule, self._prediction, self._settings):
            return make(args, kwargs)
        rows = rows_of(self._engine or Modules(self.network), Arguments(args, kwargs), "forward")
        return of_each_row([make(*row.call) for row in rows])

    @property
    def _prediction(self) -> schedules.Prediction:
        """What the members' outputs mean, as far as it was said."""
        return self._settings["prediction"]

    def _combine(self, columns: list[Any], combine: Any) -> Any:
        *leaves, spec = columns
        return pytree.tree_unflatten([combined(combine, x) if enters(x, combine) else agreed(x) for x in leaves], spec)

    # Inspection

    @property
    def rule(self) -> rules.Rule:
        """How member outputs become one output; settable by name, alias or value."""
        return self.__dict__["_rule"]

    @rule.setter
    def rule(self, rule: str | rules.Rule) -> None:
        resolved = rules.get(rule)
        resolved.check(self.num_members)
        if "_engine" in self.__dict__:  # before, it is not known whether the family has a schedule of its own
            check_rule(resolved, self._prediction, self._settings)
        self.__dict__["_rule"] = resolved

    @property
    def engine(self) -> str:
        """How the members are evaluated: ``"fold"`` or ``"loop"``."""
        return "loop" if self._engine is None else self._engine.behaviour.engine

    @property
    def device(self) -> torch.device:
        """The device of the stacks; all are on one."""
        return next(iter((*self.parameters(), *self.buffers()))).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point stack."""
        return next(t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())

    def with_rule(self, rule: str | rules.Rule) -> "Ensemble":
        """A view with another rule: the same weights, engine, plans and trajectories, and nothing copied.

        Requests in several threads take a view each, since a rule that is set on the ensemble is everybody's.

        Raises:
            ValueError: an unknown rule, or one that does not fit the ensemble.
        """
        view = view_of(self)
        view.rule = rule
        return view

    @property
    def members(self) -> Members:
        """Members on demand: ``ens.members[k]`` is a copy of member k, of which no change reaches the ensemble.

        :meth:`replace_member` puts one in.
        """
        return Members(self)

    def replace_member(self, k: int, member: nn.Module | Mapping[str, Any]) -> None:
        """Put copies of a module's, or of a state_dict's, tensors in the place of member k's; not during a call.

        Raises:
            IndexError: no member k.
            TypeError: neither a module nor a mapping.
            ValueError: it differs in more than weights, unless members do; in dtype; in what is one object in all.
        """
        replace_member(self, k, member)

    def extra_repr(self) -> str:
        """What ``print(ens)`` shows above the network."""
        return summary(self)

    def report(self) -> Report:
        """Which engine and backend each layer got, and why."""
        if self._engine is None:
            found = Report("loop", self.num_members, self.__dict__["_why_loop"], [])
        else:
            found = inspection.report(self._engine)
        own = not (self.rule.has_kernels or self.rule.needs_noise_level or self.rule.random)
        calls = self._with_captured(found.calls)
        return dataclasses.replace(found, by_definition=str(self.rule) if own else "", calls=calls)

    def verify(self, *args: Any, **kwargs: Any) -> float:
        """Evaluate fold and loop on this input; return the largest error relative to the largest output magnitude."""
        return 0.0 if self._engine is None else inspection.verify(self._engine, self._arguments(args, kwargs))

    def refresh(self) -> None:
        """Forget what was derived from the weights or established about them; call it after changing weights."""
        self._forget(state=True)

    def _forget(self, state: bool = False) -> None:
        """Forget what was derived from the weights, and, with ``state``, copies of the members' Python state."""
        self._recorded.clear()
        if self._engine is not None:
            self._engine.refresh(state)

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> Any:
        """Move or convert the stacks, as ``nn.Module.to``; a memory format is that of each member's kernels."""
        super().to(*args, **kwargs)
        if memory_format is not None and self._engine is None:
            super().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]  # torch's stub has it positional
        elif memory_format is not None:
            set_format(self.network, memory_format)
            self._forget()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Ensemble":
        """Move or convert the stacks; whatever was derived from them is dropped."""
        super()._apply(fn, recurse)
        self._forget()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the stacks [K, ...]; whatever was derived from the old ones is dropped."""
        result = super().load_state_dict(*args, **kwargs)
        self._forget()
        return result

    def requires_grad_(self, requires_grad: bool = True) -> "Ensemble":
        """Train the stacks, or freeze them; what frozen members had in common is each member's own once it trains."""
        if requires_grad and self._engine is not None:
            self._engine.unshare_parameters()
        return super().requires_grad_(requires_grad)

    def train(self, mode: bool = True) -> "Ensemble":
        """Set the mode of the members, as for one of them."""
        super().train(mode)
        self._views.train(mode)
        return self

    # Copies and files

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write the stacks (safetensors) and config.json; see :func:`fastens.checkpoints.save_ensemble`.

        The arguments are those of diffusers' models. Of several processes the main one writes.

        Raises:
            ValueError: another way of writing is asked for; see :func:`fastens.checkpoints.save_ensemble` for others.
        """
        from fastens.checkpoints import save_ensemble

        if not safe_serialization or save_function is not None or push_to_hub:
            raise ValueError("an ensemble is written as safetensors, to a folder; upload that by `hf upload`")
        if is_main_process:
            save_ensemble(self, save_directory, variant, max_shard_size)

    @classmethod
    def from_pretrained(cls, directory: str | Path, factory: Any = None, **options: Any) -> "Ensemble":
        """Read what :meth:`save_pretrained` wrote; see :func:`fastens.checkpoints.load_ensemble`."""
        from fastens.checkpoints import load_ensemble

        return load_ensemble(directory, factory, **options)


KINDS[False] = Ensemble

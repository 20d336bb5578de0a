"""The ensemble: K members behind the interface of one."""

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from inspect import ismethod
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastens import rules, schedules
from fastens.adapters import adapter_of, with_signature
from fastens.aggregation import aggregation, check_noise_level, summed
from fastens.capture import Capturing
from fastens.draws import Draws, Evaluation
from fastens.fold.alike import reaches_back
from fastens.fold.arguments import Arguments
from fastens.fold.compiled import compiled_pass
from fastens.fold.drawn import run_drawn
from fastens.fold.engine import FoldEngine, call
from fastens.fold.members import DifferentMembers, check_members, in_format, replaced, stack_members, tensors_of
from fastens.fold.tensor import MemberTensor
from fastens.methods import call_method
from fastens.ops.member_variance import member_variance
from fastens.outputs import agreed, columns, combined, is_scores, plain, stacked
from fastens.report import Report
from fastens.settings import check_settings


class Ensemble(Capturing):
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

    Raises:
        ValueError: no members; members that differ under ``engine="fold"``, or in dtype or device; an unknown rule,
            engine or backend; weights of another number than K; a conversion that lacks prediction or schedule, a rule
            that lacks a schedule, a scheduler that contradicts ``prediction`` or is refused.
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
    ) -> None:
        nn.Module.__init__(self)
        check_members(members)
        if isinstance(members, list | tuple) and isinstance(members[0], str | Path):
            from fastens.checkpoints import load_members

            members = load_members(members)  # pyright: ignore[reportArgumentType]
        first = members[0]
        settings = check_settings(engine, backend, max_fold, prediction, aggregate_in, schedule)
        self._setup(len(members), rule, settings)
        try:
            with torch.inference_mode(False):  # stacks that autograd and version counters know
                self._adopt(*stack_members(members), originals=members)  # pyright: ignore[reportArgumentType]
        except DifferentMembers as error:
            if engine == "fold":
                raise ValueError(f"{error}; members of different structure run with engine='loop' or 'auto'") from error
            with torch.inference_mode(False):
                self._adopt_modules(members, str(error))
        self.training = first.training

    # Construction

    def _setup(self, num_members: int, rule: str | rules.Rule, settings: dict[str, Any]) -> None:
        state = self.__dict__
        state["num_members"] = num_members
        state["_settings"] = settings
        state["_draws"] = Draws(num_members)
        state["_recorded"] = {}  # signature of a call -> its recording
        self.rule = rule

    def _adopt(
        self, skeleton: nn.Module, stacks: dict[str, Tensor], shared: frozenset[str], originals: Any = None
    ) -> None:
        engine = FoldEngine(skeleton, stacks, shared, self.num_members, self._settings, originals)
        self.__dict__["_engine"] = engine
        self.network = engine.network
        self._become_member_like(skeleton)

    def _adopt_modules(self, members: Sequence[nn.Module], why: str) -> None:
        modules = []
        for member in members:
            if reaches_back(member) is not None:  # a copy would run on the weights of the member itself
                modules.append(member)
                continue
            tensors = {
                name: nn.Parameter(t.detach().clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.clone()
                for name, t in tensors_of(member).items()
            }
            try:
                modules.append(replaced(member, tensors))
            except Exception:  # it cannot be copied
                modules.append(member)
        if self._settings["engine"] == "auto":
            warnings.warn(f"fastens: members are evaluated one by one: {why}", stacklevel=3)
        self.__dict__["_engine"] = None
        self.__dict__["_why_loop"] = why
        self.network = nn.ModuleList(modules)
        self._become_member_like(modules[0])

    def _become_member_like(self, member: nn.Module) -> None:
        base = self._kind()
        adapter = adapter_of(member)
        if adapter is not None:
            base = importlib.import_module(adapter).ensemble_class(member, base)
        self.__class__ = with_signature(base, type(member))
        self._check_members()
        check_noise_level(self.rule, self._noise_schedule)

    @classmethod
    def _kind(cls) -> "type[Ensemble]":
        """The class that a framework's own base class is added to."""
        return Ensemble

    def _check_members(self) -> None:
        """Raise where members do not belong together, for families that demand more than equal structure."""

    # Evaluation

    def _evaluated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = self.rule
        if rule.per_evaluation or rule.per_trajectory:
            return self._drawn(args, kwargs)
        found = summed(self._engine, rule, args, kwargs)
        if found is not None:
            return found
        return self._combine(self._evaluate(args, kwargs), self._aggregation(args, kwargs))

    def member_outputs(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate all members without combining them.

        Returns:
            [K, B, ...]; for a diffusers output its tensor; other structures keep their structure, each tensor stacked.
        """
        return plain(self._combine(self._evaluate(args, kwargs), stacked))

    def forward_with_variance(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Evaluate all members once and return their aggregate and their variance.

        Returns:
            What the ensemble returns, and the variance over members (normalised by K, around the mean) in the structure
            of :meth:`member_outputs`, [B, ...].
        """
        if self.rule.per_evaluation or self.rule.per_trajectory:
            raise ValueError(
                f"rule {self.rule.name!r} evaluates one member a sample, so there is no variance over members"
            )
        outputs = self._evaluate(args, kwargs)
        return self._combine(outputs, self._aggregation(args, kwargs)), plain(self._combine(outputs, member_variance))

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Leaves of the members' outputs, each [K, B, ...] or a list of K, and their structure."""
        if torch.compiler.is_dynamo_compiling() and self._engine is not None and self._engine.engine == "fold":
            return compiled_pass(self._engine, args, kwargs)
        arguments = self._arguments(args, kwargs)
        if self._engine is not None:
            return self._engine.evaluate(arguments, self.training)
        return columns([self._call_module(k, arguments) for k in range(self.num_members)])

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return Arguments(args, kwargs, self.num_members)

    def _call_module(self, k: int, arguments: Arguments, method: str = "forward") -> Any:
        """What member k returns, where members are modules of their own."""
        args, kwargs = arguments.of_member(k)
        return call(list(self.network.children())[k], method, args, kwargs)

    def _aggregation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], Tensor]:
        """How scores [K, B, ...] of this call become one: in which parameterisation, and variances apart."""
        forward = type(self).forward.__get__(self)
        return aggregation(self.rule, self._settings, self._noise_schedule, forward, args, kwargs)

    @property
    def _prediction(self) -> schedules.Prediction:
        """What the members' outputs mean, as far as it was said."""
        return self._settings["prediction"]

    @property
    def _noise_schedule(self) -> schedules.Schedule | None:
        """By which the time among the arguments becomes a noise level; none where nobody said it."""
        return self._prediction.schedule

    def _combine(self, columns: list[Any], combine: Any) -> Any:
        *leaves, spec = columns
        return pytree.tree_unflatten([combined(combine, x) if is_scores(x) else agreed(x) for x in leaves], spec)

    def _drawn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate, for each sample, only the member drawn for it."""
        arguments = self._arguments(args, kwargs)
        evaluation = self._begin(arguments)
        members = self._draws.members(self.rule, evaluation, arguments.batch_size)
        if self._engine is not None:
            return self._engine.evaluate_drawn(arguments, members)
        return run_drawn(self._call_module, arguments, members)

    def _begin(self, arguments: Arguments) -> Evaluation:
        evaluation = self._draws.begin(arguments.batch)
        arguments.evaluation = evaluation.seed, evaluation.number
        arguments.num_samples = evaluation.num_samples
        return evaluation

    def trajectory(
        self, batch_size: int, generator: torch.Generator | int | None = None
    ) -> AbstractContextManager[None]:
        """Scope of one run of a sampler: ``mixture`` draws one member per sample for all of it.

        Inside it ``alternating`` draws, and fresh dropout masks, are reproducible from the generator. Rows i, i+B,
        i+2B, ... of a guided batch are one sample and get the same member. Outside it, a batch that repeats itself is
        taken for a guided one (a comparison, which on a GPU waits for the batch).

        Args:
            batch_size: samples in the trajectory, B.
            generator: read once, here; or a seed; none for torch's global generator.

        Raises:
            RuntimeError: a trajectory is already in progress.
            ValueError: a batch_size below one.
        """
        return self._draws.trajectory(batch_size, generator)

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
            check_noise_level(resolved, self._noise_schedule)
        self.__dict__["_rule"] = resolved

    @property
    def engine(self) -> str:
        """How the members are evaluated: ``"fold"`` or ``"loop"``."""
        return "loop" if self._engine is None else self._engine.engine

    @property
    def device(self) -> torch.device:
        """Where the stacks are."""
        return next(iter((*self.parameters(), *self.buffers()))).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point stack."""
        return next(t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())

    @property
    def members(self) -> "_Members":
        """Members on demand: ``ens.members[k]`` is a module with a copy of member k's weights."""
        return _Members(self)

    def report(self) -> Report:
        """Which engine and backend each layer got, and why."""
        if self._engine is None:
            return Report("loop", self.num_members, self.__dict__["_why_loop"], [])
        return self._engine.report(self._settings["backend"])

    def verify(self, *args: Any, **kwargs: Any) -> float:
        """Evaluate fold and loop on this input; return the largest error relative to the largest output magnitude."""
        return 0.0 if self._engine is None else self._engine.verify(self._arguments(args, kwargs))

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
            super().to(memory_format=memory_format)
        elif memory_format is not None:
            for name, stack in tensors_of(self.network).items():
                if name not in self._engine.shared:
                    stack.data = in_format(stack.data, memory_format)
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

    def train(self, mode: bool = True) -> "Ensemble":
        """Set the mode of the members, as for one of them."""
        super().train(mode)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of all members where it is theirs and not the ensemble's."""
        network = self.__dict__.get("_modules", {}).get("network")
        own = network is None or name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        looped = not own and self.__dict__["_engine"] is None
        members = [] if own or network is None else list(network.children()) if looped else [network]
        if members and all(hasattr(member, name) for member in members):
            for member in members:
                setattr(member, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Look like a member: attributes that the ensemble has not are the members'."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            network = self.__dict__.get("_modules", {}).get("network")
            if network is None or name.startswith("__"):
                raise
        looped = self.__dict__["_engine"] is None
        member = next(network.children()) if looped else network
        try:
            value = getattr(member, name)
        except AttributeError:
            raise AttributeError(
                f"neither the ensemble nor its members ({type(member).__name__}) have {name!r}"
            ) from None
        if isinstance(value, MemberTensor):
            return value.stack
        if ismethod(value) and value.__self__ is member:
            return functools.partial(call_method, self, name)
        return value

    # Copies and files

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Rebuild from skeleton and stacks, so that classes made on the fly are not pickled."""
        state = self.__dict__
        if self._engine is None:
            content: Any = (None, list(self.network), state["_why_loop"])
        else:
            content = (self._engine.skeleton, tensors_of(self.network), self._engine.shared)
        return rebuild, (self.num_members, self.rule, self._settings, content, self.training, self._kind())

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the stacks (safetensors) and config.json; see :func:`fastens.checkpoints.save_ensemble`."""
        from fastens.checkpoints import save_ensemble

        save_ensemble(self, save_directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path, factory: Any = None, **options: Any) -> "Ensemble":
        """Read what :meth:`save_pretrained` wrote; see :func:`fastens.checkpoints.load_ensemble`."""
        from fastens.checkpoints import load_ensemble

        return load_ensemble(directory, factory, **options)


class _Members(Sequence[nn.Module]):
    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble

    def __len__(self) -> int:
        return self._ensemble.num_members

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        if not -len(self) <= k < len(self):
            raise IndexError(f"member {k} of {len(self)}")
        ensemble = self._ensemble
        if ensemble._engine is None:
            member = list(ensemble.network.children())[k]
            return replaced(member, {name: _copy(t, t) for name, t in tensors_of(member).items()})
        return ensemble._engine.member(k % len(self))


def _copy(value: Tensor, like: Tensor) -> Tensor:
    copied = value.detach().clone()
    return nn.Parameter(copied, like.requires_grad) if isinstance(like, nn.Parameter) else copied


def rebuild(
    num_members: int,
    rule: rules.Rule,
    settings: dict[str, Any],
    content: Any,
    training: bool,
    kind: type[Ensemble] = Ensemble,
) -> Ensemble:
    """Put an ensemble together from what pickling or a file keeps: skeleton, stacks and names of shared tensors."""
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
        ensemble._adopt(skeleton, *rest)
    return ensemble.train(training)

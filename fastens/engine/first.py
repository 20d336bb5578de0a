"""The first call of a kind: whether plan and fold give what the members that were handed in do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastens.engine.arguments import Arguments
from fastens.engine.check import relative_error
from fastens.engine.memory_cap import is_out_of_memory
from fastens.engine.objects import objects_kept, why_changed
from fastens.engine.states import Folded
from fastens.engine.structure import Structure, uncounted
from fastens.fold.attributes import SetWhenCalled
from fastens.fold.sharing import sharing_noted
from fastens.fold.tensor import memory_of, tensors_of
from fastens.fold.writes import NeedsWrappers, WritesInput
from fastens.network.made import MadeWhenCalled
from fastens.network.snapshots import same_bits, thread_locals
from fastens.network.state import DRAWS_ELSEWHERE, Changed, GlobalDraws, TorchDraws, random_kept, state_kept

if TYPE_CHECKING:
    from fastens.engine.engine import Engine


class FirstPass:
    """Holds the plan or the fold of a call against the members run one by one, and falls back where they part.

    Args:
        engine: whose call it is.
        arguments: of the call.
        key: what tells this kind of call from others.
        plannable: whether a plan is wanted.
        method: what is called.

    Attributes:
        disturbed: whether somebody wrote to weights meanwhile where fold and members parted: the next call is a first
            one again.
    """

    def __init__(self, engine: Engine, arguments: Arguments, key: Any, plannable: bool, method: str) -> None:
        self._engine = engine
        self._arguments = arguments
        self._key = key
        self._plannable = plannable
        self._method = method
        self.disturbed = False
        self._random = False  # whether members draw random numbers
        self._expected: list[list[Tensor]] = []  # the members' outputs: all that is held of the loop meanwhile

    def run(self) -> list[Any] | None:
        """Return the checked outputs of the plan or of the fold.

        None where the caller has to fold, or members are looped.
        """
        engine, weights = self._engine, self._engine.weights_now()
        with uncounted(), random_kept(), objects_kept(self._arguments):
            problem = self._run_members(weights)
            if problem is not None:
                engine.give_up(problem)
                return None
            random = self._random
            planned = None
            if random and self._plannable:
                engine.plans.decline("members draw random numbers in this mode")
            elif self._plannable:
                planned = engine.planned(self._arguments, self._key, self._expected)
            problem, leaves = self._folded() if planned is None else (None, planned)
            if problem is None and leaves is not None:
                structure = Structure(engine, self._arguments, self._method, self._expected)
                problem = structure.problem_drawing_alike() if random else structure.problem(leaves)
        if problem is not None:
            self.disturbed = engine.weights_now() != weights
            if not self.disturbed:
                engine.give_up(problem)
            return None
        engine.originals = None
        if planned is not None:
            return planned
        why = engine.plans.why_not if self._method == "forward" else "plans are of calls of forward alone"
        if random:
            why = "members draw random numbers in this mode"
            engine.behaviour.why = why
        engine.states.put(self._key, Folded(call=self._arguments.described(self._method), why=why))
        useful = not random and not torch.is_grad_enabled() and not engine.network.training
        return leaves if useful and not engine.behaviour.writes_itself else None

    def _run_members(self, weights: list[Any]) -> str | None:
        """Run every member alone and keep its outputs; return why members have to be looped, or none."""
        engine, originals = self._engine, self._engine.originals
        own = originals is not None and originals.usable()
        held = tensors_of(engine.network), engine.shared
        around: AbstractContextManager[None] = nullcontext()
        elsewhere = GlobalDraws()
        for k in range(engine.num_members):
            member = originals.member(k) if own and originals is not None else engine.view(k)
            arguments = self._arguments.copied()
            draws = TorchDraws()
            versions = _versions(arguments)
            network = nullcontext(Changed()) if own else state_kept(engine.network)
            parameters = _parameters(member, k, held if own else None)
            if own and engine.weights_now(k) != [weights[0], *weights[k + 1 : k + 2]]:
                # the stacks are not what this member is any more
                parameters = _parameters(member, k, None)
            given = objects_kept(arguments)
            with around, network as written, state_kept(member) as changed, given as objects:
                output = engine.call_module(member, k, arguments, self._method)
                each_thread = [] if k else thread_locals(member)  # of members that are alike
            if modules := changed.modules | written.modules:
                raise MadeWhenCalled(modules)
            if attributes := changed.attributes | written.attributes:
                raise SetWhenCalled(attributes)
            written_to = self._written_by_itself(member, k, parameters)
            changed |= written_to
            if elsewhere.drawn():
                return DRAWS_ELSEWHERE
            if objects:
                return why_changed(objects)
            touched = sorted(changed | written)
            engine.check_written(touched)
            if changed.outside or written.outside or engine.all_one_object(touched):
                return f"their code changes what they share ({', '.join(touched[:3])})"
            if each_thread:  # of what other threads keep, a fold that becomes a loop would see nothing
                return "they keep values for each thread (threading.local)"
            if changed.back is not None:
                return f"they keep what reaches them {changed.back.how} ({changed.back.name}) when they are called"
            if written_to:
                return f"their code writes to their parameters ({', '.join(sorted(written_to)[:3])})"
            self._random = self._random or draws.drawn()
            if versions != _versions(arguments) or not self._equal_arguments(arguments):
                engine.behaviour.writes_arguments = True
            engine.behaviour.writes_itself = engine.behaviour.writes_itself or bool(changed or written)
            if touched:
                engine.unshare(touched)
            self._expected.append([x.detach() for x in pytree.tree_leaves(output) if isinstance(x, Tensor)])
            del output
            around = self._measuring() if k == 0 else nullcontext()
        if engine.num_members == 1 and not isinstance(around, nullcontext):
            with around, state_kept(engine.views[0]):
                engine.call_module(engine.views[0], 0, self._arguments, self._method)
        return None

    def _written_by_itself(self, member: nn.Module, k: int, parameters: list[_Parameter]) -> set[str]:
        """Return the names of parameters that the member's own code writes to, which get the values that they had.

        Somebody else, such as a thread that trains, may have written to them meanwhile: those values stay. Whose they
        are tells a second call, whose own writes are seen as it does them, or that nothing counted the write.
        """
        written = [each for each in parameters if each.is_written()]
        if not written:
            return set()
        own = {each.name for each in written if not each.is_counted()}
        with state_kept(self._engine.network), state_kept(member), _Writes() as writes:
            self._engine.call_module(member, k, self._arguments.copied(), self._method)
        own |= {each.name for each in written if memory_of(each.tensor) in writes.memories}
        for each in written:
            if each.name in own:
                each.put_back()
        return own

    def _equal_arguments(self, arguments: Arguments) -> bool:
        """Whether arguments still are those of the call; inference mode counts no writes."""
        pairs = zip(arguments.tensors, self._arguments.tensors, strict=True)
        return not torch.is_inference_mode_enabled() or all(relative_error(a, b) == 0 for a, b in pairs)

    def _measuring(self) -> AbstractContextManager[None]:
        """What the next member's pass runs in: a measurement of memory where that is needed."""
        engine, arguments, outputs = self._engine, self._arguments, self._expected[0]
        weights = sum(p.numel() * p.element_size() for p in engine.network.parameters()) / engine.num_members
        least = int(weights / 64 + sum(x.numel() * x.element_size() for x in outputs))
        tensors = arguments.tensors
        device = tensors[0].device if tensors else torch.device("cpu")
        differentiates = torch.is_grad_enabled() and any(
            x.requires_grad for x in (*engine.network.parameters(), *tensors)
        )
        batch = arguments.batch_size
        wanted = not differentiates and engine.cap.wants_measure(self._key, engine.num_members, batch, least, device)
        return engine.cap.measuring(self._key, batch) if wanted else nullcontext()

    def _folded(self) -> tuple[str | None, list[Any] | None]:
        """Return why the fold fails where members do not, or none; and what it gave."""
        engine = self._engine
        for _ in range(8):
            try:
                with state_kept(engine.network) as changed, sharing_noted() as passes:
                    leaves = engine.fold(self._arguments, self._key, self._method)
                engine.hold_sharing(passes, self._arguments, self._method)
                engine.behaviour.writes_itself = engine.behaviour.writes_itself or bool(changed)
                break
            except NeedsWrappers as error:
                if not self._unshare(error):
                    if engine.behaviour.wrapped:
                        return f"{error}", None
                    engine.behaviour.wrapped = True
            except WritesInput:
                engine.behaviour.writes_arguments = True
            except Exception as error:  # the members have no such error
                if is_out_of_memory(error):
                    raise
                return f"the fold fails where they do not: {type(error).__name__}: {error}", None
        else:
            return "the fold fails again and again", None
        return None, leaves

    def _unshare(self, error: NeedsWrappers) -> bool:
        """Give each member its own of the buffer that a pass wrote to; return whether it was one."""
        storage = error.written.untyped_storage()._cdata
        return self._engine.unshare(
            name
            for name, tensor in tensors_of(self._engine.network).items()
            if tensor.untyped_storage()._cdata == storage
        )


class _Parameter:
    """One of a member's parameters, and what it held.

    Args:
        name: of the parameter.
        tensor: the parameter.
        stack: what it is held against; none where it is to be copied.
        k: the member, where the stack is of all.
    """

    def __init__(self, name: str, tensor: Tensor, stack: Tensor | None, k: int | None) -> None:
        self.name, self.tensor = name, tensor
        held = (tensor.clone() if stack is None else stack).detach()
        self._values = held if k is None or stack is None else held[k]
        self._counted = [x for x in (tensor, stack) if x is not None and not x.is_inference()]
        self._counts = [x._version for x in self._counted]

    def is_written(self) -> bool:
        """Whether it holds other values than it did."""
        return not same_bits(self.tensor.detach(), self._values)

    def is_counted(self) -> bool:
        """Whether writes were counted meanwhile."""
        return [x._version for x in self._counted] != self._counts

    def put_back(self) -> None:
        """Give it the values that it had."""
        with torch.inference_mode() if self.tensor.is_inference() else torch.no_grad():
            self.tensor.detach().copy_(self._values)


def _parameters(member: nn.Module, k: int, held: tuple[dict[str, Tensor], frozenset[str]] | None) -> list[_Parameter]:
    """Member k's parameters, with what they hold: what the stacks and the shared ones say, or copies."""
    stacks, common = held or ({}, frozenset())
    found = [(name, p) for name, p in tensors_of(member).items() if isinstance(p, nn.Parameter)]
    return [_Parameter(name, p, stacks.get(name), None if name in common else k) for name, p in found]


class _Writes(TorchDispatchMode):
    """The memory that operations of this thread write to."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: set[int | None] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                self.memories |= {memory_of(x) for x in pytree.tree_leaves(given) if isinstance(x, Tensor)}
        return func(*args, **kwargs)


def _versions(arguments: Arguments) -> list[int]:
    """How often the tensors of a call were written to, where that is counted."""
    return [x._version for x in arguments.tensors if not x.is_inference()]

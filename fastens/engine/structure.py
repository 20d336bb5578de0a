"""Whether a fold gives what the members do, also where a first call's own precision and weights would not show it.

Half precision hides a network that mixes rows behind its rounding, and a layer that is zero at the start, or a context
that is, hides everything before it. So the first call of such a kind is repeated in float32, and on drawn weights and
inputs. Stacks and members stay as they are: other values are made of them when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from fastens.engine.arguments import Arguments
from fastens.engine.check import HALVES, compared, relative_error, rounding_tolerance, tolerance_for
from fastens.engine.memory_cap import is_out_of_memory
from fastens.engine.predictable import PredictableDraws
from fastens.fold.tensor import tensors_of
from fastens.fold.writes import NeedsWrappers, WritesInput
from fastens.network.state import state_kept
from fastens.network.tables import converted, seen_as

if TYPE_CHECKING:
    from fastens.engine.engine import Engine

_SELECTIVE = _CachingTorchDispatchMode, _CachedTorchDispatchMode
_DRAWN = 10  # drawn weights may be worse conditioned than trained ones


def exactly(engine: Engine, k: int, arguments: Arguments, method: str = "forward") -> list[Tensor] | None:
    """Return member k's tensors in float32 on the same weights; none where it takes no other precision."""
    device, view = next((x.device.type for x in arguments.tensors), "cpu"), engine.view(k)
    given = arguments.with_tensors([_wide(x) for x in arguments.tensors]).copied()

    try:
        precise = torch.no_grad(), torch.autocast(device, enabled=False), seen_as(_wide)
        with precise[0], precise[1], state_kept(engine.network), state_kept(view), precise[2]:
            output = engine.call_module(view, k, given, method)
    except Exception:  # it casts itself
        return None
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]


@contextmanager
def uncounted() -> Iterator[None]:
    """Scope of what is computed beside a call, of which a checkpoint around that sees nothing.

    It counts what is saved, and a selective one keeps results of operations by their order: the second run of the call
    computes nothing beside it. The call's own gradient mode stays, on which torch's paths depend.
    """
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    with ExitStack() as around:
        if _top_saved_tensors_default_hooks(True) is not None:
            around.enter_context(torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged))
        if any(isinstance(mode, _SELECTIVE) for mode in modes):
            around.enter_context(_disable_current_modes())
        yield


def _unchanged(x: Tensor) -> Tensor:
    return x


class Structure:
    """Holds fold and members against each other in float32, and on drawn weights and inputs.

    Args:
        engine: whose first call it is.
        arguments: of the call.
        method: what is called.
        expected: the tensors that each member gave.
    """

    def __init__(self, engine: Engine, arguments: Arguments, method: str, expected: list[list[Tensor]]) -> None:
        self._engine = engine
        self._arguments = arguments
        self._method = method
        self._expected = expected
        tensors = tensors_of(engine.network)
        self._names = {id(t): (i, name) for i, (name, t) in enumerate(tensors.items())}
        self._common = engine.shared
        parameters = list(engine.network.parameters())
        outputs = [x for theirs in expected for x in theirs]
        self._cast = any(torch.is_autocast_enabled(x.device.type) for x in (*parameters[:1], *arguments.tensors[:1]))
        self.half = self._cast or any(t.dtype in HALVES for t in (*parameters, *outputs))
        self._zeros = {
            name for name, p in engine.network.named_parameters()
            if p.is_floating_point() and p.numel() and not name.endswith("bias") and _is_zero(p)
        }  # fmt: skip
        self.degenerate = bool(self._zeros) or self._degenerate_outputs() or any(map(_shows_nothing, arguments.tensors))

    def _degenerate_outputs(self) -> bool:
        """Whether the members' outputs tell neither rows nor members apart."""
        first = [compared(x) for x in self._expected[0] if x.numel() > 1]
        first = [x for x in first if x.is_floating_point()]
        if not first or any(bool((x == x.flatten()[0]).all()) for x in first):
            return bool(first)
        others = self._expected[1:]
        return bool(others) and all(
            all(relative_error(a, b) == 0 for a, b in zip(self._expected[0], other, strict=True)) for other in others
        )

    def problem(self, leaves: list[Any]) -> str | None:
        """What is wrong with the fold, none where nothing is.

        Args:
            leaves: what fold or plan gave, [K, ...], and their structure last.
        """
        tensors = [leaf for leaf in leaves[:-1] if isinstance(leaf, Tensor)]
        own = self._engine.kind.runs_alone  # else the fold would be held against itself
        exact = self._answers(drawn=False) if self.half and own else None
        if exact is None or isinstance(exact, str):
            network = self._engine.network
            found = _parting(tensors, self._expected, lambda expected: tolerance_for(expected, network.parameters()))
        else:
            found = _parting(*exact, self._tolerance, "in float32 ") or self._beyond_rounding(tensors, exact[1])
        if found is not None or not self.degenerate or not own:
            return found
        return self._problem_with_drawn_weights()

    def problem_drawing_alike(self) -> str | None:
        """The same where members draw random numbers, which fold and members draw alike for once."""
        if not self._engine.kind.runs_alone:
            return None
        with PredictableDraws():
            found = self._answers(drawn=False)
            if found is None or isinstance(found, str):  # such draws are not for it, as those of scripted functions
                return None
            problem = _parting(*found, self._tolerance, "with the same random numbers ")
            return self._problem_with_drawn_weights() if problem is None and self.degenerate else problem

    def _problem_with_drawn_weights(self) -> str | None:
        drawn = self._answers(drawn=True)
        if drawn is None or isinstance(drawn, str):
            return drawn
        return _parting(*drawn, lambda expected: _DRAWN * self._tolerance(expected), "on drawn weights and inputs ")

    def _tolerance(self, expected: Tensor) -> float:
        """The tolerance for one output of weights that are read in float32 where they are of half precision."""
        single = [torch.empty(0, dtype=torch.float32)] * self.half
        exact = (p for p in self._engine.network.parameters() if p.dtype not in HALVES)
        return tolerance_for(expected, (*single, *exact))

    def _beyond_rounding(self, tensors: list[Tensor], exact: list[list[Tensor]]) -> str | None:
        """Where the fold is farther from the members than these are from themselves in float32 would explain."""
        wide = {
            id(half): single
            for a, b in zip(self._expected, exact, strict=True)
            for half, single in zip(a, b, strict=True)
        }

        def allowed(expected: Tensor) -> float:
            halved = expected.dtype in HALVES or (self._cast and expected.is_floating_point())
            return (
                rounding_tolerance(expected, wide[id(expected)])
                if halved
                else tolerance_for(expected, network.parameters())
            )

        network = self._engine.network
        return _parting(tensors, self._expected, allowed)

    def _answers(self, drawn: bool) -> tuple[list[Tensor], list[list[Tensor]]] | str | None:
        """Return what the fold and each member give for other values, or why the fold gives nothing where members do.

        None where the members give nothing to hold it to.
        """
        engine = self._engine
        arguments = self._given(drawn)
        as_it_is, originals = not drawn and not self.half, engine.originals
        own = as_it_is and originals is not None and originals.usable()
        views, network = [] if own else engine.views, engine.network
        device = next((x.device.type for x in arguments.tensors), "cpu")
        enabled = torch.is_autocast_enabled(device) and not self.half

        def change(tensor: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                return self._drawn(tensor) if drawn else _wide(tensor)

        def seen() -> AbstractContextManager[Any]:
            return nullcontext() if as_it_is else seen_as(change)

        members: list[list[Tensor]] = []
        try:
            with uncounted(), torch.autocast(device, enabled=enabled), state_kept(network):
                for k in range(engine.num_members):
                    member = originals.member(k) if own and originals is not None else views[k]
                    with state_kept(network), state_kept(member), seen():  # a buffer that all share, too
                        output = engine.call_module(member, k, arguments.copied(), self._method)
                    members.append([x.detach() for x in pytree.tree_leaves(output) if isinstance(x, Tensor)])
                    if not all(bool(torch.isfinite(x).all()) for x in members[-1] if x.is_floating_point()):
                        return None
                with seen():
                    leaves = self._fold(arguments.copied())
        except Exception:  # it casts itself, or takes no other values
            return None
        if leaves is None or isinstance(leaves, str):
            return leaves
        return [leaf.detach() for leaf in leaves[:-1] if isinstance(leaf, Tensor)], members

    def _fold(self, arguments: Arguments) -> list[Any] | str | None:
        try:
            return self._engine.fold(arguments, (self._method, "structure"), self._method)
        except Exception as error:  # the members have no such error
            if self.half or is_out_of_memory(error) or isinstance(error, NeedsWrappers | WritesInput):
                return None
            return f"on other numbers the fold fails where they do not: {type(error).__name__}: {error}"

    def _given(self, drawn: bool) -> Arguments:
        """The arguments in float32; where they are to be drawn, without those that show nothing of rows."""
        generators: dict[torch.device, torch.Generator] = {}

        def one(x: Tensor) -> Tensor:
            x = _wide(x) if self.half else x
            if not drawn or not _shows_nothing(x):
                return x
            generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(1))
            return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

        with torch._C.DisableTorchFunction():
            return self._arguments.with_tensors([one(x) for x in self._arguments.tensors])

    def _drawn(self, tensor: Tensor) -> Tensor:
        """A stack with noise: small where it has values, and in their place where it is zero."""
        number, name = self._names.get(id(tensor), (-1, ""))
        value = _wide(tensor) if self.half else tensor
        if not isinstance(tensor, torch.nn.Parameter) or not value.is_floating_point():
            return value
        generator = torch.Generator(value.device).manual_seed(number + 1)
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype, device=value.device)
        size = value.square().mean().sqrt() * 0.05
        if name in self._zeros:
            one = value.shape if name in self._common else value.shape[1:]
            size = 0.5 / max(1, one[1:].numel()) ** 0.5
        return torch.nn.Parameter(value + noise * size, tensor.requires_grad)


def _is_zero(x: Tensor) -> bool:
    return not bool(x[(0,) * x.ndim]) and not bool(x.any())


def _wide(x: Tensor) -> Tensor:
    """A tensor in float32 where it is of half precision."""
    return converted(x, torch.float32) if x.dtype in HALVES else x


def _shows_nothing(x: Tensor) -> bool:
    """Whether an argument is zero, or the same in all rows."""
    if not x.is_floating_point() or x.ndim < 2 or x.numel() < 2:
        return False
    return bool((x == x[:1]).all()) if len(x) > 1 else not bool(x.any())


def _parting(
    folded: list[Tensor], members: list[list[Tensor]], tolerance: Callable[[Tensor], float], how: str = ""
) -> str | None:
    """Return the first difference of the fold from the members, said with its size; none where there is none.

    Args:
        folded: what the fold gave, [K, ...].
        members: what each member gave.
        tolerance: for one of their tensors.
        how: they were run.
    """
    for k, theirs in enumerate(members):
        if len(theirs) != len(folded):
            return f"{how}the fold gives {len(folded)} tensors, member {k} {len(theirs)}"
        for stack, expected in zip(folded, theirs, strict=True):
            if stack.dtype != expected.dtype:
                return f"{how}the fold gives {stack.dtype}, member {k} {expected.dtype}"
            error = relative_error(stack[k], expected)
            if not error <= tolerance(expected):
                return f"{how}the fold is {error:.1e} from member {k}"
    return None

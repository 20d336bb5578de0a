"""Plans of an ensemble: which calls run as a recorded program, and when that program is no longer true."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastens import reproducible
from fastens.device import device_of
from fastens.engine.check import beyond_rounding
from fastens.engine.copies import duplicate
from fastens.engine.entry import Entry, Tensors, Trial
from fastens.engine.guards import EVERY_MODE, Guards
from fastens.engine.leaves import Leaves
from fastens.engine.memory_cap import is_out_of_memory
from fastens.engine.numbers import Numbers, told
from fastens.engine.states import Refused, States
from fastens.fold.dropouts import BY_TORCH, Dropouts
from fastens.fold.sharing import check_sharing, sharing_noted
from fastens.fold.tensor import NotFoldable, memory_of
from fastens.network.snapshots import thread_locals
from fastens.network.state import state_kept
from fastens.network.weights import Weights
from fastens.ops import run_program
from fastens.plan.memory import Constants, KeptTensors
from fastens.trace.record import NotLowerable, NotRecordable, Recording, record, trace_of
from fastens.trace.sketch import sketched

if TYPE_CHECKING:
    from fastens.plan.cpu.plan import Plan
    from fastens.plan.gpu.plan import LaunchPlan

_MOST_PLANS = 16  # signatures; beyond them the oldest is dropped
_MOST_REFUSALS = 64
_DTYPES = {torch.float32, torch.bfloat16}
_LAUNCHED_DTYPES = _DTYPES | {torch.float16}
_MOST_CHANGES = 2  # of weights or state after which a plan is made only where a second call finds them as they were
_USED = 8  # calls of a plan that was worth making
_OTHER_INPUT = 0.875  # a plan is checked on inputs that it was not recorded with: these times the recorded ones


def launches_on(device_type: str) -> bool:
    """Whether plans are launches on devices of a type; tests and rehearsals of GPU code put another answer here."""
    return device_type != "cpu"


class Plans:
    """The programs of one folded network, by signature of the call.

    Attributes:
        states: of the signatures: entries of this class, and refusals.
        why_not: why the last signature that got no plan has none, empty where all have one.
    """

    _disturbed = 0  # recordings in succession during which weights were written to
    _quiet = 0  # calls without a plan in succession that found the weights as the one before left them

    def __init__(self, network: nn.Module, num_members: int, backend: str, states: States, guards: Guards) -> None:
        self._network = network
        self._backend = backend
        self.guards = guards
        self._num_members = num_members
        self._changes = 0
        self.states = states
        self.clear()

    def clear(self) -> None:
        """Drop all plans and the packed weights."""
        self._device = next((t.device for t in self._network.parameters()), torch.device("cpu"))
        self._kind = self._device.type
        self.states.drop(Entry, Refused)
        self._constants = Constants(sum(t.numel() for t in self._network.parameters()) * 5 // 2)
        self._kept = KeptTensors()
        self._rests_on: Any = None
        self.guards.look()
        self.why_not = ""

    @property
    def entries(self) -> list[Entry]:
        """The plans that there are, the oldest first; one may serve several modes."""
        return list({id(entry): entry for entry in self.states.all(Entry)}.values())

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weights and of all arenas."""
        return self._constants.num_bytes + self._kept.num_bytes + sum(entry.plan.num_bytes for entry in self.entries)

    @property
    def kinds(self) -> list[dict[str, int]]:
        """How many steps of each kind each plan has."""
        return [entry.plan.kinds for entry in self.entries]

    @property
    def launches(self) -> tuple[list[dict[str, int]], int, str]:
        """Of plans that are launches: the ways of their convolutions, how many graphs there are, why some are not."""
        from fastens.plan.gpu.plan import LaunchPlan

        plans = [e.plan for e in self.entries if isinstance(e.plan, LaunchPlan)]
        why_not = next((plan.replays.why_not for plan in plans if plan.replays.why_not), "")
        return [plan.ways for plan in plans], sum(len(plan.replays) for plan in plans), why_not

    def current(self, key: Any) -> Entry | None:
        """The plan of a signature that :meth:`can_plan` let through, while network and weights are as they were."""
        found = self.states.get(key)
        if not isinstance(found, Entry) or self.guards.state() != self._rests_on or not found.holds:
            return None
        return found

    @property
    def launched(self) -> bool:
        """Whether plans are launches, as on a GPU, and not programs."""
        return launches_on(self._kind)

    def refused(self, key: Any) -> bool:
        """Whether a signature was found to have no plan, or can have none while hooks want to be called."""
        return self._hooked() or (isinstance(self.states.of(key), Refused) and self.guards.state() == self._rests_on)

    def _hooked(self) -> bool:
        """Whether hooks want to be called, which a plan does not do."""
        hooked = self.guards.hooked()
        if hooked:
            self.why_not = "forward hooks want to be called, and a plan calls none"
        return hooked

    def refuse(self, key: Any, why: str, call: str = "") -> None:
        """Keep that a signature has no plan, which was planned unless ``call`` says what is called."""
        self.states.put(key, Refused(call=call or self.states.of(key).call, why=why))
        self.why_not = why

    def why_refused(self, key: Any) -> str | None:
        """Why a signature was found to have no plan; none where it was not, or the weights have changed."""
        found = self.states.of(key)
        return found.why if isinstance(found, Refused) else None

    def make(
        self,
        key: Any,
        whole: Callable[[Tensors], tuple[Tensors, Leaves]],
        member: Callable[..., Tensors | None],
        inputs: Tensors,
        expected: list[Tensors] | None = None,
        *,
        call: str,
        dealt: bool = False,
        seen: Callable[[Tensors], Tensors] = list,
        dropouts: Dropouts = BY_TORCH,
        numbers: Numbers | None = None,
    ) -> list[Any] | None:
        """Record a pass and return its plan's outputs, so that a signature's first result has the bits of the next.

        The plan is checked against what the members gave, or else against the recorded pass, and on other inputs
        against the first member.

        Args:
            key: the signature.
            whole: the pass as a function of the tensors of the call; see :func:`fastens.engine.leaves.recorded`.
            member: the first member likewise, its tensors alone; with ``exact`` in float32, none where it takes none.
            inputs: the tensors of the call.
            expected: what each member gave for these inputs. The pass is then recorded without its arithmetic, and a
                signature for which that fails is not refused.
            call: the signature as a report prints it.
            dealt: whether each row goes to one member; the last two inputs are then the offsets of the members' groups
                and the member of each row, and ``member`` runs the one that all rows belong to.
            seen: what of the plan's outputs is compared with the member's.
            dropouts: of the pass. Where their masks are fresh, inputs have what these depend on behind the tensors of
                the call, and then the sample of each row.
            numbers: of the call that are to be inputs. ``member`` then takes them by position, behind the tensors.

        Returns:
            The leaves of the members' outputs in memory of their own, [K, ...] or K times the same, and their structure
            last; none where there is no plan.
        """
        before = self.guards.state()
        patient = not reproducible.enabled()  # else the same call has a plan at one time and none at another
        if before != self._rests_on or not all(entry.holds for entry in self.entries):
            self._changes = 1 if any(entry.calls > _USED for entry in self.entries) else self._changes + 1
            self._changes *= patient
            self.clear()
            self._rests_on = before
            self._quiet = 0
            if self._changes > _MOST_CHANGES:
                self.why_not = "the weights, or the state of the network, change from call to call"
                return None
        self._quiet += 1
        rarer = self._disturbed > _MOST_CHANGES and self._quiet < 2**self._disturbed  # with each that was in vain
        if patient and rarer:
            self.why_not = "weights are written to while the network is recorded"
            return None
        refused = self.why_refused(key)
        if refused is None and patient and len(self.states.all(Refused)) >= _MOST_REFUSALS:
            refused = f"{_MOST_REFUSALS} signatures were refused one, so no more are tried"
        self.why_not = refused or self.why_not
        if refused is not None or self._hooked():
            return None
        why = ""
        # buffers may be of another dtype, such as a table of noise levels: what they make of the batch is torch's then
        other = {t.dtype for t in self._network.parameters() if t.is_floating_point()}
        other -= _LAUNCHED_DTYPES if self.launched else _DTYPES
        if other:
            why = f"the network has {', '.join(map(str, other))}"
        else:
            try:
                with torch.inference_mode(False), torch.no_grad():  # later calls may write to what a plan keeps
                    trial = Trial(member, inputs, expected, dealt, seen, dropouts, numbers)
                    entry, outputs = self._of_other_modes(key, trial) or self._checked(whole, trial)
            except (NotRecordable, NotLowerable, NotFoldable) as error:
                why = str(error)
            except Exception as error:  # whatever it is: the members and the fold answer such a call
                if is_out_of_memory(error):
                    raise
                why = f"{type(error).__name__} while {'launching' if self.launched else 'recording'}: {error}"
            else:
                self._rests_on = self.guards.state()  # a recorded pass writes attributes, which are restored
                if self._rests_on[1:] != before[1:]:
                    self._disturbed += 1
                    self._quiet = 0
                    self.why_not = "weights were written to while the network was recorded"
                    return None
                self._disturbed = 0
                entry.call = call
                self.states.put(key, entry)
                self.states.drop(Entry, most=_MOST_PLANS)
                return entry.leaves.whole(outputs)
        self.refuse(key, why, call)
        return None

    def _checked(self, whole: Callable[[Tensors], tuple[Tensors, Leaves]], trial: Trial) -> tuple[Entry, Tensors]:
        """Record a pass; return its plan, which does what members do, and its outputs."""
        inputs, expected, numbers = trial.inputs, trial.expected, trial.numbers
        num_threads, exact = torch.get_num_threads(), reproducible.enabled()
        if thread_locals(self._network):
            raise NotRecordable("the network keeps values for each thread by itself")
        own = [duplicate(x) for x in inputs]  # the network may write to them
        alone = reproducible.one_thread() if exact else nullcontext()  # sums over weights are constants of a plan
        with state_kept(self._network) as changed, alone, sharing_noted() as passes:
            recording, (tensors, leaves) = record(lambda: whole(own), own, None if expected is None else sketched)
        if changed:
            raise NotRecordable(f"the network changes its own state: {', '.join(sorted(changed)[:3])}")
        check_sharing(passes, lambda: trial.member([duplicate(x) for x in inputs]))
        recording.row_members = recording.inputs[len(inputs) - 1] if trial.dealt else None
        recording.masks = trial.dropouts.inputs_of(recording.inputs[trial.drawn] if trial.dropouts.fresh else None)
        plan = self._lowered(recording, num_threads, exact)
        entry = Entry(plan, leaves, numbers, trace_of(recording), self._beside_weights(recording))
        values = {} if numbers is None else numbers.values
        outputs = entry.run(inputs, values)
        if expected is None:
            self._check(outputs, tensors)
        if plan.sums and leaves.kinds == ("rows",):
            (stack,) = outputs
            mean = stack.unflatten(0, (self._num_members, -1)).mean(0)
            self._check(entry.run(inputs, values, [1 / self._num_members] * self._num_members), [mean])
        self._hold(entry, outputs, trial)
        entry.calls = 1
        return entry, outputs

    def _hold(self, entry: Entry, outputs: Tensors, trial: Trial) -> None:
        """Hold a plan's outputs against the members', and on other inputs against the first member's."""

        def of_member(given: Tensors, k: int) -> Tensors:
            return given if trial.dealt else [x[k] for x in entry.leaves.whole(given)[:-1] if isinstance(x, Tensor)]

        for k, theirs in enumerate(trial.expected or ()):
            self._check(of_member(outputs, k), theirs)
        others = [duplicate(x, _OTHER_INPUT) for x in trial.inputs]
        if trial.dealt:
            others[-2:] = _another_draw(*trial.inputs[-2:])
        if trial.dropouts.fresh:
            others[trial.drawn] = trial.dropouts.next_evaluation().drawn()
        values, read = {} if trial.numbers is None else trial.numbers.others, list[bool]()
        given = [] if trial.numbers is None else [{i: told(x, lambda: read.append(True)) for i, x in values.items()}]
        found = trial.seen(of_member(entry.run(others, values), 0))
        theirs = trial.member(others, *given)
        assert theirs is not None  # but where it is asked for float32
        if read:
            raise NotRecordable("the network reads a number of the call by its value, where it is no tensor")
        self._check(found, theirs, lambda: trial.member(others, *given, exact=True))

    def _of_other_modes(self, key: Any, trial: Trial) -> tuple[Entry, Tensors] | None:
        """The plan of this signature in other modes, and its outputs, where it gives what members give in these."""
        ambient, signature = key
        found = [self.states.get((other, signature)) for other in EVERY_MODE if other != ambient]
        entry = next((each for each in found if isinstance(each, Entry) and each.holds), None)
        if entry is None:
            return None
        calls, numbers = entry.calls, trial.numbers
        try:
            outputs = entry.run(trial.inputs, {} if numbers is None else numbers.values)
            self._hold(entry, outputs, trial)
        except NotLowerable:  # the network's Python answers otherwise in these
            return None
        finally:
            entry.calls = calls
        return entry, outputs

    def _beside_weights(self, recording: Recording) -> Weights | None:
        weights = {memory_of(x) for x in self.guards.tensors}
        others = [x for x in recording.found() if memory_of(x) not in weights]
        return Weights(others) if others else None

    def _lowered(self, recording: Recording, num_threads: int, exact: bool) -> Plan | LaunchPlan:
        # loaded when something is lowered, not with the package
        if not self.launched:
            from fastens.plan.cpu.plan import Plan

            return Plan(recording, self._num_members, self._constants, num_threads, exact)
        if exact:
            raise NotLowerable("in deterministic mode: the kernels of launches are chosen by what was measured")
        from fastens.plan.gpu.plan import LaunchPlan

        return LaunchPlan(recording, self._num_members, self._kept, self._device, self._backend)

    def decline(self, why: str) -> bool:
        """Keep why a call runs without a plan and return False.

        Its signature is not refused, since the next call may plan.
        """
        self.why_not = why
        return False

    def can_plan(self, arguments: Tensors) -> bool:
        """Whether a call may run as a plan: where no derivative can be asked for, in an ordinary context."""
        why = self._obstacle(arguments)
        return not why or self.decline(why)

    def _obstacle(self, arguments: Tensors) -> str:
        """Return what of context, device or gradients forbids a plan now, whatever the signature.

        Empty where nothing does.
        """
        kind = self._kind
        if not self.guards.ordinary_context(kind):
            return "autocast, a mode, a transform or parametrize.cached() is active, in which members' own code runs"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*arguments, *self.guards.tensors)):
            return "gradients are enabled and asked for; call it under torch.no_grad()"
        if self.guards.hooked():
            return "forward hooks want to be called, and a plan calls none"
        launched = self.launched
        if self._backend not in ("auto", "triton" if launched else "native"):
            return f"backend={self._backend!r} has none; backend='auto' takes them"
        if launched and device_of(self._device).library is None:
            return f"the weights are on {kind}"
        for x in arguments:
            if not (x.is_cpu or (launched and x.device.type == kind)):
                return "the arguments are on another device than the weights"
        return "" if launched or run_program.available() else "the compiled library is not there"

    def _check(self, ours: Tensors, theirs: Tensors, exact: Callable[[], Tensors | None] = lambda: None) -> None:
        if len(ours) != len(theirs):
            raise NotLowerable(f"the plan has {len(ours)} outputs, the members {len(theirs)}")
        error = beyond_rounding(ours, theirs, self.guards.parameters, exact)
        if error is not None:
            raise NotLowerable(f"the plan is {error:.1e} from the members")


def _another_draw(offsets: Tensor, row_members: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and members of a draw that differs from a given one: all rows go to one member."""
    last, total = len(offsets) - 2, len(row_members)
    k = 0 if bool((row_members > 0).any()) else last
    return (torch.arange(last + 2) > k) * total, torch.full_like(row_members, k)

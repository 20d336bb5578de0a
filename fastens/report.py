"""What an ensemble says of itself: engine and backend of each layer, and why."""

import itertools
from dataclasses import dataclass, field

from fastens import _build, _native
from fastens.device import gpu
from fastens.ops._dispatch import missing_triton
from fastens.ops.run_program import describe_target, target

_KINDS = {
    "folded": "each member has its own weights, and one call serves all",
    "shared": "the weights are the same in all members, and held once",
    "looped": "one call for each member",
}
_MOST_CALLS = 16  # that are printed


@dataclass(frozen=True)
class LayerReport:
    """One module that owns tensors.

    Attributes:
        path: its path in the member.
        layer: its class in the member.
        how: ``folded``, ``shared`` (equal in all members) or ``looped``.
        backend: the code that runs it where there is no plan: ``torch``, or kernels of this package.
        why: the reason where it is looped.
        parameters: parameters of one member in it, children included where it is looped.
    """

    path: str
    layer: str
    how: str
    backend: str
    why: str
    parameters: int


@dataclass(frozen=True)
class CallReport:
    """One signature that was called.

    Attributes:
        call: dtypes and shapes of the tensors among the arguments, types of the numbers, everything else by value.
        state: ``folded``, ``looped``, ``planned``, ``refused`` (folded, after a plan was tried) or ``captured``.
        why: the reason, or why there is no plan; empty where there is nothing to say.
    """

    call: str
    state: str
    why: str = ""


@dataclass(frozen=True)
class Report:
    """How an ensemble is evaluated.

    Attributes:
        engine: ``fold`` or ``loop``.
        num_members: K.
        why: the reason for the engine.
        layers: one entry per module that owns tensors; a looped module stands for its children.
        plans: one per signature that runs as a recorded program: how many steps of each kind it has, torch's own
            operations by name.
        why_no_plan: why the last call without one has none; empty where every call has had one.
        plan_bytes: memory of packed weights and arenas.
        target: the instruction set that plans run on; empty where they are launches.
        ways: one per plan of launches: how many convolutions run in each way, as was measured.
        graphs: plans' launches that are replayed as CUDA graphs.
        why_no_graph: the error because of which a plan's launches are not.
        slices: functions that ran member by member in the last pass that was checked, because they have no rule.
        by_definition: the aggregation rule, where no kernel knows it and its definition is run; else empty.
        calls: the state of each signature that was called, the oldest first; none where all members are looped.
    """

    engine: str
    num_members: int
    why: str
    layers: list[LayerReport]
    plans: list[dict[str, int]] = field(default_factory=list)
    why_no_plan: str = ""
    plan_bytes: int = 0
    target: str = field(default_factory=target)
    ways: list[dict[str, int]] = field(default_factory=list)
    graphs: int = 0
    why_no_graph: str = ""
    slices: dict[str, int] = field(default_factory=dict)
    by_definition: str = ""
    calls: list[CallReport] = field(default_factory=list)

    @property
    def looped(self) -> list[LayerReport]:
        """The modules that are evaluated one member after the other: K calls each."""
        return [layer for layer in self.layers if layer.how == "looped"]

    def __str__(self) -> str:
        """A table, one line per layer."""
        total = sum(layer.parameters for layer in self.layers) or 1
        lines = [f"engine {self.engine}, {self.num_members} members: {self.why}"]
        if self.by_definition:
            lines.append(f"  rule {self.by_definition}: by its definition in torch, since no kernel knows it")
        for plan, ways in itertools.zip_longest(self.plans, self.ways):
            lines.append(f"  plan: {_counted(plan)}")
            if ways:
                lines.append(f"    convolutions by: {_counted(ways)}")
        if self.graphs:
            lines.append(f"  {self.graphs} CUDA graphs replay the launches of plans")
        if self.why_no_graph:
            lines.append(f"  launched from the host, since recording failed: {self.why_no_graph}")
        if self.plans:
            if self.target:
                lines.append(f"  plans run on {describe_target(self.target)}")
            lines.append(f"  plans hold {self.plan_bytes / 2**20:.1f} MiB of packed weights and scratch memory")
        if self.engine == "fold" and not self.plans and not self.why_no_plan:
            lines.append("  no plan yet: the first call under torch.no_grad() makes one")
        if self.why_no_plan:
            last = "the last call that was not planned" if self.plans else "not planned"
            lines.append(f"  {last}: {self.why_no_plan}")
        if self.slices:
            lines.append(f"  functions that run once for each member: {_counted(self.slices)}")
        if len(self.calls) > _MOST_CALLS:
            lines.append(f"  {len(self.calls) - _MOST_CALLS} signatures before these {_MOST_CALLS}")
        for call in self.calls[-_MOST_CALLS:]:
            lines.append(f"  call of {call.call}: {call.state}{', ' * bool(call.why)}{call.why}")
        lines.append(f"  {'module':<48} {'class':<24} {'members':<7} {'without a plan it runs on'}")
        for layer in self.layers:
            line = f"  {layer.path or '(root)':<48} {layer.layer:<24} {layer.how:<7} {layer.backend}"
            if layer.how == "looped":
                share = 100 * layer.parameters / total
                line += f"  {self.num_members} calls, {share:.0f} % of the parameters: {layer.why}"
            lines.append(line)
        kinds = {layer.how for layer in self.layers}
        lines += [f"  {kind}: {text}" for kind, text in _KINDS.items() if kind in kinds]
        return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def backends() -> dict[str, str]:
    """The code that can run the ops here: name -> "available", or why not."""
    found = gpu()
    triton = "torch sees no CUDA device" if found is None else missing_triton(found.where)
    return {
        "reference": "available",
        "native": _native.status(),
        **{f"native ({name.upper()})": _native.status(name) for name in _build.LIBRARY_NAMES if name != "cpu"},
        "triton": triton or "available",
    }

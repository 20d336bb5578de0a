"""Steps that change the members: weights by every route that users take, attributes, modes, hooks, copies."""

import copy
import pickle
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
import torch.utils._pytree as pytree
from torch import nn

from tests.fuzz import oracle
from tests.fuzz.inputs import Form, copied
from tests.fuzz.networks import named
from tests.fuzz.oracle import Mismatch
from tests.fuzz.run import Run, Skip
from tests.fuzz.sequences import step

Route = Callable[[nn.Module, float], Any]
ROUTES: dict[str, Route] = {}


def route(function: Route) -> Route:
    """Register a way to multiply every parameter of a module by a number, which is the same on a stack of members."""
    ROUTES[function.__name__] = function
    return function


def refreshed(module: Any) -> None:
    """What the README asks for after writes that torch does not count."""
    if hasattr(module, "refresh"):
        module.refresh()


@route
def in_place(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(by)


@route
def foreach(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(module.parameters()), by)


@route
def copied_from(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p * by)


@route
def state_dict(module: nn.Module, by: float) -> None:
    module.load_state_dict({n: t * by if t.is_floating_point() else t for n, t in module.state_dict().items()})


@route
def state_dict_assigned(module: nn.Module, by: float) -> None:
    state = {n: t * by if t.is_floating_point() else t for n, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


@route
def data_assigned(module: nn.Module, by: float) -> None:
    for p in module.parameters():
        p.data = p.data * by


@route
def data_in_place(module: nn.Module, by: float) -> None:
    for p in module.parameters():
        p.data.mul_(by)
    refreshed(module)


@route
def moving_average(module: nn.Module, by: float) -> None:
    for p in module.parameters():
        p.data.lerp_(torch.full_like(p, 0.1), 1 - by if by < 1 else 0.1)
    refreshed(module)


@route
def replaced(module: nn.Module, by: float) -> None:
    changed: dict[int, nn.Parameter] = {}
    for owner in list(module.modules()):
        for name, p in list(owner._parameters.items()):
            if p is not None:
                new = changed.setdefault(id(p), nn.Parameter(p.detach() * by, p.requires_grad))
                setattr(owner, name, new)
                changed[id(new)] = new


@route
def vector(module: nn.Module, by: float) -> None:
    found = [p for p in module.parameters() if not p.is_complex()]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(found).detach() * by, found)


@route
def applied(module: nn.Module, by: float) -> None:
    done: set[int] = set()

    def change(owner: nn.Module) -> None:
        for p in owner.parameters(recurse=False):
            if id(p) not in done:
                done.add(id(p))
                with torch.no_grad():
                    p.mul_(by)

    module.apply(change)


@step(5)
def weights(run: Run, draw: Random) -> None:
    """Every parameter changed by one route, between calls of one signature."""
    change, by = ROUTES[draw.choice(list(ROUTES))], draw.choice([0.75, 0.9, 1.1])
    run.step += f" ({change.__name__})"
    again(run, draw, lambda: run.each(lambda module: change(module, by)))


@step(2)
def one_weight(run: Run, draw: Random) -> None:
    """One parameter, or one buffer, changed by one route."""
    names = [n for n, t in run.members[0].named_parameters()] + [
        n for n, t in run.members[0].named_buffers() if t.is_floating_point()
    ]
    path, how, by = draw.choice(names), draw.choice(["in place", "data", "data in place"]), draw.choice([0.5, 1.5])

    def change(module: nn.Module) -> None:
        for _, t in named([*module.named_parameters(), *module.named_buffers()], path):
            if how == "in place":
                with torch.no_grad():
                    t.mul_(by)
            elif how == "data":
                t.data = t.data * by
            else:
                t.data.mul_(by)
        if how == "data in place":
            refreshed(module)

    run.step += f" ({how})"
    again(run, draw, lambda: run.each(change))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-2),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.02, eps=1e-2, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, eps=1e-2, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, eps=1e-2, foreach=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, eps=1e-2, fused=True),
}


@step(2.5)
def optimizer(run: Run, draw: Random) -> None:
    """Two steps of training, between calls of one signature."""
    if run.random or not any(p.requires_grad for p in run.members[0].parameters()):
        return
    name = draw.choice(list(OPTIMIZERS))
    run.step += f" ({name})"
    run.trained = True
    calls = [run.make(draw, Form(run.spec.rows)) for _ in range(2)]

    def train(*modules: Any) -> None:
        for module in modules:
            mine = module is run.ensemble
            trained = [p for p in module.parameters() if p.requires_grad]
            made = OPTIMIZERS[name](trained)
            for call in calls:
                args, kwargs = copied(call)
                with torch.enable_grad():
                    answer = module.member_outputs(*args, **kwargs) if mine else module(*args, **kwargs)
                    loss = torch.zeros(())
                    for leaf in pytree.tree_leaves(answer):
                        if oracle.is_score(leaf):  # the ensemble's is the sum over members of each one's mean
                            loss = loss + leaf.square().mean() * (len(leaf) if mine else 1)
                made.zero_grad()
                if loss.requires_grad:
                    loss.backward()
                made.step()
            run.outcome.calls += mine

    def change() -> None:
        run.own(lambda: train(*run.members))
        run.attempt(lambda: train(run.ensemble))

    again(run, draw, change)


@step(1)
def functional(run: Run, draw: Random) -> None:
    """Called with other weights by ``torch.func.functional_call``, and then with its own."""
    if run.stateful or run.random:
        return
    call, by = run.make(draw, Form(run.spec.rows)), draw.choice([0.5, 1.5])

    def other(module: nn.Module) -> Any:
        tensors = {name: p.detach() * by for name, p in module.named_parameters()}
        tables = [(each, dict(each._parameters), dict(each._buffers)) for each in module.modules()]
        args, kwargs = copied(call)
        try:
            return torch.func.functional_call(module, tensors, args, kwargs)
        finally:  # torch leaves the other weights behind in a module that is reached by two names
            for each, parameters, buffers in tables:
                each._parameters.update(parameters)
                each._buffers.update(buffers)

    with torch.no_grad():
        expected = run.loop(other)
        run.outcome.calls += 1
        run.attempt(lambda: other(run.ensemble), lambda answer: run.compare(answer, expected))
        run.call(call)
        run.call(run.make(draw, Form(run.spec.rows)))


@step(1)
def converted(run: Run, draw: Random) -> None:
    """To the other precision."""
    run.dtype = torch.float32 if run.dtype == torch.float64 else torch.float64
    run.coarsest = torch.float32
    to = draw.choice(["method", "to"])
    convert = {torch.float32: nn.Module.float, torch.float64: nn.Module.double}[run.dtype]
    again(run, draw, lambda: run.each(lambda m: convert(m) if to == "method" else m.to(run.dtype)), before=False)


@step(1.5)
def modes(run: Run, draw: Random) -> None:
    """Training or evaluation of the whole."""
    run.training = not run.training if draw.random() < 0.8 else run.training
    run.each(lambda module: module.train(run.training))
    with torch.no_grad():
        run.call(run.make(draw, Form(run.spec.rows)))
    with torch.enable_grad():
        run.call(run.make(draw))
    if run.training and draw.random() < 0.6:
        run.training = False
        run.each(lambda module: module.eval())
        with torch.no_grad():
            run.call(run.make(draw))


@step(0.7)
def mode_of_one(run: Run, draw: Random) -> None:
    """One submodule in the other mode."""
    path = draw.choice([name for name, _ in run.members[0].named_modules() if "." in name or name == "inward"])
    run.training = True  # of what is random or keeps statistics, some may be

    def change(module: nn.Module) -> None:
        for _, one in named(list(module.named_modules()), path):  # pyright: ignore[reportArgumentType]
            one.train(not one.training)

    again(run, draw, lambda: run.each(change))


@step(1)
def attribute(run: Run, draw: Random) -> None:
    """A number that forward reads, set on the ensemble as on a member."""
    value, setter, run.altered = draw.choice([0.25, 3.0]), draw.random() < 0.5, True
    again(run, draw, lambda: run.each(lambda m: m.set_scale(value) if setter else setattr(m, "scale", value)))

    def check(found: float) -> None:
        if found != value:
            raise Mismatch(f"scale reads {found}, expected {value}")

    run.attempt(lambda: run.ensemble.scale, check)


@step(0.7)
def attribute_of_one(run: Run, draw: Random) -> None:
    """A number of a submodule: the epsilon of every normalisation."""
    value, run.altered = draw.choice([0.1, 1.0]), True

    def change(module: nn.Module) -> None:
        for one in module.modules():
            if isinstance(getattr(one, "eps", None), float):
                one.eps = value

    again(run, draw, lambda: run.each(change))


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return 2 * output if torch.is_tensor(output) else output


@step(0.7)
def hook(run: Run, draw: Random) -> None:
    """A forward hook on one submodule, removed after some calls."""
    path = draw.choice(["inward", "outward", "blocks.0"])
    handles: list[Any] = []

    def add(module: nn.Module) -> None:
        handles.extend(m.register_forward_hook(doubled) for _, m in named(list(module.named_modules()), path))  # pyright: ignore

    again(run, draw, lambda: run.each(add))
    again(run, draw, lambda: [handle.remove() for handle in handles], before=False)


@step(0.5)
def method(run: Run, draw: Random) -> None:
    """Another method that calls forward."""
    if run.random:
        return
    call = run.make(draw, Form(run.spec.rows, context="absent"))
    args, _ = copied(call)
    with torch.no_grad():
        expected = run.loop(lambda member: member.velocity(*args))
        run.outcome.calls += 1
        run.attempt(lambda: run.ensemble.velocity(*call[0]), lambda answer: run.compare(answer, expected))


@step(0.7)
def duplicated(run: Run, draw: Random) -> None:
    """A deep copy, or what pickling gives back, in the ensemble's place."""
    if any(name == "OwnForward" for name, _ in run.spec.blocks):
        return  # a copy of its closure is no copy
    how = copy.deepcopy if draw.random() < 0.6 else lambda e: pickle.loads(pickle.dumps(e))
    run.own(lambda: [how(member) for member in run.members], Skip)
    run.attempt(lambda: how(run.ensemble), run._adopt)
    with torch.no_grad():
        run.call(run.make(draw))


@step(0.5)
def frozen(run: Run, draw: Random) -> None:
    """Parameters that need no gradient, called with gradients enabled."""
    needed = draw.random() < 0.3

    def change(module: nn.Module) -> None:
        for name, p in module.named_parameters():
            if "trunk" not in name:  # which never needs one
                p.requires_grad_(needed)

    run.each(change)
    with torch.enable_grad():
        for _ in range(2):
            run.call(run.make(draw, Form(run.spec.rows)))


@step(0.4)
def formatted(run: Run, draw: Random) -> None:
    """Kernels of images in another memory format.

    Not where a block cuts gradients off: torch's backward pass of a group norm whose weights alone are trained, on
    such an image, reads where nothing is, and ends the process (2.13).
    """
    if run.spec.frame == "image" and not any(name == "Energy" for name, _ in run.spec.blocks):
        again(run, draw, lambda: run.each(lambda module: module.to(memory_format=torch.channels_last)))


class Halved(nn.Module):
    """A parametrization that means the same on a stack of members."""

    def forward(self, weight: Any) -> Any:
        return 0.5 * weight


@step(0.4)
def parametrized(run: Run, draw: Random) -> None:
    """A parametrization or a pruned weight, put on a layer; it may be refused."""
    how = draw.choice(["parametrization", "pruning"])

    def change(module: nn.Module) -> None:
        for _, layer in named(list(module.named_modules()), "outward"):  # pyright: ignore[reportArgumentType]
            if how == "parametrization":
                nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
            else:
                nn.utils.prune.identity(layer, "weight")

    run.allowed = run.altered = True
    run.each(change)
    with torch.no_grad():
        run.call(run.make(draw, Form(run.spec.rows)))
    again(run, draw, lambda: run.each(lambda m: ROUTES["in_place"](m, 0.75)))


def again(run: Run, draw: Random, change: Callable[[], Any], before: bool = True) -> None:
    """The same signature before a change and after it."""
    with torch.no_grad():
        form = Form(run.spec.rows)
        if before:
            run.call(run.make(draw, form))
        change()
        run.call(run.make(draw, form))
        run.call(run.make(draw, form))

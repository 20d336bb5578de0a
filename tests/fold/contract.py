"""An ensemble held against the plain loop over members of its own; the loop shares no code with the package."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fastens

K = 3
RELATIVE = 2e-5  # float32, small networks
Make = Callable[[int], nn.Module]
Draw = Callable[[torch.Generator], tuple[Any, ...]]


def made(make: Make, k: int) -> nn.Module:
    """Member k, every parameter drawn; two of one ``k`` are equal, but share nothing."""
    torch.manual_seed(100 + k)
    member = make(k)
    generator = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for p in member.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4 + 0.1)
    return member.eval()


def batch(*shape: int) -> Draw:
    """One tensor of a shape, drawn."""
    return lambda generator: (torch.randn(shape, generator=generator),)


def near(found: Any, expected: Any, relative: float = RELATIVE) -> None:
    """Assert that structures, shapes and dtypes are equal, and values as near as rounding leaves them."""
    ours, theirs = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert ours[1] == theirs[1]
    for a, e in zip(ours[0], theirs[0], strict=True):
        if not isinstance(e, Tensor):
            assert a == e
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if e.numel():
            a, e = a.detach().double(), e.detach().double()
            assert torch.equal(a.isnan(), e.isnan())
            scale = e.nan_to_num().abs().max().clamp_min(1e-3)
            assert float((a - e).nan_to_num().abs().max()) <= relative * float(scale)


class Held:
    """An ensemble, and members made by the same function beside it.

    Args:
        make: makes member k.
        num_members: K.
        options: of the ensemble.
    """

    def __init__(self, make: Make, num_members: int = K, **options: Any) -> None:
        self.members = [made(make, k) for k in range(num_members)]
        self.warned: list[str] = []
        self.ensemble = self.quietly(
            lambda: fastens.Ensemble([made(make, k) for k in range(num_members)], **options)  # pyright: ignore
        )

    def quietly(self, work: Callable[[], Any]) -> Any:
        """Do something with the ensemble; its warnings are kept."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = work()
        self.warned += [str(w.message) for w in caught if "fastens" in str(w.message)]
        return result

    def each(self, change: Callable[[Any], Any]) -> None:
        """Apply a change to the ensemble and to every member of the loop."""
        for module in (*self.members, self.ensemble):
            change(module)

    def loop(self, *args: Any, method: str = "__call__", **kwargs: Any) -> list[Any]:
        """What each member returns to arguments of its own."""
        copied = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        return [getattr(m, method)(*copied[0], **copied[1]) for m in self.members]

    def call(self, *args: Any, method: str = "__call__", relative: float = RELATIVE, **kwargs: Any) -> Any:
        """One call of the ensemble under the mean, held against the loop."""
        expected = averaged(self.loop(*args, method=method, **kwargs))
        found = self.quietly(lambda: getattr(self.ensemble, method)(*args, **kwargs))
        near(found, expected, relative)
        return found

    def sampling(self, draw: Draw, calls: int = 3, **kwargs: Any) -> None:
        """Calls of one signature on other inputs, without gradients, so that plans serve."""
        with torch.no_grad():
            for seed in range(calls):
                self.call(*draw(torch.Generator().manual_seed(seed)), **kwargs)

    def gradients(self, draw: Draw, **kwargs: Any) -> None:
        """Outputs and the gradients of every parameter of every member."""
        args = draw(torch.Generator().manual_seed(7))
        for p in (*self.ensemble.parameters(), *(p for m in self.members for p in m.parameters())):
            p.grad = None
        expected = averaged(self.loop(*args, **kwargs))
        found = self.quietly(lambda: self.ensemble(*args, **kwargs))
        near(found, expected)
        if not expected.requires_grad:
            return
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8))
        (expected * direction).sum().backward()
        (found * direction).sum().backward()
        ours = gradients_of(self.ensemble)
        for name, p in self.members[0].named_parameters():
            if p.requires_grad:
                theirs = [dense(dict(m.named_parameters())[name].grad) for m in self.members]
                if all(g is None for g in theirs):
                    assert ours[name] is None or not ours[name].any()
                    continue
                stack = torch.stack([torch.zeros_like(p) if g is None else g for g in theirs])
                assert ours[name] is not None, f"no gradient of {name}"
                near(ours[name], stack.sum(0) if ours[name].ndim == p.ndim else stack, 1e-4)

    def everywhere(self, draw: Draw, trains: bool = True, **kwargs: Any) -> None:
        """Sampling, gradients and, where nothing is random in it, training mode."""
        self.sampling(draw, **kwargs)
        self.gradients(draw, **kwargs)
        if trains:
            self.each(lambda module: module.train())
            self.gradients(draw, **kwargs)
            self.sampling(draw, 2, **kwargs)
            self.each(lambda module: module.eval())
            self.sampling(draw, **kwargs)

    def drawn(self, draw: Draw, rule: str = "alternating", **kwargs: Any) -> None:
        """Under a rule that draws, every row is some member's of the same batch."""
        before, self.ensemble.rule = self.ensemble.rule, rule
        args = draw(torch.Generator().manual_seed(9))
        with torch.no_grad():
            candidates = torch.stack(self.loop(*args, **kwargs))
            with self.ensemble.trajectory(candidates.shape[1], 3):
                for _ in range(3):
                    found = self.quietly(lambda: self.ensemble(*args, **kwargs))
                    apart = (found - candidates).abs().flatten(2).amax(2)
                    assert float(apart.min(0).values.max()) <= RELATIVE * float(candidates.abs().max())
        self.ensemble.rule = before


def dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def averaged(outputs: list[Any]) -> Any:
    """The mean over members of every floating-point tensor; other leaves are member 0's."""
    leaves = [pytree.tree_flatten(output) for output in outputs]
    columns = zip(*(flat for flat, _ in leaves), strict=True)
    combined = [
        torch.stack(c).mean(0) if isinstance(c[0], Tensor) and c[0].is_floating_point() else c[0] for c in columns
    ]
    return pytree.tree_unflatten(combined, leaves[0][1])


def gradients_of(ensemble: fastens.Ensemble) -> dict[str, Tensor | None]:
    """Gradients of an ensemble by the member's names: stacked, or of a parameter that is held once."""
    if ensemble._engine is not None:
        return {name: dense(p.grad) for name, p in ensemble.network.named_parameters()}
    own = [dict(m.named_parameters()) for m in ensemble.network.children()]
    found: dict[str, Tensor | None] = {}
    for name, p in own[0].items():
        gradients = [dense(o[name].grad) for o in own]
        found[name] = torch.stack([torch.zeros_like(p) if g is None else g for g in gradients])
    return found

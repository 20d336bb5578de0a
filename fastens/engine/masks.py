"""Dropout masks of members: a network's dropouts wherever it applies them, each row under its member's mask."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastens.device import on_gpu
from fastens.engine.arguments import Arguments
from fastens.fold.callsite import callers
from fastens.fold.dispatch import Fold
from fastens.fold.dropouts import Dropouts
from fastens.fold.stand_ins import traced
from fastens.fold.tensor import Hidden, modules_of
from fastens.kernels._graph import keep
from fastens.ops.dropout import dropout, has_kernel
from fastens.reference._rows import rows_of
from fastens.trace.record import MaskInputs, Ref

# function: (draws whole channels, keeps mean and variance)
FUNCTIONS: dict[Callable[..., Any], tuple[bool, bool]] = {
    F.dropout: (False, False),
    F.dropout1d: (True, False),
    F.dropout2d: (True, False),
    F.dropout3d: (True, False),
    F.alpha_dropout: (False, True),
    F.feature_alpha_dropout: (True, True),
    torch.dropout: (False, False),
    torch.dropout_: (False, False),
    torch.feature_dropout: (True, False),
    torch.feature_dropout_: (True, False),
    torch.alpha_dropout: (False, True),
    torch.alpha_dropout_: (False, True),
    torch.feature_alpha_dropout: (True, True),
    torch.feature_alpha_dropout_: (True, True),
}
_SATURATED = -1.7580993408473766  # what SELU tends to: dropped activations take it, then mean and variance are restored
_KEPT_BYTES = 2**28  # fixed masks kept from pass to pass; further ones are drawn again in each


class NothingDropped(ValueError):
    """MC Dropout of a network without dropout; the message says what it applied."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"MC Dropout: the network applied {found}, so all members would be the same; networks are often built with "
            "p = 0 or leave dropout out in evaluation: pass p=0.1, or wrap a network that calls dropout"
        )


class Masks:
    """The masks of one MC Dropout ensemble.

    A mask is a function of (seed, layer, member, element), and where masks are fresh also of (evaluation, sample). The
    layer is the path of the module that applies the dropout and how many it applied before in this pass.

    Args:
        num_members: K.
        seed: of the masks.
        fresh: whether masks depend on evaluation and sample.
        p: the probability for all dropouts; none for their own.
    """

    def __init__(self, num_members: int, seed: int, fresh: bool, p: float | None) -> None:
        self.seed = seed
        self.fresh = fresh
        self.p = p
        self.num_members = num_members
        self.layers: dict[tuple[str, int], int] = {}  # dropouts in the order in which they were met first
        self._layouts: dict[Any, tuple[Tensor, Tensor]] = {}
        self._keys: dict[tuple[int | None, str, int], int] = {}
        self._kept: dict[Any, Tensor] = {}
        self._kept_bytes = 0

    def forget(self) -> None:
        """Drop the masks that are kept from earlier passes."""
        self._kept.clear()
        self._kept_bytes = 0

    def layout(self, hidden: Hidden, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Member and sample of each row of a pass, int64 [R]."""
        device = next((x.device for x in arguments.tensors), torch.device("cpu"))
        samples = arguments.samples
        if hidden.row_members is not None:
            return hidden.row_members, torch.arange(hidden.size, device=device) if samples is None else samples.to(
                device
            )
        batch = arguments.batch_size
        keeps = samples is None and not traced(*arguments.tensors)
        identity = (hidden.first, hidden.size, batch, arguments.num_samples, device) if keeps else None
        if identity in self._layouts:
            return self._layouts[identity]
        if samples is None:
            samples = torch.arange(batch, device=device) % max(arguments.num_samples or batch, 1)
        members = torch.arange(hidden.first, hidden.first + hidden.size, device=device).repeat_interleave(batch)
        found = members, samples.to(device).repeat(hidden.size)
        if keeps:
            self._layouts = {} if len(self._layouts) > 64 else self._layouts
            self._layouts[identity] = found
        return found

    def key(self, seed: int | None, path: str, call: int) -> int:
        """What tells the masks of one dropout from those of others, in a trajectory of this seed."""
        identity = (seed, path, call)
        key = self._keys.get(identity)
        if key is None:
            text = f"{self.seed}/{seed}/{call}/{path}".encode()
            key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
            if len(self._keys) > 4096:  # trajectories have keys of their own
                self._keys.clear()
            self._keys[identity] = key
        return key

    def fixed(self, x: Tensor, p: float, key: int, count: int) -> Tensor:
        """Zero or 1 / (1 - p) for each member and element, [K, n]; kept, because fixed masks return in every pass."""
        keeps = not traced(x)
        identity = (key, p, count, _wide(x), x.device) if keeps else None
        scale = self._kept.get(identity)
        if scale is not None:
            return keep(scale)
        with torch.no_grad():
            ones = torch.ones(self.num_members, count, dtype=_wide(x), device=x.device)
            scale = dropout(ones, torch.arange(self.num_members, device=x.device), None, p, key)
        size = scale.numel() * scale.element_size()
        if keeps and not scale.is_inference() and self._kept_bytes + size <= _KEPT_BYTES:
            self._kept[identity] = scale
            self._kept_bytes += size
        return scale


class MaskPass(Dropouts):
    """The masks of one evaluation.

    Args:
        masks: of the ensemble.
        members: int64 [R], the member of each row.
        samples: int64 [R], the sample of each row.
        seed: of the trajectory, where masks are fresh.
        evaluation: its number, where masks are fresh.

    Attributes:
        applied: dropouts with p > 0 so far.
        calls: dropouts so far, by path.
    """

    masked = True
    functions = FUNCTIONS.keys()

    def __init__(
        self, masks: Masks, members: Tensor, samples: Tensor | None, seed: int | None = None, evaluation: int = 0
    ) -> None:
        self.masks = masks
        self.members = members
        self.samples = samples if masks.fresh else None
        self.evaluation = (seed, evaluation) if masks.fresh else (None, 0)
        self._as_factors = False
        self.applied = 0
        self.calls: dict[str, int] = defaultdict(int)
        self.fresh = masks.fresh
        self._paths: dict[int, str] = {}

    def runs(self, network: nn.Module) -> None:
        """Know the modules of the network that the pass runs, which may be others than in the pass before."""
        self._paths = {id(module): path for path, module in modules_of(network)}

    def counted(self) -> dict[str, int]:
        """How many dropouts each module has applied in this pass; a copy."""
        return self.calls.copy()

    @contextmanager
    def counting_from(self, calls: Mapping[str, int] | None) -> Iterator[None]:
        """Scope in which dropouts are counted on from ``calls``; none to go on. After it they are as before it."""
        before = self.calls
        if calls is not None:
            self.calls = defaultdict(int, calls)
        try:
            yield
        finally:
            self.calls = before

    def check(self) -> None:
        """Raise :class:`NothingDropped` where no dropout of a whole pass had p > 0."""
        if not self.applied:
            calls = sum(self.calls.values())
            raise NothingDropped(f"{calls} dropouts with p = 0" if calls else "no dropout")

    def as_factors(self) -> None:
        """Let fixed masks be factors in a recording, whose derivative is known, and not one operation."""
        self._as_factors = True

    def drawn(self) -> Tensor:
        """What fresh masks depend on: the number of the evaluation, then the key of each dropout, int64 [1 + n]."""
        seed, number = self.evaluation
        return torch.tensor([number, *(self.masks.key(seed, *layer) for layer in self.masks.layers)])

    def inputs_of(self, drawn: Ref | None) -> MaskInputs:
        """The key of each dropout, and the input that fresh masks are drawn from."""
        keys = {self.masks.key(self.evaluation[0], *layer): i for layer, i in self.masks.layers.items()}
        return MaskInputs(self.masks.num_members, keys, drawn)

    def next_evaluation(self) -> MaskPass:
        """The pass of the evaluation after this one."""
        seed, number = self.evaluation
        return MaskPass(self.masks, self.members, self.samples, seed, number + 1)

    def dropout(self, fold: Fold, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of a dropout function, whatever mode its layer is in."""
        features, alpha = FUNCTIONS[func]
        x = args[0] if args else kwargs["input"]
        p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        out = self.layer(fold, x, p, features, alpha)
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") or (args[3] if len(args) > 3 else kwargs.get("inplace", False))
        return fold.again(Tensor.copy_, x, out) if in_place and out is not x else out

    def layer(self, fold: Fold, x: Any, p: float, features: bool, alpha: bool) -> Any:
        """Apply the next dropout of the module in progress."""
        masks = self.masks
        p = p if masks.p is None else masks.p
        path = self._path()
        call = self.calls[path]
        self.calls[path] += 1
        masks.layers.setdefault((path, call), len(masks.layers))
        if p == 0:
            return x
        self.applied += 1
        key = masks.key(self.evaluation[0], path, call)
        if not alpha:
            return self._masked(fold, x, p, key, features)
        ones = fold.again(torch.ones_like, x)
        kept = fold.again(Tensor.to, fold.again(torch.ne, self._masked(fold, ones, p, key, features), 0), x.dtype)
        scale = ((1 - p) * (1 + p * _SATURATED**2)) ** -0.5 if p < 1 else 0.0
        filled = fold.again(torch.mul, fold.again(torch.rsub, kept, 1), _SATURATED)
        shifted = fold.again(torch.sub, fold.again(torch.add, fold.again(torch.mul, x, kept), filled), _SATURATED * p)
        return fold.again(torch.mul, shifted, scale)

    def _path(self) -> str:
        """The path of the innermost module of the network whose code is running; of none, the root's.

        Hooks would tell of modules that are called, and not of ``block.forward(x)``, nor of a helper method in which a
        dropout is applied: which module's code is running, only the frames tell of all of these.
        """
        paths = (self._paths.get(id(frame.f_locals.get("self"))) for frame in callers())
        return next((path for path in paths if path is not None), "")

    def _masked(self, fold: Fold, given: Any, p: float, key: int, features: bool) -> Any:
        rows = self.members.shape[0]
        per_entry = rows // fold.hidden.size if fold.hidden.size else 0
        if given.ndim == 0 or (given.shape[0] % per_entry if per_entry else given.numel()):
            raise ValueError(
                f"a dropout of the network sees {list(given.shape)} in a pass of {per_entry} samples: the batch is not "
                "in its dimension 0, so no sample has a mask of its own; call the ensemble with a batch of one"
            )
        x = fold.rows(given)
        if not x.numel():
            return fold.unrows(x)
        return fold.unrows(self._of_rows(fold, x, p, key, features))

    def _of_rows(self, fold: Fold, x: Tensor, p: float, key: int, features: bool) -> Tensor:
        members, samples, rows = self.members, self.samples, self.members.shape[0]
        number = self.evaluation[1]
        if fold.recording and not features and not self._as_factors:
            return _recorded(x, rows, members, samples, p, key, number)
        per_row = x.shape[0] // rows  # above 1 where tokens or frames were flattened into the rows
        aligned = (x.shape[1], *(1,) * (x.ndim - 2)) if features else x.shape[1:]
        if samples is not None:
            if not features:
                return _dropped(x, rows, members, samples, p, key, number)
            ones = torch.ones(rows, per_row * x.shape[1], dtype=_wide(x), device=x.device)
            draw = _recorded if fold.recording else _dropped
            scale = draw(ones, rows, members, samples, p, key, number)
            return (x * scale.reshape(-1, *aligned)).to(x.dtype)
        if on_gpu(x) and not features and has_kernel(x):  # drawn in place of being read: a mask is larger than x
            return _dropped(x, rows, members, None, p, key, 0)
        scale = self.masks.fixed(x, p, key, per_row * math.prod(aligned))  # [K, n]
        if fold.hidden.whole:
            groups = x.unflatten(0, (fold.hidden.size, -1, per_row))
            scaled = rows_of((groups * scale.reshape(fold.hidden.size, 1, per_row, *aligned)).flatten(1, 2))
        else:
            scaled = x * scale.index_select(0, members).reshape(-1, *aligned)
        return scaled.to(x.dtype)

    def attention(self, fold: Fold, q: Any, k: Any, v: Any, mask: Any, bound: dict[str, Any]) -> Any:
        """Scaled dot-product attention whose weights are dropped; q, k, v [B, ..., tokens, width]."""
        if bound.get("enable_gqa"):
            raise NotImplementedError("MC Dropout: attention that drops weights and groups its queries is not masked")
        p, scale = bound["dropout_p"], bound.get("scale")
        call = fold.again
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        weights = call(torch.mul, call(torch.matmul, q, call(Tensor.transpose, k, -2, -1)), factor)
        if bound.get("is_causal", False):
            later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            weights = call(Tensor.masked_fill, weights, later, -math.inf)
        if mask is not None:
            if mask.dtype == torch.bool:
                weights = call(Tensor.masked_fill, weights, call(torch.logical_not, mask), -math.inf)
            else:
                weights = call(torch.add, weights, mask)
        return call(torch.matmul, self.layer(fold, call(torch.softmax, weights, -1), p, False, False), v)


def _dropped(
    x: Tensor, rows: int, members: Tensor, samples: Tensor | None, p: float, key: int, evaluation: int
) -> Tensor:
    """Dropout of ``x``, whose dimension 0 holds each of R rows once, or several times where tokens are in it too."""
    if x.shape[0] == rows:
        return dropout(x, members, samples, p, key, evaluation)
    return dropout(x.reshape(rows, -1), members, samples, p, key, evaluation).reshape(x.shape)


def _recorded(
    x: Tensor, rows: int, members: Tensor, samples: Tensor | None, p: float, key: int, evaluation: int
) -> Tensor:
    """The same as an operation that a plan knows, which takes rows of at most three dimensions."""
    seen = x if x.shape[0] == rows and 2 <= x.ndim <= 4 else x.reshape(rows, -1)
    return torch.ops.fastens.dropout(seen, members, samples, p, key, evaluation).reshape(x.shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

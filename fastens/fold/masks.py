"""Dropout masks of members: a network's dropouts caught wherever it applies them, each row under its member's mask."""

import hashlib
import math
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastens.kernels._graph import keep
from fastens.ops.dropout import dropout, has_kernel
from fastens.plan.record import MaskInputs, Ref

# Layers whose forward is one call of a dropout function: (draws whole channels, keeps mean and variance).
LAYERS: dict[type[nn.Module], tuple[bool, bool]] = {
    nn.Dropout: (False, False),
    nn.Dropout1d: (True, False),
    nn.Dropout2d: (True, False),
    nn.Dropout3d: (True, False),
    nn.AlphaDropout: (False, True),
    nn.FeatureAlphaDropout: (True, True),
}
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

# The function's own code, without its hand-over to the mode, so that the dropout inside it is caught.
_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda *_: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class Masks:
    """The masks of one MC Dropout ensemble, and the pass in progress.

    A mask is a function of (seed, layer, member, element), and where masks are fresh also of (evaluation, sample). The
    layer is the path of the module that applies the dropout and how many it applied before in this pass.

    Attributes:
        fresh: whether masks depend on evaluation and sample.
        p: the probability for all dropouts; none for their own.
        num_members: K.
        applied: dropouts with p > 0 in the last pass.
        calls: dropouts in the last pass, by path.
        owners: paths of modules that apply dropout by calling a function, as far as passes have shown.
    """

    def __init__(self, num_members: int, seed: int, fresh: bool, p: float | None) -> None:
        self.seed = seed
        self.fresh = fresh
        self.p = p
        self.applied = 0
        self.owners: set[str] = set()
        self.num_members = num_members
        self._rows: tuple[Tensor, Tensor | None, bool] | None = None
        self._evaluation: tuple[int | None, int] = (None, 0)  # seed of the trajectory, number
        self.calls: dict[str, int] = defaultdict(int)
        self._path: list[str] = []
        self._keys: dict[tuple[int | None, str, int], int] = {}
        self._kept: dict[Any, Tensor] = {}
        self._kept_bytes = 0
        self._layers: dict[tuple[str, int], int] = {}  # dropouts in the order in which they were met first
        self._recorded = False

    def __deepcopy__(self, memo: Any) -> "Masks":
        return self  # the layers of copies of a network keep to the ensemble's pass

    def __reduce__(self) -> Any:
        return Masks, (self.num_members, self.seed, self.fresh, self.p)

    def start(self, seed: int | None, evaluation: int) -> None:
        """Start an evaluation, for which fresh masks are drawn."""
        self._evaluation = (seed, evaluation) if self.fresh else (None, 0)

    def drawn(self) -> Tensor:
        """What fresh masks depend on: the number of the evaluation, then the key of each dropout, int64 [1 + n]."""
        return torch.tensor([self._evaluation[1], *(self._key(*layer) for layer in self._layers)])

    def inputs_of(self, drawn: Ref | None) -> MaskInputs:
        """As plans ask for it; see :class:`fastens.fold.planned.PlannedMasks`."""
        return MaskInputs(self.num_members, {self._key(*layer): i for layer, i in self._layers.items()}, drawn)

    def another(self) -> Tensor:
        """Go on to another evaluation; return what its masks depend on."""
        self._evaluation = (self._evaluation[0], self._evaluation[1] + 1)
        return self.drawn()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Let every dropout be one operation, as plans are recorded; the evaluation is the same again afterwards."""
        self._recorded, evaluation = True, self._evaluation
        try:
            yield
        finally:
            self._recorded, self._evaluation = False, evaluation

    def forget(self) -> None:
        """Drop the masks that are kept from earlier passes."""
        self._kept.clear()
        self._kept_bytes = 0

    @contextmanager
    def rows(
        self, network: nn.Module, members: Tensor, samples: Tensor, uniform: bool, discover: bool
    ) -> Iterator[None]:
        """Mask the dropouts of ``network`` while it runs.

        Args:
            network: its dropout layers are :func:`masked` by these masks.
            members: int64 [R], the member of each row.
            samples: int64 [R], the sample of each row.
            uniform: whether rows are K equal groups, in the order of the members.
            discover: look for dropout functions in every module, not only where they were found before.
        """
        self._rows = (members, samples if self.fresh else None, uniform)
        self.calls.clear()
        self._path.clear()
        self.applied = 0
        watched = dict(network.named_modules()) if discover else {p: network.get_submodule(p) for p in self.owners}
        handles = [handle for path, module in watched.items() for handle in self._watch(path, module)]
        try:
            with _Catch(self) if watched else nullcontext():
                yield
        finally:
            self._rows = None
            for handle in handles:
                handle.remove()

    def _watch(self, path: str, module: nn.Module) -> Iterator[Any]:
        if not isinstance(module, _Masked):

            def enter(*_: Any) -> None:
                self._path.append(path)

            def leave(*_: Any) -> None:
                self._path.pop()

            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave, always_call=True)

    def layer(self, x: Tensor, p: float, path: str | None, features: bool, alpha: bool) -> Tensor:
        """Apply the next dropout of the module at ``path``; of the module in progress for none."""
        p = p if self.p is None else self.p
        if path is None:
            path = self._path[-1] if self._path else ""
            self.owners.add(path)
        call = self.calls[path]
        self.calls[path] += 1
        if (path, call) not in self._layers:
            self._layers[path, call] = len(self._layers)
        if p == 0:
            return x
        self.applied += 1
        key = self._key(path, call)
        if not alpha:
            return self._masked(x, p, key, features)
        kept = (self._masked(torch.ones_like(x), p, key, features) != 0).to(x.dtype)
        scale = ((1 - p) * (1 + p * _SATURATED**2)) ** -0.5 if p < 1 else 0.0
        return (x * kept + _SATURATED * (1 - kept) - _SATURATED * p) * scale

    def _key(self, path: str, call: int) -> int:
        identity = (self._evaluation[0], path, call)
        key = self._keys.get(identity)
        if key is None:
            text = f"{self.seed}/{self._evaluation[0]}/{call}/{path}".encode()
            key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
            if len(self._keys) > 4096:  # trajectories have keys of their own
                self._keys.clear()
            self._keys[identity] = key
        return key

    def _masked(self, x: Tensor, p: float, key: int, features: bool) -> Tensor:
        assert self._rows is not None
        members, samples, uniform = self._rows
        rows = len(members)
        if x.ndim == 0 or (x.shape[0] % rows if rows else x.numel()):
            raise ValueError(
                f"a dropout of the network sees {list(x.shape)} in a pass of {rows} rows: the batch is not in its "
                "dimension 0, so no row has a mask of its own; use engine='loop' with a batch of one"
            )
        if not x.numel():
            return x
        if self._recorded and not features:
            return _recorded(x, rows, members, samples, p, key, self._evaluation[1])
        per_row = x.shape[0] // rows  # above 1 where tokens or frames were flattened into the rows
        aligned = (x.shape[1], *(1,) * (x.ndim - 2)) if features else x.shape[1:]
        if samples is not None:
            if not features:
                return _dropped(x, rows, members, samples, p, key, self._evaluation[1])
            ones = torch.ones(rows, per_row * x.shape[1], dtype=_wide(x), device=x.device)
            draw = _recorded if self._recorded else _dropped
            scale = draw(ones, rows, members, samples, p, key, self._evaluation[1])
            return (x * scale.reshape(-1, *aligned)).to(x.dtype)
        if x.is_cuda and not features and has_kernel(x):  # drawn in place of being read: a mask is larger than x
            return _dropped(x, rows, members, None, p, key, 0)
        scale = self._fixed(x, p, key, per_row * math.prod(aligned))  # [K, n]
        if uniform:
            groups = x.unflatten(0, (self.num_members, -1, per_row))
            scaled = (groups * scale.reshape(self.num_members, 1, per_row, *aligned)).flatten(0, 2)
        else:
            scaled = x * scale.index_select(0, members).reshape(-1, *aligned)
        return scaled.to(x.dtype)

    def _fixed(self, x: Tensor, p: float, key: int, count: int) -> Tensor:
        """Zero or 1 / (1 - p) for each member and element, [K, n]; kept, because fixed masks return in every pass."""
        identity = (key, p, count, _wide(x), x.device)
        scale = self._kept.get(identity)
        if scale is not None:
            return keep(scale)
        with torch.no_grad():
            ones = torch.ones(self.num_members, count, dtype=_wide(x), device=x.device)
            scale = dropout(ones, torch.arange(self.num_members, device=x.device), None, p, key)
        size = scale.numel() * scale.element_size()
        if not torch.compiler.is_compiling() and not scale.is_inference() and self._kept_bytes + size <= _KEPT_BYTES:
            self._kept[identity] = scale
            self._kept_bytes += size
        return scale

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: Any
    ) -> Tensor:
        """Scaled dot-product attention whose weights are dropped; q, k, v [R, ..., tokens, width]."""
        weights = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            allowed = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).tril()
            weights = weights.masked_fill(~allowed, -math.inf)
        if mask is not None:
            weights = weights.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else weights + mask
        return self.layer(torch.softmax(weights, -1), p, None, False, False) @ v


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


class _Catch(TorchFunctionMode):
    """Sends calls of dropout functions to the masks."""

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self._masks = masks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = FUNCTIONS.get(func)
        if kind is not None:
            return self._dropout(kind, args, kwargs, getattr(func, "__name__", "").endswith("_"))
        if func is F.multi_head_attention_forward:
            bound = dict(zip(_multi_head_attention.__code__.co_varnames, args, strict=False)) | kwargs
            bound["training"] = bound["dropout_p"] > 0  # what is dropped is decided here, not by the mode
            with self:
                return _multi_head_attention(**bound)
        if func is F.scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        return func(*args, **kwargs)

    def _dropout(self, kind: tuple[bool, bool], args: Any, kwargs: dict[str, Any], in_place: bool) -> Tensor:
        x = args[0] if args else kwargs["input"]
        p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        out = self._masks.layer(x, p, None, *kind)
        in_place = in_place or (args[3] if len(args) > 3 else kwargs.get("inplace", False))
        return x.copy_(out) if in_place else out

    def _attention(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        bound = dict(zip(names, args, strict=False)) | kwargs
        p = bound.get("dropout_p", 0.0)
        if not p:
            return func(*args, **kwargs)
        if bound.get("enable_gqa"):
            raise NotImplementedError("MC Dropout: attention that drops weights and groups its queries is not masked")
        query, key, value = bound["query"], bound["key"], bound["value"]
        mask, causal, scale = bound.get("attn_mask"), bound.get("is_causal", False), bound.get("scale")
        return self._masks.attention(query, key, value, mask, p, causal, scale)


class _Masked(nn.Module):
    """A dropout layer that takes its masks from an ensemble; see :func:`masked`."""

    masks: Masks
    path: str

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements, in every mode."""
        kind = next(kind for layer, kind in LAYERS.items() if isinstance(self, layer))
        out = self.masks.layer(input, self.p, self.path, *kind)
        return input.copy_(out) if self.inplace else out


_CLASSES = {layer: type(f"Masked{layer.__name__}", (_Masked, layer), {}) for layer in LAYERS}
globals().update({layer.__name__: layer for layer in _CLASSES.values()})  # where pickle looks for them


def masked(network: nn.Module, masks: Masks) -> None:
    """Let the dropout layers of a network, changed in place, take their masks from ``masks``."""
    for path, module in network.named_modules():
        layer = type(module)
        if layer in _CLASSES:
            module.__class__ = _CLASSES[layer]
        if isinstance(module, _Masked):
            module.__dict__.update(masks=masks, path=path)

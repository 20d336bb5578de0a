"""The check of a stack of scores, shared by the ops that reduce over members."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from fastens.ops._dispatch import check_backend
from fastens.rules import Rule


def as_scores(op: str, scores: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return K tensors [B, ...] of one shape, dtype and device.

    Raises:
        TypeError: not tensors, or not of a floating-point dtype.
        ValueError: no members, no batch dimension, or members that differ.
    """
    if isinstance(scores, Tensor):
        if scores.ndim < 2:
            raise ValueError(f"{op}: scores is {list(scores.shape)}, expected [K, B, ...]: members, then batch")
        members = list(scores.unbind(0))
    elif isinstance(scores, Sequence):
        members = list(scores)
    else:
        raise TypeError(f"{op}: scores is a {type(scores).__name__}, expected a tensor or a sequence of tensors")
    if not members:
        raise ValueError(f"{op}: scores holds no members (K = 0), expected at least one")
    first = members[0]
    if isinstance(first, Tensor) and first.is_floating_point() and first.ndim:
        shape, dtype, device = first.shape, first.dtype, first.device
        if all(
            isinstance(x, Tensor) and x.dtype is dtype and x.shape == shape and x.device == device for x in members[1:]
        ):
            return members
    raise _refusal(op, members)


def check_defined(op: str, rule: Rule, backend: str) -> None:
    """Raise unless a backend runs the definition of a rule that no kernel knows: RuntimeError for one asked by name."""
    check_backend(backend)
    if backend not in ("auto", "reference"):
        raise RuntimeError(
            f"{op}: `backend`: no {backend} kernel knows rule {rule!r}; backend='auto' runs its definition"
        )


def _refusal(op: str, members: list[Tensor]) -> Exception:
    """The error that names the first member that does not fit."""
    for k, member in enumerate(members):
        if not isinstance(member, Tensor):
            return TypeError(f"{op}: scores[{k}] is a {type(member).__name__}, expected a tensor")
        if not member.is_floating_point():
            return TypeError(f"{op}: scores[{k}] is {member.dtype}, expected a floating-point dtype; convert it first")
        if member.ndim == 0:
            return ValueError(f"{op}: scores[{k}] is 0-dimensional, expected [B, ...]")
        for what, ours, first in (
            ("shape", tuple(member.shape), tuple(members[0].shape)),
            ("dtype", member.dtype, members[0].dtype),
            ("device", member.device, members[0].device),
        ):
            if ours != first:
                return ValueError(f"{op}: scores[{k}] has {what} {ours}, but scores[0] {first}; members must agree")
    raise AssertionError("the members agree")


def seed_from(generator: torch.Generator | SupportsIndex | None) -> int:
    """Read a seed from a generator, on its own device; none for torch's global one. A seed is taken as it is, signed.

    Raises:
        TypeError: no generator and no whole number.
        ValueError: a number of more than 64 bits.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    try:
        seed = operator.index(generator)
    except TypeError:
        raise TypeError(
            f"generator is a {type(generator).__name__}, expected a torch.Generator, a seed (a whole number), or None"
        ) from None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"the seed {seed} has more than 64 bits; take one from -2**63 to 2**64 - 1")
    return seed - 2**64 if seed >= 2**63 else seed

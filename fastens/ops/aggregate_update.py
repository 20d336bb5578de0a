"""Aggregation with what follows it in the same pass: guidance, a change of parameterisation or a sampler's step."""

from collections.abc import Sequence

from torch import Tensor

from fastens import rules
from fastens.kernels._members import result_like
from fastens.ops._dispatch import Op
from fastens.ops._scores import as_scores, check_defined
from fastens.ops.member_variance import member_variance
from fastens.reference import aggregate_update as reference


def _by_schema(
    scores: list[Tensor],
    rule: str,
    option: str,
    values: list[float],
    seed: int,
    offset: int,
    x: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor | None,
    guidance: Tensor | None,
    variance: bool,
) -> tuple[Tensor, Tensor]:
    value = rules.from_schema(rule, option, values)
    return reference.aggregate_update(scores, value, x, noise, coefficients, guidance, variance, seed, offset)


def _fake(
    scores: list[Tensor],
    rule: str,
    option: str,
    values: list[float],
    seed: int,
    offset: int,
    x: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor | None,
    guidance: Tensor | None,
    variance: bool,
) -> tuple[Tensor, Tensor]:
    out = result_like(scores, None if guidance is None else scores[0].shape[0] // 2)
    return out, result_like(scores) if variance else scores[0].new_empty(0)


_update = Op(
    "aggregate_update(Tensor[] scores, str rule, str option, float[] values, int seed, int offset, Tensor? x, "
    "Tensor? noise, Tensor? coefficients, Tensor? guidance, bool variance) -> (Tensor, Tensor)",
    _by_schema,
    {"native": _fake, "triton": _fake},
)


def aggregate_update(
    scores: Tensor | Sequence[Tensor],
    rule: str | rules.Rule = "mean",
    *,
    x: Tensor | None = None,
    noise: Tensor | None = None,
    coefficients: Tensor | None = None,
    guidance: Tensor | None = None,
    variance: bool = False,
    seed: int = 0,
    offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Combine K scores by a rule and continue in the same pass: ``out = a x + b s + c noise``.

    s is the aggregate, or ``u + g (s' - u)`` where the batch holds unconditional rows u, then conditional ones s'
    (classifier-free guidance, arXiv 2207.12598). A step of DDIM, Euler or an ancestral sampler is such a line, and
    so is a change of parameterisation, see :func:`fastens.parameterisation.conversion`.

    Args:
        scores: [K, B, ...], or a sequence of K tensors [B, ...]; floating point. [K, 2B, ...] with guidance.
        rule: name, alias or value of a rule.
        x: the state [B, ...], of the scores' dtype, or none.
        noise: [B, ...], of the scores' dtype, or none.
        coefficients: [3, B], the a, b and c of each sample, on the scores' device; none for 0, 1, 0.
        guidance: [B], the strength g of each sample, or none.
        variance: compute the variance over members as well, of every row of ``scores``.
        seed: of the member draw of "alternating".
        offset: which draw this is.
        backend: the code that runs it.

    Returns:
        out [B, ...] and the variance, in the shape of a member, or none.

    Raises:
        TypeError: scores that are not floating-point tensors.
        ValueError: shapes or dtypes that do not fit, or the rule ``mixture``, which needs a trajectory.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    members = as_scores("aggregate_update", scores)
    resolved = rules.get(rule)
    if resolved.per_trajectory:
        raise ValueError(f"aggregate_update: rule {resolved.name!r} draws per trajectory; use fastens.Ensemble")
    if resolved.needs_noise_level:
        raise ValueError(
            f"aggregate_update: rule {resolved.name!r} needs the noise level; use fastens.Ensemble, or rule.at(log_snr)"
        )
    resolved.check(len(members))
    everyone = members
    members, resolved = resolved.used(everyone)
    if variance and len(members) < len(everyone):  # a pass of its own, over all of them
        out, _ = aggregate_update(
            members, resolved, x=x, noise=noise, coefficients=coefficients, guidance=guidance, seed=seed,
            offset=offset, backend=backend,
        )  # fmt: skip
        return out, member_variance(everyone, backend=backend)
    rows, *rest = members[0].shape
    if guidance is not None:
        if rows % 2:
            raise ValueError(f"aggregate_update: scores has {rows} rows, expected an even number with guidance")
        rows //= 2
    if (x is not None or noise is not None) and coefficients is None:
        raise ValueError("aggregate_update: x or noise without coefficients, expected coefficients [3, B]")
    tensors = list(members)
    for name, tensor, shape in (
        ("x", x, (rows, *rest)),
        ("noise", noise, (rows, *rest)),
        ("coefficients", coefficients, (3, rows)),
        ("guidance", guidance, (rows,)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"aggregate_update: {name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor.device != members[0].device:
            raise ValueError(f"aggregate_update: {name} is on {tensor.device}, expected {members[0].device}")
        if name in ("x", "noise") and tensor.dtype != members[0].dtype:
            raise ValueError(f"aggregate_update: {name} is {tensor.dtype}, expected {members[0].dtype}")
        tensors.append(tensor)
    if not resolved.has_kernels:
        check_defined("aggregate_update", resolved, backend)
        out, spread = reference.aggregate_update(members, resolved, x, noise, coefficients, guidance, variance)
        return out, spread if variance else None
    out, spread = _update.resolve(backend, tensors)(
        members,
        resolved.name,
        resolved.option,
        resolved.values,
        seed,
        offset,
        x,
        noise,
        coefficients,
        guidance,
        variance,
    )
    return out, spread if variance else None

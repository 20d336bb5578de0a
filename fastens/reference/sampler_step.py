"""One step of a sampler, linear in the state, in what the network gave and in noise, in PyTorch operations."""

from torch import Tensor

from fastens.reference.normal import normal


def sampler_step(
    x: Tensor,
    output: Tensor,
    second: Tensor | None,
    row: Tensor,
    kind: str,
    low: float,
    high: float,
    seed: Tensor | None,
    offset: Tensor | None,
    samples: Tensor | None,
) -> Tensor:
    """The next state; the arguments are those of :func:`fastens.ops.sampler_step.sampler_step`."""
    output = output.to(x.dtype)
    if kind == "corrected":
        assert second is not None
        moved = row[2] * x + row[3] * output + row[4] * second.to(x.dtype)
    elif kind == "linear":
        moved = row[0] * x + row[1] * output
    else:
        data = (row[3] * x + row[4] * output).clamp(low, high)
        moved = data if kind == "data" else row[0] * x + row[1] * data
    if samples is None:
        return moved
    assert seed is not None
    assert offset is not None
    return moved + row[2] * normal(seed, offset, samples, tuple(x.shape[1:])).to(x.dtype)

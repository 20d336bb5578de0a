"""Programs of single steps in poisoned memory, run by the kernels and by the reference."""

import dataclasses
import functools

import torch
import torch.nn.functional as F

from fastens.ops.run_program import run_program
from fastens.program import steps
from fastens.program.steps import Heads, Image, Mask, Slot
from fastens.reference import run_program as reference
from tests.tolerances import OP, relative_error

GAP = 19  # poisoned elements between values: no multiple of a vector, so nothing is aligned


@dataclasses.dataclass(frozen=True)
class View:
    """Where a result is expected."""

    at: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, arena):
        return arena.as_strided(self.size, self.stride, self.at // 4)


class Memory:
    """An arena and weights, with NaN wherever no value was put."""

    def __init__(self):
        self.parts = {Slot.ARENA: [torch.full((GAP,), torch.nan)], Slot.WEIGHTS: [torch.full((GAP,), torch.nan)]}

    def put(self, x, slot=Slot.ARENA):
        """Append a tensor in its logical order; return its address."""
        at = sum(part.numel() for part in self.parts[slot])
        self.parts[slot] += [x.detach().float().reshape(-1), torch.full((GAP,), torch.nan)]
        return steps.address(slot, 4 * at)

    def put_members(self, members):
        """Append int64 values, such as the members that runs of rows belong to; return their address."""
        if sum(part.numel() for part in self.parts[Slot.ARENA]) % 2:
            self.parts[Slot.ARENA].append(torch.full((1,), torch.nan))
        return self.put(torch.tensor(members, dtype=torch.int64).view(torch.float32))

    def mask(self, count, channels, height, width, scale, rows=1, given=None):
        """Put ``count`` masks, of a member for each run of ``rows`` rows: the Mask and what it multiplies by [R, ...].

        Args:
            count: how many masks there are.
            channels: C.
            height: lines of an image.
            width: pixels of a line.
            scale: of what is kept.
            rows: of one run.
            given: the members of the runs, where they do not come in turn.
        """
        generator = torch.Generator().manual_seed(count + channels)
        kept = torch.rand(count, height, width, channels, generator=generator) < 0.6
        words = -(-channels // steps.LANES)
        bits = F.pad(kept.int(), (0, words * steps.LANES - channels)).unflatten(-1, (words, steps.LANES))
        bits = (bits << torch.arange(steps.LANES)).sum(-1).to(torch.int16).flatten()
        at = self.put(F.pad(bits, (0, len(bits) % 2)).view(torch.float32))
        members = steps.NONE if given is None else self.put_members(given)
        runs = torch.tensor(range(count) if given is None else given).repeat_interleave(rows)
        mask = Mask(at, height * width * words, words, rows, members, scale)
        return mask, kept[runs].permute(0, 3, 1, 2).double() * scale

    def room(self, *size, stride=None):
        """A place for a result in the arena."""
        stride = tuple(stride or torch.empty(size, device="meta").stride())
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        return View(self.put(torch.full((span,), torch.nan)), size, stride)

    def image(self, x):
        """Put images [R, C, H, W] as a slice of channels of wider ones; return the Image."""
        rows, channels, height, width = x.shape
        wide = torch.full((rows, height + 1, width + 2, channels + 5), torch.nan)
        wide[:, :height, :width, :channels] = x.permute(0, 2, 3, 1)
        return Image(self.put(wide), *wide.stride()[:3], channels, rows)

    def image_room(self, rows, channels, height, width):
        """A place for images, as a slice of channels of wider ones: the Image and its view [R, C, H, W]."""
        x = channels + 5
        y = x * (width + 2)
        view = self.room(rows, channels, height, width, stride=(y * (height + 1), 1, y, x))
        return Image(view.at, view.stride[0], y, x, channels, rows), view

    def heads(self, x, channels_first=False):
        """Put [R, heads, tokens, width] token by token, as a projection leaves them, or else channel by channel.

        Returns:
            The Heads.
        """
        rows, heads, tokens, width = x.shape
        if channels_first:
            wide = torch.full((rows, heads, width, tokens + 3), torch.nan)
            wide[..., :tokens] = x.transpose(2, 3)
            return Heads(self.put(wide), *wide.stride()[:2], 1, tokens + 3)
        token = heads * width + 3
        wide = torch.full((rows, tokens, token), torch.nan)
        wide[..., : heads * width] = x.transpose(1, 2).reshape(rows, tokens, heads * width)
        return Heads(self.put(wide), tokens * token, width, token)

    def check(self, step, *views, num_threads=1, tolerance=OP[torch.float32]):
        """Run a step by the kernels and by the reference, and compare.

        Outside of ``views`` nothing may have been written.

        Returns:
            The kernels' results, one of each view.
        """
        program, weights = steps.encode([step]), torch.cat(self.parts[Slot.WEIGHTS])
        before = torch.cat(self.parts[Slot.ARENA])
        arenas = [before.clone(), before.clone()]
        for run, arena in zip((run_program, reference.run_program), arenas, strict=True):
            run(program, weights, arena, [], [], num_threads)
        outside = torch.ones_like(before, dtype=torch.bool)
        for view in views:
            view.of(outside).fill_(False)
            assert_close(view.of(arenas[0]), view.of(arenas[1]), tolerance)
        for arena in arenas:
            assert torch.equal(arena.view(torch.int32)[outside], before.view(torch.int32)[outside])
        return [view.of(arenas[0]) for view in views]


def assert_close(actual, expected, tolerance=OP[torch.float32]):
    """NaN and infinities where they are expected, and all else close to the largest magnitude."""
    finite = expected.isfinite()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    assert torch.equal(actual[expected.isinf()].sign(), expected[expected.isinf()].sign().to(actual.dtype))
    assert relative_error(actual[finite], expected[finite]) <= tolerance


@functools.cache
def random(*size, seed=0):
    """Fixed normal float32 values."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))

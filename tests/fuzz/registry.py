"""What a feature of a random network is: a small module, registered by a decorator with a weight and its frames.

A frame says what the hidden state is: ``vector`` [B, C], ``sequence`` [B, L, C], ``signal`` [B, C, L],
``image`` [B, C, H, W], ``volume`` [B, C, D, H, W]. A feature maps a hidden state to one of the same shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from torch import Tensor, nn

FRAMES = ("vector", "sequence", "signal", "image", "volume")
CHANNELS_FIRST = ("signal", "image", "volume")

FEATURES: dict[str, "type[Block]"] = {}


@dataclass(frozen=True)
class Sizes:
    """What a feature is built for; ``own`` is the member's own source of randomness, all else is every member's."""

    frame: str
    width: int  # C, even and at least four
    size: int  # L, or H and W
    members: int  # K
    rows: int  # B of the first calls
    own: Random


class Block(nn.Module):
    """A feature; ``takes`` names what its forward is given: h, emb, t, context, flip, gain."""

    takes: ClassVar[tuple[str, ...]] = ("h",)
    frames: ClassVar[tuple[str, ...]] = FRAMES
    share: ClassVar[float] = 1.0  # how often it is drawn, relative to others
    mixing: ClassVar[bool] = False  # a row of the output depends on other rows
    random: ClassVar[bool] = False  # draws numbers in forward
    stateful: ClassVar[bool] = False  # a call changes later calls
    differs: ClassVar[bool] = False  # members differ in more than tensors
    coarse: ClassVar[bool] = False  # not continuous, so that rounding can be magnified
    refusable: ClassVar[bool] = False  # the README says that this may be refused
    own_python: ClassVar[bool] = False  # Python reads values that differ between members, so they must be looped
    in_training: ClassVar[bool] = False  # what is said above holds in training mode only
    equal: ClassVar[bool] = False  # parameters that need no gradient are the same in all members

    def __init__(self, draw: Random, sizes: Sizes) -> None:
        super().__init__()
        self.channel_dim = 1 if sizes.frame in CHANNELS_FIRST else -1
        self.build(draw, sizes)

    def build(self, draw: Random, sizes: Sizes) -> None:
        """Make layers, parameters and attributes."""

    def per_channel(self, p: Tensor, h: Tensor) -> Tensor:
        """A parameter [C], or values [B, C], in the shape that multiplies the hidden state."""
        if self.channel_dim == -1:
            return p if p.ndim == 1 else p.reshape(p.shape[0], *[1] * (h.ndim - 2), p.shape[1])
        return p.reshape(*p.shape, *[1] * (h.ndim - 2))


def feature(*frames: str, weight: float = 1.0, **tags: Any) -> Callable[[type[Block]], type[Block]]:
    """Register a class of blocks for some frames, or for all."""

    def register(block: type[Block]) -> type[Block]:
        assert block.__name__ not in FEATURES, block.__name__
        block.frames, block.share = frames or FRAMES, weight
        for tag, value in tags.items():
            assert hasattr(block, tag), tag
            setattr(block, tag, value)
        FEATURES[block.__name__] = block
        return block

    return register


def pick(draw: Random, frame: str, without: Callable[[type[Block]], bool] = lambda block: False) -> str:
    """The name of a feature of a frame, drawn by weight."""
    names = [name for name, block in FEATURES.items() if frame in block.frames and not without(block)]
    return draw.choices(names, [FEATURES[name].share for name in names])[0]

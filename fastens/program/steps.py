"""The steps of a program: dataclasses, of which :mod:`fastens.program.layout` makes the structs of C++.

An address is ``slot << 48 | bytes``; slot 0 is the arena, 1 the packed weights, then come the inputs and the outputs of
the call. Strides are in elements. Activations are channels-last: the channels of a pixel are contiguous.

Rows come in runs of ``rows_per_member``. A run belongs to member 0, 1, ... in turn, or to those that int64 values at
``members`` give, one for each run: what a row costs is known beforehand, whose row it is only when the program runs.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

STEP_WIDTH = 96
LANES = 16  # output channels of one vector of packed weights
PATCH_BYTES, TASKS_PER_THREAD = 256 * 1024, 3  # of a convolution: input of a task, tasks that threads share
NONE = -1  # the address of what is absent
MAX_DIMS, MAX_INPUTS, MAX_INSTRUCTIONS = 6, 4, 8
Address = Any  # NONE, an address, or a place whose ``word()`` is the address once the arena is laid out
DTYPES = {torch.float32: 0, torch.float64: 1, torch.int64: 2, torch.int32: 3, torch.bfloat16: 4}


class Slot(enum.IntEnum):
    """The memory that an address is in; inputs and outputs of the call follow."""

    ARENA = 0
    WEIGHTS = 1
    ARGUMENTS = 2


class Activation(enum.IntEnum):
    """What is applied to a value on its way into or out of a step."""

    NONE = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3


class Opcode(enum.IntEnum):
    """An elementwise instruction; the names of two-operand ones end in their operands' order."""

    COPY = 0
    ADD = 1
    SUBTRACT = 2
    MULTIPLY = 3
    DIVIDE = 4
    ADD_NUMBER = 5
    MULTIPLY_NUMBER = 6
    NUMBER_MINUS = 7
    NUMBER_OVER = 8
    SILU = 9
    GELU = 10
    GELU_TANH = 11
    SIGMOID = 12
    TANH = 13
    EXP = 14
    LOG = 15
    SIN = 16
    COS = 17
    SQRT = 18
    SQUARE = 19
    RELU = 20
    ABS = 21
    DIVIDE_NUMBER = 22


def address(slot: int, num_bytes: int) -> int:
    """The address of the byte ``num_bytes`` from the start of a slot."""
    return slot << 48 | num_bytes


@dataclasses.dataclass
class Image:
    """Channels of the rows' images: element strides between rows, lines and pixels."""

    at: Address = NONE
    row: int = 0
    y: int = 0
    x: int = 0
    channels: int = 0
    rows: int = 1  # the image of row r is r % rows


@dataclasses.dataclass
class Strided:
    """A value of any dtype and up to six dimensions."""

    at: Address = NONE
    dtype: int = 0  # of DTYPES
    strides: list[int] = dataclasses.field(default_factory=lambda: [0] * MAX_DIMS)


@dataclasses.dataclass
class Mask:
    """A dropout mask: a bit for each channel of a pixel, 16 channels to a word; strides in words."""

    at: Address = NONE
    row: int = 0  # from a mask to the next
    pixel: int = 0  # from a pixel to the next
    rows: int = 1  # rows that have one mask, that of their member
    members: Address = NONE  # of the runs of rows
    scale: float = 1.0  # of what is kept


@dataclasses.dataclass
class Heads:
    """Tokens of the heads of the rows: element strides."""

    at: Address = NONE
    row: int = 0
    head: int = 0
    token: int = 0
    channel: int = 1


@dataclasses.dataclass
class Step:
    """Base of the steps: how many tasks the threads share."""

    kind: ClassVar[int]
    tasks: int = dataclasses.field(default=1, kw_only=True)

    def words(self) -> list[int]:
        """The step as STEP_WIDTH 64-bit words."""
        words = [self.kind, self.tasks]
        _flatten([value for name, value in vars(self).items() if name != "tasks"], words)
        if len(words) > STEP_WIDTH:
            raise ValueError(f"{type(self).__name__} takes {len(words)} words, at most {STEP_WIDTH}")
        return words + [0] * (STEP_WIDTH - len(words))


def _flatten(values: Iterable[Any], into: list[int]) -> None:
    for value in values:
        if isinstance(value, int):
            into.append(int(value))
        elif isinstance(value, float):
            into += struct.unpack("<q", struct.pack("<d", value))
        elif hasattr(value, "word"):  # a place whose address is known by now
            into.append(value.word())
        else:
            _flatten(value if isinstance(value, list | tuple) else vars(value).values(), into)


@dataclasses.dataclass
class Conv(Step):
    """A convolution, or a linear layer as one of 1x1 over tokens.

    out = act_out(((conv(act_in(x * table_scale + table_shift) * mask_in) + bias + row_vector) * mask_out + residual) *
    scale / divisor).
    """

    kind: ClassVar[int] = 1
    rows: int
    rows_per_member: int
    row_chunk: int  # of a task: rows of one member
    band: int  # lines of the output
    block_chunk: int  # blocks of channels
    vectors: int  # of one block of output channels
    sources: tuple[Image, Image]  # joined along the channels; the second may be absent (0 channels)
    up: int  # nearest-neighbour enlargement of the sources
    in_h: int  # after it
    in_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    out_h: int
    out_w: int
    out_channels: int
    table_scale: Address  # [R, C_in]
    table_shift: Address
    act_in: int
    weight: Address  # [K][block][tap][C_in][vectors * 16]; of Winograd, the transformed taps, (tile + 2)^2 of them
    weight_member: int
    bias: Address  # [K, C_out padded to vectors]
    bias_member: int
    row_vector: Address  # [R, C_out]
    row_vector_row: int
    residual: Image
    scale: float
    act_out: int
    out: Image
    bfloat16: int = 0  # products of bfloat16 values, summed in float32
    members: Address = NONE
    mask_in: Mask = dataclasses.field(default_factory=Mask)
    mask_out: Mask = dataclasses.field(default_factory=Mask)
    divisor: float = 1.0  # of what is multiplied by `scale`


@dataclasses.dataclass
class Winograd(Conv):
    """A 3x3 convolution of stride 1 in squares of the output, its weights transformed for them."""

    kind: ClassVar[int] = 6
    tile: int = dataclasses.field(default=2, kw_only=True)  # pixels on a side of a square, 2 or 4


@dataclasses.dataclass
class Norm(Step):
    """Group normalisation as a scale and a shift per row and channel: y = x * out_scale + out_shift."""

    kind: ClassVar[int] = 2
    rows: int
    rows_per_member: int
    splits: int
    sources: tuple[Image, Image]
    height: int
    width: int
    groups: int
    weight: Address  # [K, C]
    bias: Address
    row_scale: Address  # [R, C]: y (1 + row_scale) + row_shift
    row_scale_row: int
    row_shift: Address
    row_shift_row: int
    eps: float
    out_scale: Address  # [R, C]
    out_shift: Address
    members: Address = NONE


@dataclasses.dataclass
class Pointwise(Step):
    """A chain of instructions on registers: the inputs come first, each instruction writes the next one."""

    kind: ClassVar[int] = 3
    sizes: list[int]
    out: Strided
    num_inputs: int
    inputs: list[Strided]
    num_instructions: int
    instructions: list[int | float]  # opcode | a << 16 | b << 32, number; in turn


@dataclasses.dataclass
class LayerNorm(Step):
    """Layer normalisation of the last dimension, scale and shift by member, then by row."""

    kind: ClassVar[int] = 4
    rows: int
    rows_per_member: int
    tokens: int
    channels: int
    source: Address
    source_row: int
    source_token: int
    weight: Address  # [K, C]
    bias: Address
    row_scale: Address  # [R, C]: y (1 + row_scale) + row_shift
    row_scale_row: int
    row_shift: Address
    row_shift_row: int
    eps: float
    out: Address
    out_row: int
    out_token: int
    members: Address = NONE


@dataclasses.dataclass
class Attention(Step):
    """softmax(scale q k^T) v, for every row and head."""

    kind: ClassVar[int] = 5
    rows: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    query_chunk: int
    q: Heads
    k: Heads
    v: Heads
    out: Heads
    scale: float


@dataclasses.dataclass
class Draw(Step):
    """A fresh dropout mask for each row, element ``pixel * pixel_step + channel * channel_step`` of it by Philox."""

    kind: ClassVar[int] = 7
    rows: int
    rows_per_member: int
    splits: int  # a task: a share of the pixels of one row
    pixels: int
    channels: int
    pixel_step: int
    channel_step: int
    key: Address  # int64, as are the next two
    evaluation: Address
    samples: Address  # [R]
    threshold: int  # above 0
    out: Address  # a Mask's words
    out_row: int
    out_pixel: int
    members: Address = NONE


@dataclasses.dataclass
class Drop(Step):
    """Normalisation, activation and dropout, of a value that no other step computes on its way in or out."""

    kind: ClassVar[int] = 8
    rows: int
    splits: int  # a task: a share of the lines of one row
    sources: tuple[Image, Image]
    height: int
    width: int
    table_scale: Address
    table_shift: Address
    activation: int
    mask: Mask
    out: Image


@dataclasses.dataclass
class Gather(Step):
    """Copies to each row the line of a table [K, count] that is its member's."""

    kind: ClassVar[int] = 9
    rows: int
    count: int  # float32 values of a line
    table: Address  # [K, count]
    members: Address  # int64 [R]
    out: Address  # [R, count]


def encode(steps: list[Step]) -> Tensor:
    """The program: int64 [steps, STEP_WIDTH]."""
    return torch.tensor([step.words() for step in steps], dtype=torch.int64).reshape(-1, STEP_WIDTH)


def decode(program: Tensor) -> list[Step]:
    """The steps of a program, the inverse of :func:`encode`.

    Args:
        program: int64 [steps, STEP_WIDTH].

    Raises:
        ValueError: a step of no known kind.
    """
    kinds = {kind.kind: kind for kind in (*Step.__subclasses__(), *Conv.__subclasses__())}
    result = []
    for number, row in enumerate(program.tolist()):
        words = iter(row)
        kind, tasks = next(words), next(words)
        if kind not in kinds:
            raise ValueError(f"`program`: step {number} is of no known kind: {kind}")
        result.append(_read(kinds[kind], words, tasks=tasks))
    return result


_LENGTHS = {"strides": MAX_DIMS, "sizes": MAX_DIMS, "inputs": MAX_INPUTS, "instructions": 2 * MAX_INSTRUCTIONS}


@functools.cache
def fields_of(kind: type) -> dict[str, Any]:
    """The fields of a record in the order of its words, and their types; of a step those behind its header."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name != "tasks"}


def _read(kind: Any, words: Iterator[int], **known: Any) -> Any:
    if kind in (int, Address):
        return next(words)
    if kind is float:
        return struct.unpack("<d", struct.pack("<q", next(words)))[0]
    for name, hint in fields_of(kind).items():
        if get_origin(hint) is tuple:
            known[name] = tuple(_read(each, words) for each in get_args(hint))
        elif get_origin(hint) is list:
            (each,) = get_args(hint)
            # an instruction is a code and a number in turn
            each_of = (each, each) if name != "instructions" else (int, float)
            known[name] = [_read(each_of[i % 2], words) for i in range(_LENGTHS[name])]
        else:
            known[name] = _read(hint, words)
    return kind(**known)

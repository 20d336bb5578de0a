"""Compile every Triton kernel as its launcher launches it, for one GPU and without one; print what each takes as JSON.

A process of its own: ``python -m tests.kernels.ahead_of_time 90 [sample]``, without TRITON_INTERPRET. The launchers
run on CPU tensors; in place of a launch, the kernel is compiled for the target.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

from bench.gpu_code import assembled, compiling, complaints
from fastens import rules
from fastens.kernels._attention import attention
from fastens.kernels._conv2d_halo import conv2d_halo
from fastens.kernels._conv2d_tma import TILINGS, conv2d_tma
from fastens.kernels._join import join
from fastens.kernels._masks import apply_bits, draw_bits
from fastens.kernels.aggregate import aggregate
from fastens.kernels.aggregate_update import aggregate_update
from fastens.kernels.conv2d import conv2d
from fastens.kernels.conv2d_sum import conv2d_sum
from fastens.kernels.dropout import dropout
from fastens.kernels.group_norm import group_norm, normalise
from fastens.kernels.layer_norm import layer_norm
from fastens.kernels.linear import linear
from fastens.kernels.linear_group import linear_group
from fastens.kernels.member_variance import member_variance
from fastens.kernels.normal import normal
from fastens.kernels.pointwise import pointwise
from fastens.kernels.sampler_step import sampler_step
from fastens.program.block import ConvBlock, Prologue
from fastens.program.steps import Opcode
from fastens.reference.pointwise import BINARY, NUMBERED

PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
WIDE_LOAD = r"ld\.global\.v(\d)\.b(\d\d)"
OF_MEMORY = re.compile(
    r"\b(?:ld|st|atom|red|cp|prefetch\w*|discard)\.(?:\S*\bglobal\b|async\.bulk|reduce)"
)  # of the GPU
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(kernel):
    """What a kernel's machine code takes: registers, stack, local and shared memory; and what ptxas says of it."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        text = subprocess.run([CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        complaint = complaints(assembled(kernel, folder)[1]) if "wgmma" in ptx else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    registers, stack, _, local = map(int, found.groups())
    waits = ptx.find("griddepcontrol.wait")
    return {
        "complaint": complaint,
        "overlaps": kernel.metadata.launch_pdl and "griddepcontrol.launch_dependents" in ptx,
        "waits": waits >= 0 and waits < min((found.start() for found in OF_MEMORY.finditer(ptx)), default=len(ptx)),
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": kernel.metadata.shared,
        "bulk loads": ptx.count("cp.async.bulk.tensor"),
        "matrix loads": ptx[: max(map(ptx.rfind, PRODUCTS))].count("ldmatrix"),  # behind the products parts are joined
        "inexact": sorted(set(re.findall(r"\b(?:fma|div\.full|\w+\.approx)[\w.]*", ptx))),
        "widest load": max((int(n) * int(b) // 8 for n, b in re.findall(WIDE_LOAD, ptx)), default=0),
        "tensor cores": "wgmma"
        if "wgmma" in ptx
        else "tcgen05"
        if "tcgen05" in ptx
        else "mma"
        if "mma.sync" in ptx
        else "",
    }


def launches():
    """What is compiled: name -> a call of a launcher."""
    shape = (4, 3, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        short = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        for k in (1, 5, 8, 16, 33):
            scores = list(torch.empty(k, *shape, dtype=dtype).unbind(0))
            for rule in (rules.Mean(), rules.Mean((1 / k,) * k), rules.Median(), rules.Geometric(), rules.Dominant(),
                         rules.MaxAbs(), rules.Alternating()):  # fmt: skip
                call = (scores, rule.name, rule.option, list(rule.values), 1, 2)
                weighted = " weighted" if rule.name == "mean" and rule.values else ""
                yield f"aggregate {rule.name}{weighted} {short} K={k}", lambda call=call: aggregate(*call)
            yield f"member_variance {short} K={k}", lambda scores=scores: member_variance(scores)
        scores = list(torch.empty(5, *shape, dtype=dtype).unbind(0))
        x = torch.empty(2, *shape[1:], dtype=dtype)
        for rule in ("mean", "median"):
            call = (scores, rule, "", [], 0, 0, x, x, torch.empty(3, 2), torch.empty(2), True)
            yield f"aggregate_update {rule} {short}", lambda call=call: aggregate_update(*call)
        for channels, size, layout in ((256, 8, "NHWC"), (256, 32, "NHWC"), (128, 128, "NHWC"), (256, 32, "NCHW"),
                                       (96, 32, "NHWC"), (128, 128, "NCHW")):  # fmt: skip
            form = torch.channels_last if layout == "NHWC" else torch.contiguous_format
            x = torch.empty(5, channels, size, size, dtype=dtype).to(memory_format=form)
            w, s = torch.empty(5, channels, dtype=dtype), torch.empty(5, channels, dtype=dtype)
            call = (x, 32, w, w, 1e-5, None, s, s, "silu")
            yield f"group_norm {layout} {short} C={channels} {size}x{size}", lambda call=call: group_norm(*call)
        for own, skip, size in ((256, 0, 8), (256, 128, 32), (128, 0, 256)):
            spans = -(-size * size // 128)
            x, y = (torch.empty(5, c, size, size, dtype=dtype).to(memory_format=torch.channels_last) if c else None
                    for c in (own, skip))  # fmt: skip
            before, after = (torch.empty(5, c // 4, spans, 2) if c else None for c in (own, skip))
            w, s = torch.empty(5, own + skip, dtype=dtype), torch.empty(5, own + skip, dtype=dtype)
            norm = Prologue(
                before, w, w, scale=s, shift=s, activation="silu", skip=y, skip_moments=after, norm_groups=32
            )
            yield (
                f"normalise {short} C={own}+{skip} {size}x{size}",
                lambda x=x, norm=norm: normalise(x, norm),
            )
        for length in (512, 768, 20000):
            x, w = torch.empty(10, 3, length, dtype=dtype), torch.empty(5, length, dtype=dtype)
            s = torch.empty(10, length, dtype=dtype)
            call = (x, [length], w, w, 1e-5, None, s, s, "none")
            yield f"layer_norm {short} N={length}", lambda call=call: layer_norm(*call)
        for rows in (1, 16, 64, 512):
            x, w = torch.empty(5 * rows, 512, dtype=dtype), torch.empty(5, 1024, 512, dtype=dtype)
            call = (x, w, torch.empty(5, 1024, dtype=dtype), None, "silu")
            yield f"linear {short} M={rows}", lambda call=call: linear(*call)
        for rows in (1, 4, 8, 16, 256):
            x, sizes = torch.empty(5 * rows, 1024, dtype=dtype), (256, 512, 256) * 14
            weights = [torch.empty(5, size, 1024, dtype=dtype) for size in sizes]
            call = (x, weights, [torch.empty(5, size, dtype=dtype) for size in sizes[1:]], list(range(1, 42)))
            yield f"linear_group {short} M={rows}", lambda call=call: linear_group(*call)
        x = torch.empty(5, 256, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        y, z = torch.empty(5, 256, 1, 1, dtype=dtype), torch.empty(5, 1, 32, 32, dtype=dtype)
        chain = ([Opcode.MULTIPLY, Opcode.ADD, Opcode.SILU, Opcode.TANH, Opcode.GELU], [0, 3, 4, 5, 6], [1, 2, 0, 0, 0])
        yield f"pointwise {short}", lambda call=([x, y, z], *chain, [0.0] * 5): pointwise(*call)
        copy = ([Opcode.COPY], [0], [0], [0.0])
        yield f"pointwise transposed {short}", lambda x=x, copy=copy: pointwise([x], *copy)
        every = list(Opcode)
        call = ([x, y, z], every, list(range(2, 2 + len(every))), [1] * len(every), [0.5] * len(every))
        yield f"pointwise of all {short}", lambda call=call: pointwise(*call)
        yield f"join {short}", lambda x=x: join([x, x], 1, torch.empty_like(torch.cat([x, x], 1)))
        large = torch.empty(5, 256, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
        yield f"join enlarged {short}", lambda x=x, large=large: join([x], 2, large)
        for rows, heads, tokens, width in ((5, 1, 256, 256), (320, 1, 256, 256), (20, 8, 256, 64), (20, 4, 77, 40)):
            if dtype == torch.bfloat16:
                q = torch.empty(rows, tokens, heads, 3 * width, dtype=dtype).movedim(2, 1)
                out = torch.empty(rows, tokens, heads, width, dtype=dtype).movedim(2, 1)
                call = (*q.split(width, 3), 0.1, out)
                yield f"attention {short} R={rows} T={tokens} D={width}", lambda call=call: attention(*call)
        members = torch.arange(5)
        drawn, samples = torch.zeros(3, dtype=torch.int64), torch.arange(10)
        for name, places, steps in (("places", 1024, (1, 1024)), ("channels", 77, (256, 1)), ("odd", 49, (1, 49))):
            bits = torch.empty(10, places, 8, dtype=torch.int32)
            call = ([bits] * 33, drawn, range(33), None, samples, 2, 2**31, [256] * 33, [steps] * 33)
            yield f"draw_bits {name} {short}", lambda call=call: draw_bits(*call)
        x, bits = torch.empty(10, 256, 8, 8, dtype=dtype), torch.empty(5, 8, 8, 8, dtype=torch.int32)
        x = x.to(memory_format=torch.channels_last)
        yield f"apply_bits {short}", lambda x=x, bits=bits: apply_bits(x, bits, 1.25, torch.empty_like(x))
        for channels, size, layout, samples in ((256, 32, "NHWC", None), (256, 9, "NHWC", members),
                                                (256, 32, "NCHW", members), (3, 7, "NCHW", None)):  # fmt: skip
            form = torch.channels_last if layout == "NHWC" else torch.contiguous_format
            x = torch.empty(5, channels, size, size, dtype=dtype).to(memory_format=form)
            call = (x, members, samples, 0.1, 2**40, 3, "silu")
            yield f"dropout {layout} {short} C={channels} {size}x{size}", lambda call=call: dropout(*call)
        masks = (members, members, 0.1, 2**40, 3)
        x = torch.empty(5, 256, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        call = (x, 32, None, None, 1e-5, None, None, None, "silu", *masks)
        yield f"group_norm dropped {short}", lambda call=call: group_norm(*call)
        x = torch.empty(5, 3, 768, dtype=dtype)
        call = (x, [768], None, None, 1e-5, None, None, None, "none", *masks)
        yield f"layer_norm dropped {short}", lambda call=call: layer_norm(*call)
        for rows in (1, 512):
            x, w = torch.empty(5, rows, 512, dtype=dtype), torch.empty(5, 1024, 512, dtype=dtype)
            call = (x, w, torch.empty(5, 1024, dtype=dtype), None, "silu", *masks)
            yield f"linear dropped {short} M={rows}", lambda call=call: linear(*call)
        yield from convolutions(dtype, short)
    double = list(torch.empty(5, *shape, dtype=torch.double).unbind(0))
    for rule in (rules.Mean(), rules.Median(), rules.Geometric()):
        call = (double, rule.name, rule.option, list(rule.values), 0, 0)
        yield f"aggregate {rule.name} f64", lambda call=call: aggregate(*call)
    x = torch.empty(10, 64, 16, 16, dtype=torch.double)
    yield "group_norm f64", lambda: group_norm(x, 32)
    yield "layer_norm f64", lambda: layer_norm(x, [16])
    every = list(Opcode)
    chain = ([x], every, list(range(len(every))), [0] * len(every), [0.1] * len(every))
    yield "pointwise f64", lambda: pointwise(*chain)
    codes = [*BINARY, *NUMBERED, Opcode.SQRT, Opcode.SQUARE]
    arithmetic = ([torch.empty(shape)] * 2, codes, list(range(1, 1 + len(codes))), [0] * len(codes), [0.1] * len(codes))
    yield "pointwise arithmetic", lambda: pointwise(*arithmetic)
    yield "dropout f64", lambda: dropout(x, torch.arange(10), None, 0.5, 1, 0, "gelu")
    for dtype, short in ((torch.float32, "f32 in full precision"), (torch.double, "f64")):
        weight = torch.empty(5, 48, 3, 3, 64, dtype=dtype).movedim(4, 2)
        call = (x.to(dtype), weight, None, (1, 1), (1, 1))
        yield f"conv2d {short}", lambda call=call: in_full_precision(ConvBlock.of(*call, num_groups=12))
    numbers = (torch.tensor(1), torch.tensor(2), torch.arange(4))
    yield "normal", lambda: normal(*numbers, shape[1:])
    state, row = torch.empty(shape), torch.empty(5)
    for dtype, short in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        call = (state, state.to(dtype), None, row, "clipped", -1.0, 1.0, *numbers)
        yield f"sampler_step {short}", lambda call=call: sampler_step(*call)
    yield "linear f64", lambda: linear(x, torch.empty(5, 24, 16, dtype=torch.double), None, None, "gelu")


def in_full_precision(block):
    """A convolution without TF32, which torch allows in convolutions by default."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        conv2d(block)


def convolutions(dtype, short):
    """Convolutions of a score network, as a residual block has them, plain, and as its ends have them."""

    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    for batch, channels, size, stride in (
        (1, 256, 32, 1),
        (16, 256, 8, 1),
        (64, 512, 32, 1),
        (2, 256, 16, 2),
        (1, 128, 256, 1),
    ):
        x = empty(5 * batch, channels, size, size).to(memory_format=torch.channels_last)
        weight = empty(5, channels, 3, 3, channels).movedim(4, 2)
        out = size // stride
        spans = -(-size * size // 128)
        own = empty(5 * batch, channels)
        affine = empty(5, channels)
        norm = {
            "moments": torch.empty(5 * batch, 32, spans, 2), "norm_weight": affine, "norm_bias": affine,
            "scale": own, "shift": own, "activation": "silu",
        }  # fmt: skip
        residual = empty(5 * batch, channels, out, out).to(memory_format=torch.channels_last)
        bias, row_bias = empty(5, channels), empty(5 * batch, channels)
        plain = ConvBlock.of(x, weight, bias, (stride, stride), (1, 1))
        behind = {"row_bias": row_bias, "residual": residual, "output_scale": 0.7, "num_groups": 32}
        name = f"{short} C={channels} {size}x{size}/{stride} B={batch}"
        block = plain.replace(**norm, **behind)
        yield f"conv2d block {name}", lambda block=block: conv2d(block)
        for tiling in ("auto", "wide", "narrow"):
            yield f"conv2d {tiling} {name}", lambda block=plain, tiling=tiling: conv2d(block, tiling)
    for batch, size, (own, beyond) in ((1, 8, (256, 128)), (16, 32, (256, 256))):
        x, skip = (empty(5 * batch, c, size, size).to(memory_format=torch.channels_last) for c in (own, beyond))
        weight = empty(5, 256, 3, 3, own + beyond).movedim(4, 2)
        moments, skip_moments = (torch.empty(5 * batch, c // 4, -(-size * size // 128), 2) for c in (own, beyond))
        affine = empty(5, own + beyond)
        block = ConvBlock.of(
            x, weight, empty(5, 256), padding=(1, 1), moments=moments, norm_weight=affine, norm_bias=affine,
            activation="silu", row_bias=empty(5 * batch, 256), num_groups=32, skip=skip, skip_moments=skip_moments,
            norm_groups=32,
        )  # fmt: skip
        yield f"conv2d skip {short} {size}x{size} B={batch}", lambda block=block: conv2d(block)
    ones = empty(1, 1, 1, 1)  # all sizes that are compiled as constants because they are 1
    block = ConvBlock.of(
        ones, empty(1, 1, 2, 1, 1), moments=torch.empty(1, 1, 1, 2), norm_weight=empty(1, 2), activation="silu",
        num_groups=1, skip=ones, skip_moments=torch.empty(1, 1, 1, 2), norm_groups=1,
    )  # fmt: skip
    yield f"conv2d of ones {short}", lambda block=block: conv2d(block)
    x, weight = empty(5, 256, 32, 32).to(memory_format=torch.channels_last), empty(5, 256, 3, 3, 256).movedim(4, 2)
    mask = torch.zeros(5, 32, 32, 8, dtype=torch.int32)
    yield (
        f"conv2d masked {short}",
        lambda x=x, weight=weight: conv2d(ConvBlock.of(x, weight, padding=(1, 1), mask=mask, mask_scale=1.25)),
    )
    x, weight = empty(4, 3, 32, 32), empty(5, 256, 3, 3, 3)
    yield (
        f"conv2d first {short}",
        lambda: conv2d(ConvBlock.of(x, weight, empty(5, 256), padding=(1, 1), num_groups=32, shared=True)),
    )
    for batch in (1, 64):
        x, weight = empty(5 * batch, 256, 32, 32), empty(5, 3, 3, 3, 256).movedim(4, 2)
        block = ConvBlock.of(
            x, weight, empty(5, 3), padding=(1, 1), moments=torch.empty(5 * batch, 32, 8, 2),
            norm_weight=empty(5, 256), norm_bias=empty(5, 256), activation="silu",
        )  # fmt: skip
        yield f"conv2d_sum {short} B={batch}", lambda block=block: conv2d_sum(block, [0.2] * 5)
    yield from descriptors(empty, short)
    point, mixing = empty(20, 384, 16, 16), empty(5, 256, 384, 1, 1)
    yield f"conv2d 1x1 {short}", lambda: conv2d(ConvBlock(point, mixing, empty(5, 256)))


def descriptors(empty, short):
    """Convolutions whose loads are tensor descriptors, with all that is behind one, and the pass before them."""
    for batch, size, taps, stride in ((1, 32, 3, 1), (16, 8, 3, 1), (2, 16, 3, 2), (16, 16, 1, 1)):
        x = empty(5 * batch, 256, size, size).to(memory_format=torch.channels_last)
        weight, out = empty(5, 256, taps, taps, 256).movedim(4, 2), size // stride
        residual = empty(5 * batch, 256, out, out).to(memory_format=torch.channels_last)
        block = ConvBlock.of(
            x, weight, empty(5, 256), (stride,) * 2, (taps // 2,) * 2, row_bias=empty(5 * batch, 256),
            residual=residual, output_scale=0.7, output_activation="silu", num_groups=32,
        )  # fmt: skip
        for tiling in TILINGS:
            if tiling == "tma 128x256" and (x.element_size() == 4 or size // stride == 8):
                continue  # refused: more sums than there are registers
            name = f"{tiling} {short} {taps}x{taps} {size}x{size}/{stride}"
            yield name, lambda block=block, tiling=tiling: conv2d_tma(block, tiling)
        if (size, taps, stride, short) == (32, 3, 1, "bf16"):
            yield f"halo {short} 3x3 32x32/1", lambda block=block: conv2d_halo(block)


SAMPLE = {  # every kernel once, the more demanding ones twice
    "aggregate mean f32 K=5",
    "aggregate median bf16 K=33",
    "aggregate geometric bf16 K=8",
    "aggregate_update mean bf16",
    "group_norm NHWC bf16 C=128 128x128",
    "group_norm NCHW f32 C=256 32x32",
    "normalise bf16 C=256+128 32x32",
    "normalise f32 C=128+0 256x256",
    "layer_norm bf16 N=768",
    "linear f32 M=16",
    "linear bf16 M=512",
    "linear f64",
    "linear_group bf16 M=1",
    "linear_group bf16 M=4",
    "linear_group bf16 M=256",
    "linear_group f32 M=16",
    "pointwise bf16",
    "join bf16",
    "attention bf16 R=5 T=256 D=256",
    "attention bf16 R=320 T=256 D=256",
    "pointwise of all f32",
    "pointwise arithmetic",
    "draw_bits places bf16",
    "draw_bits odd f32",
    "apply_bits bf16",
    "dropout NHWC bf16 C=256 32x32",
    "group_norm dropped bf16",
    "linear dropped bf16 M=512",
    "conv2d block bf16 C=256 8x8/1 B=16",
    "conv2d block bf16 C=128 256x256/1 B=1",
    "conv2d auto bf16 C=256 16x16/2 B=2",
    "conv2d_sum bf16 B=1",
    "normal",
    "sampler_step bf16",
    "tma 128x128 bf16 3x3 32x32/1",
    "tma 128x256 bf16 3x3 32x32/1",
    "tma 128x128 f32 3x3 16x16/2",
    "halo bf16 3x3 32x32/1",
    "conv2d skip bf16 8x8 B=1",
    "conv2d masked bf16",
}


def main(capability, sample):
    rows = []
    with compiling(capability) as compiled:
        for name, launch in launches():
            if (sample and name not in SAMPLE) or (re.search("^tma| wide ", name) and capability < 90):
                continue
            if name.startswith("halo") and capability != 90:
                continue  # of the products of 9.0 alone
            compiled.clear()
            launch()
            rows += [{"launch": name, "kernel": kernel, **resources(binary)} for kernel, _, _, binary in compiled]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["sample"])

"""Small launches as the compiler makes them for sm_90a, emulated, against the reference: prints each error as JSON.

A process of its own, without TRITON_INTERPRET: ``python -m tests.kernels.emulated [NAME...] [--without NAME REGEX]...``
runs the launches of these names, by default all, and those whose PTX lacks what a regular expression finds.
"""

import argparse
import json
import re
from unittest import mock

import torch

from fastens import rules
from fastens.kernels import _attention, aggregate, conv2d_sum, group_norm, linear, linear_group
from fastens.ops._block_ways import CHOICE
from fastens.ops._tma_ways import Call
from fastens.program.block import ConvBlock, Epilogue
from fastens.reference import aggregate as aggregate_reference
from fastens.reference import conv2d_sum as sum_reference
from fastens.reference import group_norm as norm_reference
from fastens.reference import linear as linear_reference
from fastens.reference.group_moments import group_moments
from tests.kernels.ptx import emulating

K, BF16 = 2, torch.bfloat16


def normal(*shape, dtype=BF16):
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def block(rows, channels, outputs, size, taps=3, skip=0, stride=1, norm=True, dtype=BF16, **more):
    """The arguments of a convolution's ways, small."""
    x, second = normal(rows, channels, size, size, dtype=dtype), normal(rows, skip, size, size, dtype=dtype)
    both, out = channels + skip, size // stride
    weight = (torch.randn(K, outputs, taps, taps, both) / (taps * both**0.5)).to(dtype).movedim(-1, 2)
    groups = 8
    moments, skip_moments = (group_moments(t.float(), groups) if norm and t.shape[1] else None for t in (x, second))
    affine = [normal(K, both, dtype=dtype) if norm else None for _ in range(2)]
    block = ConvBlock.of(
        x, weight, normal(K, outputs, dtype=dtype), (stride,) * 2, (taps // 2,) * 2, moments=moments,
        norm_weight=affine[0], norm_bias=affine[1], activation="silu" if norm else "none",
        row_bias=normal(rows, outputs, dtype=dtype), residual=normal(rows, outputs, out, out, dtype=dtype),
        output_scale=0.7, num_groups=8, skip=second if skip else None, skip_moments=skip_moments,
        norm_groups=groups if skip and norm else 0,
    )  # fmt: skip
    return Call(block, (out,) * 2)


BLOCKS = {
    "8x8": lambda: block(2, 64, 64, 8),
    "several images": lambda: block(6, 64, 64, 8),
    "16x16": lambda: block(2, 64, 128, 16),
    "narrow channels": lambda: block(2, 32, 64, 8),
    "two images": lambda: block(2, 64, 64, 8, skip=64),
    "half the size": lambda: block(2, 64, 64, 8, stride=2, norm=False),
    "1x1": lambda: block(2, 64, 96, 8, taps=1, norm=False),
    "256 outputs": lambda: block(2, 64, 256, 16, norm=False),
    "lines of 16": lambda: block(2, 96, 128, 16),
    "lines of 32": lambda: block(2, 32, 128, 32),
    "lines of 64": lambda: block(2, 64, 256, 64, norm=False),
    "two images of lines": lambda: block(4, 64, 128, 16, skip=64),
    "long sums": lambda: block(2, 512, 16, 4),
    "tf32": lambda: block(2, 32, 64, 8, dtype=torch.float32),
}


def launches():
    """What runs: name -> a call that returns a result and what it should be."""
    for name, make in BLOCKS.items():
        for way in (
            "triton",
            "triton narrow",
            "triton wide",
            "triton apart",
            "tma 64x128",
            "tma 128x128",
            "tma 128x256",
            "halo 256x128",
        ):
            yield f"{way}: {name}", lambda make=make, way=way: of_block(make(), way)
    yield "sum of members", of_sum
    yield "attention", of_attention
    yield "linear", of_linear
    yield "linear group", of_linear_group
    yield "group norm", of_norm
    yield "aggregate", of_aggregate


def of_block(c, way):
    if CHOICE.ways[way].refuses(*c) is not None:
        return None
    found = torch.full((c.block.x.shape[0], 8, -(-c.size[0] * c.size[1] // 128), 2), torch.nan)
    y = CHOICE.ways[way].run(*c._replace(moments=found))
    return [(y, CHOICE.ways["library"].run(in_double(c.block), c.size)), (found, group_moments(y.float(), 8))]


def in_double(block):
    return ConvBlock.from_flat([t.double() if isinstance(t, torch.Tensor) else t for t in block.flat()])


def doubled(*tensors):
    return [None if x is None else x.double() for x in tensors]


def of_sum():
    own = block(4, 64, 3, 8).block._replace(epilogue=Epilogue())
    y = conv2d_sum.conv2d_sum(own, [0.25, 0.75])
    return [(y, sum_reference.conv2d_sum(in_double(own), [0.25, 0.75]))]


def of_attention():
    q, k, v = (torch.randn(2, 2, 96, 64).to(BF16) for _ in "qkv")
    into = torch.full_like(q, torch.nan)
    with mock.patch("fastens.device.MULTIPROCESSORS", 1):  # tiles of 64 queries
        _attention.attention(q, k, v, 0.125, into)
    return [(into, torch.nn.functional.scaled_dot_product_attention(*doubled(q, k, v), scale=0.125))]


def of_linear():
    x, weight, bias = torch.randn(K * 70, 96).to(BF16), (torch.randn(K, 80, 96) / 10).to(BF16), normal(K, 80)
    return [(linear.linear(x, weight, bias), linear_reference.linear(*doubled(x, weight, bias)))]


def of_linear_group():
    x = torch.randn(K * 2, 96).to(BF16)
    weights = [(torch.randn(K, n, 96) / 10).to(BF16) for n in (64, 40)]
    biases = [normal(K, 64), normal(K, 40)]
    ys = linear_group.linear_group(x, weights, biases, [0, 1])
    return [(y, linear_reference.linear(*doubled(x, *w))) for y, *w in zip(ys, weights, biases, strict=True)]


def of_norm():
    x, w, b = normal(4, 64, 16, 16), normal(K, 64), normal(K, 64)
    y = group_norm.group_norm(x, 8, w, b, 1e-5, None, None, None, "silu")
    return [(y, norm_reference.group_norm(*doubled(x), 8, *doubled(w, b), 1e-5, None, None, None, "silu"))]


def of_aggregate():
    scores = list(torch.randn(5, 3, 3, 8, 8).unbind(0))
    pairs = []
    for rule in (rules.Mean(), rules.Median(), rules.MaxAbs()):
        y = aggregate.aggregate(scores, rule.name, rule.option, list(rule.values), 0, 0)
        pairs.append((y, aggregate_reference.aggregate(scores, rule)))
    return pairs


def difference(actual, expected):
    """The largest difference beside the largest number; NaN where either has one."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def main(names, without):
    for name, run in launches():
        for removed in [None] * (name in names or not (names or without)) + [x for of, x in without if of == name]:
            for loads, reverse in (("early", False), ("late", True)):
                found = result(run, loads, reverse, removed or r"(?!)")
                if found is not None:
                    print(json.dumps({"launch": name, "removed": removed, "loads": loads, **found}), flush=True)


def result(run, loads, reverse, removed):
    """The errors of a launch and in how many splits it ran, or why it did not; nothing if its way refuses it."""
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        with torch.no_grad(), emulating(loads, reverse, lambda ptx: re.sub(removed, "", ptx)) as compiled:
            pairs = run()
    except (IndexError, RuntimeError) as error:
        return {"error": str(error)}
    splits = max((constants.get("SPLITS", 1) for _, _, constants, _ in compiled), default=1)
    return None if pairs is None else {"splits": splits, "errors": [difference(*pair) for pair in pairs]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--without", nargs=2, action="append", default=[], metavar=("NAME", "REGEX"))
    options = parser.parse_args()
    main(options.names, options.without)

"""The machine code of every way of each convolution of a network's plan: ``python -m bench.gpu_ways NETWORK BATCH...``.

It prints a line of JSON per kernel and way. ``--dtype float32`` is with TF32 products; ``--sample N`` takes every Nth.
What was read of a kernel is kept by its hash in ``build/gpu-code``, beside Triton's own cache, and is not read again.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from bench.gpu_code import Code, Loop, compiling, read
from bench.gpu_launches import K, convolutions
from fastens.ops import _sum_ways
from fastens.ops._block_ways import CHOICE
from fastens.program.block import Epilogue

KEPT = Path("build/gpu-code")
MEAN = [1 / K] * K


def launched(conv, batch, dtype):
    """What runs a convolution in each way that takes it: name -> a call."""
    call = conv.call(batch, dtype)
    if conv.shared:
        from fastens.kernels.conv2d import conv2d

        return {"triton": lambda: conv2d(call.block.replace(shared=True))}
    calls = {}
    for name, way in CHOICE.ways.items():
        if name != "library" and way.refuses(*call) is None:
            calls[name] = lambda way=way: way.run(*call)
    if conv.summed:
        summed, ways = (call.block._replace(epilogue=Epilogue()), MEAN), _sum_ways.CHOICE.ways.items()
        calls = {f"sum {name}": lambda way=way: way.run(*summed) for name, way in ways if way.refuses(*summed) is None}
    return calls


def codes(conv, batch, dtype, ways=None):
    """The kernels of each way: name -> their :class:`Code`, in the order of their launches."""
    found = {}
    with torch.backends.cudnn.flags(allow_tf32=True), compiling() as compiled:
        for name, call in launched(conv, batch, dtype).items():
            if ways is None or name in ways:
                compiled.clear()
                call()
                found[name] = [kept(*each) for each in compiled]
    return found


def kept(kernel, grid, constants, binary):
    """As :func:`bench.gpu_code.read`, once per kernel."""
    file = KEPT / f"{binary.hash}.json"
    if file.exists():
        content = json.loads(file.read_text())
    else:
        content = dataclasses.asdict(read(kernel, grid, constants, binary))
        KEPT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    content["loops"] = tuple(
        Loop(
            loop["instructions"], loop["operations"], tuple(map(tuple, loop["products"])),
            tuple(loop["waits"]), tuple(loop["load_waits"]),
        )
        for loop in content["loops"]
    )  # fmt: skip
    widths = {name: {int(k): v for k, v in content[name].items()} for name in ("stores", "loads")}
    return dataclasses.replace(Code(**content | widths), grid=grid, constants=constants)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("batch", type=int, nargs="+")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--ways", nargs="+")
    options = parser.parse_args()
    for batch in options.batch:
        for conv in list(convolutions(options.network))[:: options.sample]:
            for way, kernels in codes(conv, batch, getattr(torch, options.dtype), options.ways).items():
                for code in kernels:
                    row = {"batch": batch, "convolution": str(conv), "outputs": conv.outputs, "way": way}
                    more = {name: getattr(code, name) for name in ("blocks", "in_flight", "of_warp_groups")}
                    print(json.dumps({**row, **dataclasses.asdict(code), **more}), flush=True)


if __name__ == "__main__":
    main()

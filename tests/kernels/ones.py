"""Compile every Triton kernel with all its integer arguments 1, which Triton hands over as constants.

A process of its own: ``python -m tests.kernels.ones 90``, without TRITON_INTERPRET. Prints, as JSON, the kernels that
were compiled and what the compiler says of those that were not.
"""

import json
import sys
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from bench.gpu_code import compiling
from tests.kernels.ahead_of_time import SAMPLE, launches


def main(capability):
    compiled, errors = set(), {}
    with compiling(capability):
        compile_only = JITFunction.run

        def of_ones(self, *arguments, **options):
            name = self.fn.__name__
            ones = [1 if type(x) is int else x for x in arguments]
            types = [x.dtype if isinstance(x, torch.Tensor) else x for x in ones]
            kind = name, str(types), str(sorted(options.items()))
            if kind not in compiled:
                compiled.add(kind)
                try:
                    compile_only(self, *ones, **options)
                except Exception as error:
                    errors[name] = str(error)

        with mock.patch.object(JITFunction, "run", of_ones):
            for name, launch in launches():
                if name in SAMPLE:
                    launch()
    json.dump({"compiled": sorted({name for name, _, _ in compiled}), "errors": errors}, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))

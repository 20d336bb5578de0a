"""Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before triton is imported."""

from tests import interpreter

interpreter.choose()

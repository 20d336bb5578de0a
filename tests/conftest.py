"""Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before triton is imported."""

import importlib.metadata
import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _read_loop_bounds():
    """Triton 3.6's interpreter takes int() of arrays of one element, which NumPy 2.4 refuses; as Triton 3.7 does it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.6."):
    _read_loop_bounds()

"""Settings of the whole process, which a test has to leave as it found them: the next one would run under them."""

import os

import numpy as np
import torch
from torch.nn.modules import module

import fastens

# Of calls; those of registrations torch sets itself, when a part of it is imported.
HOOKS_OF_ALL = [name for name in vars(module) if name.startswith(("_global_forward", "_global_backward"))]


def settings():
    """What holds in the process now, by name."""
    return {
        "torch's deterministic mode": torch.get_deterministic_debug_mode(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        "precision of float32 products": torch.get_float32_matmul_precision(),
        "attention's kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "mkldnn": torch.backends.mkldnn.enabled,
        "modes of functions and operations": (
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        ),
        "hooks of all modules": [len(vars(module)[name]) for name in HOOKS_OF_ALL],
        "NumPy's errors": np.geterr(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("FASTENS_", "OMP_"))},
        "fastens's deterministic mode": fastens.reproducible.enabled(),
        "working folder": os.getcwd(),
    }
